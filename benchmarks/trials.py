"""What benchmarks over several runs share: start train.py, find a trial's results, average."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from spice_pl.job.job import Job

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("acc", "nmi", "ari")


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Add --seeds and --runs-dir; return the options and the settings for train.py."""
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument("--runs-dir", type=Path, help="keep the runs here; default: delete them")
    args, settings = parser.parse_known_args()
    unknown = [text for text in settings if text.startswith("-") or not set("=~") & set(text)]
    if args.seeds < 1 or unknown:
        parser.error(f"--seeds must be 1 or more, settings KEY=VALUE: {unknown or args.seeds}")
    return args, settings


def train(*arguments: str) -> None:
    """Run train.py; end the benchmark if it fails."""
    command = [sys.executable, "train.py", *arguments]
    code = subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr).returncode
    if code:
        raise SystemExit(f"error: ended with code {code}: {' '.join(command[1:])}")


def trial(stage: str, settings: Sequence[str], swept: Sequence[str]) -> dict[str, Any]:
    """Return metrics.json of a finished trial of a sweep, whose folder its settings name.

    Args:
        stage: the stage.
        settings: those of the trial.
        swept: those of the sweep that have several values.
    """
    parsed = OverridesParser.create().parse_overrides([*settings])
    as_swept = [f"{each.get_key_element()}={each.get_value_element_as_str()}" for each in parsed]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        job = Job(
            compose("config", as_swept), tuple(as_swept), "none", sweep=True, swept=tuple(swept)
        )
    folder = job.folder(stage)
    if not folder.finished:
        raise SystemExit(f"error: {folder.path} is not a finished run")
    metrics: dict[str, Any] = json.loads((folder.path / "metrics.json").read_text())
    return metrics


def averages(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, float | None]:
    """Return mean and standard deviation (n - 1) of every score over rows, one row per seed."""
    result: dict[str, float | None] = {}
    for score in SCORES:
        values = [row[score] for row in rows]
        result[f"{prefix}{score}_mean"] = round(statistics.fmean(values), 4)
        deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
        result[f"{prefix}{score}_std"] = deviation
    return result
