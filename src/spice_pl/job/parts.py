"""The parts that a job is made of: its images, and the module and streams of a stage."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from spice_pl.data.datamodule import Stream
from spice_pl.data.duplicates import few_distinct
from spice_pl.data.images import ImageSet
from spice_pl.data.listing import Found, Note
from spice_pl.data.sources.subset import subset
from spice_pl.data.sources.survey import Survey, survey
from spice_pl.errors import UsageError
from spice_pl.job.fit import fitted
from spice_pl.job.job import Job
from spice_pl.job.origin import EMBED
from spice_pl.job.plan import Step
from spice_pl.job.settings import build, plain
from spice_pl.nn.pretrained import is_not_fetched, without_network
from spice_pl.stages.base import Stage

logger = logging.getLogger(__name__)

FOLDER = "spice_pl.data.sources.folder.folder"
DESCRIBED = ("num_clusters", "mean", "std")  # settings of the data set that stages and views read
CHOSEN = ("classes", "imbalance", "limit")  # settings that choose images of any data set


def open_images(cfg: DictConfig, found: Note | Found | None = None, **other: Any) -> ImageSet:
    """Open the data set; `other` replaces settings, where the data set has them.

    Args:
        cfg: composed settings.
        found: files of the folder that is opened, if it has just been searched.
        other: settings of the data set.

    Raises:
        UsageError: the data set cannot be opened, or holds fewer training images than clusters.
    """
    settings = {
        key: value for key, value in cfg.dataset.items() if key not in (*DESCRIBED, *CHOSEN)
    }
    settings |= {key: other[key] for key in other if key in settings}
    source: ImageSet = build(cfg, settings, **({} if found is None else {"found": found}))
    images = subset(source, **build(cfg, {key: cfg.dataset[key] for key in CHOSEN}))
    check_num_clusters(images, cfg)
    num_clusters = int(cfg.dataset.num_clusters or 0)
    truth = "labels for truth/* only" if images.labels is not None else "no labels"
    pixels = images.images.shape[-1]
    line = f"{images.name}: {len(images)} images of {pixels} x {pixels} pixels"
    if num_clusters or list(cfg.stages) != ["predict"]:  # new images have the model's clusters
        line += f", {num_clusters or 'unknown'} clusters, protocol {images.protocol}, {truth}"
    logger.info(line)
    return images


def check_num_clusters(images: ImageSet, cfg: DictConfig) -> None:
    """Refuse a data set of fewer training images than clusters.

    Raises:
        UsageError: says how many there are.
    """
    num_clusters, num_train = int(cfg.dataset.num_clusters or 0), len(images.train_index)
    if num_clusters and not 2 <= num_clusters <= num_train:
        raise UsageError(
            f"dataset.num_clusters {num_clusters} is not between 2 and the {num_train} training "
            f"images of {images.name}; lower it or give more images"
        )


class JobImages:
    """The images of a job: opened once, then the same for its plan, its steps and its report.

    Attributes:
        listed: what the folder of the data set holds, if the plan has searched it.
    """

    def __init__(self, opened: Callable[..., ImageSet] = open_images) -> None:
        """Take the function that opens the data set of some settings."""
        self.listed: Survey | None = None
        self._opened = opened
        self._images: dict[str, ImageSet] = {}

    def __call__(self, cfg: DictConfig, **other: Any) -> ImageSet:
        """Return the images of some settings; arguments and errors as for `open_images`."""
        settings = {key: value for key, value in plain(cfg.dataset).items() if key not in DESCRIBED}
        key = json.dumps([settings, other], sort_keys=True, default=str)
        if key in self._images:
            check_num_clusters(self._images[key], cfg)
        else:
            found = None if self.listed is None or other else self.listed.found
            more = other if found is None else {"found": found}
            self._images[key] = self._opened(cfg, **more)
        return self._images[key]

    def survey(self, job: Job) -> Survey | None:
        """Search the folder of a job and measure how long decoding takes; None without a folder."""
        settings = plain(job.cfg.dataset)
        chosen = any(settings.get(key) for key in ("limit", "classes"))
        if settings["_target_"] == FOLDER and not chosen:
            self.listed = survey(settings)
        return self.listed


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
