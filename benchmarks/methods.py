"""How well do heads cluster equal features? Stage 2, TEMI, TURTLE, SCAN, k-means and spectral.

    python benchmarks/methods.py RUN [--seeds 3] [--only temi,turtle] [SETTING ...]

RUN is the finished folder of a stage that left features, such as runs/digits/moco/seed0 or
runs/photos/embed/seed0. SETTINGs are those of the command that made it: the data set, recipe and
sizes. Every head reads this one run, in turn, in one process. Scores are against the true labels,
seconds are those of the head alone, its views and its prediction included. TRUE LABELS CHOOSE
NOTHING here. Prints a table of mean and standard deviation over seeds; last, all figures as JSON.
"""

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import DictConfig
from stage2 import settings

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import spectral_clusters
from spice_pl.functional.embeddings import fit_projection, neighbor_graph, project
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.job.job import Job
from spice_pl.job.parts import open_images
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder

STAGES = {"proto": "SPICE stage 2", "temi": "TEMI", "turtle": "TURTLE", "scan": "SCAN"}
CLASSICAL = {
    "kmeans": "k-means on features",
    "smoothed": "k-means on smoothed features",
    "spectral": "spectral clustering",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished folder of a stage that left features")
    parser.add_argument("settings", nargs="*", help="key=value, as on the command line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join([*STAGES, *CLASSICAL]), help="names, by comma")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    names, figures = args.only.split(","), {}
    print(f"{'':32}{'ACC':>17}{'NMI':>17}{'seconds':>10}")
    for name in names:
        rows = [one(name, args.run, args.settings, seed) for seed in range(args.seeds)]
        acc, nmi, seconds = (list(part) for part in zip(*rows, strict=True))
        title = (STAGES | CLASSICAL)[name]
        print(f"{title:32}{spread(acc):>17}{spread(nmi):>17}{statistics.mean(seconds):10.1f}")
        figures[name] = {"acc": acc, "nmi": nmi, "seconds": seconds}
    print(json.dumps(figures))


def one(name: str, run: Path, given: list[str], seed: int) -> tuple[float, float, float]:
    """Return ACC, NMI and seconds of a head with a seed."""
    with tempfile.TemporaryDirectory() as folder:
        upstream = run.parent.name
        overrides = [*given, f"seed={seed}", f"runs_dir={folder}", "answer=network"]
        if name in STAGES:
            overrides += [f"stage={name}", f"{name}.upstream={upstream}"]
        cfg = settings(*overrides)
        images = open_images(cfg)
        if name in STAGES:
            # The seed is that of the head alone: all of them read the same features.
            shutil.copytree(run, Path(folder, str(cfg.dataset.name), upstream, f"seed{seed}"))
            clusters, seconds = by_stage(Job(cfg, tuple(overrides), "none", sweep=False), name)
        else:
            clusters, seconds = by_classical(name, run, images, cfg, seed)
    truth = torch.from_numpy(images.labels)
    found = clustering_scores(clusters[images.score_index], truth[images.score_index])
    return found["acc"], found["nmi"], seconds


def by_stage(job: Job, name: str) -> tuple[torch.Tensor, float]:
    """Return clusters (N,) and seconds of a stage."""
    run_stages(job)
    folder = job.folder(name)
    return torch.from_numpy(folder.probs.argmax(axis=1)), float(folder.metrics["seconds"])


def by_classical(
    name: str, run: Path, images: ImageSet, cfg: DictConfig, seed: int
) -> tuple[torch.Tensor, float]:
    """Return clusters (N,) and seconds of k-means or spectral clustering."""
    features = torch.from_numpy(RunFolder(run).features.copy())
    num_clusters, begun = int(cfg.dataset.num_clusters), time.monotonic()
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
