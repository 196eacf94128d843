"""All methods on one data set, each in its chain of stages: ACC, NMI and seconds over seeds.

    python benchmarks/methods.py dataset=digits --seeds 5      # every method from random weights
    python benchmarks/methods.py dataset=digits --on runs/digits/moco/seed0 --only proto,temi

A method is a chain of stages, such as moco,proto. Chains share what they have in common: moco
trains once per seed. With `--on` the first stage is not trained: all chains that start with it read
this one finished run, and the seed is that of the later stages. SETTINGs are those of the command
line: data set, recipe, sizes. With `--work DIR` finished stages are kept and found again.

Scores are against the true labels; TRUE LABELS CHOOSE NOTHING here. Seconds are those of all stages
of the chain. Prints a table of mean and standard deviation over seeds; last, all figures as JSON.

    python benchmarks/methods.py experiment=cifar10_quick dataset=folder ... --first simclr \
        --only knn,smoothed,proto,fixmatch --minutes 5,15,30 --curve quick

gives each stage at most so many minutes, and draws ACC over the minutes of the whole chain.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from stage1 import neighbor_accuracy
from stage2 import quiet, settings

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import spectral_clusters
from spice_pl.functional.embeddings import fit_projection, neighbor_graph, project
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.job.job import Job
from spice_pl.job.parts import open_images
from spice_pl.job.run import run_stages
from spice_pl.reports.lines import line_figure
from spice_pl.runs.folder import RunFolder

# Title, and chain; FIRST is what `--first` names.
METHODS = {
    "knn": ("20-NN by true labels (oracle)", "FIRST"),
    "kmeans": ("k-means on features", "FIRST"),
    "smoothed": ("k-means on smoothed features", "FIRST"),
    "spectral": ("spectral clustering", "FIRST"),
    "proto": ("SPICE stage 2", "FIRST,proto"),
    "fixmatch": ("SPICE", "FIRST,proto,fixmatch"),
    "proto_chosen": ("SPICE stage 2, chosen clusters", "FIRST,proto"),
    "fixmatch_chosen": ("SPICE, chosen clusters", "FIRST,proto,fixmatch"),
    "clusmatch": ("SPICE stage 2, ClusMatch", "FIRST,proto,clusmatch"),
    "temi": ("TEMI", "FIRST,temi"),
    "turtle": ("TURTLE", "FIRST,turtle"),
    "scan": ("SCAN", "FIRST,scan"),
    "selflabel": ("SCAN, self-label", "FIRST,scan,selflabel"),
    "cdc": ("CDC", "FIRST,cdc"),
    "cc": ("CC", "cc"),
    "propos": ("ProPos", "propos"),
    "propos_clusmatch": ("ProPos, ClusMatch", "propos,clusmatch"),
    "propos_dcboost": ("ProPos, DCBoost", "propos,dcboost"),
    "proto_dcboost": ("SPICE stage 2, DCBoost", "FIRST,proto,dcboost"),
}
Figures = dict[str, list[float]]  # of each seed: acc, nmi, seconds
CLASSICAL = ("kmeans", "smoothed", "spectral")
CHOSEN = ("proto_chosen", "fixmatch_chosen")  # with answer=auto; the others keep the network's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="key=value, as on the command line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(METHODS), help="names, by comma")
    parser.add_argument("--minutes", help="limits of a stage, as 5,15,30; without it, no limit")
    parser.add_argument("--curve", type=Path, help="name of the figure of ACC over --minutes")
    parser.add_argument("--first", default="moco", help="stage 1 of the chains")
    parser.add_argument("--on", type=Path, help="finished run that is stage 1 for all seeds")
    parser.add_argument("--work", type=Path, help="folder that keeps finished stages")
    args = parser.parse_intermixed_args()
    if args.curve and not args.minutes:
        parser.error("--curve draws ACC over --minutes; give them, as --minutes 5,15,30")
    logging.disable(logging.INFO)
    quiet()
    figures: dict[str, dict[str, Figures]] = {}
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.minutes is None:
            figures["all"] = compared(args, args.settings, work)
        for minutes in args.minutes.split(",") if args.minutes else ():
            print(f"at most {minutes} minutes per stage")
            limited = [*args.settings, f"minutes={minutes}"]
            figures[minutes] = compared(args, limited, work / f"{minutes}min")
            if args.curve:
                draw(figures, args.curve)
    print(json.dumps(figures))


def compared(args: argparse.Namespace, given: list[str], work: Path) -> dict[str, Figures]:
    """Run all methods with these settings; print a line for each; return their figures."""
    first = args.on.parent.name if args.on else args.first
    figures = {}
    print(f"{'':32}{'ACC':>17}{'NMI':>17}{'seconds':>10}", flush=True)
    for name in args.only.split(","):
        title, chain = METHODS[name]
        stages = chain.replace("FIRST", first).split(",")
        rows = [one(name, stages, given, seed, work, args.on) for seed in range(args.seeds)]
        acc, nmi, seconds = (list(part) for part in zip(*rows, strict=True))
        line = f"{title:32}{spread(acc):>17}{spread(nmi):>17}{statistics.mean(seconds):10.1f}"
        print(line, flush=True)
        figures[name] = {"acc": acc, "seconds": seconds}
        if name != "knn":
            figures[name]["nmi"] = nmi
    return figures


def draw(figures: dict[str, dict[str, Figures]], name: Path) -> None:
    """Write NAME.svg: mean ACC of each method over the mean minutes of its chain."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for found in figures.values():
        for method, each in found.items():
            point = statistics.mean(each["seconds"]) / 60, statistics.mean(each["acc"])
            curves.setdefault(METHODS[method][0], []).append(point)
    figure = line_figure(curves, "minutes", "ACC")
    name.with_suffix(".svg").write_text(figure, encoding="utf-8")


def one(
    name: str, stages: list[str], given: list[str], seed: int, work: Path, on: Path | None
) -> tuple[float, float, float]:
    """Return ACC, NMI and seconds of a method with a seed."""
    answer = "auto" if name in CHOSEN else "network"
    folders = run_chain(stages, given, answer, seed, work, on)
    cfg = settings(*given, f"seed={seed}")
    images = open_images(cfg)
    seconds = sum(float(folder.metrics["seconds"]) for folder in folders)
    truth = torch.from_numpy(images.labels)
    if name == "knn":
        features = torch.from_numpy(folders[-1].features.copy())
        return neighbor_accuracy(features, truth), math.nan, seconds
    if name in CLASSICAL:
        clusters, more = classical(
            name, folders[-1].path, images, int(cfg.dataset.num_clusters), seed
        )
        seconds += more
    else:
        clusters = torch.from_numpy(folders[-1].answer.argmax(axis=1))
    found = clustering_scores(clusters[images.score_index], truth[images.score_index])
    return found["acc"], found["nmi"], seconds


def run_chain(
    stages: list[str], given: list[str], answer: str, seed: int, work: Path, on: Path | None
) -> list[RunFolder]:
    """Run what is missing of a chain, in a folder of its own; return the run of each stage."""
    *before, last = stages
    if not before:
        answer = "network"  # the first stage is the same for both
    runs = work / answer / "+".join(stages) / f"seed{seed}"
    overrides = [
        *(*given, f"seed={seed}", f"runs_dir={runs}", f"answer={answer}", f"stage={last}"),
        "resume=true",  # what an earlier call with `--work` began
        *(f"{stage}.upstream={each}" for each, stage in itertools.pairwise(stages)),
    ]
    job = Job(settings(*overrides), tuple(overrides), "none", sweep=False)
    if not job.folder(last).finished:
        if before and not runs.exists():
            start = run_chain(before, given, answer, seed, work, on)[-1].path.parents[2]
            shutil.copytree(start, runs)
        if on is not None and not before:
            shutil.copytree(on, job.folder(last).path)
        else:
            with contextlib.redirect_stdout(io.StringIO()):  # the table of each run
                run_stages(job)
    return [job.folder(each) for each in stages]


def classical(
    name: str, run: Path, images: ImageSet, num_clusters: int, seed: int
) -> tuple[torch.Tensor, float]:
    """Return clusters (N,) and seconds of k-means or spectral clustering."""
    features = torch.from_numpy(RunFolder(run).features.copy())
    begun = time.monotonic()
    if name == "spectral":
        starts = project(features, fit_projection(features, 64, "half"))
        clusters = spectral_clusters(starts, neighbor_graph(starts, 10), num_clusters, seed)
    else:
        rows = features
        if name == "smoothed":
            rows = RunFolder(run, "smoothed").embeddings(images.train_index)
        clusters = torch.from_numpy(kmeans_clusters(rows.numpy(), num_clusters, seed))
    return clusters, time.monotonic() - begun


def spread(values: list[float]) -> str:
    """Write mean and standard deviation; nothing where there is no score."""
    if math.isnan(values[0]):
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
