"""A command that is killed in any of its phases gives the same results when it is given again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.process import ROOT


@pytest.mark.slow
def test_killed_commands_end_with_the_results_of_undisturbed_ones(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "tests.chaos.phases", str(tmp_path_factory.mktemp("phases"))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wrong: dict[str, list[str]] = json.loads(done.stdout)
    assert len(wrong) == 31
    assert {phase: found for phase, found in wrong.items() if found} == {}
