"""Does memory or the number of open files grow over thousands of steps of a stage?

    python benchmarks/health.py [--steps 2000] [--stages moco,...]

Trains a small network on the digits and notes the memory in use and the open files every 50 steps.
A line fitted to the second half of the steps says how many bytes each step leaves behind. Prints a
table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from spice_pl.callbacks.stage_progress import StageProgress
from spice_pl.job import run, trainer
from spice_pl.job.job import Job

CONF = Path(__file__).parents[1] / "conf"
SMALL = (
    *("backbone=resnet_small", "backbone.blocks=[1]", "backbone.widths=[8]", "preset=none"),
    *("augment=handwriting", "dataset=digits", "trainer.accelerator=cpu"),
    *("trainer.precision=32-true", "reliable.agreement=0.1", "reliable.confidence=0.1"),
    *("moco.streams.images.batch_size=32", "moco.module.queue_size=512"),
    *("proto.streams.images.batch_size=32", "proto.module.buffer_size=320"),
    *("proto.module.num_heads=2", "proto.module.repeats=1", "proto.module.head_batch_size=32"),
    *("fixmatch.streams.labelled.batch_size=4", "fixmatch.streams.unlabelled.batch_size=16"),
    "fixmatch.module.steps_per_epoch=100",
)
SEMI = (
    *("streams.labelled.batch_size=4", "streams.unlabelled.batch_size=16"),
    *("module.steps_per_epoch=100", "selector=variance"),
)
# By `stage=`: the batches in an epoch of each stage that it runs, and settings for it.
STAGES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "all": ({"moco": 56, "proto": 50, "fixmatch": 100}, ()),
    "simclr": ({"simclr": 56}, ("streams.images.batch_size=32",)),
    "scan": ({"scan": 56}, ("streams.images.batch_size=32",)),
    "selflabel": ({"selflabel": 56}, ("streams.images.batch_size=32", "module.confidence=0.1")),
    "clusmatch": ({"clusmatch": 100}, (*SEMI, "module.kmeans_steps=100")),
    "freematch": ({"freematch": 100}, SEMI),
    "flexmatch": ({"flexmatch": 100}, SEMI),
    "softmatch": ({"softmatch": 100}, SEMI),
}


class Watch(StageProgress):
    """Also notes memory and open files."""

    notes: dict[str, list[tuple[int, float, int]]] = {}  # noqa: RUF012 - shared on purpose
    steps = 0

    def on_train_batch_end(self, trainer: Any, *more: Any) -> None:
        """Take a note every 50th step."""
        super().on_train_batch_end(trainer, *more)
        self.steps += 1
        if self.steps % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * resource.getpagesize() / 2**20
            files = len(os.listdir("/proc/self/fd"))
            self.notes.setdefault(self.name, []).append((self.steps, memory, files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    given = parser.parse_args()
    trainer.StageProgress = Watch  # type: ignore[misc,attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        for stage in given.stages:
            batches, settings = STAGES[stage]
            own = [f"{name}.epochs={-(-given.steps // count)}" for name, count in batches.items()]
            own += [f"{stage}.{text}" for text in settings]
            overrides = [*SMALL, f"stage={stage}", *own]
            overrides += [f"runs_dir={folder}", f"cache_dir={folder}/cache"]
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("config", overrides)
            run.run_stages(Job(cfg, tuple(overrides), "none", False))
    print("\n| stage | steps | MB at half | MB at the end | bytes per step | open files |")
    print("|:--|--:|--:|--:|--:|--:|")
    found = {}
    for name, notes in Watch.notes.items():
        step, memory, files = (np.array(column) for column in zip(*notes, strict=True))
        half = step >= step[-1] / 2
        slope = float(np.polyfit(step[half], memory[half], 1)[0] * 2**20)
        found[name] = {
            "steps": int(step[-1]),
            "mb_at_half": float(memory[half][0]),
            "mb_at_end": float(memory[-1]),
            "bytes_a_step": slope,
            "open_files": [int(files[half].min()), int(files[half].max())],
        }
        each = found[name]
        print(
            f"| {name} | {each['steps']} | {each['mb_at_half']:.1f} | {each['mb_at_end']:.1f} "
            f"| {slope:.0f} | {files[half].min()} to {files[half].max()} |"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
