"""Score the heads of stage 2 without labels, so that one of them can be chosen.

Niu et al. 2022 (SPICE), Section III-B, Remark.

Shapes: N images, H heads, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spice_pl.functional.device import cluster_sizes
from spice_pl.functional.losses import double_softmax_cross_entropy, mutual_information
from spice_pl.nn.heads import ParallelHeads


@dataclass(frozen=True)
class HeadScores:
    """Scores of every head on the plain views of all training images.

    Attributes:
        losses: (H,) Eq. 5 on the head's own pseudo-labels, in nats; low is good.
        information: (H,) between images and clusters, in nats; high is good.
        num_empty: (H,) clusters without an image.
    """

    losses: Tensor
    information: Tensor
    num_empty: Tensor


@torch.no_grad()
def score_heads(
    heads: ParallelHeads,
    features: Tensor,
    embeddings: Tensor,
    prototype_pseudo_labels: Callable[..., tuple[Tensor, Tensor]],
    shares: Tensor | None,
) -> HeadScores:
    """Score the heads one at a time, so that probabilities take (N, K) and not (H, N, K).

    Args:
        heads: H heads.
        features: (N, D) that the heads read.
        embeddings: (N, D) that prototypes are made of.
        prototype_pseudo_labels: the function of that name with its settings, Eqs. 2-4.
        shares: (H, K) shares of the clusters; None for equal ones.
    """
    losses, information, num_empty = [], [], []
    shares = None if shares is None else shares.cpu()  # once; they say how many slots there are
    for head in range(heads.num_heads):
        probs = heads.head(head)(features)  # (N, K)
        own = None if shares is None else shares[head]
        slots, label = prototype_pseudo_labels(embeddings, probs, shares=own)
        # Clusters of unequal shares count alike, or a head could win by emptying clusters.
        losses.append(double_softmax_cross_entropy(probs[slots], label, balanced=own is not None))
        information.append(mutual_information(probs))
        sizes = cluster_sizes(probs.argmax(dim=1), probs.shape[1])  # (K,)
        num_empty.append((sizes == 0).sum())
    return HeadScores(*(torch.stack(each) for each in (losses, information, num_empty)))
