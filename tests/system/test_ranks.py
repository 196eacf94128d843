"""The process that starts the ranks: failures, signals, and what every rank is given.

Small scripts in place of Python play the ranks; test_ddp has real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.conftest import Finished, make_job
from tests.process import ROOT

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.system import ranks as launch
from spice_pl.system.interrupts import Stopped

Ranks = Callable[[str], Path]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Have every rank run a shell script with the arguments -m spice_pl.job.rank FILE."""

    def make(script: str) -> Path:
        program = tmp_path / "rank.sh"
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return tmp_path

    return make


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].startswith(" Z")


def processes(folder: Path, count: int) -> list[int]:
    """Wait until all ranks have written their process numbers; return them."""
    for _ in range(100):
        found = [path.read_text().strip() for path in folder.glob("pid*")]
        if len(found) == count and all(found):
            return [int(each) for each in found]
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def test_when_a_rank_fails_the_hanging_others_are_ended(ranks: Ranks) -> None:
    folder = ranks('trap "" TERM; echo $$ > ${0%/*}/pid$RANK; [ $RANK = 1 ] && exit 3; sleep 600')
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 ended with code 3; see its error above"):
        launch.launch_ranks(3, "", grace_s=0.5)
    assert time.monotonic() - started < 30
    assert not [each for each in processes(folder, 3) if alive(each)]


def test_a_rank_that_is_killed_ends_the_job(ranks: Ranks) -> None:
    ranks("[ $RANK = 0 ] && kill -9 $$; exec sleep 600")
    with pytest.raises(RuntimeError, match="rank 0 ended with code -9"):
        launch.launch_ranks(2, "", grace_s=0.5)


def test_a_mistake_is_reported_with_the_message_of_its_rank(ranks: Ranks) -> None:
    ranks('echo -n "lr is too large" > $3.error$RANK; exit 2')
    with pytest.raises(UsageError, match=r"^lr is too large$"):
        launch.launch_ranks(2, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_ranks_are_told_to_stop_and_waited_for(ranks: Ranks, number: signal.Signals) -> None:
    folder = ranks(
        "trap 'sleep 0.3; echo saved > ${0%/*}/saved$RANK; exit 75' TERM INT USR1\n"
        "echo $$ > ${0%/*}/pid$RANK; while true; do sleep 0.05; done"
    )

    def tell() -> None:
        processes(folder, 2)
        os.kill(os.getpid(), number)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(Stopped):
        launch.launch_ranks(2, "")
    teller.join()
    assert len(list(folder.glob("saved*"))) == 2
    assert not [each for each in processes(folder, 2) if alive(each)]


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, time\n"
        "from spice_pl.system import ranks as launch\n"
        "launch.end_with_parent()\n"
        f"file = pathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK'])\n"
        "file.write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    rank.chmod(0o755)
    parent = subprocess.Popen(  # noqa: S603 - our own interpreter
        [
            *(sys.executable, "-c"),
            "import sys; from spice_pl.system import ranks as launch; "
            f"sys.executable = {str(rank)!r}; launch.launch_ranks(2, '')",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    try:
        numbers = processes(tmp_path, 2)
    finally:
        parent.kill()
        parent.wait()
    for _ in range(100):
        if not [each for each in numbers if alive(each)]:
            return
        time.sleep(0.1)
    raise AssertionError("the ranks are still running")


def test_all_ranks_of_a_trial_read_its_settings(
    ranks: Ranks, tiny: Sequence[str], tmp_path: Path
) -> None:
    folder = ranks('cp "$3" ${0%/*}/rank$RANK.$(grep -c . "$3").$$; exit 0')
    two = ("trainer=ddp_cpu", "trainer.devices=2", "stage=moco")
    for lr in ("0.01", "0.02"):
        for old in folder.glob("rank?.*"):
            old.unlink()
        run_stages(make_job(*tiny, *two, f"moco.module.lr={lr}", sweep=True))
        read = [OmegaConf.load(path) for path in sorted(folder.glob("rank?.*"))]
        assert len(read) == 2
        assert read[0] == read[1]
        assert [float(each.cfg.moco.module.lr) for each in read] == [float(lr)] * 2
        assert f"moco.module.lr={lr}" in read[0].overrides


@pytest.mark.parametrize(
    ("environment", "is_rank"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, True),  # torchrun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, True),  # srun, one task of several
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun with a single task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),  # salloc or sbatch without srun
        ({"SLURM_PROCID": "0"}, False),
    ],
)
def test_who_is_a_rank(
    environment: dict[str, str], is_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.in_rank() is is_rank


def test_ranks_inside_a_task_of_slurm_do_not_count_its_tasks(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    folder = ranks("env > ${0%/*}/env$RANK; exit 0")
    launch.launch_ranks(2, "")
    seen = [path.read_text() for path in sorted(folder.glob("env*"))]
    assert len(seen) == 2
    assert all("SLURM_" not in text and "WORLD_SIZE=2" in text for text in seen)


def test_a_rank_of_torchrun_checks_folders_itself(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv(launch.PARENT, raising=False)
    with pytest.raises(UsageError, match="made with other settings"):
        run_stages(finished.job("stage=moco", "moco.module.lr=0.5"))
    with pytest.raises(UsageError, match="let trainer=ddp start the processes"):
        run_stages(finished.job("stage=fixmatch", "run=reviewed", "edits=edits.json"))


def test_a_folder_stays_locked_while_a_rank_lives(ranks: Ranks, tmp_path: Path) -> None:
    # The system releases a lock when the last process that has its file open ends.
    handle = os.open(tmp_path, os.O_RDONLY)
    seen = tmp_path / "seen"
    ranks(f"[ -e /proc/self/fd/{handle} ] && touch {seen}$RANK; exit 0")
    launch.launch_ranks(2, "", [handle])
    os.close(handle)
    assert len(list(tmp_path.glob("seen*"))) == 2
