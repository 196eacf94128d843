"""How fast are images decoded, how soon can a run start on a store, and what memory does it take?

    python benchmarks/data.py                     # 10,000 and 100,000 synthetic files
    python benchmarks/data.py --sizes 1000000     # takes some minutes and 4 GB

For each size it makes folders of 1,000 small PNG files (hard links to 1,000 different files, so
that a million fit on any disk) and decodes them into a store. A new process then opens the store as
a run does: start-up is the time from the first look at the folder to the first batch, without
imports. Prints a table, then JSON.

    images_per_s  images read from the store in a shuffled epoch, uint8, before views are made
    decoded_per_s files decoded into the store, the first time
    startup_s     seconds that a new process needs on an existing store
    startup_cpu_s the same in processor time, which a busy machine does not lengthen
    rss_mb        memory that the process added by the end of the epoch (RssAnon); the mapped pages
                  of the store are not counted, they are the system's cache
    mapped_mb     the mapped pages (RssFile)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from spice_pl.data.augment import PlainView
from spice_pl.data.datamodule import Stream, ViewsDataModule
from spice_pl.data.sources.folder import folder

DIFFERENT = 1000  # different files; a file system allows some 60,000 hard links to each
PER_FOLDER = 1000
BATCH = 512
READ_AT_MOST = 200_000  # images of the timed epoch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--scan", default="auto", help="auto, files or folders")
    parser.add_argument("--measure", nargs=2, metavar=("ROOT", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.pixels, options.scan)))
        return
    logging.basicConfig(level=logging.WARNING)
    results = [run(size, options.pixels, options.scan) for size in options.sizes]
    keys = ("num_images", "decoded_per_s", "startup_s", "startup_cpu_s", "images_per_s", "rss_mb")
    print("".join(f"{key:>15}" for key in keys))
    for result in results:
        print("".join(f"{result[key]:>15,.2f}" for key in keys))
    print(json.dumps({"pixels": options.pixels, "scan": options.scan, "sizes": results}, indent=2))


def run(size: int, pixels: int, scan: str) -> dict[str, float]:
    """Make the files and the store, then let a new process open the store."""
    with tempfile.TemporaryDirectory(prefix="spice-pl-data-") as temporary:
        root, cache = Path(temporary, "images"), Path(temporary, "cache")
        write_files(root, size, pixels)
        started = time.monotonic()
        folder(str(root), pixels, str(cache), scan=scan)
        decoding = time.monotonic() - started
        more = ["--pixels", str(pixels), "--scan", scan, "--measure", str(root), str(cache)]
        done = subprocess.run(
            [sys.executable, __file__, *more], check=True, capture_output=True, text=True
        )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"num_images": size, "decoded_per_s": size / decoding} | measured


def write_files(root: Path, size: int, pixels: int) -> None:
    generator = np.random.default_rng(0)
    originals = []
    (root / "originals").mkdir(parents=True)
    for i in range(min(DIFFERENT, size)):
        path = root / "originals" / f"{i:04}.png"
        coarse = generator.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((pixels, pixels)).save(path)
        originals.append(path)
    for i in range(len(originals), size):
        parent = root / f"{i // PER_FOLDER:05}"
        if i % PER_FOLDER == 0:
            parent.mkdir()
        os.link(originals[i % DIFFERENT], parent / f"{i % PER_FOLDER:04}.png")
    for parent in (root, *root.iterdir()):  # as if it was filled some time ago
        os.utime(parent, (1e9, 1e9))


def measure(root: str, cache: str, pixels: int, scan: str) -> dict[str, float]:
    """Open the store as a run does and read an epoch of batches."""
    plain = PlainView((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    before = memory_mb("RssAnon")
    started, busy = time.monotonic(), time.process_time()
    images = folder(root, pixels, cache, scan=scan)
    count = min(len(images), READ_AT_MOST) // BATCH * BATCH
    stream = Stream({"plain": plain}, BATCH, num_samples=count)
    module = ViewsDataModule(images, {"images": stream}, plain, seed=0)
    batches = iter(module.train_dataloader())
    next(batches)
    startup, startup_cpu = time.monotonic() - started, time.process_time() - busy
    started, read = time.monotonic(), 0
    for batch in batches:
        read += len(batch.index)
    return {
        "startup_s": startup,
        "startup_cpu_s": startup_cpu,
        "images_per_s": read / (time.monotonic() - started),
        "rss_mb": memory_mb("RssAnon") - before,
        "mapped_mb": memory_mb("RssFile"),
    }


def memory_mb(what: str) -> float:
    """Return a value of /proc/self/status (Linux) in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc/self/status, which this system does not have")


if __name__ == "__main__":
    main()
