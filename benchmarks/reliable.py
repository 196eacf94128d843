"""What does the choice of reliable labels cost in time and memory?

    python benchmarks/reliable.py [--images 6000] [--dim 512] [--clusters 10] [--neighbors 100]

Random features in clusters, with 16 dimensions within a cluster. Time is compared with the one
matrix product that an exact Eq. 6 needs, every embedding with every other, in the same chunks;
beyond 60,000 images it is measured on 2^32 of the pairs and scaled. Memory is what the process adds
while it selects. Times are processor time, which other work on the machine hardly changes, of one
thread unless OMP_NUM_THREADS is set. --images 60000 is the size of CIFAR. More than 200,000 images
are searched by faiss (pip install 'spice-pl[ann]'), and its recall on 1,000 queries is reported.
Prints a table and, as the last line, the same as JSON.
"""

import argparse
import json
import logging
import os
import threading
import time
from pathlib import Path

import torch

from spice_pl.functional.neighbors import SIMILARITIES_PER_CHUNK, unit_rows
from spice_pl.functional.reliability import reliable_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--neighbors", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(args.clusters, args.dim, generator=generator)
    label = torch.arange(args.images) % args.clusters
    spread = torch.randn(16, args.dim, generator=generator) / 4
    features = centres[label] + torch.randn(args.images, 16, generator=generator) @ spread
    probs = torch.full((args.images, args.clusters), 1e-4)
    probs[torch.arange(args.images), label] = 1 - 1e-4 * (args.clusters - 1)

    floor = product_seconds(features)
    searches = Searches()
    with Peak() as peak:
        begun = time.process_time()
        mask = reliable_mask(features, probs, num_neighbors=args.neighbors, agreement=0.9)
        seconds = time.process_time() - begun
    features_mb = features.nbytes / 2**20
    figures = {
        "images": args.images,
        "dim": args.dim,
        "neighbors": args.neighbors,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "product_seconds": round(floor, 2),
        "over_product": round(seconds / floor, 3),
        "recall": searches.recall,
        "features_mb": round(features_mb),
        "added_mb": round(peak.added_mb),
        "reliable": int(mask.sum()),
    }
    print("| Images | Time | Exact product alone | Ratio | Recall | Features | Memory added |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    print(
        f"| {args.images:,} × {args.dim} | {seconds:.1f} s | {floor:.1f} s | "
        f"{seconds / floor:.3f} | {searches.recall:.4f} | {features_mb:,.0f} MB "
        f"| {peak.added_mb:,.0f} MB |\n"
    )
    print(json.dumps(figures))


def product_seconds(features: torch.Tensor) -> float:
    """Return the time of all dot products, in the chunks of the search; discards the results."""
    embeddings = unit_rows(features)
    chunk = max(1, SIMILARITIES_PER_CHUNK // len(embeddings))
    queries = min(len(embeddings), 2**32 // len(embeddings))
    begun = time.process_time()
    for start in range(0, queries, chunk):
        _ = embeddings[start : min(start + chunk, queries)] @ embeddings.T
    return (time.process_time() - begun) * len(embeddings) / queries


class Searches(logging.Handler):
    """Reads the recall that an approximate search logs; 1 for an exact one."""

    recall = 1.0

    def __init__(self) -> None:
        super().__init__()
        logger = logging.getLogger("spice_pl.functional.neighbors")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the recall of a log line that has one."""
        print(record.getMessage())
        if isinstance(record.args, tuple) and len(record.args) > 3:
            self.recall = round(float(record.args[3]), 4)  # type: ignore[arg-type]


class Peak:
    """Measures how far the resident memory rises while inside; looks every 5 ms."""

    def __enter__(self) -> "Peak":
        self.start = self.largest = _resident_mb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def added_mb(self) -> float:
        """Largest memory minus that at the start."""
        return self.largest - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.largest = max(self.largest, _resident_mb())


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
