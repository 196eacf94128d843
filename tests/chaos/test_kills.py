"""A pipeline that is killed many times ends with the same bits as one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.process import ROOT

pytestmark = pytest.mark.slow
KILLS = 30


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        [
            *(sys.executable, "-m", "tests.chaos.supervisor"),
            *(str(tmp_path_factory.mktemp("chaos")), "0", str(KILLS)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(found))
    return found


def test_killed_pipelines_end_with_the_bits_of_an_undisturbed_one(outcome: dict[str, Any]) -> None:
    assert outcome["wrong"] == []
    assert outcome["runs_compared"] >= 3


def test_kills_were_many_and_of_all_kinds(outcome: dict[str, Any]) -> None:
    assert sum(outcome["kills"].values()) >= KILLS
    assert set(outcome["kills"]) == {"SIGKILL", "SIGTERM", "SIGINT", "full disk"}
    assert outcome["stopped_inside_an_epoch"] >= 5


def test_comparison_finds_a_wrong_resume_and_a_single_bit(outcome: dict[str, Any]) -> None:
    controls = outcome["controls"]
    assert "moco/encoder.safetensors" in controls["batches taken twice"]
    assert controls["one bit"] == ["fixmatch/probs.npy"]
