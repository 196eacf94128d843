"""Run a stage: fit its module, predict every image, write the results."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace

import pytorch_lightning as pl
import torch

from spice_pl.callbacks.predictions import PredictionWriter
from spice_pl.callbacks.truth import TruthMonitor
from spice_pl.data.datamodule import Stream, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.checks import same_features, stamp
from spice_pl.job.finish import finish_stage
from spice_pl.job.job import Job
from spice_pl.job.memory import check_memory
from spice_pl.job.num_clusters import k_estimate
from spice_pl.job.plan import Step
from spice_pl.job.settings import build
from spice_pl.job.trainer import make_trainer
from spice_pl.nn.deterministic import nondeterministic_layers
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Stage
from spice_pl.system.interrupts import Interrupts

logger = logging.getLogger(__name__)


def run_stage(
    job: Job,
    step: Step,
    module: Stage,
    streams: Mapping[str, Stream],
    images: ImageSet,
    interrupts: Interrupts,
) -> None:
    """Fit one stage, predict every image, write the results."""
    started = time.monotonic()
    step = replace(step, record=replace(step.record, k_estimate=k_estimate(step)))
    pl.seed_everything(step.seed, verbose=False)
    streams = module.prepare(images, step.upstream[0] if step.upstream else None, streams)
    if step.settings["trainer"].get("deterministic") is True:
        check_deterministic(module)
    module.to(memory_format=torch.channels_last)  # convolutions: 1.2 to 6 times faster on a CPU
    plain = build(job.cfg, step.settings["augment"]["plain"])
    mode = str(step.settings["trainer"].get("data", "auto"))
    data = ViewsDataModule(images, dict(streams), plain, seed=step.seed, stage=step.name, mode=mode)
    shapes = prediction_shapes(step, module, images)
    callbacks: list[pl.Callback] = [PredictionWriter(step.folder, shapes)]
    if images.labels is not None:
        callbacks.append(TruthMonitor(images.labels, step.num_clusters))
    trainer = make_trainer(job, step, callbacks, interrupts)
    continues = step.continues
    _check_space(step.folder, shapes, module)
    if trainer.max_epochs:
        device, ranks = trainer.strategy.root_device, trainer.world_size
        check_memory(module, streams, images, ranks, device, str(trainer.precision))
    if trainer.is_global_zero:
        step.folder.clear_temporary()
        stamp(step, keep=continues)
        upstream = step.upstream[0] if step.upstream else None
        step.folder.stamp(images.fingerprint, len(images), upstream, step.more)
        verb = "continues in" if continues else "starts in"
        logger.info("%s: %s %s", step.name, verb, step.folder.path)
    if trainer.max_epochs:  # a stage of no epochs only predicts
        checkpoint = step.folder.checkpoint if continues else None
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    alone = trainer.world_size == 1 and not module.has_clusters
    earlier = same_features(step, images) if alone else None
    if earlier is None:
        trainer.predict(module, data, return_predictions=False)
    else:
        logger.info("%s: the features are those of %s", step.name, earlier.path)
        started -= float(earlier.metrics["seconds"])
        step.folder.take_features(earlier)
    finish_stage(job, step, module, images, trainer, plain, started)


def check_deterministic(module: Stage) -> None:
    """Refuse a network whose training on a GPU cannot give the same bits twice.

    Raises:
        UsageError: names the layers.
    """
    trained = any(each.requires_grad for each in module.encoder.parameters())
    if trained and (layers := nondeterministic_layers(module.encoder)):
        raise UsageError(
            f"trainer.deterministic=true: {', '.join(layers)} of the backbone have no "
            "deterministic gradient on a GPU; use trainer.deterministic=false or another backbone"
        )


def prediction_shapes(step: Step, module: Stage, images: ImageSet) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array that the prediction fills, by file name."""
    shapes: dict[str, tuple[int, ...]] = {"features.npy": (len(images), module.feature_dim)}
    if module.has_clusters:
        shapes["probs.npy"] = (len(images), step.num_clusters)
    return shapes


def _check_space(folder: RunFolder, shapes: Mapping[str, tuple[int, ...]], module: Stage) -> None:
    """Refuse a disk that cannot hold predictions, banks of views, and two whole checkpoints."""
    predictions = sum(4 * math.prod(shape) for shape in shapes.values())
    views = 2 * (getattr(module, "view_bank", None) or 0)  # weak and strong, in half precision
    predictions += views * 2 * math.prod(shapes["features.npy"])
    weights = sum(each.nbytes for each in module.state_dict().values())
    folder.check_space(predictions + 6 * weights)
