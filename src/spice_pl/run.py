"""From settings to results: seed, build, fit, predict, score, write. The only file with Hydra.

`train.py` hands a composed config to `main`; with several devices each rank runs this file as
`python -m spice_pl.run FILE` instead.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from rich.console import Console
from torch.nn import functional as F

from spice_pl import launch
from spice_pl.artifacts import RunFolder
from spice_pl.baselines import kmeans_clusters
from spice_pl.callbacks.nan import NanGuard
from spice_pl.callbacks.predictions import PredictionWriter
from spice_pl.callbacks.progress import StageProgress
from spice_pl.callbacks.truth import TruthMonitor
from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.reliability import local_consistency, select_reliable
from spice_pl.reports.page import ReportData, write_report
from spice_pl.reports.tables import ResultRow, results_markdown, results_rich
from spice_pl.stages.base import Stage

logger = logging.getLogger(__name__)

OmegaConf.register_new_resolver(
    "folder_name", lambda root: Path(str(root)).expanduser().resolve().name, replace=True
)

ALLOWED_TARGETS = ("spice_pl.", "torch.", "torchvision.", "timm.", "pytorch_lightning.")
# Settings that change where or how a run goes, but not what it computes.
NOT_IN_NAMES = {
    "stage", "dataset", "run", "seed", "resume", "overwrite", "runs_dir", "cache_dir", "trainer",
    "logger", "on_bad_image", "allow_targets", "experiment", "preset",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One job: its composed config and the command line it came from."""

    cfg: DictConfig
    overrides: tuple[str, ...]
    preset: str
    sweep: bool

    def folder(self, stage: str) -> RunFolder:
        """Return where a stage's artifacts live: runs/<dataset>/<stage>/<run>."""
        cfg = self.cfg
        name = str(cfg.run) + self._swept(stage)
        return RunFolder(Path(cfg.runs_dir, str(cfg.dataset.name), stage, name))

    def upstream(self, stage: str) -> str | None:
        """Return the name of the stage whose artifacts `stage` reads."""
        name = self.cfg[stage].get("upstream")
        return None if name is None else str(name)

    def _swept(self, stage: str) -> str:
        """In a sweep, the settings that reach this stage, so that trials have their own folder."""
        if not self.sweep:
            return ""
        chain, name = {stage}, self.upstream(stage)
        while name is not None:
            chain.add(name)
            name = self.upstream(name)
        stages = {key for key, value in self.cfg.items() if "upstream" in _keys(value)}
        parts = []
        for override in self.overrides:
            key = override.lstrip("+~").partition("=")[0]
            first = key.partition(".")[0].partition("@")[0]
            if first not in NOT_IN_NAMES or key == "dataset.num_clusters":
                if first in stages and first not in chain:
                    continue
                parts.append(override.lstrip("+~").replace("/", "_").replace(" ", ""))
        text = ",".join(sorted(parts))
        if len(text) > 150:
            digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
            text = f"{text[:140]}-{digest}"
        return f",{text}" if text else ""


def main(cfg: DictConfig) -> float | None:
    """Run the job that Hydra composed; return the label-free objective for sweeps.

    Raises:
        SystemExit: code 2 with one clear message, for mistakes that a person can mend.
    """
    hydra_config = HydraConfig.get()
    job = Job(
        cfg=cfg,
        overrides=tuple(hydra_config.overrides.task),
        preset=str(hydra_config.runtime.choices.get("preset")),
        sweep=hydra_config.mode == RunMode.MULTIRUN,
    )
    return _with_clear_errors(job)


def run_stages(job: Job) -> float | None:
    """Run the stages of a job in order, reusing those that are finished; return the objective.

    Raises:
        UsageError: a setting, the data or an earlier artifact does not fit.
    """
    _quiet()
    cfg = job.cfg
    OmegaConf.set_struct(cfg, True)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UsageError(f"no value for {', '.join(missing)}; give it on the command line")
    stages = [str(name) for name in cfg.stages]
    _check_folders(job, stages)
    num_ranks = _num_ranks(cfg)
    if num_ranks > 1 and not launch.in_rank():
        todo = [name for name in stages if not job.folder(name).finished or cfg.overwrite]
        if todo:
            launch.launch_ranks(num_ranks, _dump(job))
        metrics = job.folder(stages[-1]).metrics
    else:
        metrics = _run_here(job, stages)
    objective = metrics.get("objective")
    return None if objective is None else float(objective)


def _run_here(job: Job, stages: Sequence[str]) -> dict[str, Any]:
    cfg = job.cfg
    metrics: dict[str, Any] = {}
    images: ImageSet | None = None
    for name in stages:
        folder = job.folder(name)
        if folder.finished and not cfg.overwrite:
            logger.info("%s: finished earlier, reused (%s)", name, folder.path)
            metrics = folder.metrics
            continue
        if images is None:
            images = _images(cfg, job)
            logger.info("preset: %s", "none" if job.preset == "None" else job.preset)
        metrics = _run_stage(job, name, images)
    if _is_first_rank():
        _show(job, stages[-1], metrics)
    return metrics


def _run_stage(job: Job, name: str, images: ImageSet) -> dict[str, Any]:
    """Fit one stage, predict every image, score, write; return its metrics."""
    cfg, folder, started = job.cfg, job.folder(name), time.monotonic()
    stage_cfg = cfg[name]
    upstream = _upstream(job, name, images)
    pl.seed_everything(int(cfg.seed), verbose=False)
    streams = {key: _instantiate(cfg, value) for key, value in stage_cfg.streams.items()}
    module: Stage = _instantiate(cfg, stage_cfg.module)
    streams = dict(module.prepare(images, upstream, streams))
    data = ViewsDataModule(
        images, streams, _instantiate(cfg, cfg.augment.plain), seed=int(cfg.seed), stage=name
    )
    shapes = {"features.npy": (len(images), int(module.encoder.num_features))}  # type: ignore[union-attr, arg-type]
    if module.has_clusters:
        shapes["probs.npy"] = (len(images), int(cfg.dataset.num_clusters))
    trainer = _trainer(job, name, folder, images, PredictionWriter(folder, shapes), module)
    resume = cfg.resume and folder.checkpoint.is_file()
    if _is_first_rank():
        _save_config(job, folder)
        folder.write_dataset(images.name, images.fingerprint, len(images))
        logger.info("%s: %s %s", name, "goes on in" if resume else "starts in", folder.path)
    trainer.fit(module, data, ckpt_path=folder.checkpoint if resume else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    trainer.predict(module, data, return_predictions=False)
    if trainer.is_global_zero:
        for part, weights in module.weights().items():
            folder.write_weights(f"{part}.safetensors", weights)
        _write_results(job, name, images, trainer, upstream, time.monotonic() - started)
    trainer.strategy.barrier("stage written")
    for each in trainer.loggers:
        each.finalize("success")
    return folder.metrics


def _write_results(
    job: Job,
    name: str,
    images: ImageSet,
    trainer: pl.Trainer,
    upstream: RunFolder | None,
    seconds: float,
) -> None:
    """Score the predictions and write metrics.json, and for a clustering its table and page."""
    cfg, folder, num_clusters = job.cfg, job.folder(name), int(job.cfg.dataset.num_clusters)
    before = [ResultRow(**row) for row in upstream.metrics["rows"]] if upstream else []
    cost = seconds + (float(upstream.metrics["seconds_in_all"]) if upstream else 0.0)
    rows = list(before)
    logged = {key: float(value) for key, value in trainer.logged_metrics.items()}
    logged |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    if not job.cfg[name].get("title"):
        raise UsageError(f"conf: {name}.title is empty; it names the row of the table")
    title = str(job.cfg[name].title)
    if (folder.path / "probs.npy").is_file():
        clusters = folder.probs.argmax(axis=1).astype(np.int64)
        rows.append(_row(title, images, clusters, cfg, cost))
    else:
        for what, data in (("pixels", images.images), (f"{title} features", folder.features)):
            begun = time.monotonic()
            clusters = kmeans_clusters(data, num_clusters, int(cfg.seed))
            spent = time.monotonic() - begun
            rows.append(
                _row(f"k-means on {what}", images, clusters, cfg, spent + cost * (what != "pixels"))
            )
    metrics: dict[str, Any] = {
        "stage": name,
        "dataset": images.name,
        "protocol": images.protocol,
        "num_images": len(images),
        "num_clusters": num_clusters,
        "seed": int(cfg.seed),
        "preset": job.preset,
        "overrides": list(job.overrides),
        "seconds": seconds,
        "seconds_in_all": cost,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "versions": _versions(),
        "objective": _objective(logged),
        "logged": logged,
        "rows": [asdict(row) for row in rows],
    }
    if (folder.path / "probs.npy").is_file():
        _write_clusters(job, name, images, rows, metrics)
    folder.write_json("metrics.json", metrics)  # last: it marks the folder as finished


def _write_clusters(
    job: Job, name: str, images: ImageSet, rows: list[ResultRow], metrics: dict[str, Any]
) -> None:
    cfg, folder = job.cfg, job.folder(name)
    probs, features = folder.probs, torch.from_numpy(np.array(folder.features))
    clusters = probs.argmax(axis=1).astype(np.int64)  # (N,)
    confidence = probs.max(axis=1)
    agreement = local_consistency(
        F.normalize(features),
        torch.from_numpy(clusters),
        min(int(cfg.reliable.num_neighbors), len(images)),
    )
    reliable = select_reliable(
        agreement,
        torch.from_numpy(confidence),
        torch.from_numpy(clusters),
        agreement=float(cfg.reliable.agreement),
        confidence=float(cfg.reliable.confidence),
        balance=cfg.reliable.balance,
        generator=keyed_generator(int(cfg.seed)),
    )
    sizes = np.bincount(clusters, minlength=int(cfg.dataset.num_clusters))
    notes = [f"Cluster {i} is empty." for i in np.flatnonzero(sizes == 0)]
    metrics["cluster_sizes"] = sizes.tolist()
    metrics["mean_agreement"] = float(agreement.mean())
    metrics["mean_confidence"] = float(confidence.mean())
    metrics["reliable_fraction"] = float(reliable.float().mean())
    for note in notes:
        logger.warning(note)
    folder.write_clusters(
        images.keys, clusters, confidence, agreement.numpy(), reliable.numpy()
    )
    (folder.path / "table.md").write_text(results_markdown(rows), encoding="utf-8")
    write_report(
        ReportData(
            title=f"{images.name}: {len(images):,} images in {cfg.dataset.num_clusters} clusters",
            dataset=images.name,
            num_images=len(images),
            num_clusters=int(cfg.dataset.num_clusters),
            protocol=images.protocol,
            seed=int(cfg.seed),
            rows=rows[::-1],  # the page's headline is its first row
            images=lambda index: images.images[index],
            keys=images.keys,
            clusters=clusters,
            confidence=confidence,
            agreement=agreement.numpy(),
            reliable=reliable.numpy(),
            labels=images.labels,
            class_names=images.class_names,
            curves=_curves(job, name),
            skipped=images.skipped,
            settings={"command line": " ".join(job.overrides) or "(none)", **_settings(cfg, name)},
            versions=_versions(),
            notes=notes,
        ),
        folder.path / "report.html",
    )


def _row(
    title: str, images: ImageSet, clusters: NDArray[np.int64], cfg: DictConfig, seconds: float
) -> ResultRow:
    scores: dict[str, float] | dict[str, None] = {"acc": None, "nmi": None, "ari": None}
    if images.labels is not None:
        index = images.score_index[images.labels[images.score_index] >= 0]
        scores = clustering_scores(
            torch.from_numpy(clusters[index]), torch.from_numpy(images.labels[index])
        )
    return ResultRow(
        title, **scores, protocol=images.protocol, seed=int(cfg.seed), seconds=seconds
    )


def _images(cfg: DictConfig, job: Job) -> ImageSet:
    images: ImageSet = _instantiate(
        cfg, {key: value for key, value in cfg.dataset.items() if key not in ("num_clusters", "mean", "std")}
    )
    num_clusters, num_train = int(cfg.dataset.num_clusters), len(images.train_index)
    if not 2 <= num_clusters <= num_train:
        raise UsageError(
            f"dataset.num_clusters {num_clusters} is not between 2 and the {num_train} training "
            f"images of {images.name}"
        )
    truth = "with labels for truth/* metrics" if images.labels is not None else "without labels"
    logger.info(
        "%s: %d images of %d pixels %s, K = %d, protocol %s",
        images.name, len(images), images.images.shape[-1], truth, num_clusters, images.protocol,
    )  # fmt: skip
    return images


def _upstream(job: Job, name: str, images: ImageSet) -> RunFolder | None:
    upstream = job.upstream(name)
    if upstream is None:
        return None
    folder = job.folder(upstream)
    if not folder.finished:
        command = ["python train.py", f"stage={upstream}"]
        command += [text for text in job.overrides if not text.startswith(("stage=", "overwrite="))]
        raise UsageError(
            f"stage={name} needs the artifacts of {upstream} in {folder.path}, which are not "
            f"there; make them with\n  {' '.join(command)}\nor run all stages with stage=all"
        )
    folder.check_dataset(images.fingerprint, len(images))
    return folder


def _check_folders(job: Job, stages: Sequence[str]) -> None:
    """Refuse to mix with what earlier runs left, before any work starts."""
    cfg = job.cfg
    if cfg.overwrite and cfg.resume:
        raise UsageError("overwrite=true and resume=true exclude each other; give one of them")
    if cfg.overwrite:
        return
    for name in stages:
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
        if folder.finished and len(stages) == 1 and not cfg.resume:
            raise UsageError(
                f"{folder.path} is finished; use overwrite=true to make it anew or another "
                "run=NAME (resume=true shows its result)"
            )
        if not folder.finished and folder.checkpoint.is_file() and not cfg.resume:
            raise UsageError(
                f"{folder.path} holds an unfinished run; resume=true goes on where it stopped, "
                "overwrite=true starts anew"
            )


def _changed(saved: Any, cfg: DictConfig, name: str) -> list[str]:
    """Settings of a stage that differ from those its folder was made with."""
    shared = ("seed", "dataset", "backbone", "augment", name)
    old, new = (_flat({key: each.get(key) for key in shared}) for each in (saved, cfg))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _trainer(
    job: Job,
    name: str,
    folder: RunFolder,
    images: ImageSet,
    writer: PredictionWriter,
    module: Stage,
) -> pl.Trainer:
    cfg = job.cfg
    callbacks: list[pl.Callback] = [
        StageProgress(name),
        NanGuard(name),
        writer,
        ModelCheckpoint(
            dirpath=folder.path,
            filename="last",
            every_n_epochs=int(cfg[name].checkpoint_epochs),
            enable_version_counter=False,
        ),
    ]
    if module.has_clusters and images.labels is not None:
        callbacks.append(TruthMonitor(images.labels, int(cfg.dataset.num_clusters)))
    loggers = [_logger(cfg, value, folder, name) for value in cfg.logger.values()]
    if any(not isinstance(each, pl.loggers.CSVLogger) for each in loggers):
        callbacks.append(LearningRateMonitor("epoch"))
    settings = dict(cfg.trainer)
    if settings["precision"] == "auto":
        settings["precision"] = _precision(str(settings["accelerator"]))
    return _instantiate(  # type: ignore[no-any-return]
        cfg,
        settings,
        max_epochs=int(cfg[name].epochs),
        check_val_every_n_epoch=int(cfg[name].watch_epochs),
        limit_val_batches=1.0 if module.has_clusters else 0,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(folder.path),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _logger(cfg: DictConfig, value: DictConfig, folder: RunFolder, name: str) -> Any:
    made = _instantiate(cfg, value, save_dir=str(folder.path))
    if _is_first_rank() and not isinstance(made, pl.loggers.CSVLogger):
        made.log_hyperparams(_flat({key: cfg[key] for key in ("seed", "dataset", "backbone", name)}))
    return made


def _precision(accelerator: str) -> str:
    """bfloat16 where the hardware multiplies in it, else float32 (emulation is far slower)."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def _num_ranks(cfg: DictConfig) -> int:
    """Processes on this machine; only strategies of the ddp family start more than one."""
    if not str(cfg.trainer.strategy).startswith("ddp"):
        return 1
    devices = cfg.trainer.devices
    return torch.cuda.device_count() if devices in (-1, "auto") else int(devices)


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def _instantiate(cfg: DictConfig, value: Any, **more: Any) -> Any:
    """Build what `_target_` names, if it lies in a package that may be called."""
    allowed = (*ALLOWED_TARGETS, *(f"{name}." for name in cfg.allow_targets))
    for key, target in _flat(value).items():
        if key.split(".")[-1] == "_target_" and not str(target).startswith(allowed):
            raise UsageError(
                f"_target_ {target} lies outside {', '.join(allowed)}; if you trust it, add "
                f"allow_targets=[{str(target).split('.')[0]}]"
            )
    return hydra.utils.instantiate(value, **more, _convert_="all")


def _objective(logged: Mapping[str, float]) -> float | None:
    """What a sweep minimises; never made with labels."""
    return next((logged[key] for key in ("val/selection_loss", "train/loss") if key in logged), None)


def _curves(job: Job, name: str | None) -> dict[str, list[tuple[int, float]]]:
    """Loss by epoch of a stage and those before it, from their CSV logs."""
    curves: dict[str, list[tuple[int, float]]] = {}
    while name is not None:
        path = job.folder(name).path / "metrics.csv"
        if path.is_file():
            table = np.genfromtxt(path, delimiter=",", names=True, deletechars="", encoding="utf-8")
            names = table.dtype.names or ()
            if "train/loss" in names:
                kept = np.atleast_1d(table)[["epoch", "train/loss"]]
                curves[name] = [(int(e), float(v)) for e, v in kept if np.isfinite(v)]
        name = job.upstream(name)
    return dict(reversed(curves.items()))


def _show(job: Job, name: str, metrics: Mapping[str, Any]) -> None:
    rows = [ResultRow(**row) for row in metrics["rows"]]
    Console().print(results_rich(rows))
    folder = job.folder(name).path
    for file, what in (
        ("report.html", "look at the clusters"),
        ("clusters.csv", "one line an image"),
        ("metrics.json", "scores, settings, cost"),
    ):
        if (folder / file).is_file():
            print(f"{folder / file}  {what}")


def _save_config(job: Job, folder: RunFolder) -> None:
    hidden = folder.path / ".hydra"
    hidden.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(job.cfg, hidden / "config.yaml", resolve=True)
    OmegaConf.save(OmegaConf.create(list(job.overrides)), hidden / "overrides.yaml")
    if not job.cfg.resume:
        for file in ("metrics.json", "metrics.csv", "last.ckpt"):
            (folder.path / file).unlink(missing_ok=True)


def _settings(cfg: DictConfig, name: str) -> dict[str, str]:
    chosen = _flat({key: cfg[key] for key in ("dataset", "backbone", name)})
    return {key: str(value) for key, value in chosen.items()}


def _versions() -> dict[str, str]:
    packages = ("spice-pl", "torch", "torchvision", "pytorch-lightning", "hydra-core")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


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


def _keys(value: Any) -> Sequence[str]:
    return list(value.keys()) if isinstance(value, DictConfig) else ()


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
    for name in ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def _with_clear_errors(job: Job) -> float | None:
    try:
        return run_stages(job)
    except UsageError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run_rank(file: str) -> None:
    """Run one rank of a job that the parent wrote to a file."""
    first = _is_first_rank()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    job = OmegaConf.load(file)
    _with_clear_errors(
        Job(job.cfg, tuple(job.overrides), str(job.preset), bool(job.sweep))
    )


if __name__ == "__main__":
    _run_rank(sys.argv[1])
