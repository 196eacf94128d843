"""How fast is a training step of stage 1, compared with a plain loop and with bare arithmetic?

    python benchmarks/moco.py [--backbone resnet10_narrow] [--pixels 32] [--compile]

Measures the same step of MoCo in three ways, in images per second of processor time of one thread.
The ways are timed in turn, so that a busy machine slows all of them alike:

- ours: `MoCoModule` in Lightning's trainer, views made in batches, the trainer's precision and
  memory format;
- plain: a float32 loop that makes views image by image with torchvision on PIL images, as scripts
  of the field do, in PyTorch's standard memory format;
- compute: forward and backward of the query branch and forward of the key branch on a batch already
  in memory, in our precision and memory format; no views, no queue, no optimizer.

Then it prints a table of precision, memory format and compilation for the bare arithmetic. The last
line is JSON: over_plain and of_compute are ours divided by the other two.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from views import MEAN, STD, photographs

from spice_pl.callbacks.stage_progress import StageProgress
from spice_pl.data.augment import PlainView
from spice_pl.data.crop_views import MoCoView
from spice_pl.data.datamodule import Stream, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.job.trainer import auto_precision
from spice_pl.nn.resnet import ResNet
from spice_pl.stages.moco import MoCoModule

CONF = Path(__file__).parents[1] / "conf"
WARM_UP = 3  # steps that are not counted
QUEUE = 4096


class Clock(pl.Callback):
    """Measures the processor time from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the end of a step."""
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Processor seconds of the steps after the warm-up."""
        return [b - a for a, b in zip(self.ends[WARM_UP:], self.ends[WARM_UP + 1 :], strict=False)]


def timed_trainer(stage: str, **length: int) -> tuple[pl.Trainer, Clock, StageProgress]:
    """Return a trainer as a run has it, without files and validation, and its two clocks."""
    clock, progress = Clock(), StageProgress(stage)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=auto_precision("cpu"),  # type: ignore[arg-type]
        callbacks=[progress, clock],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **length,  # type: ignore[arg-type]
    )
    return trainer, clock, progress


def network(name: str) -> ResNet:
    """Build the backbone of a file in conf/backbone."""
    settings = yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text())
    return ResNet(**{key: value for key, value in settings.items() if key != "_target_"})


def ours(
    backbone: nn.Module, images: np.ndarray, batch_size: int, steps: int
) -> tuple[list[float], float]:
    """Return the seconds of each step, and the share of them spent waiting for views."""
    module = MoCoModule(copy.deepcopy(backbone), queue_size=QUEUE)
    module.to(memory_format=torch.channels_last)
    view = MoCoView(MEAN, STD)
    stream = Stream({"query": view, "key": view}, batch_size)
    data = ViewsDataModule(
        ImageSet("noise", images, [str(i) for i in range(len(images))], "noise"),
        {"images": stream},
        PlainView(MEAN, STD),
        seed=0,
    )
    trainer, clock, progress = timed_trainer("moco", max_steps=steps + WARM_UP + 1)
    trainer.fit(module, data)
    return clock.seconds, progress.data_wait_fraction


def plain(backbone: nn.Module, images: np.ndarray, batch_size: int, steps: int) -> list[float]:
    """Return the seconds of each step of the plain loop."""
    pixels = images.shape[-1]
    recipe = v2.Compose(
        [
            v2.RandomResizedCrop(pixels, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(min(13, 2 * pixels - 1), (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    pictures = [v2.functional.to_pil_image(torch.from_numpy(image)) for image in images]
    width = int(backbone.num_features)  # type: ignore[arg-type]
    query = nn.Sequential(
        copy.deepcopy(backbone), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)
    )
    key = copy.deepcopy(query).requires_grad_(False)
    queue = F.normalize(torch.randn(128, QUEUE), dim=0)
    optimizer = torch.optim.SGD(query.parameters(), 0.015, momentum=0.9, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(
        [(recipe, picture) for picture in pictures],  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda items: [
            torch.stack([recipe(picture) for recipe, picture in items]) for _ in range(2)
        ],
    )
    seconds, done, place = [], 0, 0
    while done < steps + WARM_UP:
        start = time.process_time()
        for one, other in loader:
            z = F.normalize(query(one))
            with torch.no_grad():
                for mine, theirs in zip(key.parameters(), query.parameters(), strict=True):
                    mine.mul_(0.999).add_(theirs, alpha=0.001)
                k = F.normalize(key(other))
            logits = torch.cat([(z * k).sum(1, keepdim=True), z @ queue.clone()], 1) / 0.2
            loss = F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue[:, place : place + len(k)] = k.T
            place = (place + len(k)) % QUEUE
            seconds.append(time.process_time() - start)
            start, done = time.process_time(), done + 1
            if done >= steps + WARM_UP:
                break
    return seconds[WARM_UP:]


def compute(
    backbone: nn.Module,
    pixels: int,
    batch_size: int,
    steps: int,
    *,
    bf16: bool,
    channels_last: bool,
    compiled: bool = False,
) -> list[float]:
    """Return the seconds that the bare arithmetic of each step takes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    query = copy.deepcopy(backbone).to(memory_format=layout)
    key = copy.deepcopy(query).requires_grad_(False)
    run: Callable[[Tensor], Tensor] = torch.compile(query) if compiled else query
    run_key: Callable[[Tensor], Tensor] = torch.compile(key) if compiled else key
    batch = torch.randn(batch_size, 3, pixels, pixels).to(memory_format=layout)
    seconds = []
    for _ in range(steps + WARM_UP):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            out = run(batch)
            with torch.no_grad():
                run_key(batch)
        out.float().square().mean().backward()
        query.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds[WARM_UP:]


def rate(seconds: list[float], batch_size: int) -> float:
    """Return images per second, from the median step."""
    return batch_size / float(np.median(seconds))


def figures(rates: dict[str, float], waits: list[float]) -> dict[str, Any]:
    """Return what both benchmarks of a step report: ratios, waiting for views, memory."""
    return {
        "over_plain": round(rates["ours"] / rates["plain"], 2),
        "of_compute": round(rates["ours"] / rates["compute"], 3),
        "data_wait_fraction": round(float(np.mean(waits)), 4),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backbone", default="resnet10_narrow", help="a file of conf/backbone")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="timed steps per way and round")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is timed")
    parser.add_argument(
        "--compile", action="store_true", help="also time compiled networks; half a minute each"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = network(args.backbone)
    images = photographs(max(QUEUE, 8 * args.batch_size), args.pixels).numpy()
    bf16 = auto_precision("cpu") == "bf16-mixed"
    size = (args.batch_size, args.steps)

    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "compute": []}
    waits = []
    for _ in range(args.rounds):
        spent, wait = ours(backbone, images, *size)
        seconds["ours"] += spent
        waits.append(wait)
        seconds["plain"] += plain(backbone, images, *size)
        seconds["compute"] += compute(backbone, args.pixels, *size, bf16=bf16, channels_last=True)
    rates = {name: rate(spent, args.batch_size) for name, spent in seconds.items()}
    print(f"\n{args.backbone}, {args.pixels} pixels, batch {args.batch_size}, one thread, images/s")
    for name, value in rates.items():
        print(f"  {name:8} {value:8.1f}")
    print("\nbare arithmetic, images/s")
    table = {}
    for precision in (False, True):
        for last in (False, True):
            for compiled in (False, True) if args.compile else (False,):
                name = ", ".join(
                    [
                        "bfloat16" if precision else "float32",
                        "channels_last" if last else "contiguous",
                        *(["compiled"] if compiled else []),
                    ]
                )
                spent = compute(
                    backbone,
                    args.pixels,
                    args.batch_size,
                    2 if precision and not bf16 else args.steps,  # emulated: seconds per step
                    bf16=precision,
                    channels_last=last,
                    compiled=compiled,
                )
                table[name] = rate(spent, args.batch_size)
                print(f"  {name:32} {table[name]:8.1f}", flush=True)
    print(
        json.dumps(
            figures(rates, waits)
            | {
                "images_per_second": {k: round(v, 1) for k, v in (rates | table).items()},
                "backbone": args.backbone,
                "bf16_in_hardware": bf16,
            }
        )
    )


if __name__ == "__main__":
    main()
