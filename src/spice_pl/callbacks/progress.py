"""One line that says how far a stage is and how long it will take."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class StageProgress(ProgressBar):
    """A bar over the whole stage on a terminal; a line every tenth of it elsewhere.

    Its state in a checkpoint is the time that training has taken so far, so that the cost of a
    resumed run counts all its parts.

    Args:
        name: of the stage.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.enabled = name, True
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self._waited = self._stepped = 0.0
        self._mark: float | None = None  # end of the last step

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which a step waited for its views, in [0, 1]."""
        return self._waited / max(self._waited + self._stepped, 1e-9)

    def state_dict(self) -> dict[str, float]:
        """Return the seconds of training so far, over all parts of the run."""
        return {"seconds": self.seconds_before + time.monotonic() - self.started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting from an earlier part."""
        self.seconds_before = state_dict["seconds"]

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self.enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the bar, where training begins or goes on."""
        self.total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
        batches_done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        self.first = trainer.current_epoch * int(trainer.num_training_batches) + (
            batches_done % max(1, int(trainer.num_training_batches))
        )
        self.done, self.started, self.shown = self.first, time.monotonic(), -1
        self.bar: Progress | None = None
        if self.enabled and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[values]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.name, total=self.total, completed=self.done, values=""
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count no time between epochs as waiting."""
        self._mark = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """End the wait for a batch; its views are made."""
        now = time.monotonic()
        if self._mark is not None:
            self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Move on by a batch."""
        now = time.monotonic()
        if self._mark is not None:
            self._stepped += now - self._mark
        self._mark = now
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the loss, and elsewhere than on a terminal a line every tenth."""
        values = _values(trainer, pl_module)
        if self.bar is not None:
            self.bar.update(self.task, values=values)
            return
        tenth = 10 * self.done // max(1, self.total)
        if self.enabled and tenth > self.shown:
            self.shown = tenth
            seconds = time.monotonic() - self.started
            left = seconds / max(1, self.done - self.first) * (self.total - self.done)
            logger.info(
                "%s %3d %%, %.0f s, %.0f s left  %s", self.name, tenth * 10, seconds, left, values
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the bar, so that the message stands on a line of its own."""
        if getattr(self, "bar", None) is not None:
            self.bar.stop()  # type: ignore[union-attr]


def _values(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    shown = ("train/loss", "val/selection_loss", "train/confident_fraction", "truth/acc")
    # The epoch's own means are logged after this; these are the first rank's.
    sums = getattr(pl_module, "epoch_sums", {})
    metrics = trainer.callback_metrics | {name: each[0] / each[1] for name, each in sums.items()}
    return "  ".join(f"{name} {float(metrics[name]):.3f}" for name in shown if name in metrics)
