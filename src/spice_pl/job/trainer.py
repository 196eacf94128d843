"""The trainer of a stage, as its settings describe it: loggers, callbacks, precision, processes."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger

from spice_pl.callbacks.checkpoints import CheckpointFile, Checkpoints
from spice_pl.callbacks.dashboards import run_id
from spice_pl.callbacks.metrics_csv import CurveLogger
from spice_pl.callbacks.nan import NanGuard
from spice_pl.callbacks.stage_progress import StageProgress
from spice_pl.errors import UsageError
from spice_pl.job.job import Job
from spice_pl.job.plan import Step
from spice_pl.job.settings import build, flat, masked
from spice_pl.system.interrupts import Interrupts
from spice_pl.system.ranks import is_first_rank


def make_trainer(
    job: Job, step: Step, callbacks: list[pl.Callback], interrupts: Interrupts
) -> pl.Trainer:
    """Return the trainer of a stage, with the callbacks that every stage has after those given."""
    path, loggers = step.folder.path, _loggers(job, step)
    dashboards = [each for each in loggers if not isinstance(each, CurveLogger)]
    guard = NanGuard(step.name)
    checkpoints = Checkpoints(
        step.folder.checkpoint,
        guard,
        interrupts,
        every_minutes=float(step.settings["checkpoint_minutes"]),
        seed=step.seed,
    )
    callbacks = [*callbacks, StageProgress(step.name), guard, checkpoints]
    if dashboards:
        callbacks.append(LearningRateMonitor("epoch"))
    settings = dict(step.settings["trainer"])
    if settings["precision"] == "auto":
        settings["precision"] = auto_precision(str(settings["accelerator"]))
    trainer: pl.Trainer = build(
        job.cfg,
        settings,
        max_epochs=step.epochs,
        check_val_every_n_epoch=step.watch_epochs,
        callbacks=callbacks,
        plugins=[CheckpointFile()],
        logger=loggers,
        default_root_dir=str(path),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    # Lightning's own handlers stop before anything is saved, and broadcast inside a handler.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _loggers(job: Job, step: Step) -> list[Logger]:
    """Return the loggers of a stage; dashboards get its settings."""
    loggers: list[Logger] = [
        build(
            job.cfg,
            {
                key: text.format(stage=step.name) if isinstance(text, str) else text
                for key, text in settings.items()
            },
            save_dir=str(step.folder.path),
            **_same_run(step, str(settings["_target_"])),
        )
        for settings in step.settings["logger"].values()
    ]
    kept = ("seed", "dataset", "backbone", "reliable", step.name)
    shown = flat(masked("", {key: step.settings[key] for key in kept}))
    for each in loggers:
        if not isinstance(each, CurveLogger):
            each.log_hyperparams(shown | {"preset": step.record.preset})
    return loggers


def _same_run(step: Step, target: str) -> dict[str, str]:
    """Return what makes a resumed stage continue its W&B run."""
    if not target.endswith(".WandbLogger") or not is_first_rank():
        return {}
    return {"id": run_id(step.folder.path, keep=step.continues), "resume": "allow"}


def progress(trainer: pl.Trainer) -> StageProgress:
    """Return the callback that keeps the time."""
    return next(each for each in trainer.callbacks if isinstance(each, StageProgress))  # type: ignore[attr-defined]


def auto_precision(accelerator: str) -> str:
    """bfloat16 where the hardware multiplies in it, else float32; emulation is far slower."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def num_ranks(cfg: DictConfig) -> int:
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
