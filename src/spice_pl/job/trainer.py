"""The trainer of a stage, as its settings describe it: loggers, callbacks, precision, processes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from spice_pl.callbacks.checkpoints import CheckpointFile, Checkpoints
from spice_pl.callbacks.compiling import Compiling
from spice_pl.callbacks.dashboards import run_id
from spice_pl.callbacks.metrics_csv import CurveLogger
from spice_pl.callbacks.nan import NanGuard
from spice_pl.callbacks.stage_progress import StageProgress
from spice_pl.errors import UsageError
from spice_pl.job.job import Job
from spice_pl.job.plan import Step
from spice_pl.job.settings import build, flat, masked
from spice_pl.system import ranks
from spice_pl.system.interrupts import Interrupts

logger = logging.getLogger(__name__)

OURS = ("data", "compile")  # settings of trainer.* that are not arguments of Lightning's trainer
STRATEGIES = (
    *("auto", "ddp"),
    *("ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
)
PATIENCE = timedelta(days=1)  # of a collective: rank 0 writes results while the others wait


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
    callbacks = [
        *callbacks,
        StageProgress(job.part_name(step.name), plain=job.plain),
        guard,
        checkpoints,
    ]
    compile_mode = str(step.settings["trainer"].get("compile", False)).lower()
    callbacks.append(Compiling(compile_mode))
    if dashboards:
        callbacks.append(LearningRateMonitor("epoch"))
    settings = trainer_settings(step.settings["trainer"])
    made: dict[str, Any] = {}
    if isinstance(settings.get("strategy"), DDPStrategy):  # an object, which is no setting
        made["strategy"] = settings.pop("strategy")
    plugins: list[Any] = [CheckpointFile()]
    if not ranks.in_rank():  # else Lightning takes the variables of salloc for those of srun
        plugins.append(LightningEnvironment())
    trainer: pl.Trainer = build(
        job.cfg,
        settings,
        **made,
        max_epochs=step.epochs,
        check_val_every_n_epoch=step.watch_epochs,
        callbacks=callbacks,
        plugins=plugins,
        logger=loggers,
        default_root_dir=str(path),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    # Lightning's own handlers stop before anything is saved, and broadcast inside a handler.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # With them it has no signal to broadcast, which it would do in every batch and wait for.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
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
    if not target.endswith(".WandbLogger") or not ranks.is_first_rank():
        return {}
    return {"id": run_id(step.folder.path, keep=step.continues), "resume": "allow"}


def progress(trainer: pl.Trainer) -> StageProgress:
    """Return the callback that keeps the time."""
    return next(each for each in trainer.callbacks if isinstance(each, StageProgress))  # type: ignore[attr-defined]


def trainer_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the trainer, with precision, devices and strategy settled.

    `accelerator: auto` is CUDA or the processor. On a GPU float32 products use TF32, and cuDNN
    tries its algorithms once per shape of a batch.

    Raises:
        UsageError: the machine does not have what is asked for.
    """
    settings = dict(given)
    for ours in OURS:
        settings.pop(ours, None)
    count, gpu = num_devices(settings), on_gpu(settings)
    if settings.get("precision") == "auto":
        chosen = _chosen_gpus(settings) if gpu else ()
        settings["precision"] = auto_precision(str(settings["accelerator"]), chosen)
        _say_if_mixed(chosen, settings["precision"])
    if settings.get("sync_batchnorm") and not gpu:
        raise UsageError(
            "trainer.sync_batchnorm=true needs GPUs; on the processor each process has its own "
            "BatchNorm statistics"
        )
    settings["devices"] = _device_choice(settings) if gpu else count
    if isinstance(settings.get("strategy"), str):
        several = count > 1 or int(settings.get("num_nodes") or 1) > 1 or ranks.in_rank()
        if several or settings["strategy"] != "auto":
            settings["strategy"] = _ddp(str(settings["strategy"]))
    if settings["accelerator"] == "auto":  # Lightning's own would take Apple's GPU: no float64
        settings["accelerator"] = "cuda" if gpu else "cpu"
    if gpu:
        torch.set_float32_matmul_precision("high")
        settings.setdefault("benchmark", not settings.get("deterministic"))
    return settings


def _ddp(strategy: str) -> DDPStrategy:
    """Return DDP with local BatchNorm statistics and time for what rank 0 does alone."""
    # Else the queue and all statistics travel in every step. Torch 2.14 renamed the argument.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    local: dict[str, Any] = {sync: False}
    return DDPStrategy(
        **local,
        find_unused_parameters=strategy.endswith("unused_parameters_true"),
        timeout=PATIENCE,
    )


def auto_precision(accelerator: str, gpus: Sequence[int] = (0,)) -> str:
    """bfloat16 where the hardware multiplies in it, float16 on other GPUs with tensor cores.

    Else float32; emulation is far slower. All `gpus` of a run have the same precision, one that
    each of them has.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        least = min(torch.cuda.get_device_capability(each) for each in gpus)
        if torch.cuda.is_bf16_supported(including_emulation=False) and least[0] >= 8:
            return "bf16-mixed"
        return "16-mixed" if least[0] >= 7 else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def _chosen_gpus(settings: Mapping[str, Any]) -> Sequence[int]:
    """Return the numbers of the GPUs that the settings ask for."""
    choice = _device_choice(settings)
    if isinstance(choice, list):
        return choice
    return range(torch.cuda.device_count() if choice == -1 else choice)


def _say_if_mixed(gpus: Sequence[int], precision: str) -> None:
    """Log that the GPUs of a run are of several kinds, and what follows."""
    names = sorted({torch.cuda.get_device_name(each) for each in gpus})
    if len(names) > 1 and ranks.is_first_rank():
        logger.warning(
            "the GPUs differ (%s): trainer.precision=auto is %s, which all of them have, and a "
            "step takes as long as on the slowest; trainer.devices=[0,...] names those to use",
            ", ".join(names),
            precision,
        )


def on_gpu(settings: Mapping[str, Any]) -> bool:
    """Whether these settings of the trainer use CUDA on this machine."""
    return str(settings["accelerator"]) in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def num_devices(settings: Mapping[str, Any]) -> int:
    """Return the number of devices, and so of processes, that the settings ask for.

    Raises:
        UsageError: there is no GPU, or fewer than asked for, or `devices` is not understood.
    """
    accelerator = str(settings["accelerator"])
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator={accelerator} finds no GPU; use trainer=auto, or "
            "trainer=ddp_cpu for several processes on the processor"
        )
    choice, gpu = _device_choice(settings), on_gpu(settings)
    present = torch.cuda.device_count() if gpu else 1
    if choice == -1:
        return present
    chosen = choice if isinstance(choice, list) else range(choice)
    if gpu and len(chosen) and max(chosen) >= present:
        raise UsageError(
            f"trainer.devices={settings['devices']} asks for GPU {max(chosen)} and this machine "
            f"has {present}, numbered from 0; give at most trainer.devices={present}"
        )
    if not gpu and accelerator == "auto" and len(chosen) > 1:
        raise UsageError(
            f"trainer.devices={settings['devices']} finds no GPU; use trainer=ddp_cpu for several "
            "processes on the processor"
        )
    return len(chosen)


def _device_choice(settings: Mapping[str, Any]) -> int | list[int]:
    """Return a number of devices, -1 for all, or a list of GPUs."""
    given = settings.get("devices", 1)
    if given in ("auto", -1, "-1"):
        return -1
    if isinstance(given, str) and "," in given:
        given = [each for each in given.split(",") if each.strip()]
    try:
        if isinstance(given, int | str):
            number = int(given)
            if number > 0:
                return number
        else:
            listed = [int(each) for each in given]
            if listed and len(set(listed)) == len(listed) and min(listed) >= 0:
                return listed
    except (TypeError, ValueError):
        pass  # said below
    raise UsageError(
        f"trainer.devices={settings.get('devices')} is neither a number of devices, nor -1 or auto "
        "for all, nor a list of GPUs such as [0,1]"
    )


def num_ranks(cfg: DictConfig) -> int:
    """Return the number of processes to start on this machine, one for each device.

    Raises:
        UsageError: the strategy is not one of one process per device that spice-pl starts.
    """
    settings: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    strategy = settings["strategy"]
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UsageError(
            f"trainer.strategy={strategy} is none of {', '.join(STRATEGIES)}; spice-pl starts one "
            "process per device itself, and each holds the whole network"
        )
    return num_devices(settings)
