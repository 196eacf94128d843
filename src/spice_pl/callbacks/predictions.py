"""Write the predictions of a stage into arrays on disk, batch by batch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction


class PredictionWriter(pl.Callback):
    """Fill features.npy and probs.npy; every rank writes the rows of its own images.

    Args:
        folder: folder of the run.
        shapes: name of each file to write, to the shape of its array.
    """

    def __init__(self, folder: RunFolder, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes = folder, shapes

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the arrays, on one rank."""
        if trainer.is_global_zero:
            for name, shape in self.shapes.items():
                self.folder.create(name, shape)
        trainer.strategy.barrier("arrays made")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Write the rows of a batch."""
        prediction: Prediction = outputs
        index = prediction.index.cpu().numpy()
        rows = {"features.npy": prediction.features, "probs.npy": prediction.probs}
        for name in self.shapes:
            value = rows[name]
            if value is not None:
                self.folder.write_rows(name, index, value.float().cpu().numpy())

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the files their final names, once every rank has written its rows."""
        trainer.strategy.barrier("rows written")
        if trainer.is_global_zero:
            for name in self.shapes:
                self.folder.publish(name)
        trainer.strategy.barrier("arrays published")
