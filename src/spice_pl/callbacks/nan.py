"""Stop at a loss that is not finite, before it reaches a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from spice_pl.data.sampler import KeyedBatches
from spice_pl.errors import UsageError


class NanGuard(pl.Callback):
    """Remember the first batch with a loss that is not finite; stop at the end of its epoch.

    Each batch costs one comparison on the device. The processor waits for the result once per epoch
    and before each checkpoint, so the checkpoint on disk is finite.

    Args:
        stage: name of the stage, for the message.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.first: Tensor | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note a loss that is not finite; some batches have no loss."""
        if outputs is None or "loss" not in outputs:
            return
        step = torch.where(torch.isfinite(outputs["loss"].detach()), -1, batch_idx)
        self.first = step if self.first is None else torch.where(self.first < 0, step, self.first)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if a loss was not finite on any rank."""
        self.check(trainer, pl_module)

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if a loss so far was not finite on any rank, or a weight is not.

        Raises:
            UsageError: says where, and what to try.
        """
        first, self.first = self.first, None
        worst = first if first is not None else torch.full((), -1, device=pl_module.device)
        if trainer.world_size > 1:
            worst = trainer.strategy.reduce(worst, reduce_op="max")
        # A gradient can be infinite where the loss is finite, so weights are checked too.
        largest = torch.stack(torch._foreach_norm(list(pl_module.parameters()), torch.inf))
        batch, finite = torch.stack((worst, largest.isfinite().all())).tolist()  # the only wait
        if batch >= 0:
            raise UsageError(
                f"{self.stage}: the loss is not a number at epoch {trainer.current_epoch}, batch "
                f"{batch} ({_batch_images(trainer, batch)}); the last checkpoint is from "
                f"before it. Lower {self.stage}.module.lr or use trainer.precision=32-true, then "
                "resume=true"
            )
        if not finite:
            raise UsageError(
                f"{self.stage}: a weight is not a number in epoch {trainer.current_epoch}; the "
                f"last checkpoint is from before it. Lower {self.stage}.module.lr or use "
                "trainer.precision=32-true, then resume=true"
            )


def _batch_images(trainer: pl.Trainer, batch_idx: int) -> str:
    """Name some images of a batch of the present epoch, by their positions in the data set."""
    loaders = trainer.train_dataloader
    named = loaders if isinstance(loaders, dict) else {"images": loaders}
    texts = []
    for name, loader in named.items():
        sampler = copy.copy(getattr(loader, "sampler", None))
        if isinstance(sampler, KeyedBatches):
            sampler.skip = batch_idx
            index, _ = next(iter(sampler))
            some = ", ".join(map(str, index[:8].tolist()))
            texts.append(f"{name} {some}{', ...' if len(index) > 8 else ''}")
    return "; ".join(texts) or "images unknown"
