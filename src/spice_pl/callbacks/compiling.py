"""Compile the networks and views of a stage with torch.compile."""

from __future__ import annotations

import logging

import pytorch_lightning as pl
import torch

from spice_pl.data.augment import PlainView
from spice_pl.errors import UsageError
from spice_pl.stages.base import as_stage

logger = logging.getLogger(__name__)

MODES = ("false", "true", "auto")
LONG = 5000  # steps of a stage from which `auto` compiles: compiling takes about a minute


class Compiling(pl.Callback):
    """Compile encoders and, on a GPU, views, before the first step.

    Names and values of the weights stay; a network that is compiled has the same state.

    Args:
        mode: "true", "false", or "auto", which compiles on a GPU where a stage is long.
        backend: backend of torch.compile.

    Raises:
        UsageError: `mode` is another word.
    """

    def __init__(self, mode: str, backend: str = "inductor") -> None:
        if mode not in MODES:
            raise UsageError(f"trainer.compile={mode} is none of {', '.join(MODES)}")
        self.mode, self.backend = mode, backend

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile, if it is asked for and worth it."""
        stage, on_gpu = as_stage(pl_module), trainer.strategy.root_device.type != "cpu"
        steps = trainer.num_training_batches * (trainer.max_epochs or 1)
        if self.mode == "false" or (self.mode == "auto" and not (on_gpu and steps >= LONG)):
            return
        networks = [each for name, each in stage.named_children() if name.endswith("encoder")]
        for network in networks:
            network.compile(backend=self.backend)
        views = [view for each in stage.datamodule.streams.values() for view in each.views.values()]
        compiled = 0
        for view in views if on_gpu else ():
            if isinstance(view, PlainView):
                fast = torch.compile(view._on_device, backend=self.backend)
                object.__setattr__(view, "_on_device", fast)  # views are frozen
                compiled += 1
        logger.info("compiled %d networks and %d views", len(networks), compiled)
