"""Progress bar and clock of a stage."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar

from spice_pl.stages.base import as_stage
from spice_pl.system.progress import PAUSE, RARELY, Bar

EVERY = 8  # steps between two that are timed on a GPU


class StageProgress(ProgressBar):
    """Show a bar over training, and one over the prediction of all images.

    On a GPU the processor runs ahead, so its clock says nothing about waiting. There, events on the
    GPU's own time line do, in every `EVERY`-th step; they are read once per epoch.

    Checkpoints hold the time that training has taken so far, so that the cost of a resumed run
    includes all its parts.

    Args:
        name: name of the stage, as it is shown.
        plain: whether losses and scores are left out, and lines come half a minute apart.
    """

    def __init__(self, name: str, *, plain: bool = False) -> None:
        super().__init__()
        self.name, self.enabled, self.plain = name, True, plain
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self._waited = self._stepped = 0.0
        self._mark: Any = None  # time, or event of a GPU, of the last start or end of a step
        self._timed: list[tuple[Any, Any, Any]] = []  # end of a step, start and end of the next
        self._bar: Bar | None = None

    @property
    def data_wait_fraction(self) -> float:
        """Share of the training time in which steps waited for their views, in [0, 1]."""
        return self._waited / max(self._waited + self._stepped, 1e-9)

    def state_dict(self) -> dict[str, float]:
        """Return the seconds of training so far, over all parts of the run."""
        return {"seconds": self.seconds_before + time.monotonic() - self.started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take the seconds of the earlier parts."""
        self.seconds_before = state_dict["seconds"]

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but the first."""
        self.enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar at the batch where training starts or resumes."""
        self.started = time.monotonic()
        num_batches = int(trainer.num_training_batches)
        batches_done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        done = trainer.current_epoch * num_batches + batches_done % max(1, num_batches)
        total = num_batches * (trainer.max_epochs or 1)
        self._bar = Bar(
            self.name, total, done=done, enabled=self.enabled, pause=RARELY if self.plain else 0.0
        ).__enter__()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not count the time between epochs as waiting."""
        self._mark = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Count the wait for the batch, whose views are made by now."""
        if trainer.strategy.root_device.type == "cuda":
            if self._mark is not None:
                self._mark = (self._mark, _event())
            return
        now = time.monotonic()
        if self._mark is not None:
            self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Count the step and advance the bar."""
        if trainer.strategy.root_device.type == "cuda":
            if self._mark is not None:
                self._timed.append((*self._mark, _event()))
            next_step = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._mark = _event() if next_step % EVERY == 0 else None
        else:
            now = time.monotonic()
            if self._mark is not None:
                self._stepped += now - self._mark
            self._mark = now
        if self._bar is not None:
            self._bar.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the loss and other means of the epoch."""
        for before, start, end in self._timed:
            end.synchronize()
            self._waited += before.elapsed_time(start) / 1000
            self._stepped += start.elapsed_time(end) / 1000
        self._timed.clear()
        if self._bar is not None:
            self._bar.show("" if self.plain else _values(trainer, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the bar."""
        self._end()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show a bar over all images."""
        name = self.name if self.plain else f"{self.name}, all images"
        total, pause = int(sum(trainer.num_predict_batches)), RARELY if self.plain else PAUSE
        self._bar = Bar(name, total, enabled=self.enabled, pause=pause).__enter__()

    def on_predict_batch_end(self, *_: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.advance()
            self._bar.show()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the bar."""
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the bar, so that the message starts on a new line."""
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _values(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    shown = ("train/loss", "val/selection_loss", "train/confident_fraction", "truth/acc")
    # The means of all ranks are logged after this hook, so these are the first rank's.
    metrics = trainer.callback_metrics | as_stage(pl_module).epoch_means()
    return "  ".join(f"{name} {float(metrics[name]):.3f}" for name in shown if name in metrics)
