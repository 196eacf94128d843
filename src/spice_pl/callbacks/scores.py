"""Clustering scores over all batches and ranks.

Shapes: B samples in a batch, K clusters, C classes.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from spice_pl.functional.assignment import count_table, scores_from_counts


class ClusteringScores(Metric):
    """Scores of a whole pass, from a clusters x classes table summed over ranks.

    Only the table is kept, so the result does not depend on how samples are split over batches and
    ranks. See `spice_pl.functional.assignment.scores_from_counts`.

    Args:
        num_clusters: K.
        num_classes: C; it may differ from K.
        kwargs: arguments of `torchmetrics.Metric`.

    Examples:
        >>> scores = ClusteringScores(num_clusters=2, num_classes=2)
        >>> scores.update(torch.tensor([1, 1]), torch.tensor([0, 0]))
        >>> scores.update(torch.tensor([0, 0]), torch.tensor([1, -1]))
        >>> scores.compute()
        {'acc': 1.0, 'recall': 1.0, 'nmi': 1.0, 'ari': 1.0, 'purity': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, num_clusters: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(num_clusters, num_classes, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, clusters: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            clusters: (B,), ids 0 to K - 1.
            labels: (B,), ids 0 to C - 1, or -1 for a sample without truth, which is not counted.

        Raises:
            ValueError: the shapes disagree or an id is out of range.
        """
        self.counts += count_table(clusters, labels, *self.counts.shape)

    def compute(self) -> dict[str, float]:
        """Score everything counted so far.

        Returns:
            acc, recall, nmi, ari and purity; an empty dictionary if no sample had a label.
        """
        return scores_from_counts(self.counts) if self.counts.any() else {}
