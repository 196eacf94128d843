"""Run train.py in a process of its own, as from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train(
    *arguments: str, options: tuple[str, ...] = (), timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python train.py` to its end; raise if it takes longer than `timeout` seconds."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(  # noqa: S603 - our own interpreter and script
        [sys.executable, *options, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env=os.environ | quiet | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
