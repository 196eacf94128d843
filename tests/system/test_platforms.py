"""What Windows and macOS lack is hidden here, and a whole job runs without it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.conftest import TINY

from spice_pl.runs.folder import RunFolder
from spice_pl.system import files, locks, provenance

ROOT = Path(__file__).parents[2]
# Third-party packages are imported first: what they do about a missing module is their own matter.
HIDDEN = """
import multiprocessing, os, signal, sys, types
import pytorch_lightning, torch, torchvision, sklearn.cluster, hydra, filelock
import sklearn.metrics, tensorboard, rich.progress
multiprocessing.set_start_method("spawn")
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
sys.modules["psutil"] = types.SimpleNamespace(Process=lambda: types.SimpleNamespace(
    memory_info=lambda: types.SimpleNamespace(peak_wset=123 * 2**20)))
for name in ("posix_fallocate", "fork", "forkpty", "sched_getaffinity", "getuid",
             "geteuid", "getpgid", "setsid", "mkfifo", "sync", "uname"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGQUIT"):
    delattr(signal, name)
sys.argv[0] = "train.py"
from spice_pl.cli import main
main()
"""


def test_a_job_runs_without_what_windows_and_macos_lack(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for i in range(90):
        image = generator.integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(image).save(photos / f"{i}.png")
    settings = [
        *(*TINY, "dataset=folder", f"dataset.root={photos}", "dataset.image_size=8"),
        *(f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "open=false"),
        *("stages=[moco,proto]", "moco.epochs=1", "proto.epochs=1"),
    ]
    known = (ROOT / "conf" / "config.yaml").read_text(encoding="utf-8")
    settings = [each for each in settings if each != "open=false" or "\nopen:" in known]
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", HIDDEN, *settings],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "runs" / "photos" / "proto" / "seed0")
    assert run.metrics["peak_memory_mb"] == 123  # of the psutil above: resource is hidden
    assert len(run.read_clusters().keys) == 90


@pytest.mark.parametrize("hidden", [False, True])
def test_a_second_process_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    if hidden:
        monkeypatch.setattr(locks, "fcntl", None)
    order = []

    def second() -> None:
        with locks.hold(tmp_path, "waiting"):
            order.append("second")

    with locks.hold(tmp_path, "waiting"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("lacks", ["function", "support"])
def test_room_on_the_disk_is_taken_without_fallocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if lacks == "function":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(files, "CHUNK", 1000)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.write(b"head")
        file.truncate(100_001)
    files.allocate(sparse)
    assert sparse.read_bytes() == b"head" + bytes(99_997)
    assert sparse.stat().st_blocks * 512 >= 100_001


def test_a_full_disk_is_an_error_without_fallocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "file").write_bytes(bytes(10))
    with pytest.raises(OSError, match="No space left") as error:
        files.allocate(tmp_path / "file")
    assert files.is_disk_full(error.value)


@pytest.mark.parametrize(("system", "counted"), [("linux", 2**10), ("darwin", 2**20)])
def test_peak_memory_has_the_unit_of_the_system(
    monkeypatch: pytest.MonkeyPatch, system: str, counted: int
) -> None:
    fake = SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=50 * counted)
    )
    monkeypatch.setattr(provenance, "resource", fake)
    monkeypatch.setattr(sys, "platform", system)
    assert provenance.peak_memory_mb() == 50


def test_a_folder_is_not_opened_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(PermissionError):
        files.sync_folder(tmp_path)
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", open=denied))
    files.sync_folder(tmp_path)


def test_all_signals_that_ask_to_stop_are_handled_here() -> None:
    from spice_pl.system.interrupts import SIGNALS

    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= set(SIGNALS)
