"""How much accuracy does the choice of the clusters at hand lose, and how stable is it?

    python benchmarks/choice.py [NAME=RUN ...] [--seeds 2] [--most 100]
    python benchmarks/choice.py [NAME=FEATURES.npy,LABELS.npy ...]

RUN is a finished run of stage 1 whose data set has labels, such as runs/mnist5k/embed/seed0, or
runs/photos/embed/seed0 of a folder that was read with dataset.labels=folders.
Without data sets: the pixels of scikit-learn's digits. Of each data set, seven kinds of set are
drawn: as many images of each class, two and five classes, thirty images per class, classes that
fall from 10 to 1, one class with half of the images, and two classes 6 to 1. On each, heads are
trained on the fixed features with the steps of stage 2 as the recipe pretrained has it
(`start=kmeans prior=estimated`), noise in the place of views; then `choose_answer` chooses.
Regret is the largest ACC of the network and of k-means after 3, 10, 30 and 100 steps, minus that of
the chosen clusters; the last columns have the regret if the silhouette or the assortativity alone
chooses. Labels are read only for these figures. Prints one line per set, then
one per kind, with means over data sets and seeds, the regret (mean and largest), the adjusted Rand
index between the chosen clusters of two seeds on the same images, and, as its last line, JSON.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import (
    COMPONENTS,
    assortativity,
    neighbor_agreement,
    silhouettes,
    spectral_clusters,
    walk_clusters,
)
from spice_pl.functional.embeddings import (
    coordinates,
    fit_projection,
    neighbor_graph,
    project,
    smoothed_embeddings,
)
from spice_pl.functional.losses import (
    double_softmax_cross_entropy,
    double_softmax_cross_entropy_per_head,
    tempered_cross_entropy_per_head,
)
from spice_pl.functional.prototypes import prototype_pseudo_labels, prototype_shares
from spice_pl.job.parts import open_images
from spice_pl.nn.heads import ParallelHeads
from spice_pl.runs.answer import candidates, choose_answer
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.proto import EMPTY_COST, SHARES_RATE
from spice_pl.stages.proto_start import start_clusters, start_probs

HEADS, CYCLES, REPEATS, BATCH, WIDTH, NOISE = 3, 8, 8, 128, 128, 0.5
STEPS = (3, 10, 30, 100)
KINDS = ("even", "two", "five", "thirty", "tail", "dominant", "6 to 1")
ALONE = ("silhouette", "assortativity")
COLUMNS = ("network", "k-means", "spectral", "chosen", "regret", *ALONE)


class Outcome(NamedTuple):
    """Figures of one set and seed.

    Attributes:
        acc: ACC of the network, of k-means after 3 steps, of spectral clustering and of the choice.
        best: largest ACC of the network and of k-means after each number of steps.
        alone: ACC of the choice by each of ALONE.
        chosen: (N,), the chosen clusters.
    """

    acc: dict[str, float]
    best: float
    alone: dict[str, float]
    chosen: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="*", metavar="NAME=RUN|FEATURES.npy,LABELS.npy")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--most", type=int, default=100, help="largest number of images per class")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"| set | images | classes | {' | '.join(COLUMNS[:5])} |")
    print("|:--|" + "--:|" * 7)
    found: dict[tuple[str, str], list[Outcome]] = {}
    for name, features, labels in data_sets(args.sets):
        for kind in KINDS:
            drawn = draw(labels, kind, args.most, np.random.default_rng(0))
            truth = torch.from_numpy(np.unique(labels[drawn], return_inverse=True)[1])
            runs = [look(features[drawn], truth, seed) for seed in range(args.seeds)]
            found[name, kind] = runs
            cells = [statistics.fmean(run.acc[key] for run in runs) for key in COLUMNS[:4]]
            cells.append(statistics.fmean(run.best - run.acc["chosen"] for run in runs))
            text = " | ".join(f"{cell:.3f}" for cell in cells)
            print(f"| {name} {kind} | {len(drawn)} | {int(truth.max()) + 1} | {text} |", flush=True)
    figures = {kind: summary(found, kind) for kind in KINDS}
    print(f"\n| kind | {' | '.join(COLUMNS)} | largest regret | ARI of seeds |")
    print("|:--|" + "--:|" * (len(COLUMNS) + 2))
    for kind, row in figures.items():
        print(f"| {kind} | {' | '.join(f'{value:.3f}' for value in row.values())} |")
    print(f"\n{json.dumps(figures)}")


def summary(found: dict[tuple[str, str], list[Outcome]], kind: str) -> dict[str, float]:
    """Return the means of one kind of set over data sets and seeds."""
    runs = [run for (_, each), of in found.items() if each == kind for run in of]
    regrets = [run.best - run.acc["chosen"] for run in runs]
    row = {key: statistics.fmean(run.acc[key] for run in runs) for key in COLUMNS[:4]}
    row["regret"] = statistics.fmean(regrets)
    row |= {key: statistics.fmean(run.best - run.alone[key] for run in runs) for key in ALONE}
    row["largest regret"] = max(regrets)
    pairs = [
        clustering_scores(one.chosen, other.chosen)["ari"]
        for (_, each), of in found.items()
        if each == kind
        for one, other in itertools.combinations(of, 2)
    ]
    row["ARI of seeds"] = statistics.fmean(pairs) if pairs else float("nan")
    return row


def data_sets(given: list[str]) -> Iterator[tuple[str, Tensor, NDArray[np.int64]]]:
    """Yield name, features (N, D) and labels (N,)."""
    if not given:
        pixels, labels = load_digits(return_X_y=True)
        yield "digits, pixels", torch.from_numpy(pixels).float(), labels
    for text in given:
        name, _, where = text.partition("=")
        if "," in where:
            features, labels = (np.load(Path(file)) for file in where.split(","))
        else:
            features, labels = of_run(Path(where))
        yield name, torch.from_numpy(features.astype(np.float32)), labels


def of_run(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return features and labels of the labelled images of a finished run."""
    cfg: Any = OmegaConf.load(path / ".hydra" / "config.yaml")
    labels = open_images(cfg).labels
    if labels is None:
        raise SystemExit(f"the data set of {path} has no labels; give a run with dataset.labels")
    known = labels >= 0
    return RunFolder(path).features[known], labels[known]


def draw(
    labels: NDArray[np.int64], kind: str, most: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Return the images of a kind of set, in order."""
    classes = generator.permutation(np.unique(labels))
    classes = classes[: {"five": 5, "two": 2, "6 to 1": 2}.get(kind)]
    count = len(classes)
    least = min(int((labels == each).sum()) for each in classes)
    largest = least if kind in ("tail", "dominant", "6 to 1") else min(most, least)
    sizes = [largest] * count
    if kind == "thirty":
        sizes = [min(30, least)] * count
    if kind == "tail":
        sizes = [max(2, round(size)) for size in np.geomspace(largest, largest / 10, count)]
    if kind == "6 to 1":
        sizes = [largest, max(2, round(largest / 6))]
    if kind == "dominant":
        sizes = [largest] + [max(2, largest // (count - 1))] * (count - 1)
    parts = [
        generator.choice(np.flatnonzero(labels == each), size, replace=False)
        for each, size in zip(classes, sizes, strict=True)
    ]
    return np.sort(np.concatenate(parts))


def look(features: Tensor, truth: Tensor, seed: int) -> Outcome:
    """Train, choose, and measure."""
    num_clusters = int(truth.max()) + 1
    probs = network(features, num_clusters, seed)
    walked = walk_clusters(features, num_clusters, walks=STEPS, seed=seed)
    starts = project(features, fit_projection(features))
    spectral = spectral_clusters(starts, neighbor_graph(starts), num_clusters, seed)
    chosen = choose_answer(features, probs, seed).probs.argmax(dim=1)
    rows = {"network": probs.argmax(dim=1), "k-means": walked[0], "spectral": spectral}
    acc = {name: accuracy(row, truth) for name, row in (rows | {"chosen": chosen}).items()}
    best = max(acc["network"], *(accuracy(row, truth) for row in walked))
    found, others = candidates(features, probs, seed)
    each = torch.stack(list(found.values()))
    located = coordinates(features, fit_projection(features, COMPONENTS, "none"))
    linked = assortativity(neighbor_agreement(others, each), each)
    scores = dict(zip(ALONE, (silhouettes(located, each), linked), strict=True))
    alone = {name: accuracy(each[int(of.argmax())], truth) for name, of in scores.items()}
    return Outcome(acc, best, alone, chosen)


def accuracy(clusters: Tensor, truth: Tensor) -> float:
    return clustering_scores(clusters, truth)["acc"]


def network(
    features: Tensor,
    num_clusters: int,
    seed: int,
    *,
    started: bool = True,
    num_heads: int = HEADS,
    cycles: int = CYCLES,
) -> Tensor:
    """Train heads on 128 components of fixed features; return the probabilities of the kept one.

    Args:
        features: (N, D).
        num_clusters: K.
        seed: seed of heads, noise and order.
        started: as the recipe pretrained, `start=kmeans prior=estimated`; else the paper's start.
        num_heads: number of heads.
        cycles: number of E-steps.

    Returns:
        Probabilities (N, K).
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = smoothed_embeddings(features)
    centred = features - features.mean(dim=0)
    rows = centred @ torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :WIDTH]
    rows = rows / rows.norm(dim=1).mean() * rows.shape[1] ** 0.5
    heads = ParallelHeads(rows.shape[1], WIDTH, num_clusters, num_heads, 1000 * seed)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3, fused=True)
    shares = None
    for cycle in range(cycles):
        with torch.no_grad():
            probs = heads(rows)  # (H, N, K)
            if started and cycle == 0:
                clusters = start_clusters(features, num_clusters, seed)
                probs = start_probs(embeddings, clusters, num_clusters).expand_as(probs)
                sizes = clusters.bincount(minlength=num_clusters) / len(clusters)
                shares = sizes.expand(num_heads, -1).clone()
            if shares is not None:
                found = prototype_shares(embeddings, probs, shares=shares)
                shares.lerp_(found, SHARES_RATE)
            slots, label = prototype_pseudo_labels(embeddings, probs, shares=shares)
        noise = torch.randn(rows.shape, generator=generator)
        strong = rows + NOISE * rows.std(dim=0) * noise
        for _ in range(REPEATS):
            for chosen in torch.randperm(slots.shape[1], generator=generator).split(BATCH):
                logits = heads.logits(F.embedding(slots[:, chosen], strong))
                if started and cycle == 0:
                    loss = tempered_cross_entropy_per_head(logits, label[..., chosen])
                else:
                    probs = logits.softmax(dim=-1)
                    loss = double_softmax_cross_entropy_per_head(probs, label[..., chosen])
                optimizer.zero_grad()
                torch.autograd.backward(loss.sum())
                optimizer.step()
    with torch.no_grad():
        probs = heads(rows)
        slots, label = prototype_pseudo_labels(embeddings, probs, shares=shares)
        label = label.expand(slots.shape)
        losses = [
            double_softmax_cross_entropy(one[at], own, balanced=started)
            + started * EMPTY_COST * (num_clusters - len(one.argmax(dim=1).unique()))
            for one, at, own in zip(probs, slots, label, strict=True)
        ]
    return probs[int(torch.stack(losses).argmin())]


if __name__ == "__main__":
    main()
