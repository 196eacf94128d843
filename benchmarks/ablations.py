"""What does each part of stage 2 contribute? Tables VII and VIII of SPICE beside our results.

    python benchmarks/ablations.py table7|table8 [--rows spice,ce] [--seeds 5] [--runs-dir DIR]
                                   [KEY=VALUE ...]

One multirun over the seeds and the rows of conf/experiment/table7.yaml (or table8), or over the
rows named. Stage 1 is trained once per seed and shared by the rows; trials that are finished in DIR
are reused. Prints mean ± standard deviation over the seeds beside the paper's figures for STL10
(whole) and, as the last line, JSON. Further settings go to train.py. Without --runs-dir the runs
are deleted at the end.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from trials import ROOT, SCORES, averages, parse, train, trial

from spice_pl.reports.tables import mean_std

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
    parser.add_argument("--rows", help="rows of the table, with commas between; default: all")
    args, settings = parse(parser)
    experiment = OmegaConf.load(ROOT / "conf" / "experiment" / f"{args.table}.yaml")
    rows = args.rows or experiment.hydra.sweeper.params["proto/ablation"]
    names, seeds = rows.split(","), range(args.seeds)
    if unknown := set(names) - PAPER.keys():
        parser.error(f"--rows {sorted(unknown)} are none of {', '.join(PAPER)}")
    with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
        folder = (args.runs_dir or Path(temporary)).resolve()
        fixed = ["stages=[moco,proto]", f"runs_dir='{folder}'", *settings]
        swept = [f"proto/ablation={rows}", f"seed={','.join(map(str, seeds))}"]
        train("-m", "resume=true", *fixed, *swept)
        found = {
            name: [
                trial("proto", [*fixed, f"seed={seed}", f"proto/ablation={name}"], swept)["rows"][
                    -1
                ]
                for seed in seeds
            ]
            for name in names
        }
    print(f"\n{table(found)}\n")
    result: dict[str, Any] = {"table": args.table}
    for name, rows in found.items():
        result |= averages(rows, f"{name}_")
    print(json.dumps(result))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return Markdown: one line per row of the paper's table, our scores beside the paper's."""
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


if __name__ == "__main__":
    main()
