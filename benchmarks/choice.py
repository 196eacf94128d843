"""How much accuracy does the choice of the clusters at hand lose, and how stable is it?

    python benchmarks/choice.py [NAME=FEATURES.npy,LABELS.npy ...] [--seeds 2] [--most 100]

Without data sets: the pixels of scikit-learn's digits. Of each data set and seed, five kinds of set
are drawn: as many images of each class, five classes, thirty images per class, classes that fall
from 10 to 1, and one class with half of the images. On each, heads are trained on the fixed
features with the steps of stage 2, noise in the place of views; then `choose_answer` chooses.
Regret is the largest ACC of the network and of k-means after 3, 10, 30 and 100 steps, minus that of
the chosen clusters. "Left out" is the regret if the weight of the evenness is the one that loses
least on the other data sets. Labels are read only for these figures. Prints one line per set, then
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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import (
    DISAGREEMENT_FLOOR,
    EVENNESS_WEIGHT,
    evenness,
    neighbor_agreement,
    spectral_clusters,
    walk_clusters,
)
from spice_pl.functional.embeddings import (
    fit_projection,
    neighbor_graph,
    project,
    smoothed_embeddings,
)
from spice_pl.functional.losses import double_softmax_cross_entropy_per_head
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.nn.heads import ParallelHeads
from spice_pl.runs.answer import candidates, choose_answer

HEADS, EPOCHS, REPEATS, BATCH, WIDTH, NOISE = 3, 8, 8, 128, 128, 0.5
STEPS = (3, 10, 30, 100)
KINDS = ("even", "five", "thirty", "tail", "dominant")
WEIGHTS = (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0)  # of the evenness
COLUMNS = ("network", "k-means", "spectral", "chosen", "regret", "left out")


class Outcome(NamedTuple):
    """Figures of one set and seed.

    Attributes:
        acc: ACC of the network, of k-means after 3 steps, of spectral clustering and of the choice.
        best: largest ACC of the network and of k-means after each number of steps.
        by_weight: ACC of the choice with each of WEIGHTS.
        chosen: (N,), the chosen clusters.
    """

    acc: dict[str, float]
    best: float
    by_weight: tuple[float, ...]
    chosen: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="*", metavar="NAME=FEATURES.npy,LABELS.npy")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--most", type=int, default=100, help="largest number of images per class")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"| set | images | classes | {' | '.join(COLUMNS[:-1])} |")
    print("|:--|" + "--:|" * (len(COLUMNS) + 1))
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
    row["left out"] = statistics.fmean(
        run.best - run.by_weight[weight_without(found, name)]
        for (name, each), of in found.items()
        if each == kind
        for run in of
    )
    row["largest regret"] = max(regrets)
    pairs = [
        clustering_scores(one.chosen, other.chosen)["ari"]
        for (_, each), of in found.items()
        if each == kind
        for one, other in itertools.combinations(of, 2)
    ]
    row["ARI of seeds"] = statistics.fmean(pairs) if pairs else float("nan")
    return row


def weight_without(found: dict[tuple[str, str], list[Outcome]], left_out: str) -> int:
    """Return the place in WEIGHTS that loses least on the other data sets; on all if no other."""
    others = [run for (name, _), of in found.items() if name != left_out for run in of]
    others = others or [run for of in found.values() for run in of]
    gains = [sum(run.by_weight[place] for run in others) for place in range(len(WEIGHTS))]
    near = sorted(range(len(WEIGHTS)), key=lambda place: abs(WEIGHTS[place] - EVENNESS_WEIGHT))
    return max(near, key=lambda place: gains[place])  # of equal ones that nearest to the constant


def data_sets(given: list[str]) -> Iterator[tuple[str, Tensor, NDArray[np.int64]]]:
    """Yield name, features (N, D) and labels (N,)."""
    if not given:
        pixels, labels = load_digits(return_X_y=True)
        yield "digits, pixels", torch.from_numpy(pixels).float(), labels
    for text in given:
        name, _, files = text.partition("=")
        features, labels = (np.load(Path(file)) for file in files.split(","))
        yield name, torch.from_numpy(features.astype(np.float32)), labels


def draw(
    labels: NDArray[np.int64], kind: str, most: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Return the images of a kind of set, in order."""
    classes = generator.permutation(np.unique(labels))
    if kind == "five":
        classes = classes[:5]
    count = len(classes)
    least = min(int((labels == each).sum()) for each in classes)
    largest = least if kind in ("tail", "dominant") else min(most, least)
    sizes = [largest] * count
    if kind == "thirty":
        sizes = [min(30, least)] * count
    if kind == "tail":
        sizes = [max(2, round(size)) for size in np.geomspace(largest, largest / 10, count)]
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
    agreements = -(1 - neighbor_agreement(others, each) + DISAGREEMENT_FLOOR).log()
    even = torch.tensor([evenness(row, num_clusters) for row in each], dtype=torch.float64)
    kept = [int((weight * even + agreements).argmax()) for weight in WEIGHTS]
    return Outcome(acc, best, tuple(accuracy(each[place], truth) for place in kept), chosen)


def accuracy(clusters: Tensor, truth: Tensor) -> float:
    return clustering_scores(clusters, truth)["acc"]


def network(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Train heads on fixed features by Eqs. 2 to 5; return the probabilities of the best loss."""
    generator = torch.Generator().manual_seed(seed)
    centred = features - features.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :WIDTH]
    rows = centred @ axes
    rows = rows / rows.norm(dim=1).mean() * WIDTH**0.5
    embeddings = smoothed_embeddings(features)
    heads = ParallelHeads(rows.shape[1], WIDTH, num_clusters, HEADS, 1000 * seed)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        with torch.no_grad():
            slots, label = prototype_pseudo_labels(embeddings, heads(rows))
        noise = torch.randn(rows.shape, generator=generator)
        strong = rows + NOISE * rows.std(dim=0) * noise
        for _ in range(REPEATS):
            for chosen in torch.randperm(len(label), generator=generator).split(BATCH):
                probs = heads(F.embedding(slots[:, chosen], strong))
                loss = double_softmax_cross_entropy_per_head(probs, label[chosen]).sum()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
    with torch.no_grad():
        probs = heads(rows)
        slots, label = prototype_pseudo_labels(embeddings, probs)
        own = torch.stack([one[at] for one, at in zip(probs, slots, strict=True)])
        best = int(double_softmax_cross_entropy_per_head(own, label).argmin())
    return probs[best]


if __name__ == "__main__":
    main()
