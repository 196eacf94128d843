"""Hidden state that no other test holds; docs/reference/hidden-state.md lists all of it.

Each test fails if the line that it is about is removed.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from sklearn.decomposition import NMF
from sklearn.mixture import GaussianMixture
from tests.conftest import CONF, TINY, make_job
from tests.stages.small import PLAIN, image_set, stream
from torch import Tensor, nn

from spice_pl import cli, clusterer
from spice_pl.callbacks import stage_progress
from spice_pl.callbacks.checkpoints import CheckpointFile, Checkpoints
from spice_pl.callbacks.nan import NanGuard
from spice_pl.callbacks.stage_progress import StageProgress
from spice_pl.data import decode, formats
from spice_pl.data.datamodule import Views, ViewsDataModule
from spice_pl.data.sources.folder import folder
from spice_pl.functional import neighbors
from spice_pl.job import job as job_module
from spice_pl.job import parts, run, task, trainer
from spice_pl.job.errors import quiet
from spice_pl.job.job import Job
from spice_pl.job.plan import plan
from spice_pl.job.stage import run_stage
from spice_pl.nn import encoders
from spice_pl.stages.base import Stage
from spice_pl.system import ranks
from spice_pl.system.interrupts import Interrupts, Stopped
from spice_pl.system.progress import Bar
from spice_pl.tasks import baselines

PAGE = CONF.parent / "docs" / "reference" / "hidden-state.md"


def test_the_page_names_files_and_tests_that_exist() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[-1] != "test |"]  # without the heads of the tables
    assert len(rows) > 40
    for row in rows:
        *_, where, _, tests = row
        for module in re.findall(r"`([\w/]+\.py)`", where):
            assert (CONF.parent / "src" / "spice_pl" / module).is_file(), module
        file = ""
        for name, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", tests):
            file = name or file  # `::test_b` after `file::test_a` is of the same file
            assert f"def {test}" in (CONF.parent / file).read_text(), (file, test)
        assert file or "every test" in tests, row


# Private parts of Lightning, torch and Pillow

EPOCHS, BATCHES = 2, 3


class Drawing(Stage):
    """One weight; each step draws a random number, as dropout does. Notes draws and hooks."""

    def __init__(self, interrupts: Interrupts, stop: tuple[int, int] | None) -> None:
        super().__init__()
        self.interrupts, self.stop = interrupts, stop
        self.weight = nn.Parameter(torch.zeros(()))
        self.started: list[int] = []
        self.draws: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.started.append(self.current_epoch)

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == self.stop:
            self.interrupts.asked = signal.SIGTERM
        draw = torch.rand(())
        self.draws.append(float(draw))
        return self.weight * draw

    def on_train_epoch_end(self) -> None:
        self.record("train/epoch", self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass
class Trained:
    """A training of two epochs of three batches: its stage, last metrics and progress bars."""

    stage: Drawing
    metrics: dict[str, float]
    bars: list[Bar]


def trained(
    path: Path,
    patch: pytest.MonkeyPatch,
    *,
    stop: tuple[int, int] | None = None,
    resume: bool = False,
) -> Trained:
    """Train `Drawing` with the callbacks that every stage has; `stop` is an epoch and a batch."""
    bars: list[Bar] = []

    def noted(*given: Any, **more: Any) -> Bar:
        bars.append(Bar(*given, **more))
        return bars[-1]

    patch.setattr(stage_progress, "Bar", noted)
    quiet()
    interrupts = Interrupts()
    stage = Drawing(interrupts, stop)
    checkpoints = Checkpoints(path, NanGuard("drawing"), interrupts, every_minutes=9, seed=0)
    runner = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[StageProgress("drawing"), checkpoints],
        plugins=[CheckpointFile()],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    data = ViewsDataModule(image_set(), {"images": stream(30, plain=PLAIN)}, PLAIN, seed=0)
    try:
        runner.fit(stage, data, ckpt_path=path if resume else None, weights_only=True)
    except Stopped:
        assert stop is not None
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    return Trained(stage, metrics, bars)


@pytest.fixture
def parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trained, Trained, Trained]:
    """A straight training; one stopped after the first batch of epoch 1; its continuation."""
    return (
        trained(tmp_path / "straight.ckpt", monkeypatch),
        trained(tmp_path / "last.ckpt", monkeypatch, stop=(1, 0)),
        trained(tmp_path / "last.ckpt", monkeypatch, resume=True),
    )


def test_hooks_of_an_epochs_start_are_called_where_it_is_continued(
    parted: tuple[Trained, Trained, Trained],
) -> None:
    assert [each.stage.started for each in parted] == [[0, 1], [0, 1], [1]]


def test_bar_of_a_continued_stage_starts_where_it_stopped(
    parted: tuple[Trained, Trained, Trained],
) -> None:
    done = BATCHES + 1
    bars = [(bar.first, bar.done, bar.total) for each in parted for bar in each.bars]
    assert bars == [(0, 6, 6), (0, done, 6), (done, 6, 6)]


def test_layers_that_draw_continue_as_if_never_stopped(
    parted: tuple[Trained, Trained, Trained],
) -> None:
    straight, first, second = (each.stage.draws for each in parted)
    assert straight == first + second
    assert len(set(straight)) == EPOCHS * BATCHES


def test_what_a_stage_records_at_the_end_of_an_epoch_is_logged_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(tmp_path / "last.ckpt", monkeypatch)
    assert made.metrics["train/epoch"] == EPOCHS - 1
    assert made.stage.epoch_sums == {}


@pytest.mark.parametrize(
    ("avx512", "amx", "precision"),
    [
        (False, False, "32-true"),
        (True, False, "bf16-mixed"),
        (False, True, "bf16-mixed"),
    ],
)
def test_bfloat16_where_the_processor_multiplies_in_it(
    avx512: bool, amx: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        assert isinstance(getattr(torch.cpu, name)(), bool)  # torch still has it
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
    assert trainer.auto_precision("cpu") == precision


def test_decoders_that_run_programs_are_not_tried() -> None:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "EPS")
    assert Image.open(content).format == "EPS"  # Pillow would hand it to Ghostscript
    assert decode.read_image(content.getvalue(), decode.Decoding(8)) == "cannot identify image file"


# Hydra and OmegaConf


@pytest.mark.parametrize(("dataset", "preset"), [("digits", "digits"), ("folder", "none")])
def test_preset_is_named_where_the_data_set_has_one(
    dataset: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(run, "run_stages", jobs.append)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    given = [f"dataset={dataset}", "stages=[]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra_compose("config", given, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        cli.run_job(cfg)
    assert [(job.preset, list(job.overrides)) for job in jobs] == [(preset, given)]


def test_settings_read_properties_of_a_pretrained_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "pretrained", lambda name: SimpleNamespace(title=f"the {name}"))
    cfg = OmegaConf.create({"encoder": "lite", "title": "${pretrained:${encoder},title}"})
    assert cfg.title == "the lite"


# Environment variables


def variable(name: str, patch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """Remove an environment variable until the test ends; return what reads it."""
    patch.setenv(name, "")  # so that its value of now is restored, or removed again
    patch.delenv(name)
    return lambda: os.environ.get(name)


def test_idle_threads_spin_shortly_unless_you_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = variable("GOMP_SPINCOUNT", monkeypatch), []

    def composed() -> None:  # the first thing that a job asks for
        seen.append(read())
        raise KeyboardInterrupt

    monkeypatch.setattr(HydraConfig, "get", composed)
    with pytest.raises(KeyboardInterrupt):
        cli.run_job(OmegaConf.create({}))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    with pytest.raises(KeyboardInterrupt):
        cli.run_job(OmegaConf.create({}))
    assert seen == ["10000", "7"]


def rank_script(folder: Path, script: str, patch: pytest.MonkeyPatch) -> None:
    """Have every rank run a shell script in place of Python."""
    program = folder / "rank.sh"
    program.write_text(f"#!/bin/bash\ncd {folder}\n{script}\n")
    program.chmod(0o755)
    patch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(("given", "threads"), [(None, "4"), ("3", "3")])
def test_ranks_share_the_cores(
    given: str | None, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable("OMP_NUM_THREADS", monkeypatch)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    rank_script(tmp_path, "echo -n $OMP_NUM_THREADS > threads$RANK", monkeypatch)
    ranks.launch_ranks(2, "")
    assert [file.read_text() for file in sorted(tmp_path.glob("threads*"))] == [threads] * 2


class EnoughError(Exception):
    """What comes after does not matter."""


@pytest.mark.parametrize("step_of", ["parts", "stage", "task"])
def test_seed_is_set_before_a_part_is_built(step_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = variable("PL_GLOBAL_SEED", monkeypatch), []
    job = make_job("dataset=digits", *TINY, "seed=5", "stages=[moco,inspect]")
    moco, inspect = plan(job)

    def note(*_: Any, **__: Any) -> None:
        seen.append((read(), torch.initial_seed()))
        raise EnoughError

    monkeypatch.setattr(parts, "build", note)
    monkeypatch.setattr(task, "build", note)
    stage: Any = SimpleNamespace(prepare=note)
    start: dict[str, Callable[[], object]] = {
        "parts": partial(parts.build_stage, job, moco, image_set()),
        "stage": partial(run_stage, job, moco, stage, {}, image_set(), Interrupts()),
        "task": partial(task.run_task, job, inspect, image_set),
    }
    with pytest.raises(EnoughError):
        start[step_of]()
    assert seen == [("5", 5)]


# Kept for the rest of the process


@pytest.mark.parametrize(
    "find",
    [partial(encoders.pretrained, "efficientnet_lite0"), formats.decoders, formats._formats],
    ids=["pretrained", "decoders", "formats"],
)
def test_what_is_on_this_machine_is_looked_up_once(find: Any) -> None:
    kept = getattr(find, "func", find)
    kept.cache_clear()
    first = find()
    assert find() is first
    assert (kept.cache_info().misses, kept.cache_info().hits) == (1, 1)


# Warnings, logging and output


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning_fabric"])
def test_lightning_logs_nothing_but_warnings(name: str) -> None:
    logger, child = logging.getLogger(name), logging.getLogger(f"{name}.utilities.rank_zero")
    before = logger.level
    try:
        logger.setLevel(logging.INFO)  # as it is after its import
        quiet()
        assert [child.isEnabledFor(level) for level in (logging.INFO, logging.WARNING)] == [
            False,
            True,
        ]
    finally:
        logger.setLevel(before)


def test_pillow_does_not_warn_about_damaged_files(tmp_path: Path) -> None:
    photo, half = io.BytesIO(), b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0"
    Image.new("RGB", (8, 8)).save(photo, "JPEG", exif=half)
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_bytes(photo.getvalue())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        decode.read_image(photo.getvalue(), decode.Decoding(8))
        assert ["Corrupt EXIF" in str(each.message) for each in said] == [True]
        images = folder(str(tmp_path / "images"), 8, str(tmp_path / "cache"))
    assert len(images) == 2
    assert len([each for each in said if "EXIF" in str(each.message)]) == 1


@pytest.mark.parametrize("method", ["nmf", "gaussian_mixture"])
def test_a_baseline_that_does_not_converge_is_no_warning(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "NMF", partial(NMF, tol=1e-30))
    monkeypatch.setattr(baselines, "GaussianMixture", partial(GaussianMixture, max_iter=1))
    data = np.random.default_rng(0).random((60, 6)).astype(np.float32)
    clusters, _ = baselines.Baselines([method])._cluster(method, data, 3, 0)
    assert clusters.shape == (60,)


@pytest.mark.parametrize("verbose", [False, True])
def test_an_estimator_prints_only_when_asked_to(
    verbose: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_stages(job: Job) -> None:
        print("table of results")
        raise EnoughError

    monkeypatch.setattr("spice_pl.job.python.run_stages", run_stages)
    images = np.zeros((3, 8, 8), np.uint8)
    with pytest.raises(EnoughError):
        clusterer.SpiceClusterer(2, verbose=verbose).fit(images)
    assert capsys.readouterr().out == ("table of results\n" if verbose else "")


# Processes and threads


def test_ranks_are_sessions_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The sixth field of stat is the session; Ctrl-C reaches all processes of the terminal's.
    rank_script(tmp_path, "cut -d' ' -f1,6 /proc/$$/stat > session$RANK", monkeypatch)
    ranks.launch_ranks(2, "")
    found = [file.read_text().split() for file in sorted(tmp_path.glob("session*"))]
    assert len(found) == 2
    assert all(process == session for process, session in found)


def test_faiss_is_given_as_many_threads_as_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only where faiss was imported before torch do they count threads apart.
    faiss, threads = pytest.importorskip("faiss"), list[int]()
    monkeypatch.setattr(faiss, "omp_set_num_threads", threads.append)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(neighbors, "RECALL", 0.0)
    keys = torch.randn(1100, 8, generator=torch.Generator().manual_seed(0))
    neighbors.nearest_neighbors(keys, keys, 3)
    assert threads == [torch.get_num_threads()]
