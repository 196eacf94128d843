"""Say which words of a list describe each cluster, by a network that knows images and text.

Shapes: n images, W words, E coordinates of an embedding, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def word_shares(
    images: Tensor, words: Tensor, clusters: Tensor, num_clusters: int, scale: float
) -> Tensor:
    """Return the mean probability of each word for the images of each cluster.

    The probabilities of one image are those of zero-shot classification among these words: the
    softmax of its scaled cosines (Radford et al. 2021, CLIP, Section 3.1.2). They say which word
    of the list fits best, not whether any of them fits.

    Args:
        images: (n, E), length one.
        words: (W, E), length one.
        clusters: int64 (n,), from 0 to K - 1.
        num_clusters: K.
        scale: the network's factor of its cosines, exp(logit_scale).

    Returns:
        (K, W); rows sum to 1, and to 0 for a cluster without images.

    Examples:
        >>> images, words = torch.eye(2)[[0, 0, 1]], torch.eye(2)
        >>> word_shares(images, words, torch.tensor([0, 2, 2]), 3, scale=100.0).round(decimals=4)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    probs = (scale * images @ words.T).softmax(dim=1)  # (n, W)
    sums = probs.new_zeros(num_clusters, len(words)).index_add_(0, clusters, probs)  # (K, W)
    sizes = torch.bincount(clusters, minlength=num_clusters)[:, None]
    return sums / sizes.clamp(min=1)
