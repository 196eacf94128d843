"""Does memory grow over epochs of a stage, predicted images, or trials in one process?

    python benchmarks/memory.py [--epochs 2000] [--images 50000] [--trials 30]

Trains tiny stages on the digits, predicts random images with their model, and runs trials one after
another, as Hydra's own launcher does. A line fitted to the second half of the notes says how many
bytes each epoch, image or trial leaves behind. Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray

from spice_pl.callbacks.stage_progress import StageProgress
from spice_pl.job import run, trainer
from spice_pl.job.job import Job
from spice_pl.models.portable import load

CONF = Path(__file__).parents[1] / "conf"
TINY = (
    *("backbone=resnet_small", "backbone.blocks=[1]", "backbone.widths=[8]", "preset=none"),
    *("augment=handwriting", "dataset=digits", "dataset.limit=200", "trainer.accelerator=cpu"),
    *("trainer.precision=32-true", "reliable.agreement=0.1", "reliable.confidence=0.1"),
    *("moco.streams.images.batch_size=100", "moco.module.queue_size=100"),
    *("proto.streams.images.batch_size=100", "proto.module.buffer_size=100"),
    *("proto.module.num_heads=2", "proto.module.repeats=1", "proto.module.head_batch_size=50"),
    *("fixmatch.streams.labelled.batch_size=4", "fixmatch.streams.unlabelled.batch_size=16"),
    *("fixmatch.module.steps_per_epoch=2", "recipe=scratch", "checkpoint_minutes=1000"),
)


def megabytes() -> float:
    """Return the memory in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Watch(StageProgress):
    """Also notes memory after each epoch."""

    notes: dict[str, list[float]] = {}  # noqa: RUF012 - shared on purpose

    def on_train_epoch_end(self, *more: Any) -> None:
        """Take a note."""
        self.notes.setdefault(self.name, []).append(megabytes())


def run_job(folder: str, *more: str) -> None:
    """Run a job in this process."""
    overrides = [*TINY, f"runs_dir={folder}", f"cache_dir={folder}/cache", *more]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides)
    run.run_stages(Job(cfg, tuple(overrides), "none", False))


def slope(notes: Sequence[float], each: int) -> tuple[float, float, float]:
    """Return megabytes at half and at the end, and bytes per unit over the second half."""
    half = np.array(notes[len(notes) // 2 :])
    per_note = np.polyfit(np.arange(len(half)), half, 1)[0] if len(half) > 1 else 0.0
    return float(half[0]), float(half[-1]), float(per_note) * 2**20 / each


def batches(num_images: int, size: int) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Yield random images, 250 at a time."""
    generator = np.random.default_rng(0)
    for start in range(0, num_images, 250):
        pixels = generator.integers(0, 256, (250, 3, size, size)).astype(np.uint8)
        yield [str(start + i) for i in range(250)], pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--trials", type=int, default=30)
    given = parser.parse_args()
    trainer.StageProgress = Watch  # type: ignore[misc,attr-defined]
    table: dict[str, dict[str, float]] = {}

    def show(name: str, notes: Sequence[float], each: int = 1) -> None:
        half, end, left = slope(notes, each)
        table[name] = {"number": len(notes) * each, "half": half, "end": end, "bytes": left}
        row = f"| {name} | {len(notes) * each:,} | {half:.1f} | {end:.1f} | {left:,.1f} |"
        print(row, flush=True)

    print("| what | number | MB at half | MB at the end | bytes for each |")
    print("|:--|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("moco", "proto", "fixmatch"):
            run_job(folder, f"stage={stage}", f"{stage}.epochs={given.epochs}")
            show(f"epochs of {stage}", Watch.notes.pop(stage))
        model, seen = load(Path(folder, "digits/fixmatch/seed0")), []
        for _ in model.stream(batches(given.images, model.image_size)):
            seen.append(megabytes())
        show("predicted images", seen, 250)
        after, short = [], [f"{stage}.epochs=1" for stage in ("moco", "proto", "fixmatch")]
        for seed in range(1, given.trials + 1):
            run_job(folder, f"seed={seed}", *short)
            after.append(megabytes())
        show("trials", after)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
