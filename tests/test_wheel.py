"""The wheel, installed away from the checkout, clusters a folder with its command."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import TINY, write_folder
from tests.process import ROOT

import spice_pl


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without a way back to the checkout; return what it prints."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(  # noqa: S603 - our own interpreter and command
        list(map(str, command)),
        cwd=cwd,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A virtual environment with our wheel; other packages are those of this interpreter."""
    pytest.importorskip("hatchling", reason="pip install 'spice-pl[dev]'")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    wheels = tmp_path / "wheels"
    offline = ("--no-deps", "--no-build-isolation")
    run(*pip, "wheel", *offline, "--wheel-dir", wheels, ROOT, cwd=tmp_path)
    (wheel,) = wheels.iterdir()
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # Read as a folder of packages: the .pth files in there, an editable install of ours, are not.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    run(*pip, "--python", home / "bin" / "python", "install", "--no-deps", wheel, cwd=tmp_path)
    return home / "bin"


@pytest.mark.slow
def test_the_installed_command_clusters_a_folder(installed: Path, tmp_path: Path) -> None:
    where = run(
        installed / "python", "-c", "import spice_pl; print(spice_pl.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "cifar10 | " in run(installed / "spice", "--help", cwd=tmp_path)
    write_folder(tmp_path / "photos", classes=False)
    job: Sequence[str] = ("dataset=folder", "dataset.root=photos", *TINY)
    assert "report.html" in run(installed / "spice", *job, cwd=tmp_path)
    run_folder = tmp_path / "runs/photos/fixmatch/seed0"
    assert len((run_folder / "clusters.csv").read_text().splitlines()) == 91
    assert len(spice_pl.load(run_folder).predict(tmp_path / "photos")) == 90
