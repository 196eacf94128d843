"""How many clusters stay non-empty when K is large? Stage 2's mathematics on synthetic features.

    python benchmarks/clusters.py [--clusters 200] [--per-cluster 50] [--cycles 10] [--heads 4]

Features are K random centres (D = 64) plus noise; weak and strong views add noise of their own. The
buffer holds all images. Each cycle takes Eqs. 2 to 4 on the weak views and then the M-step on the
strong views (Adam). The M-step minimises Eq. 5, Eq. 5 with the entropy term at two weights, or
plain cross-entropy. For each loss it prints the accuracy and the number of empty clusters of the
head with the lowest Eq. 5, beside k-means; then JSON.
"""

import argparse
import json
import time

import torch

from spice_pl.functional.assignment import clustering_scores
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--per-cluster", type=int, default=50)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--lr", type=float, default=5e-3, help="learning rate of Adam; default: the paper's"
    )
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
