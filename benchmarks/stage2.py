"""What heads.py and proto.py share: settings of conf/, random images, one training of stage 2."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.job.settings import build
from spice_pl.runs.folder import RunFolder

CONF = Path(__file__).resolve().parents[1] / "conf"
NUM_HEADS, NUM_CLUSTERS, REPEATS, HEAD_BATCH_SIZE = 10, 10, 8, 128  # the paper's


def quiet() -> None:
    """Silence Lightning's hints about devices and loaders."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")


def settings(*overrides: str) -> DictConfig:
    """Compose conf/ with these settings."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def noise(num_images: int, size: int) -> ImageSet:
    """Random images of `size` pixels a side."""
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 3, size, size), np.uint8)
    return ImageSet("noise", pixels, [str(i) for i in range(num_images)], "noise")


def fit(
    cfg: DictConfig,
    images: ImageSet,
    backbone: nn.Module,
    num_heads: int,
    folder: Path,
    watch: pl.Callback,
    precision: Any = "32-true",
    epochs: int = 3,
) -> None:
    """Train stage 2 as train.py does, on an encoder that was not trained."""
    plain = build(cfg, cfg.augment.plain)
    upstream = untrained_upstream(images, backbone, folder, plain)
    module = build(cfg, cfg.proto.module, backbone=backbone, num_heads=num_heads)
    stream = build(cfg, cfg.proto.streams.images)
    streams = module.prepare(images, upstream, {"images": stream})
    module.to(memory_format=torch.channels_last)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ViewsDataModule(images, streams, plain, seed=0, stage="proto"))


@torch.no_grad()
def untrained_upstream(
    images: ImageSet, backbone: nn.Module, path: Path, plain: Callable[[Tensor, Tensor], Tensor]
) -> RunFolder:
    """Write the weights and features of a stage 1 that did not train."""
    upstream = RunFolder(path)
    upstream.path.mkdir(parents=True, exist_ok=True)
    upstream.write_weights("encoder.safetensors", backbone)
    pixels = torch.split(torch.from_numpy(images.images), 256)
    encode = backbone.eval()
    features = torch.cat([encode(plain(part, torch.empty(len(part), 0))) for part in pixels])
    np.save(upstream.path / "features.npy", features.numpy())
    return upstream
