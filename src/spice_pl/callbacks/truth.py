"""Ground truth, the only place where training can be seen beside it: it logs and does no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_pl.functional.assignment import clustering_scores
from spice_pl.metrics import ClusteringScores
from spice_pl.stages.base import Prediction


class TruthMonitor(pl.Callback):
    """Log `truth/acc`, `truth/nmi`, `truth/ari` of the watched images, and of reliable labels.

    Args:
        labels: (N,) truth, -1 where unknown.
        num_clusters: K.
    """

    def __init__(self, labels: NDArray[np.int64], num_clusters: int) -> None:
        self.labels = torch.from_numpy(labels)
        self.scores = ClusteringScores(num_clusters, int(labels.max()) + 1)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new count."""
        self.scores.reset()
        self.scores.to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Count clusters against classes."""
        if isinstance(outputs, Prediction) and outputs.probs is not None:
            labels = self.labels[outputs.index.cpu()].to(pl_module.device)
            self.scores.update(outputs.probs.argmax(dim=1), labels)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the scores of all ranks together."""
        if int(self.scores.update_count):
            for name, value in self.scores.compute().items():
                pl_module.log(f"truth/{name}", float(value), sync_dist=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the accuracy of the reliable labels that stage 3 learns from."""
        index = getattr(pl_module, "reliable_index", None)
        if index is not None:
            known = index[self.labels[index] >= 0]
            pseudo_labels: Tensor = pl_module.pseudo_labels  # type: ignore[assignment]
            scores = clustering_scores(pseudo_labels.cpu()[known], self.labels[known])
            pl_module.log("truth/reliable_acc", scores["acc"], sync_dist=True)
