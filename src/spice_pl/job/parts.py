"""The parts that a job is made of: its images, and the module and streams of a stage."""

from __future__ import annotations

import logging
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
    if step.more and not module.reads_many:
        raise UsageError(
            f"{step.name}.upstream names {1 + len(step.more)} stages and this stage reads one; "
            "give one (stage=turtle reads several)"
        )
    module.more_upstream = step.more
    module.check(images, streams)
    return module, streams


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
