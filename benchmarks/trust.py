"""How well do the label-free measures of `stage=trust` follow true ACC?

    python benchmarks/trust.py runs/digits/*/* runs/mnist5k/*/*

Writes src/spice_pl/reports/trust_record.csv, one line per finished run of stage 2 or 3 on a data
set with labels: the measures of `stage=trust` and the ACC in the run's metrics.json. Lines of runs
that are not named stay in the file. Prints the rank correlation of each measure with ACC as JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from spice_pl.errors import UsageError
from spice_pl.job.job import Job
from spice_pl.job.run import run_stages
from spice_pl.reports.trust_page import NAMES, record, track
from spice_pl.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "src/spice_pl/reports/trust_record.csv"
FIELDS = ("dataset", "stage", "run", *NAMES, "acc")
KEPT = ("dataset=", "dataset.", "backbone", "experiment=", "proto.", "fixmatch.", "reliable.")


def measured(path: Path, more: list[str]) -> dict[str, str] | None:
    """Run `stage=trust` on a run; return its line of the record, None for a run without ACC."""
    folder = RunFolder(path)
    if not folder.finished or not (path / "probs.npy").is_file():
        return None
    metrics = folder.metrics
    acc = metrics["rows"][-1]["acc"]
    if acc is None:
        return None
    runs_dir, stage = path.parents[2], path.parent.name
    overrides = [
        *(text for text in metrics["overrides"] if text.startswith(KEPT)),
        *("stage=trust", f"trust.upstream={stage}", f"run={path.name}", f"runs_dir={runs_dir}"),
        f"cache_dir={runs_dir}/cache",
        *("overwrite=true", *more),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run_stages(Job(compose("config", overrides), tuple(overrides), "none", sweep=False))
    found = RunFolder(runs_dir / path.parents[1].name / "trust" / path.name).metrics["measures"]
    values = {name: "" if found[name] is None else f"{found[name]:.4f}" for name in NAMES}
    about = {"dataset": path.parents[1].name, "stage": stage, "run": path.name}
    return {**about, **values, "acc": f"{acc:.4f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], help="a setting KEY=VALUE that these runs had"
    )
    chosen = parser.parse_args()
    with RECORD.open(newline="", encoding="utf-8") as file:
        lines = {tuple(line[key] for key in FIELDS[:3]): line for line in csv.DictReader(file)}
    for path in sorted(chosen.runs):
        try:
            line = measured(path, chosen.set)
        except UsageError as error:
            print(f"left out: {path}: {error}", file=sys.stderr)
            continue
        if line:
            lines[tuple(line[key] for key in FIELDS[:3])] = line
            with RECORD.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines[key] for key in sorted(lines))
    for name, pair in record().items():
        found = track(*pair)
        rho = None if found.rho is None else round(found.rho, 3)
        print(json.dumps({"measure": name, "rho": rho, "runs": found.num_runs}))


if __name__ == "__main__":
    main()
