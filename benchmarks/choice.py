"""How much accuracy does the choice of the clusters at hand lose, and how stable is it?

    python benchmarks/choice.py [NAME=FEATURES.npy,LABELS.npy ...] [--seeds 2]

Without data sets: the pixels of scikit-learn's digits. Of each data set: as many images of
each class as the smallest has, five classes, thirty images per class, and classes that fall from 10
to 1. On each, heads are trained on the fixed
features with the steps of stage 2, noise in the place of views; then `choose_answer` chooses.
Regret is the largest ACC of the candidates of the table minus that of the chosen clusters. Labels
are read only for it. Prints one line per kind of set with means over seeds, the regret (mean and
largest), the adjusted Rand index between the chosen clusters of two seeds on the same images, and,
as its last line, JSON.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import walk_clusters
from spice_pl.functional.embeddings import smoothed_embeddings
from spice_pl.functional.losses import double_softmax_cross_entropy_per_head
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.nn.heads import ParallelHeads
from spice_pl.runs.answer import choose_answer

HEADS, EPOCHS, REPEATS, BATCH, WIDTH, NOISE = 3, 8, 8, 128, 128, 0.5
WALKS = (3, 10, 30, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="*", metavar="NAME=FEATURES.npy,LABELS.npy")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    columns = ["network", *(f"t = {steps}" for steps in WALKS), "chosen", "regret", "largest"]
    print(f"| set | images | classes | {' | '.join([*columns, 'ARI of seeds'])} |")
    print("|:--|" + "--:|" * (len(columns) + 3))
    figures: dict[str, dict[str, float]] = {}
    for name, features, labels in data_sets(args.sets):
        for kind in ("all", "five", "thirty", "tail"):
            drawn = draw(labels, kind, np.random.default_rng(0))
            truth = torch.from_numpy(np.unique(labels[drawn], return_inverse=True)[1])
            rows = [scores(features[drawn], truth, seed) for seed in range(args.seeds)]
            found = {
                key: statistics.fmean(acc[key] for acc, _ in rows)
                for key in columns
                if key != "largest"
            }
            found["largest"] = max(acc["regret"] for acc, _ in rows)
            pairs = itertools.combinations([clusters for _, clusters in rows], 2)
            agreement = [clustering_scores(one, other)["ari"] for one, other in pairs]
            found["ARI of seeds"] = statistics.fmean(agreement) if agreement else float("nan")
            cells = [f"{found[key]:.3f}" for key in (*columns, "ARI of seeds")]
            print(
                f"| {name} {kind} | {len(drawn)} | {int(truth.max()) + 1} | {' | '.join(cells)} |"
            )
            figures[f"{name} {kind}"] = {key: round(value, 4) for key, value in found.items()}
    regret = statistics.fmean(found["regret"] for found in figures.values())
    print(f"\nmean regret {regret:.3f}\n\n{json.dumps({'mean_regret': regret, **figures})}")


def data_sets(given: list[str]) -> Iterator[tuple[str, Tensor, NDArray[np.int64]]]:
    """Yield name, features (N, D) and labels (N,)."""
    if not given:
        pixels, labels = load_digits(return_X_y=True)
        yield "digits, pixels", torch.from_numpy(pixels).float(), labels
    for text in given:
        name, _, files = text.partition("=")
        features, labels = (np.load(Path(file)) for file in files.split(","))
        yield name, torch.from_numpy(features.astype(np.float32)), labels


def draw(labels: NDArray[np.int64], kind: str, generator: np.random.Generator) -> NDArray[np.intp]:
    """Return the images of a kind of set, in order."""
    classes = generator.permutation(np.unique(labels))
    if kind == "five":
        classes = classes[:5]
    least = min(int((labels == each).sum()) for each in classes)
    sizes = [least] * len(classes)
    if kind == "thirty":
        sizes = [min(30, least)] * len(classes)
    if kind == "tail":
        sizes = [max(2, round(size)) for size in np.geomspace(least, least / 10, len(classes))]
    parts = [
        generator.choice(np.flatnonzero(labels == each), size, replace=False)
        for each, size in zip(classes, sizes, strict=True)
    ]
    return np.sort(np.concatenate(parts))


def scores(features: Tensor, truth: Tensor, seed: int) -> tuple[dict[str, float], Tensor]:
    """Return ACC of each candidate and of the chosen clusters with its regret, and the latter."""
    num_clusters = int(truth.max()) + 1
    probs = network(features, num_clusters, seed)
    walked = walk_clusters(features, num_clusters, walks=WALKS, seed=seed)
    chosen = choose_answer(features, probs, seed).probs.argmax(dim=1)
    candidates = {"network": probs.argmax(dim=1)}
    candidates |= {f"t = {steps}": row for steps, row in zip(WALKS, walked, strict=True)}
    found = {name: clustering_scores(row, truth)["acc"] for name, row in candidates.items()}
    best = max(found.values())
    found["chosen"] = clustering_scores(chosen, truth)["acc"]
    return found | {"regret": best - found["chosen"]}, chosen


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
