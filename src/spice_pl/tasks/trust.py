"""Check without labels how far the clusters of a run can be trusted; write one page.

Shapes: N images, n of them sampled, H heads, K clusters, D features, d principal components.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.models.portable import FILE_NAME as MODEL
from spice_pl.models.portable import load
from spice_pl.nn.frozen import Frozen
from spice_pl.nn.heads import ParallelHeads
from spice_pl.nn.weights import load_strictly
from spice_pl.reports.trust_page import (
    NAMES,
    Check,
    NullCheck,
    TrustData,
    record,
    write_trust,
)
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.base import Context, sample

logger = logging.getLogger(__name__)

COMPONENTS = 32  # d, at most
VIEW_BATCH = 250  # images that pass the encoder at once


class Trust:
    """Write trust.html and metrics.json about the upstream run.

    Args:
        weak: view of an image that should not change its cluster.
        runs: folders of runs of the same stage with other seeds; may be empty.
        num_samples: n, images that the slower checks use.
        num_nulls: number of clouds without groups in the null check.
        allow_targets: names of your own packages that define the run's network.
    """

    def __init__(
        self,
        weak: View,
        runs: Sequence[str] = (),
        num_samples: int = 2000,
        num_nulls: int = 9,
        allow_targets: Sequence[str] = (),
    ) -> None:
        if num_nulls < 2:
            raise UsageError(
                f"trust.task.num_nulls {num_nulls} is too few to compare with; use at least 2"
            )
        if isinstance(runs, str):
            raise UsageError(f"trust.runs={runs} is not a list; write trust.runs=[{runs}]")
        self.weak, self.runs, self.allow_targets = weak, runs, allow_targets
        self.num_samples, self.num_nulls = num_samples, num_nulls

    def __call__(self, context: Context) -> Mapping[str, Any]:
        """Take the measures, write the page, return the numbers."""
        for run in self.runs:
            if not Path(run, "clusters.csv").is_file():
                raise UsageError(
                    f"trust.runs holds {run}, which is not the folder of a run with clusters; give "
                    "runs/<dataset>/<stage>/<run>"
                )
        folder, images = context.upstream[0], context.images()
        table, seed = folder.read_clusters(), context.seed
        chosen = sample(len(images), self.num_samples, seed)
        values: dict[str, float | None] = {
            "heads": self._heads(context.upstream),
            "seeds": seeds_agreement([folder, *map(RunFolder, map(Path, self.runs))]),
            "consistency": float(table.agreement.mean()),
            "views": self._views(folder, images, chosen, seed),
            "separation": separation(folder.features[chosen], table.clusters[chosen]),
            "sure": 1 - float(table.not_sure.mean()),
        }
        null = null_check(
            folder.features[chosen],
            context.num_clusters,
            self.num_nulls,
            seed,
            table.clusters[chosen],
        )
        checks = [Check(name, value) for name, value in values.items()]
        data = TrustData(
            title=f"{images.name}: how far can these clusters be trusted?",
            run=f"{folder.path.parent.name}/{folder.path.name}",
            num_images=len(images),
            num_sampled=len(chosen),
            num_clusters=context.num_clusters,
            checks=checks,
            null=null,
            record=record(),
            chance=chance(table.clusters),
        )
        write_trust(data, context.folder.path / "trust.html")
        logger.info("%s", data.verdict)
        logger.info("%s", data.summary)
        for check in checks:
            if found := data.judged(check):
                line = (NAMES[check.name], check.value, found.level, found.advice)
                logger.info("  %-25s %.2f  %-8s  %s", *line)
        return {
            "reviewed": data.run,
            "verdict": data.verdict,
            "summary": data.summary,
            "judged": {each.name: found.level for each in checks if (found := data.judged(each))},
            "measures": values,
            "null": {
                "real": null.real,
                "nulls": list(null.nulls),
                "clear": null.clear,
                "own": null.own,
            },
        }

    def _heads(self, upstream: Sequence[RunFolder]) -> float | None:
        """Return the mean agreement of stage 2's heads; None where there are not several."""
        run = next((each for each in upstream if (each.path / "heads.safetensors").is_file()), None)
        if run is None:
            return None
        state = run.read_weights("heads.safetensors")
        num_heads, hidden_dim, feature_dim = state["hidden_weight"].shape
        heads = ParallelHeads(feature_dim, hidden_dim, state["output_bias"].shape[1], num_heads)
        load_strictly(heads, state, str(run.path / "heads.safetensors"))
        if num_heads < 2:
            return None
        features = torch.from_numpy(np.array(run.features))
        with torch.no_grad():
            found = [heads.head(h)(features).argmax(dim=1) for h in range(num_heads)]
        return matched_agreement(found)

    @torch.no_grad()
    def _views(
        self,
        folder: RunFolder,
        images: ImageSet,
        chosen: NDArray[np.intp],
        seed: int,
    ) -> float | None:
        """Return the share of images whose weak view the network puts into the same cluster.

        Both are the network's clusters. Those of the run may be of another clustering (`answer`).
        The network is that of the run's model.spice, whatever the settings of this job name. A run
        with a head of your own has none.
        """
        file = folder.checked(MODEL)
        if not file.is_file():
            return None
        network = load(file, device="cpu", allow_targets=self.allow_targets).network
        encode, head = Frozen(network.encoder), network.head
        same = 0
        for index in torch.split(torch.from_numpy(chosen), VIEW_BATCH):
            pixels = torch.from_numpy(images.images[index.numpy()])
            uniforms = keyed_uniform(seed, 0, index, 0, self.weak.num_uniforms)
            weak = head(encode(self.weak(pixels, uniforms)).float()).argmax(dim=1)
            own = head(torch.from_numpy(np.array(folder.features[index.numpy()]))).argmax(dim=1)
            same += int((weak == own).sum())
        return same / len(chosen)


def matched_agreement(found: Sequence[Tensor]) -> float:
    """Return the share of images on which two clusterings agree, as a mean over all pairs.

    The clusters of a pair are matched one to one, so their numbers do not matter.
    """
    pairs = [clustering_scores(one, other)["acc"] for one, other in combinations(found, 2)]
    return float(np.mean(pairs))


def chance(clusters: NDArray[np.int64]) -> float:
    """Return the share of pairs of images in one cluster, Σ p², of clusters (N,)."""
    shares = np.bincount(clusters) / len(clusters)
    return float((shares**2).sum())


def seeds_agreement(runs: Sequence[RunFolder]) -> float | None:
    """Return `matched_agreement` of runs on the same images; None for a single run.

    Raises:
        UsageError: the runs are on different images.
    """
    if len(runs) < 2:
        return None
    tables = [run.read_clusters() for run in runs]
    for run, table in zip(runs, tables, strict=True):
        if table.keys != tables[0].keys:
            raise UsageError(
                f"trust.runs: {run.path} is of other images than {runs[0].path}; give runs on the "
                "same images"
            )
    return matched_agreement([torch.from_numpy(table.clusters) for table in tables])


def separation(features: NDArray[np.float32], clusters: NDArray[np.int64]) -> float | None:
    """Return the mean silhouette by cosine (Rousseeuw 1987), in [-1, 1]; None for one cluster."""
    if not 2 <= len(np.unique(clusters)) < len(clusters):
        return None
    return float(silhouette_score(features, clusters, metric="cosine"))


def null_check(
    features: NDArray[np.float32],
    num_clusters: int,
    num_nulls: int,
    seed: int,
    clusters: NDArray[np.int64] | None = None,
) -> NullCheck:
    """Compare k-means on the features with k-means on clouds of points that have no groups.

    Like the gap statistic (Tibshirani et al. 2001, reference distribution b) along the principal
    components. Every second cloud shuffles each component over the images: this keeps the values
    of each component and removes the dependence between components. The others draw each component
    from a Gaussian of the same variance: this keeps the shape of the whole and has no groups.

    Args:
        features: (n, D).
        num_clusters: K.
        num_nulls: number of clouds.
        seed: seed of the clouds and of k-means.
        clusters: (n,) clusters of the run.

    Returns:
        The mean silhouettes of k-means with K clusters, of the features and of each cloud; and of
        the run's clusters on the same features.
    """
    rows = F.normalize(torch.from_numpy(np.array(features, dtype=np.float64))).numpy()
    rows = rows - rows.mean(axis=0)
    _, scale, axes = np.linalg.svd(rows, full_matrices=False)
    kept = min(COMPONENTS, int((scale > 1e-9 * max(scale[0], 1e-300)).sum()))
    scores = rows @ axes[:kept].T  # (n, d)
    generator = np.random.default_rng(seed)

    def score(points: NDArray[np.float64]) -> float:
        if len(np.unique(points, axis=0)) <= num_clusters:
            return 0.0
        found = KMeans(num_clusters, n_init=3, random_state=seed).fit_predict(points)
        return float(silhouette_score(points, found))

    spread = scores.std(axis=0)
    nulls = [
        score(
            generator.permuted(scores, axis=0)
            if cloud % 2
            else generator.normal(size=scores.shape) * spread
        )
        for cloud in range(num_nulls)
    ]
    own = None
    if kept and clusters is not None and 2 <= len(np.unique(clusters)) < len(clusters):
        own = float(silhouette_score(scores, clusters))
    return NullCheck(score(scores) if kept else 0.0, tuple(nulls), own)
