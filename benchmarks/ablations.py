"""Tables VII and VIII of SPICE beside ours: what does each part of stage 2 give?

    python benchmarks/ablations.py table7|table8 [--seeds 5] [--runs-dir DIR] [KEY=VALUE ...]

One multirun, `train.py experiment=table7`, over rows and seeds; stage 1 is trained once a seed and
shared by the rows, and trials that are finished in DIR are kept. Prints mean ± standard deviation
over the seeds beside the paper's STL10 (whole) figures and, as its last line, JSON. Further
settings go to train.py; without --runs-dir nothing is kept.
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

from omegaconf import OmegaConf

from spice_pl.reports.tables import mean_std

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("acc", "nmi", "ari")
PAPER = {  # SPICE, Tables VII and VIII: STL10, whole, mean and deviation over five trials
    "non_overlap": ("Non-overlap", "0.885 ± 0.002", "0.788 ± 0.003", "0.771 ± 0.003"),
    "joint_sh": ("Joint-SH", "0.622 ± 0.061", "0.513 ± 0.037", "0.437 ± 0.053"),
    "joint_mh": ("Joint-MH", "0.687 ± 0.037", "0.577 ± 0.029", "0.512 ± 0.033"),
    "entropy": ("Entropy", "0.907 ± 0.001", "0.817 ± 0.003", "0.810 ± 0.003"),
    "ce": ("CE", "0.875 ± 0.031", "0.784 ± 0.017", "0.764 ± 0.033"),
    "tce": ("TCE", "0.895 ± 0.005", "0.794 ± 0.010", "0.787 ± 0.010"),
    "weak_weak": ("Weak, Weak", "0.905 ± 0.002", "0.815 ± 0.003", "0.808 ± 0.003"),
    "strong_weak": ("Strong, Weak", "0.883 ± 0.029", "0.799 ± 0.019", "0.781 ± 0.031"),
    "strong_strong": ("Strong, Strong", "0.902 ± 0.008", "0.812 ± 0.009", "0.803 ± 0.013"),
    "spice": ("SPICE (Weak, Strong)", "0.908 ± 0.001", "0.817 ± 0.002", "0.812 ± 0.002"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("table", choices=("table7", "table8"))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument(
        "--runs-dir", type=Path, help="keep the runs here, go on where they stopped"
    )
    args, overrides = parser.parse_known_args()
    unknown = [text for text in overrides if text.startswith("-") or not set("=~") & set(text)]
    if args.seeds < 1 or unknown:
        parser.error(f"--seeds must be 1 or more, settings KEY=VALUE: {unknown or args.seeds}")
    experiment = OmegaConf.load(ROOT / "conf" / "experiment" / f"{args.table}.yaml")
    names = experiment.hydra.sweeper.params["proto/ablation"].split(",")
    seeds = range(args.seeds)
    with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
        folder = (args.runs_dir or Path(temporary)).resolve()
        swept = f"hydra.sweeper.params.seed='{','.join(map(str, seeds))}'"
        fixed = [f"experiment={args.table}", f"runs_dir='{folder}'", *overrides]
        command = [sys.executable, "train.py", *fixed, swept]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            raise SystemExit(f"error: ended with code {code}: {' '.join(command[1:])}")
        found = {
            name: [scores_of(folder, name, seed, overrides) for seed in seeds] for name in names
        }
    print(f"\n{table(found)}\n")
    print(json.dumps(figures(args.table, found)))


def scores_of(folder: Path, name: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The last row of the trial's metrics."""
    own = {f"proto/ablation={name}", f"seed={seed}", *overrides}
    for file in sorted(folder.glob(f"*/proto/seed{seed},*/metrics.json")):
        metrics = json.loads(file.read_text())
        free = ("experiment=", "stage=", "runs_dir=", "cache_dir=")
        if {text for text in metrics["overrides"] if not text.startswith(free)} == own:
            return dict(metrics["rows"][-1])
    raise SystemExit(f"error: no finished run of proto/ablation={name} seed={seed} in {folder}")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: one line a row of the paper, ours beside the paper's."""
    num_seeds = len(next(iter(found.values())))
    lines = [
        f"| | ACC, ours ({num_seeds} seeds) | ACC, paper (STL10) | NMI, ours | NMI, paper "
        "| ARI, ours | ARI, paper |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in found.items():
        title, *paper = PAPER[name]
        cells = [title]
        for score, theirs in zip(SCORES, paper, strict=True):
            cells += [mean_std([run[score] for run in runs]), theirs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(which: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and deviation (n - 1) of every score of every row."""
    result: dict[str, Any] = {"table": which}
    for name, runs in found.items():
        for score in SCORES:
            values = [run[score] for run in runs]
            result[f"{name}_{score}_mean"] = round(statistics.fmean(values), 4)
            deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
            result[f"{name}_{score}_std"] = deviation
    return result


if __name__ == "__main__":
    main()
