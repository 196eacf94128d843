"""Stage 3 and its family on the same features and labels: which method adds what?

    python benchmarks/semi.py [--seeds 5] [--stages fixmatch,clusmatch,...] [--before moco,proto]
                              [--runs-dir DIR] [KEY=VALUE ...]
    python benchmarks/semi.py --before simclr,proto experiment=cifar10_quick dataset=folder ...

Makes the stages before once a seed, then runs every method on them in one multirun, and prints a
Markdown table, mean ± standard deviation over the seeds: ACC, NMI, ARI, share and accuracy of the
labels that were learnt (truth, for this table only), time on top of the stages before. Last line:
the same as JSON. Runs that are finished in --runs-dir are reused.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spice_pl.reports.tables import duration_text, mean_std

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("acc", "nmi", "ari")
STAGES = "fixmatch,clusmatch,freematch,flexmatch,softmatch,scan,selflabel,supervised"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument("--before", default="moco,proto", help="made first; the last one is a row")
    parser.add_argument("--stages", default=STAGES, help="of the family, with commas between")
    parser.add_argument("--runs-dir", type=Path, help="of one data set: kept, and reused")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs_dir = args.runs_dir or Path(temporary)
        seeds = list(range(args.seeds))
        before, stages = args.before.split(","), args.stages.split(",")
        for stage in (*before, *stages):
            missing = [seed for seed in seeds if not _finished(runs_dir, stage, seed)]
            if missing:
                multirun(runs_dir, stage, missing, overrides)
        found = {
            stage: [_finished(runs_dir, stage, seed)[0] for seed in seeds]
            for stage in (before[-1], *stages)
        }
        print(table(found))
        print(json.dumps({stage: figures(runs) for stage, runs in found.items()}))


def multirun(runs_dir: Path, stage: str, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Run one stage for several seeds."""
    fixed = [f"stage={stage}", f"runs_dir='{runs_dir}'"]
    fixed += [f"seed={','.join(map(str, seeds))}", "overwrite=true"]
    command = [sys.executable, "train.py", "-m", *overrides, *fixed]
    code = subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr).returncode
    if code:
        raise SystemExit(f"error: stage {stage} ended with code {code}: {' '.join(command[1:])}")


def _finished(runs_dir: Path, stage: str, seed: int) -> list[dict[str, Any]]:
    """Metrics of a stage's finished runs of one seed."""
    files = sorted(runs_dir.glob(f"*/{stage}/seed{seed}*/metrics.json"))
    found = [json.loads(file.read_text()) for file in files]
    return [each for each in found if each["seed"] == seed]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One line a method."""
    lines = [
        "| Method | ACC | NMI | ARI | Labelled | their ACC | Seeds | Time |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for runs in found.values():
        rows = [run["rows"][-1] for run in runs]
        mark = " (oracle)" if rows[0].get("oracle") else ""
        cells = [rows[0]["name"] + mark, *(mean_std([row[key] for row in rows]) for key in SCORES)]
        for key in ("train/reliable_fraction", "truth/reliable_acc"):
            values = [run["logged"][key] for run in runs if key in run["logged"]]
            cells.append(mean_std(values) if values else "–")
        cells += [str(len(runs)), duration_text(statistics.fmean(run["seconds"] for run in runs))]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(found.values()))[0]
    lines.append(
        f"\n{first['dataset']}, {first['num_images']:,} images, K = {first['num_clusters']}, "
        f"protocol {first['protocol']}; mean ± standard deviation over seeds."
    )
    return "\n".join(lines)


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of a method by name."""
    result: dict[str, Any] = {"seeds": len(runs)}
    for key in SCORES:
        values = [run["rows"][-1][key] for run in runs]
        result[f"{key}_mean"] = round(statistics.fmean(values), 4)
        result[f"{key}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return result


if __name__ == "__main__":
    main()
