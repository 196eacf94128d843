"""How fast is a training step of stage 3, compared with a plain loop and with bare arithmetic?

    python benchmarks/fixmatch.py [--backbone resnet10_narrow] [--pixels 32] [--threads 1]

Measures the same step in three ways, in images per second of processor time. A step forwards 960
images at once: 64 labelled images, and 448 unlabelled images in a weak and a strong view. The ways
are timed in turn, so that a busy machine slows all of them alike:

- ours: `ReliableFixMatchModule` in Lightning's trainer, views made in batches, the trainer's
  precision and memory format, the averaged model;
- plain: a float32 loop that makes views image by image with torchvision on PIL images, as scripts
  of the field do, in PyTorch's standard memory format;
- compute: forward and backward of 960 images already in memory, in our precision and memory format;
  no views, no optimizer, no averaged model.

The last line is JSON: over_plain and of_compute are ours divided by the other two.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from contextlib import nullcontext

import numpy as np
import torch
from moco import WARM_UP, figures, network, rate, timed_trainer
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from views import MEAN, STD, photographs

from spice_pl.data.augment import PlainView, StrongView, WeakView
from spice_pl.data.datamodule import Stream, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.functional.selectors import OracleLabels
from spice_pl.job.trainer import auto_precision
from spice_pl.nn.thresholds import FixedThreshold
from spice_pl.stages.fixmatch import ReliableFixMatchModule

LABELLED, UNLABELLED, CLUSTERS = 64, 448, 10
BATCH = LABELLED + 2 * UNLABELLED
NUM_LABELLED = 1000  # images with a label


def ours(backbone: nn.Module, images: np.ndarray, steps: int) -> tuple[list[float], float]:
    """Return the seconds of each step, and the share of them spent waiting for views."""
    module = ReliableFixMatchModule(
        copy.deepcopy(backbone),
        CLUSTERS,
        selector=OracleLabels(),  # given labels, so that no stage 2 is needed
        threshold=FixedThreshold(),
        init="scratch",
        steps_per_epoch=steps + WARM_UP + 1,
    )
    module.to(memory_format=torch.channels_last)
    weak, strong = WeakView(MEAN, STD), StrongView(MEAN, STD)
    labels = np.arange(len(images)) % CLUSTERS
    labels[NUM_LABELLED:] = -1
    keys = [str(i) for i in range(len(images))]
    data_set = ImageSet("noise", images, keys, "noise", labels=labels)
    streams = module.prepare(
        data_set,
        None,
        {
            "labelled": Stream({"weak": weak}, LABELLED),
            "unlabelled": Stream({"weak": weak, "strong": strong}, UNLABELLED),
        },
    )
    data = ViewsDataModule(data_set, streams, PlainView(MEAN, STD), seed=0)
    trainer, clock, progress = timed_trainer("fixmatch", max_epochs=1)
    trainer.fit(module, data)
    return clock.seconds, progress.data_wait_fraction


def plain(backbone: nn.Module, images: np.ndarray, steps: int) -> list[float]:
    """Return the seconds of each step of the plain loop."""
    pixels = images.shape[-1]
    begin = [v2.RandomHorizontalFlip(), v2.RandomCrop(pixels, pixels // 8, padding_mode="reflect")]
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    weak = v2.Compose([*begin, *end])
    strong = v2.Compose([*begin, v2.RandAugment(4), *end, v2.RandomErasing(1.0, (0.02, 0.25))])
    pictures = [v2.functional.to_pil_image(torch.from_numpy(image)) for image in images]
    model = nn.Sequential(
        copy.deepcopy(backbone),
        nn.Linear(int(backbone.num_features), CLUSTERS),  # type: ignore[arg-type]
    )
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4, nesterov=True, foreach=False
    )
    generator, seconds = np.random.default_rng(0), []
    for _ in range(steps + WARM_UP):
        start = time.process_time()
        labelled = generator.permutation(NUM_LABELLED)[:LABELLED]
        unlabelled = generator.permutation(len(pictures))[:UNLABELLED]
        batch = torch.stack(
            [weak(pictures[i]) for i in labelled]
            + [weak(pictures[i]) for i in unlabelled]
            + [strong(pictures[i]) for i in unlabelled]
        )
        sure, guess, logits = model(batch).split([LABELLED, UNLABELLED, UNLABELLED])
        confidence, label = guess.detach().softmax(1).max(1)
        consistency = F.cross_entropy(logits, label, reduction="none") * (confidence >= 0.95)
        loss = F.cross_entropy(sure, torch.from_numpy(labelled) % CLUSTERS) + consistency.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.mul_(0.999).add_(theirs, alpha=0.001)
        seconds.append(time.process_time() - start)
    return seconds[WARM_UP:]


def compute(backbone: nn.Module, pixels: int, steps: int, *, bf16: bool) -> list[float]:
    """Return the seconds that the bare arithmetic of each step takes."""
    model = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    batch = torch.randn(BATCH, 3, pixels, pixels).to(memory_format=torch.channels_last)
    seconds = []
    for _ in range(steps + WARM_UP):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            out = model(batch)
        out.float().square().mean().backward()
        model.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backbone", default="resnet10_narrow", help="a file of conf/backbone")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per way and round")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is timed")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backbone = network(args.backbone)
    images = photographs(4096, args.pixels).numpy()
    bf16 = auto_precision("cpu") == "bf16-mixed"

    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "compute": []}
    waits = []
    for _ in range(args.rounds):
        spent, wait = ours(backbone, images, args.steps)
        seconds["ours"] += spent
        waits.append(wait)
        seconds["plain"] += plain(backbone, images, args.steps)
        seconds["compute"] += compute(backbone, args.pixels, args.steps, bf16=bf16)
    rates = {name: rate(spent, BATCH) for name, spent in seconds.items()}
    print(f"\n{args.backbone}, {args.pixels} pixels, {BATCH} images per step, images/s")
    for name, value in rates.items():
        print(f"  {name:8} {value:8.1f}")
    print(
        json.dumps(
            figures(rates, waits)
            | {
                "images_per_second": {k: round(v, 1) for k, v in rates.items()},
                "backbone": args.backbone,
                "threads": args.threads,
                "bf16_in_hardware": bf16,
            }
        )
    )


if __name__ == "__main__":
    main()
