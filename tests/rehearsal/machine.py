"""Lightning on the pretended GPU: one device, or rank 0 of two with a strict NCCL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, ddp
from tests.rehearsal.device import DEVICE, NAME, OnDevice, RefusedError, Rehearsal

from spice_pl.job import outlook
from spice_pl.stages.base import as_stage

GLOO = "a group of the processors"
VIEW_FILES = ("data/augment.py", "data/operations.py", "data/keyed.py", "data/device_views.py")


class _Accelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    parse_devices = staticmethod(lambda devices: devices)
    get_parallel_devices = staticmethod(lambda devices: [DEVICE] * int(devices))
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: NAME)


class _Environment(LightningEnvironment):
    creates_processes_externally = True
    world_size = lambda *_: 2  # noqa: E731
    local_rank = lambda *_: 0  # noqa: E731


class _RankZero(DDPStrategy):
    """Rank 0 of two: no process group and no wrapper; `nccl` gives the collectives."""

    def setup_distributed(self) -> None:
        self.set_world_ranks()

    def _setup_model(self, model: Any) -> Any:
        return model

    def _register_ddp_hooks(self) -> None: ...


@dataclass
class Step:
    """What happened between the ends of two training batches."""

    waits: Counter[tuple[str, str]]
    launches: Counter[str]

    @property
    def view_launches(self) -> int:
        """Kernels that make views and their random numbers."""
        return sum(n for where, n in self.launches.items() if where.startswith(VIEW_FILES))


@dataclass
class Steps(pl.Callback):
    """Cut the counts of a rehearsal into training steps; the first of an epoch is left out."""

    steps: list[Step] = field(default_factory=list)
    addresses: list[dict[str, int]] = field(default_factory=list)
    rates: list[Any] = field(default_factory=list)
    epochs: list[Counter[tuple[str, str]]] = field(default_factory=list)  # waits of each, all
    _before: Step | None = None
    _epoch: Counter[tuple[str, str]] | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        now = Counter(Rehearsal.now.waits)
        if self._epoch is not None:
            self.epochs.append(now - self._epoch)
        self._before, self._epoch = None, now

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.addresses.append(_addresses(trainer, module))
        self.rates = [
            group["lr"]
            for each in trainer.lr_scheduler_configs
            for group in each.scheduler.optimizer.param_groups
        ]
        now = Step(Counter(Rehearsal.now.waits), Counter(Rehearsal.now.launches))
        if self._before is not None:
            before = self._before
            self.steps.append(Step(now.waits - before.waits, now.launches - before.launches))
        self._before = now


def _addresses(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, int]:
    """Return where each tensor is that lasts from step to step: weights, buffers, optimizers."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for number, optimizer in enumerate(trainer.optimizers):
        for place, group in enumerate(optimizer.param_groups):
            tensors[f"lr {number}.{place}"] = group["lr"]
        for place, state in enumerate(optimizer.state.values()):
            tensors |= {f"state {number}.{place}.{key}": each for key, each in state.items()}
    tensors |= {f"sums {name}": each for name, each in as_stage(module).epoch_sums.items()}
    return {
        name: each.held.data_ptr() for name, each in tensors.items() if isinstance(each, OnDevice)
    }


def _nccl(*tensors: torch.Tensor) -> None:
    if not all(isinstance(each, OnDevice) for each in tensors):
        raise RefusedError("NCCL gets a tensor of the processor")


def _all_reduce(tensor: torch.Tensor, *_: Any, group: Any = None, **__: Any) -> None:
    if group != GLOO:
        _nccl(tensor)
    elif isinstance(tensor, OnDevice):
        raise RefusedError("gloo gets a tensor of the GPU")


def _all_gather(out: list[torch.Tensor], tensor: torch.Tensor, *_: Any, **__: Any) -> None:
    _nccl(tensor, *out)
    for each in out:
        each.detach().copy_(tensor)


def _gather_with_gradient(tensor: torch.Tensor, group: Any = None) -> tuple[torch.Tensor, ...]:
    _nccl(tensor)
    return tensor, tensor


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch, count: int = 1) -> Iterator[Steps]:
    """Give every trainer one pretended GPU, or make it rank 0 of two."""
    real, steps = pl.Trainer, Steps()

    class Trainer(real):  # type: ignore[misc,valid-type]
        def __init__(
            self, *, plugins: Sequence[Any], callbacks: Sequence[Any], **settings: Any
        ) -> None:
            one = SingleDeviceStrategy(DEVICE)
            strategy = one if count == 1 else _RankZero(cluster_environment=_Environment())
            settings |= {"accelerator": _Accelerator(), "devices": count, "strategy": strategy}
            del settings["precision"]
            if count > 1:  # the strategy names its environment
                plugins = [each for each in plugins if not isinstance(each, LightningEnvironment)]
            super().__init__(
                plugins=[*plugins, MixedPrecision("bf16-mixed", NAME)],
                callbacks=[*callbacks, steps],
                **settings,
            )

    patch.setattr(pl, "Trainer", Trainer)
    patch.setattr(outlook, "_device", lambda _: str(DEVICE))  # the plan measures there too
    if count > 1:
        _pretend_nccl(patch)
    yield steps


def _pretend_nccl(patch: pytest.MonkeyPatch) -> None:
    """Replace torch's collectives by ones that refuse tensors of the processor, as NCCL does."""
    for name, value in {
        "is_initialized": lambda: True,
        "get_world_size": lambda *_: 2,
        "get_rank": lambda *_: 0,
        "get_backend": lambda *_: "nccl",
        "all_gather": _all_gather,
        "all_reduce": _all_reduce,
        "new_group": lambda *_, backend=None, **__: GLOO if backend == "gloo" else None,
        "barrier": lambda *_, **__: None,
        "broadcast": lambda tensor, *_, **__: _nccl(tensor),
        "broadcast_object_list": lambda *_, **__: None,
    }.items():
        patch.setattr(dist, name, value)
    patch.setattr(differentiable, "all_gather", _gather_with_gradient)
    patch.setattr(ddp, "_sync_module_states", lambda _: None)
