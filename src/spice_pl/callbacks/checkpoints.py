"""One checkpoint per stage, written between two batches; a resumed run is equal bit for bit.

Saving takes at most 2 % of the time: the end of an epoch is skipped if the last checkpoint is
younger than 50 times what saving took. Several processes agree about once per second, and not
through the GPU: the processor would wait for all its work.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from spice_pl.callbacks.nan import NanGuard
from spice_pl.data.keyed import keyed_seed
from spice_pl.errors import UsageError
from spice_pl.stages.base import as_stage
from spice_pl.system.files import atomic
from spice_pl.system.interrupts import Interrupts, Stopped
from spice_pl.system.schema import COUNT, Kind, check_fields, is_text, map_of

_TENSORS = Kind(
    "tensors by name",
    lambda value: (
        isinstance(value, dict)
        and all(is_text(name) and isinstance(each, torch.Tensor) for name, each in value.items())
    ),
)
_STATES = Kind("a list of states", lambda value: isinstance(value, list))
_NAMED = Kind("a state", lambda value: isinstance(value, dict))
# Fields of a checkpoint, Lightning's and ours.
STATE: Mapping[str, Kind] = {
    **dict.fromkeys(("epoch", "global_step"), COUNT),
    **dict.fromkeys(("state_dict", "epoch_sums"), _TENSORS),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), _STATES),
    **dict.fromkeys(("loops", "callbacks"), _NAMED),
    "ViewsDataModule": map_of(COUNT),
}

SAVE_SHARE = 0.02  # of the time that saving may take
AGREE_SECONDS = 1.0  # between two agreements of several processes, about
MOST_BATCHES = 100  # between two agreements


class Checkpoints(pl.callbacks.Checkpoint):
    """Save after an epoch, every `every_minutes`, when asked to stop, and at the end.

    Epochs that are short beside the time of saving share a checkpoint (`SAVE_SHARE`).

    The state between two batches is weights, optimizers, schedules, counters and the sums of the
    epoch. Views and order are keyed, and torch's generator is seeded before each batch. A new file
    replaces the old one when it is complete, so a stage has one checkpoint at any time.

    Args:
        path: file of the checkpoint.
        guard: check that refuses to save a state that is not finite.
        interrupts: signals received so far.
        every_minutes: about the most minutes between two checkpoints.
        seed: seed of the run.
    """

    def __init__(
        self,
        path: Path,
        guard: NanGuard,
        interrupts: Interrupts,
        *,
        every_minutes: float,
        seed: int,
    ) -> None:
        self.path, self.guard, self.interrupts = path, guard, interrupts
        self.every_minutes, self.seed = every_minutes, seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks; inside an epoch, call the hooks of its start, which Lightning skips."""
        self.interrupts.deferred = True
        self._saved_at, self._saved_epoch = time.monotonic(), trainer.current_epoch
        self._save_seconds, self._wished = 0.0, (False, False)
        self._agreed_at, self._batches, self._every = time.monotonic(), 0, 1
        # NCCL would need a tensor of the GPU, and the processor would wait for it.
        self._group: Any = None
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        stage = as_stage(pl_module)
        epoch: Any = trainer.fit_loop.epoch_progress.current
        if epoch.started > epoch.processed:
            sums = {name: each.clone() for name, each in stage.epoch_sums.items()}
            for each in trainer.callbacks:  # type: ignore[attr-defined]
                each.on_train_epoch_start(trainer, stage)
            stage.on_train_epoch_start()
            stage.epoch_sums = sums  # which already hold what these hooks record

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the batch; save if it is time, and stop if asked to."""
        epoch, rank = trainer.current_epoch, trainer.global_rank
        torch.manual_seed(keyed_seed(self.seed, epoch, batch_idx, rank))
        # A wish waits until the stage is resumable.
        stop, save = (
            before or now
            for before, now in zip(self._wished, self._agreed(trainer, epoch), strict=True)
        )
        self._wished = (stop, save)
        if (stop or save) and as_stage(pl_module).resumable:
            self._wished = (False, False)
            self._save(trainer, pl_module)
            if stop:
                raise Stopped

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of training; stop if asked to."""
        self._save(trainer, pl_module)
        self.interrupts.deferred = False
        self._every = 1
        if self._agreed(trainer, trainer.current_epoch)[0]:
            raise Stopped

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let signals stop the process at once: there will be no more batches."""
        self.interrupts.deferred = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lower the count of logged steps by the one that Lightning adds where it resumes."""
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

    def _agreed(self, trainer: pl.Trainer, epoch: int) -> tuple[bool, bool]:
        """Return whether to stop and whether to save, the same on all ranks."""
        now, stop = time.monotonic(), self.interrupts.asked is not None
        age = now - self._saved_at
        ended = epoch > self._saved_epoch and SAVE_SHARE * age >= self._save_seconds
        save = ended or age >= 60 * self.every_minutes
        if trainer.world_size == 1:
            return stop, save
        self._batches += 1
        if self._batches < self._every:
            return False, False
        seconds = (now - self._agreed_at) / self._batches  # of a batch
        every = min(MOST_BATCHES, max(1, int(AGREE_SECONDS / max(seconds, 1e-6))))
        wishes = torch.tensor([stop, save, -every])  # the slowest rank says how often
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group)
        stop, save = bool(wishes[0]), bool(wishes[1])
        self._agreed_at, self._batches, self._every = now, 0, -int(wishes[2])
        return stop, save

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        started = time.monotonic()
        self.guard.check(trainer, pl_module)
        for logger in trainer.loggers:  # first, so that curves are never behind the checkpoint
            logger.save()
        trainer.save_checkpoint(self.path)
        self._saved_at, self._saved_epoch = time.monotonic(), trainer.current_epoch
        self._save_seconds = self._saved_at - started


class CheckpointFile(TorchCheckpointIO):
    """Write a checkpoint completely or not at all; read only a complete one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a new file beside the old one, then replace it."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain containers, no code.

        Raises:
            UsageError: the file is damaged.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; check each part against the checksum (CRC-32) that the file holds.

    It is not compressed, so that it takes no more memory than its size, and its state has the
    types of `STATE`.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            if any(each.compress_type != zipfile.ZIP_STORED for each in parts.infolist()):
                raise ValueError("it is compressed")
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("it holds no state")
        check_fields(found, STATE)
    except FileNotFoundError:
        raise
    # A damaged file can break zipfile's and torch's readers in any way.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{path} is damaged and cannot be resumed ({reason}); overwrite=true starts its "
            "stage from scratch, or restore a copy of the file"
        ) from error
    return found
