"""Checkpoints, signals, damaged files and full disks: what is kept and what is reported."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Finished, run_as_a_person_does
from torch import nn

from spice_pl.callbacks.checkpoints import CheckpointFile, read_checkpoint
from spice_pl.callbacks.metrics_csv import CurveLogger
from spice_pl.errors import UsageError
from spice_pl.job.errors import clear_errors
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.proto import ProtoHeadModule
from spice_pl.system.files import atomic
from spice_pl.system.interrupts import RESUME_CODE, Interrupts, Stopped


def stop_at(patch: pytest.MonkeyPatch, stage: type, epoch: int, batch: int) -> None:
    """Ask a run to stop by a real SIGTERM, in a training step."""
    original = stage.training_step  # type: ignore[attr-defined]

    def training_step(self: Any, views: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, views, batch_idx)

    patch.setattr(stage, "training_step", training_step)


# Stop inside an epoch


@pytest.fixture
def stopped(finished: Finished) -> Finished:
    """Stage 2, asked to stop in the middle of a cycle of its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, ProtoHeadModule, 0, 0)
        with pytest.raises(SystemExit) as code:
            run_as_a_person_does(finished.job("stage=proto", "overwrite=true"))
    assert code.value.code == RESUME_CODE == 75
    return finished


def test_stop_is_between_two_cycles(stopped: Finished) -> None:
    saved = read_checkpoint(stopped.folder("proto").checkpoint)
    # A buffer of 40 images passes in batches of 25 and 15: the cycle ends after the second.
    assert (saved["epoch"], saved["ViewsDataModule"]["batches_done"]) == (0, 2)
    assert saved["epoch_sums"]["train/loss"].shape == (1, 2)


def test_run_that_was_stopped_inside_an_epoch_ends_as_a_straight_one(
    stopped: Finished, straight: Finished
) -> None:
    run_stages(stopped.job("stage=proto", "resume=true"))
    for name in ("head.safetensors", "probs.npy", "clusters.csv", "metrics.csv"):
        made, wanted = (each.folder("proto").path / name for each in (stopped, straight))
        assert made.read_bytes() == wanted.read_bytes(), name


def test_the_command_that_continues_is_printed(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stopped), clear_errors(finished.job("stage=proto", "overwrite=true")):
        raise Stopped
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "stopped; what was made is kept. Continue with"
    assert lines[1].startswith("  python train.py dataset=folder ")
    assert lines[1].endswith("stage=proto resume=true")


# Signals


def test_a_second_signal_stops_at_once() -> None:
    with Interrupts() as interrupts:
        interrupts.deferred = True
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), Interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_that_other_code_swallowed_is_still_a_stop() -> None:
    with pytest.raises(Stopped), Interrupts(), suppress(SystemExit):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_other_code_made_an_error_of_is_still_a_stop() -> None:
    def careless() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise AttributeError("half a list")

    with pytest.raises(Stopped), Interrupts():
        careless()
    while_saving = Interrupts()
    while_saving.deferred = True  # a failure then is reported as itself
    with pytest.raises(AttributeError), while_saving:
        careless()


# Damage


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    weight = torch.arange(500.0)
    CheckpointFile().save_checkpoint({"state_dict": {"weight": weight}, "epoch": 3}, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for position in generator.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except UsageError as error:
            assert "is damaged and cannot be resumed" in str(error)  # noqa: PT017 - some pass
            refused += 1
        else:  # a bit without meaning: a date, padding
            assert torch.equal(found["state_dict"]["weight"], weight)
            assert found["epoch"] == 3
    assert refused > 150


@pytest.mark.parametrize("length", [0, 1, 100, -1, -30])
def test_half_a_checkpoint_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "last.ckpt"
    CheckpointFile().save_checkpoint({"epoch": 1}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UsageError, match=r"last\.ckpt is damaged .*overwrite=true"):
        read_checkpoint(path)


def test_resume_from_a_damaged_checkpoint_says_so(finished: Finished) -> None:
    folder = finished.folder("moco")
    (folder.path / "metrics.json").unlink()
    content = bytearray(folder.checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    folder.checkpoint.write_bytes(content)
    with pytest.raises(UsageError, match=r"moco/seed0/last\.ckpt is damaged"):
        run_stages(finished.job("stage=moco", "resume=true"))


@pytest.mark.parametrize("name", ["encoder.safetensors", "features.npy"])
def test_upstream_with_a_flipped_bit_is_refused(finished: Finished, name: str) -> None:
    file = finished.folder("moco").path / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} has changed since it was written"):
        run_stages(finished.job("stage=proto", "overwrite=true"))


def test_a_run_leaves_one_checkpoint_and_no_other_hidden_file(straight: Finished) -> None:
    for stage in ("moco", "proto", "fixmatch"):
        names = [path.name for path in straight.folder(stage).path.iterdir()]
        assert [name for name in names if name.endswith(".ckpt")] == ["last.ckpt"]
        assert [name for name in names if name.startswith(".")] == [".hydra"]


# Full disks


def test_full_disk_is_one_clear_message(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as stopped:
        run_as_a_person_does(finished.job("stage=moco", "overwrite=true"))
    assert stopped.value.code == 2
    assert "error: no space left to write" in capsys.readouterr().err
    names = {path.name for path in finished.folder("moco").path.iterdir()}
    assert not names & {"last.ckpt", "metrics.json"}
    assert not [name for name in names if name.startswith(".") and name != ".hydra"]


@pytest.fixture
def _at_most_64_kb_a_file() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_at_most_64_kb_a_file")
def test_no_space_is_an_error_before_the_first_row_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(OSError, match="File too large"):
        folder.create("features.npy", (1000, 100))
    with pytest.raises(OSError, match="File too large"):
        folder.write_weights("encoder.safetensors", nn.Linear(200, 200))
    assert not (tmp_path / "encoder.safetensors").exists()


def test_disk_that_is_too_small_is_said_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_space(1)
    with pytest.raises(UsageError, match=r"needs about 1,000,000,000.0 GB .* another runs_dir"):
        folder.check_space(10**18)


# Two runs at once


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    folder, order = RunFolder(tmp_path / "run"), []

    def second() -> None:
        with folder.lock():
            order.append("second")

    with folder.lock():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


# Curves


def test_a_repeated_row_stands_once_where_it_stood(tmp_path: Path) -> None:
    logger = CurveLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, 3)
    logger.log_metrics({"train/loss": 1.0, "epoch": 1}, 6)
    logger.save()
    before = (tmp_path / "metrics.csv").read_text()
    assert before.splitlines() == ["epoch,step,train/loss", "0,3,2.0", "1,6,1.0"]
    again = CurveLogger(str(tmp_path))
    again.log_metrics({"train/loss": 1.0, "epoch": 1}, 6)
    again.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == before
    again.log_metrics({"val/confidence": 0.5, "epoch": 1}, 6)  # another row of the same step
    again.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == [
        "0,3,2.0,",
        "1,6,1.0,",
        "1,6,,0.5",
    ]


def test_atomic_write_reaches_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    noted("fsync")
    noted("replace")
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert calls == ["fsync", "replace", "fsync"]
