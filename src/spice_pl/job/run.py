"""From settings to a finished run: check, build, fit, predict.

`train.py` hands a composed config to `main`; with several devices every rank runs this file as
`python -m spice_pl.job.run FILE` instead.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from spice_pl.callbacks.dashboards import log_results
from spice_pl.callbacks.predictions import PredictionWriter
from spice_pl.callbacks.truth import TruthMonitor
from spice_pl.data.augment import View
from spice_pl.data.datamodule import Stream, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.subset import subset
from spice_pl.errors import UsageError
from spice_pl.job.finish import keep_numbers, write_portable
from spice_pl.job.job import (
    Job,
    check_chain,
    check_folders,
    check_upstream,
    forget,
    stamp,
    take_edits,
)
from spice_pl.job.settings import build, flat, masked, masked_override, missing
from spice_pl.job.trainer import make_trainer, num_ranks, progress
from spice_pl.nn.places import fine_feature_map
from spice_pl.reports.tables import ResultRow, results_rich
from spice_pl.runs.attention import Places
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.results import StageRun, last_logged, write_results
from spice_pl.stages.base import Stage
from spice_pl.system import ranks
from spice_pl.system.files import is_disk_full
from spice_pl.system.interrupts import Interrupts, Stopped
from spice_pl.system.provenance import machine, versions
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)

ASKED = ("stage", "dataset.num_clusters", "overwrite")


def main(cfg: DictConfig) -> float | None:
    """Run the job that Hydra composed; return the label-free objective for sweeps.

    Raises:
        SystemExit: code 2 and one clear message, for mistakes that a person can mend.
    """
    composed = HydraConfig.get()
    preset = composed.runtime.choices.get("preset")
    job = Job(
        cfg=cfg,
        overrides=tuple(composed.overrides.task),
        preset=str(preset) if str(preset) in _options("preset") else "none",
        sweep=composed.mode == RunMode.MULTIRUN,
    )
    objective = _with_clear_errors(job)
    if trials := os.environ.get("SPICE_PL_TRIALS"):  # of a sweep; see sweep.py
        with Path(trials).open("a", encoding="utf-8") as file:
            file.writelines(f"{job.folder(name).path.absolute()}\n" for name in job.stages)
    return objective


def run_stages(job: Job) -> float | None:
    """Run the stages of a job in order, reusing those that are finished; return the objective.

    Raises:
        UsageError: a setting, the data or an earlier artifact does not fit.
        Stopped: a signal asked to stop; what was made is kept, `resume=true` goes on.
    """
    _quiet()
    OmegaConf.set_struct(job.cfg, True)
    if absent := missing(job.cfg):
        raise UsageError(f"no value for {', '.join(absent)}; give it on the command line")
    _check_num_clusters(job)
    count = num_ranks(job.cfg)
    if ranks.in_rank():
        with Interrupts() as interrupts:
            if not ranks.is_ours():
                if job.cfg.edits:
                    raise UsageError(
                        "edits are made into a run by one process; leave torchrun or srun out and "
                        "let trainer=ddp start the processes"
                    )
                check_folders(job)
            metrics = _run_here(job, interrupts)
    else:
        with Interrupts():
            take_edits(job)
            check_folders(job)
        todo = [name for name in job.stages if not job.reused(name)]
        if count > 1 and todo:
            if tasks := [name for name in todo if _is_task(job, name)]:
                raise UsageError(
                    f"stage={','.join(tasks)} trains nothing and runs in one process; use "
                    "trainer=auto for it"
                )
            with ExitStack() as held:
                locks = [held.enter_context(job.folder(name).lock()) for name in todo]
                ranks.launch_ranks(count, job.dump(), locks)
            metrics = _metrics(job)
        else:
            with Interrupts() as interrupts:
                metrics = _run_here(job, interrupts)
    objective = metrics.get("objective")
    return None if objective is None else float(objective)


def _run_here(job: Job, interrupts: Interrupts) -> dict[str, Any]:
    load_images = functools.cache(functools.partial(_images, job.cfg))
    training = [name for name in job.stages if not job.reused(name) and not _is_task(job, name)]
    if training:
        images = load_images()
        logger.info("preset: %s", job.preset)
        for name in training:
            module, streams = _parts(job.cfg, name)
            module.check(images, streams)
    if job.cfg.overwrite and ranks.is_first_rank():
        for name in job.stages:  # all at once: a stop half-way leaves none that looks finished
            forget(job.folder(name))
    for name in job.stages:
        if _is_task(job, name) and not job.reused(name):
            _run_task(job, name, load_images)
            continue
        with ExitStack() as held:
            if not job.reused(name):
                if upstream := job.upstream_folders(name):
                    check_upstream(job, name, upstream[0], load_images())
                # The parent holds it for ranks. Trials that share a stage wait for it here.
                if ranks.is_first_rank() and not ranks.is_ours():
                    held.enter_context(job.folder(name).lock())
            if job.reused(name):
                check_chain(job, name)
                logger.info("%s: finished earlier, reused from %s", name, job.folder(name).path)
            else:
                _run_stage(job, name, load_images(), interrupts)
    metrics = _metrics(job)
    if metrics and ranks.is_first_rank():
        _show(job.folder(job.stages[-1]).path, metrics)
    return metrics


def _check_num_clusters(job: Job) -> None:
    """Refuse to train clusters without their number; stage 1 and tasks do without."""
    given = job.cfg.dataset.num_clusters
    clustering = [name for name in job.stages if job.upstream(name) and not _is_task(job, name)]
    if given == "auto" or (given is None and clustering):
        raise UsageError(
            f"dataset.num_clusters={given} is no number; features tell how many clusters they "
            "show, and you decide:\n"
            f"  {job.command('stage=moco', 'dataset.num_clusters=null', without=ASKED)}\n"
            f"  {job.command('stage=estimate_k', without=ASKED)}\n"
            "then give dataset.num_clusters=K; the features are reused"
        )


def _metrics(job: Job) -> dict[str, Any]:
    """What the last stage left in metrics.json; empty after a task that leaves none."""
    folder = job.folder(job.stages[-1])
    return folder.metrics if folder.finished else {}


def _is_task(job: Job, name: str) -> bool:
    return "task" in job.cfg[name]


def _run_task(job: Job, name: str, load_images: Callable[..., ImageSet]) -> None:
    """Do what a stage without training does."""
    cfg, folder, started = job.cfg, job.folder(name), time.monotonic()
    upstream = job.upstream_folders(name)
    if upstream:
        check_upstream(job, name, upstream[0], load_images())
    pl.seed_everything(int(cfg.seed), verbose=False)
    task = build(cfg, cfg[name].task)
    stamp(job, folder, keep=False)
    metrics = task(
        Context(
            folder=folder,
            upstream=upstream,
            images=load_images,
            plain=build(cfg, cfg.augment.plain),
            num_clusters=int(cfg.dataset.num_clusters or 0),
            seed=int(cfg.seed),
        )
    )
    if metrics is not None:
        folder.stamp(
            load_images().fingerprint, len(load_images()), upstream[0] if upstream else None
        )
        about = {
            "stage": name,
            "seed": int(cfg.seed),
            "overrides": [masked_override(text) for text in job.overrides],
        }
        spent = {
            "seconds": time.monotonic() - started,
            "versions": versions(),
            "machine": machine(),
        }
        folder.write_json("metrics.json", about | spent | dict(metrics))


def _run_stage(job: Job, name: str, images: ImageSet, interrupts: Interrupts) -> None:
    """Fit one stage, predict every image, write the results."""
    cfg, folder, started = job.cfg, job.folder(name), time.monotonic()
    upstream = job.upstream_folders(name)
    pl.seed_everything(int(cfg.seed), verbose=False)
    module, streams = _parts(cfg, name)
    streams = dict(module.prepare(images, upstream[0] if upstream else None, streams))
    module.to(memory_format=torch.channels_last)  # convolutions: 1.2 to 6 times faster on a CPU
    plain = build(cfg, cfg.augment.plain)
    data = ViewsDataModule(images, streams, plain, seed=int(cfg.seed), stage=name)
    shapes: dict[str, tuple[int, ...]] = {"features.npy": (len(images), module.feature_dim)}
    if module.has_clusters:
        shapes["probs.npy"] = (len(images), int(cfg.dataset.num_clusters))
    callbacks: list[pl.Callback] = [PredictionWriter(folder, shapes)]
    if images.labels is not None:
        callbacks.append(TruthMonitor(images.labels, int(cfg.dataset.num_clusters or 0)))
    trainer = make_trainer(job, name, callbacks, interrupts)
    resume = bool(cfg.resume) and folder.checkpoint.is_file()
    weights_bytes = sum(each.nbytes for each in module.state_dict().values())
    folder.check_space(  # predictions; a checkpoint with its optimizer beside the one before
        sum(4 * math.prod(shape) for shape in shapes.values()) + 6 * weights_bytes
    )
    if trainer.is_global_zero:
        folder.clear_temporary()
        stamp(job, folder, keep=resume)
        folder.stamp(images.fingerprint, len(images), upstream[0] if upstream else None)
        logger.info("%s: %s %s", name, "goes on in" if resume else "starts in", folder.path)
    if trainer.max_epochs:  # a stage of no epochs only predicts
        checkpoint = folder.checkpoint if resume else None
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    trainer.predict(module, data, return_predictions=False)
    if trainer.is_global_zero:
        if module.has_clusters:
            keep_numbers(job, name, module, images, upstream)
        for part, weights in module.weights().items():
            folder.write_weights(f"{part}.safetensors", weights)
        if module.has_clusters:
            write_portable(job, name, module, images)
        write_results(
            _stage_run(job, name, upstream, oracle=module.oracle),
            images,
            last_logged(folder),  # callback_metrics is empty when resumed after the last epoch
            places=_places(plain, module),
            seconds=time.monotonic() - started + progress(trainer).seconds_before,
            data_wait_fraction=progress(trainer).data_wait_fraction,
            devices=trainer.world_size,
            precision=str(trainer.precision),
        )
    trainer.strategy.barrier("results written")
    for each in trainer.loggers:
        if trainer.is_global_zero:
            log_results(each, folder, upstream, images, trainer.global_step)
        finish = getattr(getattr(each, "experiment", None), "finish", None)
        if finish is not None:  # W&B keeps one run open until it is told
            finish()


def _places(plain: View, module: Stage) -> Places:
    """Return what makes maps of places of images, with the encoder that is handed on."""
    encoder = module.weights()["encoder"].eval()

    def places(images: torch.Tensor) -> torch.Tensor | None:
        prepared = plain(images.to(module.device), torch.empty(0, device=module.device))
        return fine_feature_map(encoder, prepared)

    return places


def _parts(cfg: DictConfig, name: str) -> tuple[Stage, dict[str, Stream]]:
    """Build a stage's module and streams."""
    streams = {key: build(cfg, value) for key, value in cfg[name].streams.items()}
    return build(cfg, cfg[name].module), streams


def _stage_run(job: Job, name: str, upstream: Sequence[RunFolder], *, oracle: bool) -> StageRun:
    cfg = job.cfg
    settings = OmegaConf.to_container(cfg, resolve=True)
    chosen = masked("", {key: settings[key] for key in ("dataset", "backbone", name)})  # type: ignore[index,call-overload]
    return StageRun(
        stage=name,
        title=str(cfg[name].title),
        folder=job.folder(name),
        upstream=upstream,
        num_clusters=int(cfg.dataset.num_clusters or 0),
        seed=int(cfg.seed),
        preset=job.preset,
        overrides=[masked_override(text) for text in job.overrides],
        settings={key: str(value) for key, value in flat(chosen).items()},
        map_method=str(cfg.map),
        oracle=oracle,
        **OmegaConf.to_container(cfg.reliable, resolve=True),  # type: ignore[arg-type]
    )


def _images(cfg: DictConfig, **other: Any) -> ImageSet:
    """Open the data set, some of its settings replaced by others."""
    described = {"num_clusters", "mean", "std"}  # read by stages and views
    chosen = ("classes", "imbalance", "limit")
    settings = {
        key: value for key, value in cfg.dataset.items() if key not in {*described, *chosen}
    }
    source: ImageSet = build(cfg, settings | other)
    images = subset(source, **build(cfg, {key: cfg.dataset[key] for key in chosen}))
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


def _show(path: Path, metrics: Mapping[str, Any]) -> None:
    if "rows" in metrics:
        Console().print(results_rich([ResultRow(**row) for row in metrics["rows"]]))
    for file, what in (
        ("report.html", "look at the clusters"),
        ("clusters.csv", "one line an image"),
        ("metrics.json", "scores, settings, cost"),
    ):
        if (path / file).is_file():
            print(f"{path / file}  {what}")


def _options(group: str) -> list[str]:
    """Names of the options of a config group, over all places that Hydra looks in."""
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _quiet() -> None:
    """Keep what a person cannot act on out of the log."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for known in (
        "resuming from a checkpoint that ended before the epoch",  # the sampler goes on there
        "does not have many workers",  # images are in memory, whole batches at a time
        "Checkpoint directory .* exists and is not empty",
        "Experiment logs directory .* exists and is not empty",
        "torch.distributed.nn.functional.all_gather is deprecated",  # inside Lightning
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{known}.*")


def _with_clear_errors(job: Job) -> float | None:
    try:
        return _run_stages_on_any_disk(job)
    except Exception as error:
        if isinstance(error, UsageError):
            print(f"\nerror: {error}", file=sys.stderr)
        if job.sweep:  # Hydra goes on with the other trials; sweep.py reports it at the end
            if trials := os.environ.get("SPICE_PL_TRIALS"):
                given = " ".join(masked_override(text) for text in job.overrides)
                with Path(f"{trials}.failed").open("a", encoding="utf-8") as file:
                    file.write(json.dumps([given, f"{type(error).__name__}: {error}"]) + "\n")
            raise
        if isinstance(error, UsageError):
            raise SystemExit(2) from error
        raise
    except Stopped:
        if ranks.is_first_rank():
            command = job.command(without=("resume", "overwrite"), last=["resume=true"])
            print(f"\nstopped; what was made is kept. Go on with\n  {command}", file=sys.stderr)
        raise


def _run_stages_on_any_disk(job: Job) -> float | None:
    try:
        return run_stages(job)
    except OSError as error:
        if is_disk_full(error):
            raise UsageError(
                f"no space left to write {error.filename or 'a file'} under {job.cfg.runs_dir} "
                f"({error.strerror}); files that stand there are whole. Free some space, then "
                "go on with resume=true"
            ) from error
        raise


def _run_rank(file: str) -> None:
    """Run one rank of a job that the parent wrote to a file."""
    ranks.end_with_parent()
    level = logging.INFO if ranks.is_first_rank() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    try:
        _run_stages_on_any_disk(Job.load(file))
    except UsageError as error:  # every rank has it; the parent says it once
        Path(f"{file}.error{os.environ['RANK']}").write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from error


if __name__ == "__main__":
    _run_rank(sys.argv[1])
