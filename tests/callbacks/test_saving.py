"""How often is saved, and how often several processes agree on it."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from spice_pl.callbacks import checkpoints as module
from spice_pl.callbacks.checkpoints import Checkpoints
from spice_pl.callbacks.nan import NanGuard
from spice_pl.system.interrupts import Interrupts, Stopped


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Trainer(SimpleNamespace):
    """What `Checkpoints` asks a trainer for; saving takes `seconds`."""

    def save_checkpoint(self, path: Path) -> None:
        self.clock.now += self.seconds
        self.saved.append(self.current_epoch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(NanGuard, "check", lambda *_: None)
    return made


def parts(clock: Clock, *, seconds: float, world_size: int = 1) -> tuple[Checkpoints, Any, Any]:
    made = Checkpoints(Path("x"), NanGuard("moco"), Interrupts(), every_minutes=10, seed=0)
    progress = SimpleNamespace(current=SimpleNamespace(started=0, processed=0))
    trainer = Trainer(
        clock=clock,
        seconds=seconds,
        saved=[],
        current_epoch=0,
        global_rank=0,
        world_size=world_size,
        loggers=[],
        fit_loop=SimpleNamespace(epoch_progress=progress),
    )
    stage = SimpleNamespace(resumable=True, epoch_sums={})
    return made, trainer, stage


def epochs(made: Checkpoints, trainer: Any, stage: Any, count: int, *, seconds: float) -> None:
    for epoch in range(count):
        trainer.current_epoch = epoch
        made.on_train_batch_start(trainer, stage, None, 0)
        trainer.clock.now += seconds


@pytest.mark.parametrize(
    ("epoch_seconds", "save_seconds", "gap"),
    [(60.0, 0.5, 1), (1.0, 0.5, 26), (10.0, 1.0, 6)],
)
def test_saving_takes_at_most_two_percent_of_the_time(
    epoch_seconds: float,
    save_seconds: float,
    gap: int,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "as_stage", lambda stage: stage)
    made, trainer, stage = parts(clock, seconds=save_seconds)
    made.on_train_start(trainer, stage)
    epochs(made, trainer, stage, 200, seconds=epoch_seconds)
    saved = trainer.saved
    assert saved[0] == 1  # nothing is known yet about the cost
    assert max(b - a for a, b in pairwise(saved)) <= gap
    assert (len(saved) - 1) * save_seconds <= 0.02 * clock.now


def test_slow_saving_of_long_epochs_is_bounded_by_minutes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "as_stage", lambda stage: stage)
    made, trainer, stage = parts(clock, seconds=60)  # 2 % would be 50 minutes
    made.on_train_start(trainer, stage)
    epochs(made, trainer, stage, 40, seconds=60)
    assert len(trainer.saved) >= 3


def test_processes_agree_once_per_second_and_a_wish_waits_for_the_stage(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreements: list[list[int]] = []

    def all_reduce(tensor: Tensor, *_: object, **__: object) -> None:
        agreements.append(tensor.tolist())

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(module, "as_stage", lambda stage: stage)
    made, trainer, stage = parts(clock, seconds=0.01, world_size=2)
    made.on_train_start(trainer, stage)
    for _ in range(200):  # batches of 50 ms
        clock.now += 0.05
        made.on_train_batch_start(trainer, stage, None, 1)
    assert 9 <= len(agreements) <= 14
    stage.resumable = False
    made.interrupts.asked = signal.SIGTERM
    for _ in range(40):
        clock.now += 0.05
        made.on_train_batch_start(trainer, stage, None, 1)
    assert not trainer.saved
    stage.resumable = True
    with pytest.raises(Stopped):
        made.on_train_batch_start(trainer, stage, None, 1)
    assert trainer.saved == [0]
