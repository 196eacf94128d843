"""What do smoothed embeddings cost beyond the features, and what does each part of them do?

    python benchmarks/embeddings.py [--images 60000] [--dim 512] [--components 64] [--neighbors 10]
    python benchmarks/embeddings.py --million      # 1,000,000 x 512, searched by faiss
    python benchmarks/embeddings.py --ablation NAME=FEATURES.npy,LABELS.npy ... [--seeds 5]

Random features in clusters, of 16 dimensions within a cluster. The product is the one that an exact
neighbour graph cannot do without: every projected sample with every other, in the same chunks.
Beyond 60,000 samples it is measured on 2^32 of the pairs and scaled. Memory is what the process
adds while it embeds. Projection, graph and walk are also timed one by one. Times are processor
time, which other work on the machine hardly changes, and the clock beside it. One thread unless
OMP_NUM_THREADS says otherwise. More than 200,000 samples are searched by faiss
(pip install 'spice-pl[ann]'), with its recall on 1,000 exact queries. Prints a table and, as its
last line, the same as JSON.

--ablation changes one of d, k, t and the whitening at a time. It prints ACC of k-means on the
smoothed embeddings of stored features, mean ± standard deviation over the seeds of k-means, and as
its last line JSON. Labels are read for ACC only.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from reliable import Peak, Searches, product_seconds
from torch import Tensor

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.embeddings import (
    fit_projection,
    neighbor_graph,
    project,
    smoothed_embeddings,
    walk_states,
)
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.reports.tables import mean_std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--components", type=int, default=64, help="d")
    parser.add_argument("--neighbors", type=int, default=10, help="k")
    parser.add_argument("--steps", type=int, default=3, help="t")
    parser.add_argument("--million", action="store_true", help="1,000,000 images of 512 features")
    parser.add_argument("--ablation", nargs="+", metavar="NAME=FEATURES.npy,LABELS.npy")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of k-means in the ablation")
    args = parser.parse_args()
    if args.ablation:
        ablation(args.ablation, args.seeds)
        return
    if args.million:
        args.images, args.dim = 1_000_000, 512
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    features = clustered(args.images, args.dim, args.clusters)

    searches = Searches()
    with Peak() as peak:
        clock = time.perf_counter()
        seconds, embeddings = timed(
            lambda: smoothed_embeddings(
                features,
                num_components=args.components,
                num_neighbors=args.neighbors,
                num_steps=args.steps,
            )
        )
        clock = time.perf_counter() - clock
    figures: dict[str, float] = {
        "images": args.images,
        "dim": args.dim,
        "components": args.components,
        "neighbors": args.neighbors,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "clock_seconds": round(clock, 2),
        "recall": searches.recall,
        "features_mb": round(features.nbytes / 2**20),
        "embeddings_mb": round(embeddings.nbytes / 2**20),
        "added_mb": round(peak.added_mb),
    }
    del embeddings
    if not args.million:  # a second search of a million would take as long as the first
        figures |= parts(features, args.components, args.neighbors, args.steps)
        figures["over_product"] = round(seconds / max(figures["product_seconds"], 1e-9), 3)
    print("| " + " | ".join(key.replace("_", " ") for key in figures) + " |")
    print("|" + "--:|" * len(figures))
    print("| " + " | ".join(f"{value:,}" for value in figures.values()) + " |\n")
    print(json.dumps(figures))


ABLATION: dict[str, dict[str, Any]] = {
    "d = 64, k = 10, t = 3, half": {},
    **{f"d = {d}": {"num_components": d} for d in (16, 32, 128)},
    **{f"k = {k}": {"num_neighbors": k} for k in (5, 20, 40)},
    **{f"t = {t}": {"num_steps": t} for t in (0, 1, 5, 10)},
    **{f"whitening {how}": {"whitening": how} for how in ("none", "full")},
}


def ablation(given: list[str], num_seeds: int) -> None:
    """Print ACC of k-means for each row of `ABLATION` and each data set."""
    sets = dict(text.split("=", 1) for text in given)
    print(f"| embeddings | {' | '.join(sets)} |")
    print("|:--|" + "--:|" * len(sets))
    found: dict[str, dict[str, list[float]]] = {}
    for row, settings in ABLATION.items():
        found[row] = {}
        for name, files in sets.items():
            features, labels = (torch.from_numpy(np.load(file)) for file in files.split(","))
            rows = smoothed_embeddings(features, **settings).numpy()
            num_clusters = len(labels.unique())
            found[row][name] = [
                clustering_scores(
                    torch.from_numpy(kmeans_clusters(rows, num_clusters, seed)), labels
                )["acc"]
                for seed in range(num_seeds)
            ]
        cells = [mean_std(found[row][name]) for name in sets]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
    print(f"\n{json.dumps(found)}")


def clustered(num_images: int, dim: int, num_clusters: int) -> Tensor:
    """Features (N, D) around centres; made in parts, so that no second copy is needed."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_clusters, dim, generator=generator)
    spread = torch.randn(16, dim, generator=generator) / 4
    features = torch.empty(num_images, dim)
    for rows in torch.split(torch.arange(num_images), 10_000):
        noise = torch.randn(len(rows), 16, generator=generator) @ spread
        features[rows] = centres[rows % num_clusters] + noise
    return features


def parts(
    features: Tensor, num_components: int, num_neighbors: int, steps: int
) -> dict[str, float]:
    """Seconds of each part, and of the product alone."""
    projection, starts = timed(lambda: project(features, fit_projection(features, num_components)))
    graph, weights = timed(lambda: neighbor_graph(starts, num_neighbors))
    walk, _ = timed(lambda: list(islice(walk_states(starts, weights), steps, steps + 1)))
    found = {"projection": projection, "graph": graph, "walk": walk}
    found["product"] = product_seconds(starts)
    return {f"{key}_seconds": round(value, 2) for key, value in found.items()}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of a call, and what it returns."""
    begun = time.process_time()
    value = call()
    return time.process_time() - begun, value


if __name__ == "__main__":
    main()
