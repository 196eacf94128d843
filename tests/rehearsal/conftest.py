"""Runs that stages start from, made once on the processor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import TINY, make_job, write_folder

from spice_pl.job.run import run_stages

# Collected for doctests they would be imported twice, and the second device would undo autocast.
collect_ignore = ["device.py", "machine.py"]


@pytest.fixture(scope="session")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rehearsal")
    write_folder(root / "photos", classes=True)
    run_stages(make_job(*_overrides(root, root / "runs"), "stages=[moco,proto]"))
    return root


def _overrides(root: Path, runs: Path) -> Sequence[str]:
    return (
        *("dataset=folder", f"dataset.root={root / 'photos'}", "dataset.labels=folders"),
        *(f"runs_dir={runs}", f"cache_dir={root / 'cache'}", *TINY),
    )


@pytest.fixture
def upstream(_base: Path, tmp_path: Path) -> Sequence[str]:
    """Overrides of a job whose runs hold finished stages moco and proto."""
    shutil.copytree(_base / "runs", tmp_path / "runs")
    return _overrides(_base, tmp_path / "runs")


@pytest.fixture
def fresh(_base: Path, tmp_path: Path) -> Sequence[str]:
    """Overrides of a job that has no runs yet."""
    return _overrides(_base, tmp_path / "runs")
