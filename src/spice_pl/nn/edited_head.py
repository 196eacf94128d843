"""A cluster head after clusters were merged and split.

Shapes: B images, D features, K clusters before and L after, P parts of split clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.nn.heads import ClusterHead, LinearHead, head_of


class EditedHead(nn.Module):
    """Add the probabilities of merged clusters, and divide those of split ones.

    Each round of edits is applied to the probabilities (B, K) that the round before it leaves:

    1. They are multiplied by a matrix (K, L) of zeros and ones. The row of a cluster that was
       merged into another has its one in the column of the other.
    2. The probability of a split cluster goes to the part whose centre is nearest to the image's
       embedding, the features divided by their length.

    Args:
        feature_dim: D.
        hidden_dim: number of hidden units; 0 for a linear head.
        num_clusters: clusters of the trained head.
        rounds: for each round, L and P.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        num_clusters: int,
        rounds: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.head = (
            ClusterHead(feature_dim, hidden_dim, num_clusters)
            if hidden_dim
            else LinearHead(feature_dim, num_clusters)
        )
        self.feature_dim, self.hidden_dim, self.num_clusters = feature_dim, hidden_dim, num_clusters
        self.rounds = [[int(number) for number in each] for each in rounds]
        width = num_clusters
        for i, (after, parts) in enumerate(self.rounds):
            self.register_buffer(f"merge_{i}", torch.zeros(width, after))
            self.register_buffer(f"centres_{i}", torch.zeros(parts, feature_dim))
            self.register_buffer(f"part_of_{i}", torch.zeros(parts, dtype=torch.int64))
            self.register_buffer(f"part_is_{i}", torch.zeros(parts, dtype=torch.int64))
            width = after

    @property
    def num_clusters_after(self) -> int:
        """L of the last round."""
        return self.rounds[-1][0] if self.rounds else self.num_clusters

    def check(self) -> None:
        """Compare the numbers of clusters in the buffers with how many there are.

        Raises:
            ValueError: a part is of no cluster.
        """
        for i, (after, _) in enumerate(self.rounds):
            for name in ("part_of", "part_is"):
                values = getattr(self, f"{name}_{i}")
                if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < after:
                    raise ValueError(f"{name}_{i} holds numbers outside 0 to {after - 1}")

    def forward(self, features: Tensor) -> Tensor:
        """Return probabilities (B, L) of raw features (B, D)."""
        probs: Tensor = self.head(features)
        for i in range(len(self.rounds)):
            buffers = (getattr(self, f"{name}_{i}") for name in BUFFERS)
            probs = edited(probs, features, *buffers)
        return probs

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> EditedHead:
        """Build the head that a state dict belongs to, without loading the weights."""
        below = {key.removeprefix("head."): value for key, value in state.items()}
        base = head_of(below)
        rounds: list[list[int]] = []
        while f"merge_{len(rounds)}" in state:
            i = len(rounds)
            rounds.append([state[f"merge_{i}"].shape[1], len(state[f"centres_{i}"])])
        if isinstance(base, LinearHead):
            return cls(base.in_features, 0, base.out_features, rounds)
        sizes = base.hidden.in_features, base.hidden.out_features
        return cls(*sizes, base.output.out_features, rounds)

    @property
    def base_clusters(self) -> list[int]:
        """For each cluster (L,), one of the clusters of the trained head that it comes from."""
        sources = list(range(self.num_clusters))
        for i in range(len(self.rounds)):
            merge, part_of, part_is = (
                getattr(self, f"{name}_{i}") for name in ("merge", "part_of", "part_is")
            )
            # A number whose images went elsewhere keeps its own row.
            chosen = [
                int(column.argmax()) if column.any() else min(number, len(merge) - 1)
                for number, column in enumerate(merge.T)
            ]
            for parent, part in zip(part_of.tolist(), part_is.tolist(), strict=True):
                chosen[part] = chosen[parent]
            sources = [sources[each] for each in chosen]
        return sources

    @classmethod
    def after(
        cls, before: nn.Module, merge: Tensor, centres: Tensor, part_of: Tensor, part_is: Tensor
    ) -> EditedHead:
        """Return a trained or edited head after one more round of edits.

        Args:
            before: head to edit.
            merge: (K, L), see the class.
            centres: (P, D) of length one or less.
            part_of: (P,) the split cluster of each part.
            part_is: (P,) the cluster that each part becomes.

        Raises:
            TypeError: the head is of another kind.
        """
        if isinstance(before, ClusterHead):
            sizes = before.hidden.in_features, before.hidden.out_features
            made = cls(*sizes, before.output.out_features, [])
            made.head = before
        elif isinstance(before, LinearHead):
            made = cls(before.in_features, 0, before.out_features, [])
            made.head = before
        elif isinstance(before, cls):
            made = before
        else:
            raise TypeError(f"{type(before).__name__} is not a head that edits can be added to")
        i = len(made.rounds)
        made.rounds = [*made.rounds, [merge.shape[1], len(centres)]]
        for name, value in zip(BUFFERS, (merge, centres, part_of, part_is), strict=True):
            made.register_buffer(f"{name}_{i}", value)
        return made


BUFFERS = ("merge", "centres", "part_of", "part_is")


def edited(
    probs: Tensor,
    features: Tensor,
    merge: Tensor,
    centres: Tensor,
    part_of: Tensor,
    part_is: Tensor,
) -> Tensor:
    """Return the probabilities (B, L) after one round of edits, see `EditedHead`.

    Args:
        probs: (B, K).
        features: (B, D), raw.
        merge: (K, L).
        centres: (P, D).
        part_of: (P,).
        part_is: (P,).
    """
    after = probs @ merge.to(probs.dtype)  # (B, L)
    if len(centres):
        distance = torch.cdist(F.normalize(features.float()), centres.float())  # (B, P)
        same = part_of[:, None] == part_of  # (P, P) parts of one cluster
        among = torch.where(same, distance[:, None], math.inf)  # (B, P, P)
        number = torch.arange(len(centres), device=probs.device)
        nearest = among.argmin(dim=2) == number  # (B, P)
        mass = torch.where(nearest, after[:, part_of], 0.0)
        after = after.index_copy(1, part_is, mass)
    return after
