"""The parts that a job is made of: its images, and the module and streams of a stage."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from spice_pl.data.datamodule import Stream
from spice_pl.data.duplicates import few_distinct
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.subset import subset
from spice_pl.errors import UsageError
from spice_pl.job.fit import fitted
from spice_pl.job.job import Job
from spice_pl.job.origin import EMBED
from spice_pl.job.plan import Step
from spice_pl.job.settings import build
from spice_pl.nn.pretrained import is_not_fetched, without_network
from spice_pl.stages.base import Stage

logger = logging.getLogger(__name__)

DESCRIBED = ("num_clusters", "mean", "std")  # settings of the data set that stages and views read
CHOSEN = ("classes", "imbalance", "limit")  # settings that choose images of any data set


def open_images(cfg: DictConfig, **other: Any) -> ImageSet:
    """Open the data set; `other` replaces settings, where the data set has them.

    Raises:
        UsageError: the data set cannot be opened, or holds fewer training images than clusters.
    """
    settings = {
        key: value for key, value in cfg.dataset.items() if key not in (*DESCRIBED, *CHOSEN)
    }
    source: ImageSet = build(cfg, settings | {key: other[key] for key in other if key in settings})
    images = subset(source, **build(cfg, {key: cfg.dataset[key] for key in CHOSEN}))
    num_clusters, num_train = int(cfg.dataset.num_clusters or 0), len(images.train_index)
    if num_clusters and not 2 <= num_clusters <= num_train:
        raise UsageError(
            f"dataset.num_clusters {num_clusters} is not between 2 and the {num_train} training "
            f"images of {images.name}; lower it or give more images"
        )
    truth = "labels for truth/* only" if images.labels is not None else "no labels"
    pixels = images.images.shape[-1]
    logger.info(
        f"{images.name}: {len(images)} images of {pixels} x {pixels} pixels, "
        f"{num_clusters or 'unknown'} clusters, protocol {images.protocol}, {truth}"
    )
    return images


def build_stage(job: Job, step: Step, images: ImageSet) -> tuple[Stage, dict[str, Stream]]:
    """Return the module of a stage, with the initial weights of the run's seed, and its streams.

    Raises:
        UsageError: a setting does not fit the data.
    """
    own, changes = fitted(step.name, step.own, images, step.num_clusters, job.overrides)
    if changes:
        logger.info("fitted to %d images: %s", len(images.train_index), ", ".join(changes))
    pl.seed_everything(step.seed, verbose=False)
    streams = {key: build(job.cfg, value) for key, value in own["streams"].items()}
    try:
        module: Stage = build(job.cfg, own["module"])
    except Exception as error:  # each library of networks has errors of its own
        if isinstance(error, UsageError) or not is_not_fetched(error):
            raise
        backbone = own["module"].get("backbone", step.settings["backbone"])
        raise UsageError(
            f"the pretrained weights cannot be fetched ({str(error).splitlines()[0]}): "
            f"{without_network(backbone)}"
        ) from error
    module.name = step.name
    module.check(images, streams)
    if step.name == EMBED and (said := other_normalisation(own["module"], module, step.settings)):
        logger.warning(said)
    return module, streams


def other_normalisation(
    own: Mapping[str, Any], module: Stage, settings: Mapping[str, Any]
) -> str | None:
    """Return a warning where images are normalised otherwise than a network of timm expects.

    Args:
        own: settings of the module.
        module: stage with the network as its encoder.
        settings: all settings of the job.
    """
    backbone = own["backbone"]
    is_timm = str(backbone["_target_"]).startswith("timm.")
    if not is_timm or not (backbone.get("pretrained") or own.get("weights")):
        return None
    expected = getattr(module.encoder, "pretrained_cfg", None) or {}
    given = {key: list(map(float, settings["dataset"][key])) for key in ("mean", "std")}
    other = {
        key: [float(each) for each in expected[key]]
        for key in given
        if key in expected
        and any(abs(a - b) > 1e-3 for a, b in zip(expected[key], given[key], strict=True))
    }
    if not other:
        return None
    ways = " ".join(f"dataset.{key}={value}".replace(", ", ",") for key, value in other.items())
    return (
        f"embed: {backbone['model_name']} was trained on images of another normalisation; give "
        f"{ways}, or recipe=pretrained encoder={backbone['model_name']}, which takes its own"
    )


def check_distinct(images: ImageSet, num_clusters: int) -> None:
    """Refuse images that are copies of fewer images than there are clusters.

    Raises:
        UsageError: says how many differ.
    """
    distinct = few_distinct(images.images, num_clusters)
    if distinct is not None:
        way = "" if distinct < 2 else f", or lower dataset.num_clusters to {distinct} or less"
        raise UsageError(
            f"the {len(images)} images of {images.name} are copies of {distinct}, pixel by pixel "
            f"at dataset.image_size={images.images.shape[-1]}, which cannot be {num_clusters} "
            f"clusters; give images that differ{way}"
        )
