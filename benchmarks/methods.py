"""All methods on one data set, each in its chain of stages: ACC, NMI and seconds over seeds.

    python benchmarks/methods.py dataset=digits --seeds 5      # every method from random weights
    python benchmarks/methods.py dataset=digits --on runs/digits/moco/seed0 --only proto,temi

A method is a chain of stages, such as moco,proto. Chains share what they have in common: moco
trains once per seed. With `--on` the first stage is not trained: all chains that start with it read
this one finished run, and the seed is that of the later stages. SETTINGs are those of the command
line: data set, recipe, sizes. With `--work DIR` finished stages are kept and found again.

Scores are against the true labels; TRUE LABELS CHOOSE NOTHING here. Seconds are those of all stages
of the chain. Prints a table of mean and standard deviation over seeds; last, all figures as JSON.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from stage2 import quiet, settings

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import spectral_clusters
from spice_pl.functional.embeddings import fit_projection, neighbor_graph, project
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.job.job import Job
from spice_pl.job.parts import open_images
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder

# Title, and chain; FIRST is what `--first` names.
METHODS = {
    "kmeans": ("k-means on features", "FIRST"),
    "smoothed": ("k-means on smoothed features", "FIRST"),
    "spectral": ("spectral clustering", "FIRST"),
    "proto": ("SPICE stage 2", "FIRST,proto"),
    "fixmatch": ("SPICE", "FIRST,proto,fixmatch"),
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
CLASSICAL = ("kmeans", "smoothed", "spectral")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="key=value, as on the command line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(METHODS), help="names, by comma")
    parser.add_argument("--first", default="moco", help="stage 1 of the chains")
    parser.add_argument("--on", type=Path, help="finished run that is stage 1 for all seeds")
    parser.add_argument("--work", type=Path, help="folder that keeps finished stages")
    args = parser.parse_intermixed_args()
    logging.disable(logging.INFO)
    quiet()
    first = args.on.parent.name if args.on else args.first
    figures = {}
    print(f"{'':32}{'ACC':>17}{'NMI':>17}{'seconds':>10}", flush=True)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in args.only.split(","):
            title, chain = METHODS[name]
            stages = chain.replace("FIRST", first).split(",")
            rows = [
                one(name, stages, args.settings, seed, work, args.on) for seed in range(args.seeds)
            ]
            acc, nmi, seconds = (list(part) for part in zip(*rows, strict=True))
            line = f"{title:32}{spread(acc):>17}{spread(nmi):>17}{statistics.mean(seconds):10.1f}"
            print(line, flush=True)
            figures[name] = {"acc": acc, "nmi": nmi, "seconds": seconds}
    print(json.dumps(figures))


def one(
    name: str, stages: list[str], given: list[str], seed: int, work: Path, on: Path | None
) -> tuple[float, float, float]:
    """Return ACC, NMI and seconds of a method with a seed."""
    folders = run_chain(stages, given, seed, work, on)
    cfg = settings(*given, f"seed={seed}")
    images = open_images(cfg)
    seconds = sum(float(folder.metrics["seconds"]) for folder in folders)
    if name in CLASSICAL:
        clusters, more = classical(
            name, folders[-1].path, images, int(cfg.dataset.num_clusters), seed
        )
        seconds += more
    else:
        clusters = torch.from_numpy(folders[-1].probs.argmax(axis=1))
    truth = torch.from_numpy(images.labels)
    found = clustering_scores(clusters[images.score_index], truth[images.score_index])
    return found["acc"], found["nmi"], seconds


def run_chain(
    stages: list[str], given: list[str], seed: int, work: Path, on: Path | None
) -> list[RunFolder]:
    """Run what is missing of a chain, in a folder of its own; return the run of each stage."""
    runs = work / "+".join(stages) / f"seed{seed}"
    *before, last = stages
    overrides = [
        *(*given, f"seed={seed}", f"runs_dir={runs}", "answer=network", f"stage={last}"),
        "resume=true",  # what an earlier call with `--work` began
        *(f"{last}.upstream={each}" for each in before[-1:]),
    ]
    job = Job(settings(*overrides), tuple(overrides), "none", sweep=False)
    if not job.folder(last).finished:
        if before and not runs.exists():
            start = run_chain(before, given, seed, work, on)[-1].path.parents[2]
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
    """Write mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
