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

FOLDER = Path(__file__).parent / "golden"
STAGES = ("moco", "proto", "fixmatch")
TOLERANCE = 2e-3  # relative


def curve(finished: Finished, stage: str) -> list[float]:
    with (finished.folder(stage).path / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("stage", STAGES)
def test_loss_curve_is_the_golden_one(straight: Finished, stage: str) -> None:
    found, file = curve(straight, stage), FOLDER / f"{stage}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"train/loss": found}) + "\n")
    golden = json.loads(file.read_text())["train/loss"]
    assert found == pytest.approx(golden, rel=TOLERANCE)
    assert len(found) == int(straight.job().cfg[stage].epochs)


@pytest.mark.parametrize("stage", STAGES)
def test_no_other_epoch_would_pass_for_another(stage: str) -> None:
    """The tolerance is finer than what the curve itself does."""
    golden = json.loads((FOLDER / f"{stage}.json").read_text())["train/loss"]
    assert golden[::-1] != pytest.approx(golden, rel=TOLERANCE)
