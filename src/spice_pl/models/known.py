"""Known images: training images to show beside a new one, by similarity.

Shapes: N training images, n of them known, B new images, k known images shown for each, D features,
K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.neighbors import similarities
from spice_pl.functional.reliability import least_agreement, neighbors_for

NUM_VOTERS = 10  # known images whose clusters are averaged, at most; as in `runs.answer`
NUM_NEIGHBORS = 20  # known images that a new one is compared with, at most


@dataclass(frozen=True)
class Known:
    """Training images that a model keeps, to name those most similar to a new image.

    Attributes:
        keys: (n,) path or index of each.
        embeddings: (n, D) of length one, float16.
        clusters: (n,) cluster of each.
    """

    keys: Sequence[str]
    embeddings: Tensor
    clusters: Tensor

    def nearest(self, embeddings: Tensor, most: int) -> tuple[list[list[str]], NDArray[np.float32]]:
        """Find the k = min(most, n) known images with the largest cosine to each new image.

        Args:
            embeddings: (B, D), of length one.
            most: largest number of known images for each, at least 0.

        Returns:
            Keys (B, k) and cosines (B, k), nearest first.
        """
        similarity, index = self._alike(embeddings, most)  # (B, k)
        return [[self.keys[i] for i in row] for row in index.tolist()], similarity.cpu().numpy()

    def not_sure(self, embeddings: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
        """Return whether too few of the nearest known images are in the cluster of a new one.

        The share is Eq. 6 of Niu et al. 2022 (SPICE), with known images as neighbours of a new one;
        `least_agreement` says how large it has to be.

        Args:
            embeddings: (B, D), of length one.
            clusters: (B,) predicted cluster of each.
            num_clusters: K.

        Returns:
            (B,), bool.
        """
        known = self.clusters.to(clusters.device, torch.int64)
        most = neighbors_for(NUM_NEIGHBORS, len(self.keys), num_clusters)
        _, index = self._alike(embeddings, most)  # (B, k)
        agreement = (known[index] == clusters[:, None]).float().mean(dim=1)
        sizes = F.one_hot(known, num_clusters).sum(dim=0)  # (K,); bincount waits for a GPU
        return agreement < least_agreement(sizes, index.shape[1])[clusters]

    def shares(self, embeddings: Tensor, num_clusters: int) -> Tensor:
        """Return the share of each cluster among the known images most like a new one.

        Args:
            embeddings: (B, D), of length one.
            num_clusters: K.

        Returns:
            (B, K); rows sum to 1.
        """
        known = self.clusters.to(embeddings.device, torch.int64)
        _, index = self._alike(embeddings, neighbors_for(NUM_VOTERS, len(self.keys), num_clusters))
        return F.one_hot(known[index], num_clusters).float().mean(dim=1)

    def _alike(self, embeddings: Tensor, most: int) -> tuple[Tensor, Tensor]:
        alike = similarities(embeddings, self.embeddings.to(embeddings))  # (B, n)
        return alike.topk(min(most, len(self.keys)), dim=1)


def choose_known(
    keys: Sequence[str], features: NDArray[np.float32], clusters: NDArray[np.int64], most: int
) -> Known | None:
    """Keep at most `most` of N training images, evenly spaced; None where `most` is below 1.

    Args:
        keys: (N,).
        features: (N, D), raw; stored as embeddings.
        clusters: (N,), cluster of each image.
        most: largest n.
    """
    if most <= 0:
        return None
    index = np.arange(0, len(keys), -(-len(keys) // most))  # (n,)
    return Known(
        keys=[keys[i] for i in index.tolist()],
        embeddings=F.normalize(torch.from_numpy(features[index])).half(),
        clusters=torch.from_numpy(clusters[index]),
    )
