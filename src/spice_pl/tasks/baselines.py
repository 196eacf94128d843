"""Cluster pixels and features with the classical methods of the papers' tables.

Shapes: N images, n of them fitted, D dimensions, K clusters.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, SpectralClustering
from sklearn.decomposition import NMF, PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from spice_pl.errors import UsageError
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.reports.tables import results_markdown
from spice_pl.runs.results import score_row
from spice_pl.tasks.base import Context, sample

logger = logging.getLogger(__name__)

TITLES = {
    "kmeans": "k-means",
    "spectral": "Spectral",
    "agglomerative": "Agglomerative (Ward)",
    "nmf": "NMF",
    "gaussian_mixture": "Gaussian mixture",
}


@dataclass(frozen=True)
class Baselines:
    """Cluster pixels and features with every method; write table.md.

    Attributes:
        methods: names in `TITLES`.
        max_samples: largest number of images that spectral and agglomerative clustering are fitted
            on; every other image takes the cluster of its nearest fitted one, and the row says so.
        num_components: largest number of principal components that a Gaussian mixture sees.
    """

    methods: Sequence[str]
    max_samples: int = 5000
    num_components: int = 64

    def __call__(self, context: Context) -> Mapping[str, Any]:
        """Cluster, score and write the table.

        Raises:
            UsageError: a method is unknown.
        """
        if unknown := [name for name in self.methods if name not in TITLES]:
            raise UsageError(f"baselines.task.methods {unknown} are none of {sorted(TITLES)}")
        images = context.images()
        pixels = images.images.reshape(len(images), -1).astype(np.float32)  # (N, D)
        pixels *= np.float32(1 / 255)
        data: dict[str, NDArray[np.float32]] = {"pixels": pixels}
        if context.upstream:
            stage = context.upstream[0].path.parent.name
            data[f"{stage} features"] = np.asarray(context.upstream[0].features)
        rows = []
        for where, values in data.items():
            for method in self.methods:
                begun = time.monotonic()
                clusters, note = self._cluster(method, values, context.num_clusters, context.seed)
                spent = time.monotonic() - begun
                name = f"{TITLES[method]} on {where}{note}"
                rows.append(score_row(name, clusters, images, seed=context.seed, seconds=spent))
                logger.info("%s: %.1f s", rows[-1].name, spent)
        text = results_markdown(rows)
        context.folder.path.mkdir(parents=True, exist_ok=True)
        (context.folder.path / "table.md").write_text(text, encoding="utf-8")
        return {
            "dataset": images.name,
            "protocol": images.protocol,
            "num_images": len(images),
            "num_clusters": context.num_clusters,
            "rows": [asdict(row) for row in rows],
        }

    def _cluster(
        self, method: str, data: NDArray[np.float32], num_clusters: int, seed: int
    ) -> tuple[NDArray[np.int64], str]:
        """Return clusters (N,) and what the name of the row has to add."""
        if method == "kmeans":
            return kmeans_clusters(data, num_clusters, seed), ""
        fitters: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
            "spectral": lambda rows: _spectral(rows, num_clusters, seed),
            "agglomerative": AgglomerativeClustering(num_clusters, linkage="ward").fit_predict,
            "nmf": lambda rows: _nmf(rows, num_clusters, seed),
            "gaussian_mixture": lambda rows: self._mixture(rows, num_clusters, seed),
        }
        limit = self.max_samples if method in ("spectral", "agglomerative") else len(data)
        if len(data) <= limit:
            return fitters[method](data).astype(np.int64), ""
        chosen = sample(len(data), limit, seed)
        fitted = torch.from_numpy(fitters[method](data[chosen]).astype(np.int64))
        _, nearest = nearest_neighbors(torch.from_numpy(data), torch.from_numpy(data[chosen]), 1)
        return fitted[nearest[:, 0]].numpy(), f", fitted on {limit:,}"

    def _mixture(
        self, rows: NDArray[np.float32], num_clusters: int, seed: int
    ) -> NDArray[np.int64]:
        components = min(self.num_components, *rows.shape)
        if components < rows.shape[1]:
            rows = PCA(components, random_state=seed).fit_transform(rows)
        # reg_covar: border pixels are constant, which would make the covariance singular.
        model = GaussianMixture(num_clusters, reg_covar=1e-3, n_init=3, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found: NDArray[np.int64] = model.fit_predict(rows)
        return found


def _spectral(rows: NDArray[np.float32], num_clusters: int, seed: int) -> NDArray[np.int64]:
    model = SpectralClustering(
        num_clusters,
        affinity="nearest_neighbors",
        n_neighbors=min(10, len(rows) - 1),
        random_state=seed,
    )
    with warnings.catch_warnings():  # "Graph is not fully connected", where clusters are far apart
        warnings.simplefilter("ignore", UserWarning)
        found: NDArray[np.int64] = model.fit_predict(rows)
    return found


def _nmf(rows: NDArray[np.float32], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Return the cluster of the largest of K non-negative parts, of features shifted to be >= 0."""
    shifted = rows - rows.min(axis=0).clip(max=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = NMF(num_clusters, init="nndsvda", max_iter=400, random_state=seed)
        parts = model.fit_transform(shifted)
    # The scale of a part is arbitrary: compare how much of the row each part explains.
    share = parts * model.components_.sum(axis=1)
    return np.asarray(share.argmax(axis=1), dtype=np.int64)
