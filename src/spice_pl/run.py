"""From settings to a finished run: check, build, fit, predict. The only file that knows Hydra.

`train.py` hands a composed config to `main`; with several devices every rank runs this file as
`python -m spice_pl.run FILE` instead.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from rich.console import Console

from spice_pl import launch
from spice_pl.artifacts import RunFolder
from spice_pl.callbacks.nan import NanGuard
from spice_pl.callbacks.predictions import PredictionWriter
from spice_pl.callbacks.progress import StageProgress
from spice_pl.callbacks.truth import TruthMonitor
from spice_pl.data.datamodule import Stream, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.reports.tables import ResultRow, results_rich
from spice_pl.results import StageRun, last_logged, write_results
from spice_pl.stages.base import Stage

logger = logging.getLogger(__name__)

OmegaConf.register_new_resolver(
    "folder_name", lambda root: Path(str(root)).expanduser().resolve().name, replace=True
)

ALLOWED_TARGETS = ("spice_pl.", "torch.", "torchvision.", "timm.", "pytorch_lightning.")
# Settings that change where or how a run goes but not what it computes.
NOT_IN_NAMES = {
    *("stage", "dataset", "run", "seed", "preset", "experiment", "resume", "overwrite", "hydra"),
    *("runs_dir", "cache_dir", "trainer", "logger", "on_bad_image", "allow_targets"),
}


@dataclass(frozen=True)
class Job:
    """One job: its composed config and the command line it came from."""

    cfg: DictConfig
    overrides: tuple[str, ...]
    preset: str
    sweep: bool

    @property
    def stages(self) -> list[str]:
        """Stages to run, in order."""
        return [str(name) for name in self.cfg.stages]

    def upstream(self, stage: str) -> list[str]:
        """Return the stages that a stage builds on, the nearest first."""
        name = self.cfg[stage].upstream
        return [] if name is None else [str(name), *self.upstream(str(name))]

    def folder(self, stage: str) -> RunFolder:
        """Return where a stage's artifacts live: runs/<dataset>/<stage>/<run>.

        In a sweep the run's name carries the settings that reach this stage, so that trials have
        their own folders and share the stages before the one they vary.
        """
        cfg, name = self.cfg, str(self.cfg.run)
        if self.sweep:
            name = ",".join([name, *self._reaching(stage)])
            if len(name) > 150:
                digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
                name = f"{name[:140]}-{digest}"
        return RunFolder(Path(cfg.runs_dir, str(cfg.dataset.name), stage, name))

    def _reaching(self, stage: str) -> list[str]:
        others = {
            key
            for key, value in self.cfg.items()
            if isinstance(value, DictConfig) and "upstream" in value
        } - {stage, *self.upstream(stage)}
        kept = []
        for override in self.overrides:
            text = override.lstrip("+~")
            first = text.partition("=")[0].partition(".")[0].partition("@")[0]
            swept = first not in NOT_IN_NAMES or text.startswith("dataset.num_clusters=")
            if swept and first not in others:
                kept.append(text.replace("/", "_").replace(" ", ""))
        return sorted(kept)


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
    return _with_clear_errors(job)


def run_stages(job: Job) -> float | None:
    """Run the stages of a job in order, reusing those that are finished; return the objective.

    Raises:
        UsageError: a setting, the data or an earlier artifact does not fit.
    """
    _quiet()
    OmegaConf.set_struct(job.cfg, True)
    missing = _missing(job.cfg)
    if missing:
        raise UsageError(f"no value for {', '.join(missing)}; give it on the command line")
    num_ranks = _num_ranks(job.cfg)
    if launch.in_rank():
        metrics = _run_here(job)
    else:
        _check_folders(job)
        if num_ranks > 1 and not all(_reused(job, name) for name in job.stages):
            launch.launch_ranks(num_ranks, _dump(job))
            metrics = job.folder(job.stages[-1]).metrics
        else:
            metrics = _run_here(job)
    objective = metrics["objective"]
    return None if objective is None else float(objective)


def _run_here(job: Job) -> dict[str, Any]:
    images: ImageSet | None = None
    for name in job.stages:
        if _reused(job, name):
            _check_chain(job, name)
            logger.info("%s: finished earlier, reused from %s", name, job.folder(name).path)
            continue
        if images is None:
            images = _images(job.cfg)
            logger.info("preset: %s", job.preset)
            for each in job.stages:
                if not _reused(job, each):
                    module, streams = _parts(job.cfg, each)
                    module.check(images, streams)
        _run_stage(job, name, images)
    metrics = job.folder(job.stages[-1]).metrics
    if _is_first_rank():
        _show(job.folder(job.stages[-1]).path, metrics)
    return metrics


def _run_stage(job: Job, name: str, images: ImageSet) -> None:
    """Fit one stage, predict every image, write the results."""
    cfg, folder, started = job.cfg, job.folder(name), time.monotonic()
    upstream = [job.folder(each) for each in job.upstream(name)]
    if upstream:
        _check_upstream(job, name, upstream[0], images)
    pl.seed_everything(int(cfg.seed), verbose=False)
    module, streams = _parts(cfg, name)
    streams = dict(module.prepare(images, upstream[0] if upstream else None, streams))
    module.to(memory_format=torch.channels_last)  # convolutions: 1.2 to 6 times faster on a CPU
    plain = _build(cfg, cfg.augment.plain)
    data = ViewsDataModule(images, streams, plain, seed=int(cfg.seed), stage=name)
    shapes: dict[str, tuple[int, ...]] = {"features.npy": (len(images), module.feature_dim)}
    if module.has_clusters:
        shapes["probs.npy"] = (len(images), int(cfg.dataset.num_clusters))
    callbacks: list[pl.Callback] = [PredictionWriter(folder, shapes)]
    if module.has_clusters and images.labels is not None:
        callbacks.append(TruthMonitor(images.labels, int(cfg.dataset.num_clusters)))
    trainer = _trainer(job, name, callbacks, watch=module.has_clusters)
    resume = bool(cfg.resume) and folder.checkpoint.is_file()
    if trainer.is_global_zero:
        _stamp(job, folder, keep=resume)
        folder.stamp(images.fingerprint, len(images), upstream[0] if upstream else None)
        logger.info("%s: %s %s", name, "goes on in" if resume else "starts in", folder.path)
    trainer.fit(module, data, ckpt_path=folder.checkpoint if resume else None, weights_only=True)
    trainer.predict(module, data, return_predictions=False)
    if trainer.is_global_zero:
        for part, weights in module.weights().items():
            folder.write_weights(f"{part}.safetensors", weights)
        write_results(
            _stage_run(job, name, upstream),
            images,
            last_logged(folder),  # callback_metrics is empty when resumed after the last epoch
            seconds=time.monotonic() - started + _progress(trainer).seconds_before,
            devices=trainer.world_size,
            precision=str(trainer.precision),
        )
    trainer.strategy.barrier("results written")
    for each in trainer.loggers:
        finish = getattr(getattr(each, "experiment", None), "finish", None)
        if finish is not None:  # W&B keeps one run open until it is told
            finish()


def _parts(cfg: DictConfig, name: str) -> tuple[Stage, dict[str, Stream]]:
    """Build a stage's module and streams."""
    streams = {key: _build(cfg, value) for key, value in cfg[name].streams.items()}
    return _build(cfg, cfg[name].module), streams


def _stage_run(job: Job, name: str, upstream: Sequence[RunFolder]) -> StageRun:
    cfg = job.cfg
    chosen = {key: cfg[key] for key in ("dataset", "backbone", name)}
    return StageRun(
        stage=name,
        title=str(cfg[name].title),
        folder=job.folder(name),
        upstream=upstream,
        num_clusters=int(cfg.dataset.num_clusters),
        seed=int(cfg.seed),
        preset=job.preset,
        overrides=job.overrides,
        settings={key: str(value) for key, value in _flat(chosen).items()},
        **OmegaConf.to_container(cfg.reliable, resolve=True),  # type: ignore[arg-type]
    )


def _images(cfg: DictConfig) -> ImageSet:
    described = {"num_clusters", "mean", "std"}  # read by stages and views
    images: ImageSet = _build(
        cfg, {key: value for key, value in cfg.dataset.items() if key not in described}
    )
    num_clusters, num_train = int(cfg.dataset.num_clusters), len(images.train_index)
    if not 2 <= num_clusters <= num_train:
        raise UsageError(
            f"dataset.num_clusters {num_clusters} is not between 2 and the {num_train} training "
            f"images of {images.name}; lower it or give more images"
        )
    truth = "labels for truth/* only" if images.labels is not None else "no labels"
    pixels = images.images.shape[-1]
    logger.info(
        f"{images.name}: {len(images)} images of {pixels} x {pixels} pixels, "
        f"{num_clusters} clusters, protocol {images.protocol}, {truth}"
    )
    return images


def _reused(job: Job, name: str) -> bool:
    return job.folder(name).finished and not job.cfg.overwrite


def _check_folders(job: Job) -> None:
    """Refuse to mix with what earlier runs left, before any work starts."""
    cfg = job.cfg
    if cfg.overwrite and cfg.resume:
        raise UsageError("overwrite=true and resume=true exclude each other; give one of them")
    if cfg.overwrite:
        return
    for name in job.stages:
        folder = job.folder(name)
        saved = folder.path / ".hydra" / "config.yaml"
        if not saved.is_file():
            continue
        changed = _changed(OmegaConf.load(saved), cfg, name)
        if changed and (folder.finished or cfg.resume):
            raise UsageError(
                f"{folder.path} was made with other settings:\n  " + "\n  ".join(changed) + "\n"
                "give those again, or use overwrite=true to make it anew, or another run=NAME"
            )
        if folder.finished or cfg.resume:
            _check_chain(job, name)
        if folder.finished and len(job.stages) == 1 and not cfg.resume:
            raise UsageError(
                f"{folder.path} is finished; overwrite=true makes it anew, run=NAME keeps it and "
                "makes another, resume=true shows its result"
            )
        if not folder.finished and folder.checkpoint.is_file() and not cfg.resume:
            raise UsageError(
                f"{folder.path} holds an unfinished run; resume=true goes on where it stopped, "
                "overwrite=true starts anew"
            )


def _check_chain(job: Job, name: str) -> None:
    """Refuse to reuse a run whose upstream was made anew since."""
    upstream = job.upstream(name)
    if upstream and job.folder(upstream[0]).finished:
        job.folder(name).check_upstream(job.folder(upstream[0]))


def _changed(saved: Any, cfg: DictConfig, name: str) -> list[str]:
    """Settings of a stage that differ from those its folder was made with."""
    parts = ("seed", "dataset", "backbone", "augment", name)
    old, new = (_flat({key: each[key] for key in parts}) for each in (saved, cfg))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in ("dataset.cache_dir", "dataset.on_bad_image")
    ]


def _check_upstream(job: Job, name: str, upstream: RunFolder, images: ImageSet) -> None:
    if not upstream.finished:
        stage = upstream.path.parent.name
        same = [text for text in job.overrides if not text.startswith(("stage=", "overwrite="))]
        sweep = ["-m"] if job.sweep else []  # its folders have other names
        command = shlex.join(["python", "train.py", *sweep, f"stage={stage}", *same])
        raise UsageError(
            f"stage={name} reads what stage={stage} leaves in {upstream.path}, and that is not "
            f"there; make it with\n  {command}\nor run all stages with stage=all"
        )
    upstream.check_dataset(images.fingerprint, len(images))


def _stamp(job: Job, folder: RunFolder, *, keep: bool) -> None:
    """Write the settings of a run; forget what an earlier run left there unless it goes on."""
    curve = folder.path / "metrics.csv"
    if keep and curve.is_file():  # the logger starts a new file
        curve.rename(folder.path / f"metrics.{len(list(folder.path.glob('metrics*.csv')))}.csv")
    if not keep:
        for file in (folder.path / "metrics.json", *folder.path.glob("metrics*.csv")):
            file.unlink(missing_ok=True)
        folder.checkpoint.unlink(missing_ok=True)
    hidden = folder.path / ".hydra"
    hidden.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(job.cfg, hidden / "config.yaml", resolve=True)
    OmegaConf.save(OmegaConf.create(list(job.overrides)), hidden / "overrides.yaml")


def _trainer(job: Job, name: str, callbacks: list[pl.Callback], *, watch: bool) -> pl.Trainer:
    cfg, path = job.cfg, job.folder(name).path
    loggers = [
        _build(
            cfg,
            {
                key: text.format(stage=name) if isinstance(text, str) else text
                for key, text in settings.items()
            },
            save_dir=str(path),
        )
        for settings in cfg.logger.values()
    ]
    dashboards = [each for each in loggers if not isinstance(each, pl.loggers.CSVLogger)]
    for each in dashboards:
        each.log_hyperparams(_flat({key: cfg[key] for key in ("seed", "dataset", name)}))
    callbacks += [
        StageProgress(name),
        NanGuard(name),
        ModelCheckpoint(
            dirpath=path,
            filename="last",
            every_n_epochs=int(cfg[name].checkpoint_epochs),
            save_on_train_epoch_end=True,  # whatever watch_epochs is, and after NanGuard
            enable_version_counter=False,
        ),
    ]
    if dashboards:
        callbacks.append(LearningRateMonitor("epoch"))
    settings = dict(cfg.trainer)
    if settings["precision"] == "auto":
        settings["precision"] = _precision(str(settings["accelerator"]))
    trainer: pl.Trainer = _build(
        cfg,
        settings,
        max_epochs=int(cfg[name].epochs),
        check_val_every_n_epoch=int(cfg[name].watch_epochs),
        limit_val_batches=None if watch else 0,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(path),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    return trainer


def _progress(trainer: pl.Trainer) -> StageProgress:
    return next(each for each in trainer.callbacks if isinstance(each, StageProgress))  # type: ignore[attr-defined]


def _precision(accelerator: str) -> str:
    """bfloat16 where the hardware multiplies in it, else float32; emulation is far slower."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def _num_ranks(cfg: DictConfig) -> int:
    """Processes to start on this machine; only strategies of the ddp family have several."""
    if str(cfg.trainer.accelerator) in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator={cfg.trainer.accelerator} finds no GPU; use trainer=auto, or "
            "trainer=ddp_cpu for several processes on the processor"
        )
    if not str(cfg.trainer.strategy).startswith("ddp"):
        return 1
    devices = cfg.trainer.devices
    return torch.cuda.device_count() if devices in (-1, "auto") else int(devices)


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def _build(cfg: DictConfig, value: Any, **more: Any) -> Any:
    """Instantiate what `_target_` names, if it lies in a package that may be called."""
    allowed = (*ALLOWED_TARGETS, *(f"{name}." for name in cfg.allow_targets))
    for key, target in _flat(value).items():
        if key.rpartition(".")[2] == "_target_" and not _is_within(str(target), allowed):
            raise UsageError(
                f"_target_ {target} lies outside {', '.join(allowed)}; if you trust it, add "
                f"allow_targets=[{str(target).partition('.')[0]}]"
            )
    try:
        return hydra.utils.instantiate(value, **more, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # said by the callable itself: clear enough
            raise UsageError(str(error.__cause__)) from error
        raise


def _is_within(target: str, allowed: tuple[str, ...]) -> bool:
    """Whether a target is named, and defined, in one of these packages (torch.os is not torch)."""
    if not target.startswith(allowed):
        return False
    try:
        home = getattr(hydra.utils.get_object(target), "__module__", None)
    except (ImportError, AttributeError, ValueError):
        return True  # there is no such thing; instantiate says so
    return f"{home}.".startswith(allowed)


def _show(path: Path, metrics: Mapping[str, Any]) -> None:
    Console().print(results_rich([ResultRow(**row) for row in metrics["rows"]]))
    for file, what in (
        ("report.html", "look at the clusters"),
        ("clusters.csv", "one line an image"),
        ("metrics.json", "scores, settings, cost"),
    ):
        if (path / file).is_file():
            print(f"{path / file}  {what}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _options(group: str) -> list[str]:
    """Names of the options of a config group, over all places that Hydra looks in."""
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _missing(value: Any, prefix: str = "") -> list[str]:
    """Dotted keys that must be given and were not."""
    if not isinstance(value, DictConfig):
        return []
    found = []
    for key in map(str, value):
        name = prefix + key
        if OmegaConf.is_missing(value, key):
            found.append(name)
        elif not OmegaConf.is_interpolation(value, key):
            found += _missing(value[key], f"{name}.")
    return found


def _dump(job: Job) -> str:
    settings = {
        "cfg": OmegaConf.to_container(job.cfg, resolve=True),
        "overrides": list(job.overrides),
        "preset": job.preset,
        "sweep": job.sweep,
    }
    return OmegaConf.to_yaml(OmegaConf.create(settings))


def _quiet() -> None:
    """Keep what a person cannot act on out of the log."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for known in (
        "does not have many workers",  # images are in memory, whole batches at a time
        "Checkpoint directory .* exists and is not empty",
        "Experiment logs directory .* exists and is not empty",
        "torch.distributed.nn.functional.all_gather is deprecated",  # inside Lightning
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{known}.*")


def _with_clear_errors(job: Job) -> float | None:
    try:
        return run_stages(job)
    except UsageError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        if job.sweep:  # Hydra goes on with the other trials and reports the failed one at the end
            raise
        raise SystemExit(2) from error


def _run_rank(file: str) -> None:
    """Run one rank of a job that the parent wrote to a file."""
    level = logging.INFO if _is_first_rank() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    job = OmegaConf.load(file)
    try:
        run_stages(Job(job.cfg, tuple(job.overrides), str(job.preset), bool(job.sweep)))
    except UsageError as error:  # every rank has it; the parent says it once
        Path(f"{file}.error{os.environ['RANK']}").write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from error


if __name__ == "__main__":
    _run_rank(sys.argv[1])
