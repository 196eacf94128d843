"""How do stage 3 and its relatives compare on the same features and labels?

    python benchmarks/semi.py [--seeds 5] [--stages fixmatch,clusmatch,...] [--before moco,proto]
                              [--runs-dir DIR] [KEY=VALUE ...]
    python benchmarks/semi.py --before simclr,proto experiment=cifar10_quick dataset=folder ...

Trains the stages before once per seed, then runs every method on them, one multirun per method.
Prints a Markdown table of means ± standard deviations over the seeds: ACC, NMI, ARI, the share of
images with a label to learn and the accuracy of these labels (truth, for this table only), and the
time beyond the stages before. The last line is the scores as JSON. Runs that are finished in
--runs-dir are reused.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from trials import SCORES, averages, parse, train, trial

from spice_pl.reports.tables import duration_text, mean_std

STAGES = "fixmatch,clusmatch,freematch,flexmatch,softmatch,scan,selflabel,supervised"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--before", default="moco,proto", help="stages trained first; the last one gets a row too"
    )
    parser.add_argument("--stages", default=STAGES, help="methods to compare, with commas between")
    args, settings = parse(parser)
    before, stages, seeds = args.before.split(","), args.stages.split(","), range(args.seeds)
    with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
        swept = f"seed={','.join(map(str, seeds))}"
        fixed = [*settings, f"runs_dir='{(args.runs_dir or Path(temporary)).resolve()}'"]
        for stage in (*before, *stages):
            train("-m", f"stage={stage}", "resume=true", *fixed, swept)
        found = {
            stage: [
                trial(stage, [f"stage={stage}", *fixed, f"seed={seed}"], [swept]) for seed in seeds
            ]
            for stage in (before[-1], *stages)
        }
    print(table(found))
    rows = {stage: [run["rows"][-1] for run in runs] for stage, runs in found.items()}
    print(json.dumps({stage: {"seeds": len(seeds), **averages(rows[stage])} for stage in rows}))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return Markdown, one line per method."""
    lines = [
        "| Method | ACC | NMI | ARI | Labelled | ACC of labels | Seeds | Time |",
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


if __name__ == "__main__":
    main()
