"""A small data set, backbone and trainer that the stages' tests share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from tests.conftest import NUM_CLASSES, NUM_IMAGES, photographs
from torch import Tensor, nn

from spice_pl.data.augment import PlainView, StrongView, View, WeakView
from spice_pl.data.datamodule import Stream, Views, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.nn.resnet import ResNet
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Stage

N, K, D = NUM_IMAGES, NUM_CLASSES, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PLAIN = PlainView(MEAN, STD)
WEAK = WeakView(MEAN, STD, padding=1)
STRONG = StrongView(MEAN, STD, num_ops=2, max_cutout=3)


class Watch(pl.Callback):
    """Keep the batches and their losses."""

    def __init__(self) -> None:
        self.batches: list[Views] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches.append(args[1])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(args[1]["loss"])


def backbone(seed: int = 0) -> ResNet:
    """Make a network of D = 8 features, in channels_last as a run has it."""
    torch.manual_seed(seed)
    return ResNet(blocks=[1], widths=[D])


@torch.no_grad()
def settled(encoder: nn.Module) -> nn.Module:
    """Give BatchNorm the statistics of the plain images, as a trained network has them."""
    images = PLAIN(torch.from_numpy(image_set().images), torch.empty(N, 0))
    for _ in range(50):
        encoder.train()(images)
    return encoder


def image_set() -> ImageSet:
    """Return the 90 photographs of the conftest."""
    images = np.ascontiguousarray(photographs().transpose(0, 3, 1, 2))
    return ImageSet("photos", images, [str(i) for i in range(N)], "fingerprint")


def stream(batch_size: int, **views: View) -> Stream:
    """Make a stream."""
    return Stream(views, batch_size)


def write_upstream(
    path: Path, encoder: nn.Module, *, probs: NDArray[np.float32] | None = None, **parts: nn.Module
) -> RunFolder:
    """Write what an upstream stage hands on, with the encoder's own features."""
    folder = RunFolder(path)
    arrays = {"features.npy": plain_features(encoder).numpy()}
    if probs is not None:
        arrays["probs.npy"] = probs
    for name, array in arrays.items():
        folder.create(name, array.shape)
        folder.write_rows(name, np.arange(len(array)), array)
        folder.publish(name)
    for name, module in {"encoder": encoder, **parts}.items():
        folder.write_weights(f"{name}.safetensors", module)
    return folder


@torch.no_grad()
def plain_features(encoder: nn.Module) -> Tensor:
    """Return the features (N, D) of the plain images."""
    was = encoder.training
    encoder.eval()
    images = torch.from_numpy(image_set().images)
    features: Tensor = encoder(PLAIN(images, torch.empty(N, 0)))
    encoder.train(was)
    return features


def fit(
    module: Stage,
    streams: Mapping[str, Stream],
    *callbacks: pl.Callback,
    epochs: int = 2,
    resume: Any = None,
    **settings: Any,
) -> pl.Trainer:
    """Train a stage that was prepared; `images` are others than `image_set()`."""
    images = settings.pop("images", None) or image_set()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **{"limit_val_batches": 0, **settings},
    )
    data = ViewsDataModule(images, streams, PLAIN, seed=0, stage="test")
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's state."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
