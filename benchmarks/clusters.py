"""How many clusters stay non-empty when K is large? How do classes of unequal size fare?

    python benchmarks/clusters.py [--clusters 200] [--per-cluster 50] [--cycles 10] [--heads 4]
    python benchmarks/clusters.py --unequal [NAME=FEATURES.npy,LABELS.npy ...] [--draws 2]
                                  [--per-class 150] [--extra 0] [--kinds even "10 : 1"]

The first takes synthetic features: K random centres (D = 64) plus noise; weak and strong views add
noise of their own. The buffer holds all images. Each cycle takes Eqs. 2 to 4 on the weak views and
then the M-step on the strong views (Adam). The M-step minimises Eq. 5, Eq. 5 with the entropy term
at two weights, or plain cross-entropy. For each loss it prints the accuracy and the number of empty
clusters of the head with the lowest Eq. 5, beside k-means; then JSON.

The second takes features of images, by default the pixels of scikit-learn's digits, and draws
classes of equal and of unequal size from them; `--extra` asks for more clusters than classes. Heads
are trained with the steps of stage 2 on smoothed embeddings, noise in the place of views, from
random predictions with equal shares (the paper) and with `start=kmeans prior=estimated` (the recipe
pretrained). Prints ACC / mean recall of classes / purity of the head with the lowest loss, means
over sets and draws, beside k-means on smoothed embeddings; then JSON with the empty clusters too.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from choice import data_sets, network
from numpy.typing import NDArray
from torch import Tensor

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.embeddings import smoothed_embeddings
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.functional.losses import (
    double_softmax_cross_entropy_per_head,
    mean_prediction_entropy,
    tempered_cross_entropy_per_head,
)
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.nn.heads import ParallelHeads

DIM, REPEATS, BATCH = 64, 8, 128
ROWS = {  # name: (double softmax or plain cross-entropy, weight of the entropy term)
    "spice": (True, 0.0),
    "entropy_0.03": (True, 0.03),
    "entropy_1": (True, 1.0),
    "ce": (False, 0.0),
}
KINDS = {  # sizes of C classes as shares of the largest
    "even": lambda num: np.ones(num),
    "5 : 1": lambda num: np.geomspace(1, 1 / 5, num),
    "10 : 1": lambda num: np.geomspace(1, 1 / 10, num),
    "20 : 1": lambda num: np.geomspace(1, 1 / 20, num),
    "one large": lambda num: np.append(1, np.full(num - 1, 0.1)),
    "half small": lambda num: np.where(np.arange(num) < num // 2, 1, 0.1),
}
COLUMNS = ("random, uniform", "kmeans, estimated", "k-means itself")
SCORES = ("acc", "recall", "purity", "empty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="NAME=FEATURES.npy,LABELS.npy")
    parser.add_argument("--unequal", action="store_true")
    parser.add_argument("--draws", type=int, default=2, help="draws of images, with --unequal")
    parser.add_argument("--per-class", type=int, default=150, help="images of the largest class")
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--extra", type=int, default=0, help="clusters beyond the classes")
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--per-cluster", type=int, default=50)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--lr", type=float, default=5e-3, help="learning rate of Adam; default: the paper's"
    )
    args = parser.parse_args()
    if args.unequal:
        unequal(args)
        return
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(args.clusters).repeat(args.per_cluster)
    centres = torch.randn(args.clusters, DIM, generator=generator)

    def noisy(features: torch.Tensor, scale: float) -> torch.Tensor:
        return features + scale * torch.randn(features.shape, generator=generator)

    features = noisy(centres[truth], 0.7)
    found = clustering_scores(
        torch.from_numpy(kmeans_clusters(features.numpy(), args.clusters, seed=0)), truth
    )
    figures = {"clusters": args.clusters, "images": len(truth), "kmeans_acc": found["acc"]}
    print(f"K = {args.clusters}, {len(truth):,} images; k-means ACC {found['acc']:.3f}")
    for name, (double, entropy) in ROWS.items():
        begun = time.process_time()
        heads = ParallelHeads(DIM, DIM, args.clusters, args.heads, seed=0)
        optimizer = torch.optim.Adam(heads.parameters(), lr=args.lr, fused=True)
        for _ in range(args.cycles):
            weak, strong = noisy(features, 0.2), noisy(features, 0.4)
            with torch.no_grad():
                slots, label = prototype_pseudo_labels(features, heads(weak))
            for _ in range(REPEATS):
                for chosen in torch.randperm(len(label), generator=generator).split(BATCH):
                    logits = heads.logits(strong[slots[:, chosen]])
                    probs = logits.softmax(dim=-1)
                    if double:
                        loss = double_softmax_cross_entropy_per_head(probs, label[chosen])
                    else:
                        loss = tempered_cross_entropy_per_head(logits, label[chosen])
                    if entropy:
                        loss = loss - entropy * mean_prediction_entropy(probs)
                    optimizer.zero_grad()
                    loss.sum().backward()
                    optimizer.step()
        with torch.no_grad():
            probs = heads(features)
            slots, label = prototype_pseudo_labels(features, probs)
            own = torch.stack([one[at] for one, at in zip(probs, slots, strict=True)])
            best = int(double_softmax_cross_entropy_per_head(own, label).argmin())
            clusters = probs[best].argmax(dim=1)
        empty = args.clusters - len(clusters.unique())
        acc = clustering_scores(clusters, truth)["acc"]
        seconds = time.process_time() - begun
        figures |= {f"acc_{name}": acc, f"empty_{name}": empty}
        print(f"{name:<13} ACC {acc:.3f}, {empty} empty clusters, {seconds:.0f} s", flush=True)
    print(json.dumps(figures))


def unequal(args: argparse.Namespace) -> None:
    print(f"| classes | {' | '.join(COLUMNS)} |\n|:--|{'--:|' * len(COLUMNS)}", flush=True)
    figures: dict[str, float] = {}
    sets = list(data_sets(args.sets))
    for kind in args.kinds:
        found = defaultdict(list)
        for _, features, labels in sets:
            for seed in range(args.draws):
                drawn = draw(labels, kind, args.per_class, seed)
                truth = torch.from_numpy(np.unique(labels[drawn], return_inverse=True)[1])
                num_clusters = int(truth.max()) + 1 + args.extra
                for name, clusters in candidates(features[drawn], num_clusters, seed).items():
                    scores = clustering_scores(clusters, truth)
                    scores["empty"] = num_clusters - len(clusters.unique())
                    found[name].append(scores)
        means = {
            name: [statistics.fmean(each[score] for each in found[name]) for score in SCORES]
            for name in COLUMNS
        }
        cells = [" / ".join(f"{value:.3f}" for value in means[name][:3]) for name in COLUMNS]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        figures |= {
            f"{kind}, {name}, {score}": round(value, 4)
            for name in COLUMNS
            for score, value in zip(SCORES, means[name], strict=True)
        }
    print(json.dumps(figures))


def draw(labels: NDArray[np.int64], kind: str, most: int, seed: int) -> NDArray[np.intp]:
    """Draw images: the largest class has `most`, or as many as every class has."""
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(labels))
    most = min(most, *(int((labels == each).sum()) for each in classes))
    sizes = np.maximum(3, np.round(most * KINDS[kind](len(classes)))).astype(int)
    parts = [
        generator.choice(np.flatnonzero(labels == each), size, replace=False)
        for each, size in zip(classes, sizes, strict=True)
    ]
    return np.sort(np.concatenate(parts))


def candidates(features: Tensor, num_clusters: int, seed: int) -> dict[str, Tensor]:
    """Return the clusters (N,) of each column."""
    embeddings = smoothed_embeddings(features)
    clusters = [
        network(features, num_clusters, seed, started=started, num_heads=5, cycles=10).argmax(dim=1)
        for started in (False, True)
    ]
    clusters.append(torch.from_numpy(kmeans_clusters(embeddings.numpy(), num_clusters, seed)))
    return dict(zip(COLUMNS, clusters, strict=True))


if __name__ == "__main__":
    main()
