"""How far is the estimated number of clusters off, where classes are even and where they are not?

    python benchmarks/num_clusters.py [NAME=RUN ...] [--most 60]
    python benchmarks/num_clusters.py [NAME=FEATURES.npy,LABELS.npy ...]

RUN is a finished run of stage 1 whose data set has labels, as in choice.py.
Without data sets: the pixels of scikit-learn's digits. Of each data set: 2, 3, 5, 7 and all classes
of equal size; and 3, 5, 7 and all classes that fall from 10 to 1, and of which one has half of the
images. Prints, for each set, the estimate of stage=estimate_k, the range of K that fit about as
well, whether it is clear, and what the largest silhouette × modularity, without the agreement, and
the largest silhouette and modularity alone give.
Then, for each kind, the mean of |ln(estimate/true)|: 0.17 is a factor of 1.2, 0.7 a factor of 2.
Labels are read only for these figures. The last line is JSON.
"""

import argparse
import json
import math
import os
import statistics
from collections import defaultdict

import numpy as np
import torch
from choice import data_sets, draw
from numpy.typing import NDArray

from spice_pl.functional.embeddings import nearest_others
from spice_pl.tasks.estimate_k import (
    IMAGES_PER_CLUSTER,
    NUM_NEIGHBORS,
    choose,
    doubts_of,
    look,
    principal_components,
    smoothed,
)

LARGEST, COMPONENTS, SPLITS = 20, 32, 2
COUNTS = {"even": (2, 3, 5, 7), "tail": (3, 5, 7), "dominant": (3, 5, 7)}
RULES = ("estimate", "silhouette × modularity", "silhouette", "modularity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="*", metavar="NAME=RUN|FEATURES.npy,LABELS.npy")
    parser.add_argument("--most", type=int, default=60, help="images per class of even sets")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"| set | images | classes | estimate | range | clear | {' | '.join(RULES[1:])} |")
    print("|:--|--:|--:|--:|:--|:--|--:|--:|--:|")
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, features, labels in data_sets(args.sets):
        classes = np.unique(labels)
        for kind, counts in COUNTS.items():
            fewer = [count for count in counts if count < len(classes)]
            for count in (*fewer, len(classes)):
                generator = np.random.default_rng(count)
                kept = np.flatnonzero(np.isin(labels, generator.permutation(classes)[:count]))
                drawn = kept[draw(labels[kept], kind, args.most, generator)]
                found, text = estimate(features[drawn].double().numpy())
                for rule, number in zip(RULES, found, strict=True):
                    errors[kind][rule].append(abs(math.log(number / count)))
                head = f"{name} {kind} | {len(drawn)} | {count} | {found[0]} | {text}"
                print(f"| {head} | {' | '.join(map(str, found[1:]))} |", flush=True)
    figures = {
        kind: {rule: statistics.fmean(values) for rule, values in of.items()}
        for kind, of in errors.items()
    }
    print(f"\n| kind | sets | {' | '.join(RULES)} |\n|:--|--:|{'--:|' * len(RULES)}")
    for kind, of in figures.items():
        text = " | ".join(f"{value:.2f}" for value in of.values())
        print(f"| {kind} | {len(errors[kind]['estimate'])} | {text} |")
    print(f"\n{json.dumps(figures)}")


def estimate(features: NDArray[np.float64]) -> tuple[tuple[int, ...], str]:
    """Return K by each of RULES; and the task's range and clarity."""
    largest = min(LARGEST, len(features) // IMAGES_PER_CLUSTER)
    rows = principal_components(features, COMPONENTS)
    num_neighbors = max(1, min(NUM_NEIGHBORS, len(features) // (2 * largest)))
    embeddings = smoothed(features, num_neighbors)
    others = nearest_others(torch.from_numpy(features), num_neighbors)
    curve = [look(rows, embeddings, others, k, SPLITS, 0) for k in range(2, largest + 1)]
    found, candidates = choose(curve)
    clear = "no" if doubts_of(found, curve, candidates) else "yes"
    by_both = max(curve, key=lambda point: point.silhouette * point.modularity).num_clusters
    by_silhouette = max(curve, key=lambda point: point.silhouette).num_clusters
    by_modularity = max(curve, key=lambda point: point.modularity).num_clusters
    text = f"{min(candidates)} to {max(candidates)} | {clear}"
    return (found.num_clusters, by_both, by_silhouette, by_modularity), text


if __name__ == "__main__":
    main()
