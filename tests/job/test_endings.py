"""How a run ends that the system stops: signals, closed pipes, folders that cannot be written."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.conftest import Finished, make_job
from tests.process import ROOT

from spice_pl.errors import UsageError
from spice_pl.job.errors import full_disk_as_usage_error
from spice_pl.job.run import run_stages
from spice_pl.job.sweep import CompareTrials
from spice_pl.system import files
from spice_pl.system.files import atomic, check_temporary
from spice_pl.system.interrupts import Interrupts, Stopped
from spice_pl.system.output import PIPE_CODE


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_stops_and_the_handler_comes_back(name: str) -> None:
    number = signal.Signals[name]
    ignored = signal.signal(number, signal.default_int_handler)  # SIGHUP is, under nohup
    before = signal.getsignal(number)
    with pytest.raises(Stopped), Interrupts() as interrupts:
        signal.raise_signal(number)
    assert interrupts.asked == number
    assert signal.getsignal(number) == before
    signal.signal(number, ignored)


def test_nohup_is_kept() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
        assert interrupts.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("key", ["runs_dir", "cache_dir"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR])
def test_a_folder_that_cannot_be_written_is_one_message(
    tmp_path: Path, key: str, number: int
) -> None:
    job = make_job("dataset=digits", f"runs_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache")
    file = tmp_path / key.removesuffix("_dir") / "digits" / "x"
    message = rf"{key}=.* cannot be written to \(.*x: .*\); give another {key}=PATH"
    with pytest.raises(UsageError, match=message), full_disk_as_usage_error(job):
        raise OSError(number, os.strerror(number), str(file))
    with pytest.raises(OSError, match=r"/elsewhere"), full_disk_as_usage_error(job):
        raise OSError(number, os.strerror(number), "/elsewhere")  # not ours to explain


def test_runs_below_a_file_are_one_message(straight: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/runs"):
        job = make_job(*straight.overrides, f"runs_dir={tmp_path / place}")
        message = r"runs_dir=.* cannot be written to .*give another runs_dir=PATH"
        with pytest.raises(UsageError, match=message), full_disk_as_usage_error(job):
            run_stages(job)


def test_a_runs_dir_that_cannot_be_written_is_refused_before_work(
    straight: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In /proc no folder can be made, not even by root; a read-only disk says so by itself."""
    with pytest.raises(UsageError, match=r"runs_dir=/proc/x cannot be .*No such file.*runs_dir=PA"):
        run_stages(make_job(*straight.overrides, "stage=moco", "runs_dir=/proc/x"))

    def read_only(dir: Path, prefix: str) -> str:  # noqa: A002
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{dir}/{prefix}")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    runs = tmp_path / "runs"
    with pytest.raises(UsageError, match=rf"runs_dir={runs} cannot be .*Read-only file system"):
        run_stages(make_job(*straight.overrides, "stage=moco", f"runs_dir={runs}"))
    assert not runs.exists()
    run_stages(straight.job("resume=true"))  # writes nothing


def test_a_temporary_folder_that_cannot_be_written_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_temporary()
    monkeypatch.setattr(tempfile, "tempdir", "/proc/x")
    with pytest.raises(UsageError, match=r"TMPDIR=/proc/x cannot be written to .*TMPDIR=PATH"):
        check_temporary()


def test_without_any_temporary_folder_there_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system tries TMPDIR, /tmp and others by writing to them; all may be full or read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/x"])
    monkeypatch.setenv("TMPDIR", "/proc/x")
    with pytest.raises(UsageError, match=r"TMPDIR=/proc/x cannot be written to \(No usable temp"):
        check_temporary()


def test_a_full_disk_names_the_file_wherever_it_is(tmp_path: Path) -> None:
    job = make_job("dataset=digits", f"runs_dir={tmp_path}")
    for file, said in (("/tmp/x", "/tmp/x"), (None, f"a file under {tmp_path}")):  # noqa: S108
        message = rf"no space left to write {said} \(No space.*resume=true"
        with pytest.raises(UsageError, match=message), full_disk_as_usage_error(job):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)


def test_a_folder_of_sweeps_that_cannot_be_written_is_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "/proc/x"}}})
    with pytest.raises(SystemExit, match="2"):
        CompareTrials().on_multirun_start(config)
    said = capsys.readouterr().err
    assert "error: hydra.sweep.dir=/proc/x cannot be written to" in said


def test_files_have_the_permissions_that_the_user_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        monkeypatch.setattr(files, "UMASK", mask)
        with atomic(tmp_path / "x") as temporary:
            temporary.touch()
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode
    code = "import os; os.umask(0o027); from spice_pl.system import files; print(files.UMASK)"
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == 0o027


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_traceback(straight: Finished, tmp_path: Path) -> None:
    """As `python train.py | head -1`: the results are complete, and the code is that of SIGPIPE."""
    command = [sys.executable, str(ROOT / "train.py"), *straight.overrides]
    running = subprocess.Popen(  # noqa: S603 - our own interpreter
        [*command, "stage=moco", f"runs_dir={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    with running.stderr as stderr:
        said = stderr.read()
    assert running.wait(timeout=300) == PIPE_CODE, said
    assert "Traceback" not in said
    assert (tmp_path / "my photos/moco/seed0/metrics.json").is_file()
