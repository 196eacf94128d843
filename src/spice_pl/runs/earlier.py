"""Keep the clusters of the stage before where a stage that learned from them made them worse.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from spice_pl.functional.assignment import count_table, match_clusters
from spice_pl.functional.candidates import cluster_scores
from spice_pl.functional.embeddings import nearest_others
from spice_pl.runs.answer import Answer, neighbors_for
from spice_pl.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def better_of(answer: Answer, probs: Tensor, stage: str, upstream: RunFolder) -> Answer:
    """Return the answer of a stage, or that of its upstream if that scores higher.

    Both are scored without labels (`functional.candidates.cluster_scores`) on the features of the
    upstream. Those of the stage itself were trained to agree with its own clusters, and would find
    them better whatever they are.

    Args:
        answer: clusters of the stage.
        probs: (N, K), of the network of the stage, which clusters are numbered by.
        stage: name of the stage, for the log.
        upstream: run with clusters that the stage learned from.
    """
    num_clusters = probs.shape[1]
    earlier = torch.from_numpy(np.array(upstream.answer))  # (N, K)
    scores = _scores(answer.probs, stage, upstream)
    (before, old), (now, new) = scores.items()
    kept = before if old > new else now
    logger.info(
        "clusters of %s are kept: without labels, on the features of %s, %s scores %.3f and %s "
        "%.3f",
        *(kept, before, before, old, now, new),
    )
    if kept == now:
        return answer
    number = match_clusters(  # of each earlier cluster among those of the network
        count_table(earlier.argmax(dim=1), probs.argmax(dim=1), num_clusters, num_clusters)
    )
    renumbered = torch.empty_like(earlier)
    renumbered[:, number] = earlier
    return Answer(before, scores, renumbered)


def warn_if_worse(probs: Tensor, stage: str, upstream: RunFolder) -> None:
    """Warn where the clusters of the upstream score higher than those of a stage's network.

    For `answer=network`, which keeps the network's clusters all the same.

    Args:
        probs: (N, K), of the network of the stage.
        stage: name of the stage, for the log.
        upstream: run with clusters that the stage learned from.
    """
    (before, old), (now, new) = _scores(probs, stage, upstream).items()
    if old > new:
        logger.warning(
            "without labels, on the features of %s, its clusters score %.3f and those of %s %.3f: "
            "the stage may have made them worse. Its network's clusters are kept, as "
            "answer=network says; answer=auto keeps the better ones. A lower %s.module.lr changes "
            "them less",
            *(before, old, now, new, stage),
        )


def _scores(probs: Tensor, stage: str, upstream: RunFolder) -> dict[str, float]:
    """Return the label-free scores of an upstream's clusters and of a stage's, in this order."""
    found = {
        f"stage={upstream.path.parent.name}": torch.from_numpy(np.array(upstream.answer)),
        f"stage={stage}": probs,
    }
    features = torch.from_numpy(np.array(upstream.features))
    others = nearest_others(features, neighbors_for(len(features), probs.shape[1]))
    candidates = torch.stack([each.argmax(dim=1) for each in found.values()])
    values = cluster_scores(features, others, candidates).tolist()
    return dict(zip(found, values, strict=True))
