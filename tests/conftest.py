"""What several tests share: composed settings, a job, a small data set that runs in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file

from spice_pl.job.errors import clear_errors
from spice_pl.job.job import Job
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder

CONF = Path(__file__).parents[1] / "conf"
NUM_IMAGES, NUM_CLASSES, PIXELS = 90, 3, 8

# Every stage in less than a second; the numbers are for speed, not for scores.
TINY = (
    "recipe=scratch",
    "backbone=resnet_small",
    "backbone.blocks=[1]",
    "backbone.widths=[8]",
    "augment=handwriting",
    f"dataset.image_size={PIXELS}",
    f"dataset.num_clusters={NUM_CLASSES}",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "moco.epochs=2",
    "moco.streams.images.batch_size=30",
    "moco.module.queue_size=60",
    "proto.epochs=3",
    "proto.streams.images.batch_size=25",
    "proto.module.buffer_size=40",
    "proto.module.num_heads=3",
    "proto.module.repeats=2",
    "proto.module.head_batch_size=10",
    "fixmatch.epochs=2",
    "fixmatch.module.steps_per_epoch=3",
    "fixmatch.streams.labelled.batch_size=2",
    "fixmatch.streams.unlabelled.batch_size=10",
    "reliable.num_neighbors=5",
    "reliable.agreement=0.4",
    "reliable.confidence=0.2",
)


def compose(*overrides: str) -> DictConfig:
    """Compose conf/ as the command line does."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", list(overrides))


def make_job(*overrides: str, sweep: bool = False) -> Job:
    """Make the job of a command line."""
    return Job(compose(*overrides), overrides, "none", sweep)


def run_as_a_person_does(job: Job) -> None:
    """Run a job as the command does: errors become messages and exit codes."""
    with clear_errors(job):
        run_stages(job)


def photographs(seed: int = 0) -> NDArray[np.uint8]:
    """Return (90, 8, 8, 3) images; image i is of class i % 3: red left, green right, blue below."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 40, (NUM_IMAGES, PIXELS, PIXELS, 3))
    half = PIXELS // 2
    images[0::3, :, :half, 0] += 200
    images[1::3, :, half:, 1] += 200
    images[2::3, half:, :, 2] += 200
    return images.astype(np.uint8)


def write_folder(root: Path, *, classes: bool, seed: int = 0) -> Path:
    """Write `photographs` as PNG files, in class subfolders or in one folder."""
    for i, image in enumerate(photographs(seed)):
        parent = root / f"class {i % NUM_CLASSES}" if classes else root
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(parent / f"{i:03}.png")
    return root


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    """Leave torch's generator as it was, so that no test depends on the ones before it."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """A folder of 90 images in three class subfolders."""
    return write_folder(tmp_path / "photos", classes=True)


@pytest.fixture
def tiny(tmp_path: Path, photo_folder: Path) -> Sequence[str]:
    """Overrides of a run of all stages on `photo_folder` that takes a few seconds."""
    return (
        "dataset=folder",
        f"dataset.root={photo_folder}",
        "dataset.labels=folders",
        f"runs_dir={tmp_path / 'runs'}",
        f"cache_dir={tmp_path / 'cache'}",
        *TINY,
    )


@dataclass(frozen=True)
class Finished:
    """Runs of all three stages on images without labels.

    Attributes:
        overrides: of the command line, without runs_dir.
        runs: runs_dir.
    """

    overrides: Sequence[str]
    runs: Path

    def job(self, *more: str, sweep: bool = False) -> Job:
        """Make a job on these runs."""
        return make_job(*self.overrides, f"runs_dir={self.runs}", *more, sweep=sweep)

    def copy(self, target: Path, *, without: str | None = None) -> Finished:
        """Copy the runs to a new folder, one stage left out."""
        shutil.copytree(self.runs, target / "copied runs")
        copied = Finished(self.overrides, target / "copied runs")
        if without is not None:
            shutil.rmtree(copied.folder(without).path)
        return copied

    def folder(self, stage: str) -> RunFolder:
        """Return the artifacts of a stage."""
        return RunFolder(self.runs / "my photos" / stage / "seed0")


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All stages run once on a folder without class subfolders; for reading only."""
    root = tmp_path_factory.mktemp("straight")
    write_folder(root / "my photos", classes=False)
    overrides = (
        "dataset=folder",
        f"dataset.root={root / 'my photos'}",
        f"cache_dir={root / 'cache'}",
        *TINY,
    )
    finished = Finished(overrides, root / "runs")
    run_stages(finished.job())
    return finished


@pytest.fixture
def finished(straight: Finished, tmp_path: Path) -> Finished:
    """A copy of `straight` to change."""
    return straight.copy(tmp_path)


def authors_names(folder: RunFolder) -> dict[str, torch.Tensor]:
    """A finished stage 2 or 3 of ours under the names of the authors' stage 2."""
    state = load_file(folder.path / "encoder.safetensors")
    named = {f"module.feature_module.{key}": value for key, value in state.items()}
    for key, value in load_file(folder.path / "head.safetensors").items():
        name = key.replace("hidden", "lin1").replace("output", "lin2")
        named[f"module.head.head_0.classifier.{name}"] = value
    return named
