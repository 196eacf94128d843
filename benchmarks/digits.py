"""How well are digits clustered, on average over seeds?

    python benchmarks/digits.py [--seeds 5] [--dataset mnist5k] [--runs-dir DIR] [KEY=VALUE ...]

Runs train.py once per seed, with any further settings. Prints a Markdown table of every row that
the run reports (k-means on pixels and features, stages 2 and 3 of SPICE, their chosen clusters) as
mean ± standard deviation over the seeds and, as the last line, the same as JSON. A row's time
includes the stages before it; the time of a run is that of the whole command. Without --runs-dir
the runs are deleted at the end.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trials import SCORES, averages, parse, train

from spice_pl.reports.tables import duration_text, mean_std

ROWS = {  # name in the JSON: name in the report
    "kmeans_pixels": "k-means on pixels",
    "kmeans_features": "k-means on MoCo features",
    "kmeans_smoothed": "k-means on smoothed MoCo features",
    "stage2": "SPICE stage 2",
    "stage2_chosen": "SPICE stage 2, chosen clusters",
    "stage3": "SPICE stage 3",
    "stage3_chosen": "SPICE stage 3, chosen clusters",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", choices=("digits", "mnist5k"), default="digits")
    args, overrides = parse(parser)
    with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
        folder = (args.runs_dir or Path(temporary)).resolve()
        runs, seconds = [], []
        for seed in range(args.seeds):
            print(f"==> {args.dataset}, seed {seed} of 0..{args.seeds - 1}", flush=True)
            started = time.monotonic()
            runs.append(run(args.dataset, seed, folder, overrides))
            seconds.append(time.monotonic() - started)
    print("\n" + table(runs, seconds) + "\n")
    print(json.dumps(figures(runs, seconds)))


def run(dataset: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run all stages with one seed and return the last stage's metrics."""
    fixed = [f"dataset={dataset}", f"seed={seed}", f"run=seed{seed}", "overwrite=true"]
    train(*fixed, f"runs_dir='{folder}'", *overrides)
    file = folder / dataset / "fixmatch" / f"seed{seed}" / "metrics.json"
    metrics: dict[str, Any] = json.loads(file.read_text())
    metrics["rows"] = {row["name"]: row for row in metrics["rows"]}
    return metrics


def table(runs: Sequence[dict[str, Any]], seconds: Sequence[float]) -> str:
    """Return Markdown: one line per result, mean ± standard deviation (n - 1) over the seeds."""
    lines = [
        "| Name | ACC | NMI | ARI | Protocol | Seeds | Time |",
        "|:--|--:|--:|--:|:--|--:|--:|",
    ]
    for name in runs[0]["rows"]:
        rows = [each["rows"][name] for each in runs]
        scores = (mean_std([row[score] for row in rows]) for score in SCORES)
        spent = duration_text(statistics.fmean(row["seconds"] for row in rows))
        cells = [name, *scores, rows[0]["protocol"], str(len(runs)), spent]
        lines.append(f"| {' | '.join(cells)} |")
    time_text, peak = duration_text(statistics.fmean(seconds)), peak_memory_mb(runs)
    lines.append(
        f"\n{runs[0]['dataset']}, {runs[0]['num_images']:,} images, K = {runs[0]['num_clusters']}; "
        f"a run takes {time_text} and at most {peak:,.0f} MB; settings: "
        f"{' '.join(own_settings(runs[0])) or 'as shipped'}."
    )
    return "\n".join(lines)


def figures(runs: Sequence[dict[str, Any]], seconds: Sequence[float]) -> dict[str, Any]:
    """Return every score of every row; names without a prefix, as `acc_mean`, are stage 3's."""
    result: dict[str, Any] = {
        "dataset": runs[0]["dataset"],
        "protocol": runs[0]["protocol"],
        "seeds": len(runs),
        "settings": own_settings(runs[0]),
    }
    for key, name in ROWS.items():
        if name not in runs[0]["rows"]:  # embeddings=cosine and answer=network have fewer
            continue
        prefix = "" if key == "stage3" else f"{key}_"
        result |= averages([each["rows"][name] for each in runs], prefix)
    result["seconds_per_run"] = round(statistics.fmean(seconds), 1)
    result["peak_memory_mb"] = round(peak_memory_mb(runs))
    return result


def own_settings(metrics: dict[str, Any]) -> list[str]:
    """Return the settings of the command line, without those that this benchmark adds."""
    ours = ("dataset=", "seed=", "run=", "overwrite=", "runs_dir=")
    return [text for text in metrics["overrides"] if not text.startswith(ours)]


def peak_memory_mb(runs: Sequence[dict[str, Any]]) -> float:
    """Return the largest resident memory of any run."""
    return max(float(each["peak_memory_mb"]) for each in runs)


if __name__ == "__main__":
    main()
