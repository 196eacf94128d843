"""Curves of tiny runs as they were: a refactoring that changes a loss is found here.

`UPDATE_GOLDEN=1 pytest tests/test_golden.py` writes them anew; say why in the commit. Bits depend
on processor and version of torch: a curve may differ by 0.2 %, relative.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from tests.conftest import Finished

from spice_pl.job.run import run_stages

FOLDER = Path(__file__).parent / "golden"
STAGES = ("moco", "proto", "fixmatch")
OTHER = ("empssl", "vicreg", "fastsiam")  # other ways to stage 1
STORED = ("temi", "turtle")  # heads on the stored features of moco
WHOLE = ("cc", "propos")  # features and clusters from random weights
AFTER = ("cdc", "dcboost")  # encoder and clusters after stage 1 or after any clustering
CURVES = (("other", OTHER), ("stored", STORED), ("whole", WHOLE), ("after", AFTER))
TOLERANCE = 2e-3  # relative


def curve(finished: Finished, stage: str) -> list[float]:
    with (finished.folder(stage).path / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def other(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Other ways to stage 1 on the same images."""
    finished = straight.copy(tmp_path_factory.mktemp("other"))
    sizes = (
        f"{name}.{size}" for name in OTHER for size in ("epochs=2", "streams.images.batch_size=30")
    )
    finished = Finished((*finished.overrides, *sizes), finished.runs)
    run_stages(finished.job(f"stages=[{','.join(OTHER)}]"))
    return finished


@pytest.fixture(scope="module")
def stored(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The three stages, and heads on stored features in a few steps."""
    finished = straight.copy(tmp_path_factory.mktemp("stored"))
    sizes = (
        *("epochs=3", "module.steps_per_epoch=4", "module.batch_size=20"),
        *("module.num_heads=3", "module.lr=0.02"),
    )
    more = tuple(f"{stage}.{size}" for stage in STORED for size in sizes)
    finished = Finished((*finished.overrides, *more), finished.runs)
    run_stages(finished.job(f"stages=[{','.join(STORED)}]"))
    return finished


@pytest.fixture(scope="module")
def whole(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Contrastive clustering and ProPos in a few steps."""
    finished = straight.copy(tmp_path_factory.mktemp("whole"))
    sizes = ("epochs=3", "watch_epochs=3", "streams.images.batch_size=30", "module.lr=0.01")
    more = (
        *(f"{stage}.{size}" for stage in WHOLE for size in sizes),
        *("propos.module.warmup_epochs=1", "propos.module.hidden_dim=16"),
    )
    finished = Finished((*finished.overrides, *more), finished.runs)
    run_stages(finished.job(f"stages=[{','.join(WHOLE)}]"))
    return finished


@pytest.fixture(scope="module")
def after(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The three stages, and CDC and DCBoost in a few steps."""
    finished = straight.copy(tmp_path_factory.mktemp("after"))
    sizes = ("epochs=3", "watch_epochs=3", "streams.images.batch_size=30", "module.hidden_dim=16")
    more = (
        *(f"{stage}.{size}" for stage in AFTER for size in sizes),
        *("dcboost.module.warmup_epochs=1", "dcboost.upstream=proto", "cdc.module.lr=0.01"),
    )
    finished = Finished((*finished.overrides, *more), finished.runs)
    run_stages(finished.job(f"stages=[{','.join(AFTER)}]"))
    return finished


@pytest.mark.parametrize("stage", [*STAGES, *OTHER, *STORED, *WHOLE, *AFTER])
def test_loss_curve_is_the_golden_one(
    straight: Finished, stage: str, request: pytest.FixtureRequest
) -> None:
    for fixture, stages in CURVES:
        if stage in stages:
            straight = request.getfixturevalue(fixture)
    found, file = curve(straight, stage), FOLDER / f"{stage}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"train/loss": found}) + "\n")
    golden = json.loads(file.read_text())["train/loss"]
    assert found == pytest.approx(golden, rel=TOLERANCE)
    assert len(found) == int(straight.job().cfg[stage].epochs)


@pytest.mark.parametrize("stage", [*STAGES, *OTHER, *STORED, *WHOLE, *AFTER])
def test_no_other_epoch_would_pass_for_another(stage: str) -> None:
    """The tolerance is finer than what the curve itself does."""
    golden = json.loads((FOLDER / f"{stage}.json").read_text())["train/loss"]
    assert golden[::-1] != pytest.approx(golden, rel=TOLERANCE)
