"""Cluster heads: a single one, or many that are computed together by batched matrix products.

Shapes: H heads, B images, D features, E hidden units, K clusters.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClusterHead(nn.Module):
    """Map features to cluster probabilities by Linear-ReLU-Linear-softmax.

    Niu et al. 2022 (SPICE), Section III-B.

    Args:
        feature_dim: width D of the features.
        hidden_dim: number of hidden units E.
        num_clusters: number of clusters K.

    Examples:
        >>> head = ClusterHead(feature_dim=8, hidden_dim=8, num_clusters=3)
        >>> head(torch.zeros(2, 8)).sum(dim=1).allclose(torch.ones(2))
        True
    """

    def __init__(self, feature_dim: int, hidden_dim: int, num_clusters: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(feature_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, num_clusters)

    def forward(self, features: Tensor) -> Tensor:
        """Return probabilities (B, K) of raw features (B, D)."""
        return self.logits(features).softmax(dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of raw features (B, D), for losses with a single softmax."""
        with _float32(features):
            logits: Tensor = self.output(F.relu(self.hidden(features.to(self.hidden.weight.dtype))))
        return logits


class ParallelHeads(nn.Module):
    """Compute H independent cluster heads together.

    Niu et al. 2022 (SPICE), Section III-B. Equal to H separate `ClusterHead`s; each is initialised
    as `nn.Linear` is by default.

    Args:
        feature_dim: width D of the features.
        hidden_dim: number of hidden units E of each head.
        num_clusters: number of clusters K.
        num_heads: number of heads H.
        seed: seed of the initial weights: head h has its own generator with seed + h, so it equals
            the only head of `num_heads=1, seed=seed + h`. None uses torch's default generator.

    Raises:
        ValueError: num_heads is less than 1.

    Examples:
        >>> heads = ParallelHeads(feature_dim=8, hidden_dim=8, num_clusters=3, num_heads=10)
        >>> heads(torch.zeros(2, 8)).shape  # the same images for every head
        torch.Size([10, 2, 3])
        >>> heads(torch.zeros(10, 2, 8)).shape  # its own images for every head
        torch.Size([10, 2, 3])
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        num_clusters: int,
        num_heads: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads {num_heads} leaves nothing to train; use at least 1")
        if num_clusters < 1:
            raise ValueError(f"num_clusters {num_clusters} is not positive; use at least 1")
        self.num_heads = num_heads
        # The layout of nn.Linear: all hidden layers flatten into one (H·E, D) without a copy.
        self.hidden_weight = nn.Parameter(torch.empty(num_heads, hidden_dim, feature_dim))
        self.hidden_bias = nn.Parameter(torch.empty(num_heads, hidden_dim))
        self.output_weight = nn.Parameter(torch.empty(num_heads, num_clusters, hidden_dim))
        self.output_bias = nn.Parameter(torch.empty(num_heads, num_clusters))
        self._initialise(seed)

    def forward(self, features: Tensor) -> Tensor:
        """Return the probabilities of every head.

        Args:
            features: raw features, (B, D) if all heads see the same images, else (H, B, D).

        Returns:
            Probabilities (H, B, K).

        Raises:
            ValueError: features has neither shape.
        """
        return self.logits(features).mT.softmax(dim=-2).mT

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of every head, (H, B, K); arguments and errors as in `forward`.

        Their memory is that of a contiguous (H, K, B).
        """
        num_heads, _, feature_dim = self.hidden_weight.shape
        shared = features.ndim == 2
        own = features.ndim == 3 and len(features) == num_heads
        if not (shared or own) or features.shape[-1] != feature_dim:
            raise ValueError(
                f"features {tuple(features.shape)} is neither (B, D) nor (H, B, D) with "
                f"D = {feature_dim} and H = {num_heads}; build the heads with "
                "feature_dim=backbone.num_features"
            )
        # Weights on the left, so that their gradients need no transposing copy.
        with _float32(features):
            return self._products(features.to(self.hidden_weight.dtype), shared=shared)

    def _products(self, features: Tensor, *, shared: bool) -> Tensor:
        num_heads, hidden_dim, _ = self.hidden_weight.shape
        if shared:
            weight, bias = self.hidden_weight.flatten(0, 1), self.hidden_bias.flatten()
            hidden = torch.addmm(bias[:, None], weight, features.T)  # (H·E, B)
            hidden = hidden.view(num_heads, hidden_dim, len(features))  # (H, E, B)
        else:
            hidden = torch.baddbmm(self.hidden_bias[..., None], self.hidden_weight, features.mT)
        logits = torch.baddbmm(self.output_bias[..., None], self.output_weight, F.relu(hidden))
        return logits.mT  # (H, B, K)

    def head(self, index: int) -> ClusterHead:
        """Return a copy of one head as an ordinary module.

        Args:
            index: number of the head, 0 ≤ index < H.

        Returns:
            A head that shares no memory with these heads.

        Raises:
            IndexError: there is no such head.
        """
        if not 0 <= index < self.num_heads:
            raise IndexError(f"head {index} does not exist; choose one of 0..{self.num_heads - 1}")
        num_clusters, hidden_dim = self.output_weight.shape[1:]
        with torch.device("meta"):  # so that torch's generator draws no initial weights
            head = ClusterHead(self.hidden_weight.shape[2], hidden_dim, num_clusters)
        one = {k.replace("_", "."): v[index].clone() for k, v in self.state_dict().items()}
        head.load_state_dict(one, assign=True)
        return head

    @torch.no_grad()
    def _initialise(self, seed: int | None) -> None:
        for h in range(self.num_heads):
            generator = None
            if seed is not None:
                generator = torch.Generator(self.hidden_weight.device).manual_seed(seed + h)
            for weight, bias in (
                (self.hidden_weight[h], self.hidden_bias[h]),
                (self.output_weight[h], self.output_bias[h]),
            ):
                bound = 1 / math.sqrt(weight.shape[1])  # U(±1/√fan_in), the default of nn.Linear
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)


class LinearHead(nn.Linear):
    """Map features to cluster probabilities by Linear-softmax.

    The head of SCAN, of self-labelling and of a stage 3 that trains a new network.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return probabilities (B, K) of raw features (B, D)."""
        return self.logits(features).softmax(dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of raw features (B, D)."""
        with _float32(features):
            return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


def head_of(state: Mapping[str, Tensor]) -> ClusterHead | LinearHead:
    """Build the head that a state dict belongs to, without loading the weights."""
    if "hidden.weight" in state:
        hidden_dim, feature_dim = state["hidden.weight"].shape
        return ClusterHead(feature_dim, hidden_dim, len(state["output.weight"]))
    num_clusters, feature_dim = state["weight"].shape
    return LinearHead(feature_dim, num_clusters)


def _float32(features: Tensor) -> torch.autocast:
    """Switch autocast off: bfloat16 has too few levels to rank probabilities."""
    return torch.autocast(features.device.type, enabled=False)
