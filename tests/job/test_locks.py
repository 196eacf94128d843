"""Locks: no job removes results that another one reads, and each folder has one writer."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
from tests.conftest import Finished, make_job

from spice_pl.errors import UsageError
from spice_pl.job.locks import used_folders
from spice_pl.job.plan import plan
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.report import Report
from spice_pl.tasks.review import Review


def is_free(folder: Path) -> bool:
    """Whether a second process could lock a folder for itself."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@pytest.mark.parametrize("used", ["proto", "moco"])
def test_overwrite_waits_for_those_that_read(finished: Finished, used: str) -> None:
    metrics = finished.folder("proto").path / "metrics.json"
    before = metrics.stat().st_mtime_ns
    job = finished.job("stage=proto", "overwrite=true")
    overwriting = threading.Thread(target=run_stages, args=(job,), daemon=True)
    with finished.folder(used).used():  # as stage 3 does while it trains on it
        overwriting.start()
        time.sleep(1.5)
        if used == "proto":
            assert overwriting.is_alive()
            assert metrics.stat().st_mtime_ns == before
        else:  # what proto only reads may be read by others too
            overwriting.join(60)
            assert metrics.stat().st_mtime_ns > before
    overwriting.join(60)
    assert metrics.stat().st_mtime_ns > before


def test_a_job_holds_all_its_folders_until_it_ends(finished: Finished) -> None:
    job = finished.job("stage=fixmatch")
    stages = [finished.folder(name).path for name in ("moco", "proto", "fixmatch")]
    [step] = plan(job)
    with used_folders(step):
        assert [is_free(path / ".hydra") for path in stages] == [False] * 3
        assert [is_free(path) for path in stages] == [True] * 3  # nobody writes there yet
        with used_folders(step):  # other readers come in
            pass
    assert [is_free(path / ".hydra") for path in stages] == [True] * 3


def test_tasks_lock_their_folders(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(self: Report, context: object) -> None:
        own = finished.folder("report").path
        seen.append((is_free(own), is_free(finished.folder("fixmatch").path / ".hydra")))
        assert not (own / ".predictions.csv.abc").exists()  # left by a run that was killed

    own = finished.folder("report").path
    own.mkdir(parents=True)
    (own / ".predictions.csv.abc").touch()
    monkeypatch.setattr(Report, "__call__", look)
    run_stages(finished.job("stage=report"))
    assert seen == [(False, False)]


def test_a_page_that_is_open_holds_nobody_up(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(self: Review, context: object) -> None:
        seen.append(is_free(finished.folder("fixmatch").path / ".hydra"))

    monkeypatch.setattr(Review, "__call__", look)
    run_stages(finished.job("stage=review"))
    assert seen == [True]


def test_a_lock_may_be_asked_for_without_waiting(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with (
        folder.lock(),
        pytest.raises(UsageError, match="run is used by another run; try again when it has ended"),
        folder.lock(wait=False),
    ):
        pass
    with folder.lock(wait=False):
        pass


def test_two_jobs_that_replace_each_others_results_end(finished: Finished) -> None:
    overrides = (*finished.overrides, f"runs_dir={finished.runs}", "stage=proto", "overwrite=true")
    jobs = [make_job(*overrides) for _ in range(2)]
    threads = [threading.Thread(target=run_stages, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive()
    finished.folder("proto").check_digests()
