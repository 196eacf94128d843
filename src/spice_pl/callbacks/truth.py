"""Log scores against true labels in training; the only callback that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from spice_pl.callbacks.scores import ClusteringScores
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.stages.base import Prediction, Stage, as_stage


class TruthMonitor(pl.Callback):
    """Log how well the watched images are clustered, and how many training labels are right.

    - `truth/acc`, `truth/recall`, `truth/nmi`, `truth/ari`, `truth/purity` of a stage with
      clusters.
    - `truth/best_head_acc` and `truth/epoch_head_acc` of a stage with many heads: the best of them,
      and the one chosen without labels after this epoch (SPICE, Figure 6).
    - `truth/knn_acc` of a stage without clusters: `knn_accuracy`.
    - `truth/reliable_acc` of a stage that trains on labels: accuracy of these labels.

    Args:
        labels: (N,) true labels, -1 where unknown.
        num_clusters: K.
    """

    def __init__(self, labels: NDArray[np.int64], num_clusters: int) -> None:
        self.labels = torch.from_numpy(labels)
        self.sizes = (num_clusters, int(labels.max()) + 1)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the validation before."""
        self.index: list[Tensor] = []  # (B,) each
        self.features: list[Tensor] = []  # (B, D) each
        self.clusters: list[Tensor] = []  # (B, 1 + H) each

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Keep clusters or features; they stay on their device, so that no batch waits."""
        if not isinstance(outputs, Prediction):
            return
        self.index.append(outputs.index)
        if outputs.probs is None:
            self.features.append(outputs.features)
            return
        clusters = [outputs.probs.argmax(dim=1)[None]]
        if outputs.head_clusters is not None:
            clusters.append(outputs.head_clusters)
        self.clusters.append(torch.cat(clusters).T)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the scores of all ranks together."""
        stage = as_stage(pl_module)
        if self.clusters:
            rows = torch.cat([torch.cat(self.index)[:, None], torch.cat(self.clusters)], dim=1)
            index, *columns = stage.across_ranks(rows).cpu().unbind(dim=1)  # (W,), (W,) each
            labels = self.labels[index]
            kept, *heads = (self._scores(each, labels) for each in columns)
            for name, value in kept.items():
                _log(stage, name, value)
            # There are scores only where an image with a true label is among those watched.
            if any(heads) and stage.chosen_head is not None:
                accuracies = [scores["acc"] for scores in heads]
                _log(stage, "best_head_acc", max(accuracies))
                _log(stage, "epoch_head_acc", accuracies[stage.chosen_head])
        if self.features:
            features, index = (
                stage.across_ranks(torch.cat(parts)).cpu() for parts in (self.features, self.index)
            )
            known = self.labels[index] >= 0
            accuracy = knn_accuracy(features[known], self.labels[index[known]])
            _log(stage, "knn_acc", accuracy)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the accuracy of the labels that the stage trains on."""
        stage = as_stage(pl_module)
        labelled = stage.labelled()
        if labelled is not None:
            index, label = (each.cpu() for each in labelled)
            known = self.labels[index] >= 0
            scores = clustering_scores(label[known], self.labels[index[known]])
            _log(stage, "reliable_acc", scores["acc"])

    def _scores(self, clusters: Tensor, labels: Tensor) -> dict[str, float]:
        scores = ClusteringScores(*self.sizes, sync_on_compute=False)  # of all ranks already
        scores.update(clusters, labels)
        return scores.compute()


def _log(stage: Stage, name: str, value: float) -> None:
    """Log a score that is the same on all ranks; a tensor of the processor, so nothing waits."""
    stage.log(f"truth/{name}", torch.tensor(value))


def knn_accuracy(features: Tensor, labels: Tensor, num_neighbors: int = 20) -> float:
    """Compute the share of samples whose class is the most frequent among their neighbours.

    Args:
        features: (N, D); neighbours are the nearest by cosine, the sample itself left out.
        labels: (N,), classes.
        num_neighbors: k; N - 1 where there are fewer samples.

    Returns:
        Accuracy in [0, 1]; of classes with equal votes the smaller id wins. NaN for fewer than two
        samples.

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> knn_accuracy(features, torch.tensor([0, 0, 1, 1]), num_neighbors=1)
        1.0
    """
    if len(features) < 2:
        return float("nan")
    k = min(num_neighbors, len(features) - 1)
    _, index = nearest_neighbors(features, features, k + 1)  # (N, 1 + k)
    others = index != torch.arange(len(features), device=index.device)[:, None]
    others[others.all(dim=1), -1] = False  # many duplicates may leave the sample itself out
    votes = F.one_hot(labels[index[others].view(-1, k)]).sum(dim=1)  # (N, classes)
    return float((votes.argmax(dim=1) == labels).float().mean())
