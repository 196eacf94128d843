"""Images per second of each stage's step: what a GPU does, and what it waits for.

    python benchmarks/gpu.py                  # about ten minutes on one GPU
    python benchmarks/gpu.py --small          # the same table in small, also on a processor
    torchrun --nproc-per-node 4 benchmarks/gpu.py   # scaling: run it with 1, 2, 4 processes

Per stage, with images of the size of CIFAR and random pixels:

- `step`: batch, views, forward, backward, optimizer, averages, as training does it
- `resident batch`: the same without batch and views: one batch of views again and again
- `plain loop`: torchvision's views of single images (stage 1 only), forward, backward, SGD
- `compiled`: `step` with networks and views compiled, after the compilation

With CUDA also the largest memory, the host waits of a step (`torch.cuda.set_sync_debug_mode`), and
the host's share: time in which the processor prepares work, divided by the time of the step.
The result is a table and `--json FILE`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spice_pl.data.augment import StrongView, View, WeakView
from spice_pl.data.crop_views import MoCoView, PatchView
from spice_pl.data.datamodule import Stream, Views, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.data.transfer import Ahead, resident_store
from spice_pl.functional.coding_rate import multi_patch_loss
from spice_pl.functional.consistency import weighted_cross_entropy
from spice_pl.functional.contrastive import info_nce, nt_xent
from spice_pl.functional.device import synchronize
from spice_pl.functional.momentum import EmaPairs
from spice_pl.functional.scan import scan_loss, self_label_loss
from spice_pl.job.trainer import auto_precision
from spice_pl.nn.optimizers import keep_rates, sgd_settings
from spice_pl.nn.queue import Queue
from spice_pl.nn.resnet import ResNet

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.2, 0.2)
MOCO, WEAK = MoCoView(MEAN, STD), WeakView(MEAN, STD)
STRONG, STRONG_JOINT = StrongView(MEAN, STD), StrongView(MEAN, STD, padding=4, num_ops=2)
NUM_CLUSTERS, PROJECTION = 10, 128
Step = Callable[[dict[str, Views]], Tensor]

# Stage to its streams, (views, batch size) each; batch sizes are those of conf/.
STREAMS: dict[str, dict[str, tuple[dict[str, View], int]]] = {
    "moco": {"images": ({"query": MOCO, "key": MOCO}, 128)},
    "moco, batch 512": {"images": ({"query": MOCO, "key": MOCO}, 512)},
    "simclr": {"images": ({"query": MOCO, "key": MOCO}, 512)},
    "empssl": {"images": ({"patches": PatchView(MEAN, STD)}, 64)},
    "fixmatch": {
        "labelled": ({"weak": WEAK}, 64),
        "unlabelled": ({"weak": WEAK, "strong": STRONG_JOINT}, 448),
    },
    "scan": {"images": ({"strong": STRONG}, 256)},
    "selflabel": {"images": ({"plain": WEAK, "strong": STRONG}, 256)},
    "proto, a batch": {"images": ({"weak": WEAK, "strong": STRONG}, 250)},
}


class Model:
    """Networks, loss and optimizer of a stage."""

    def __init__(self, stage: str, device: torch.device, *, small: bool, world_size: int) -> None:
        torch.manual_seed(0)
        blocks, widths = ([1], [16]) if small else ([2, 2, 2, 2], [64, 128, 256, 512])
        encoder = ResNet(blocks=blocks, widths=widths)
        outputs = PROJECTION if stage.startswith(("moco", "simclr", "empssl")) else NUM_CLUSTERS
        self.stage = stage
        network = nn.Sequential(encoder, nn.Linear(widths[-1], outputs)).to(
            device, memory_format=torch.channels_last
        )
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.plain, self.network = network, network
        if world_size > 1:
            ids = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        self.queue = Queue(PROJECTION, 1024 if small else 12800).to(device)
        self.new_keys: Tensor | None = None
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=0.9, **sgd_settings(device)
        )
        keep_rates(self.optimizer, device)
        self.ema = EmaPairs((self.average, network))
        self.dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(
            auto_precision(device.type)
        )
        self.device = device

    def step(self, batch: dict[str, Views]) -> Tensor:
        """Take a training step; return its loss, unread."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self._loss({name: each.views for name, each in batch.items()})
        if loss.requires_grad:
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.ema.update_(0.999)
            if self.new_keys is not None:
                self.queue.enqueue(self.new_keys)  # in place, so after the backward pass
        return loss

    def _loss(self, views: dict[str, dict[str, Tensor]]) -> Tensor:
        normal, images = nn.functional.normalize, views.get("images", {})
        if self.stage.startswith("moco"):
            query = normal(self.network(images["query"]).float())
            with torch.no_grad():
                key = normal(self.average(images["key"]).float())
            loss = info_nce(query, key, self.queue.keys, 0.2)
            self.new_keys = key
            return loss
        if self.stage == "simclr":
            both = self.network(torch.cat([images["query"], images["key"]])).float()
            first, second = normal(both).chunk(2)
            return nt_xent(first, second, 0.2)
        if self.stage == "empssl":
            patches = images["patches"]  # (B, n, 3, S, S)
            rows = normal(self.network(patches.flatten(0, 1)).float())
            return multi_patch_loss(rows.view(*patches.shape[:2], -1), 0.02, 0.2)
        if self.stage == "fixmatch":
            labelled, unlabelled = views["labelled"], views["unlabelled"]
            parts = (labelled["weak"], unlabelled["weak"], unlabelled["strong"])
            logits = self.network(torch.cat(parts)).float()
            one, weak, strong = logits.split_with_sizes([len(each) for each in parts])
            confidence, label = weak.detach().softmax(dim=1).max(dim=1)
            target = torch.zeros(len(one), dtype=torch.long, device=one.device)
            extra = weighted_cross_entropy(strong, label, (confidence >= 0.95).float())
            return nn.functional.cross_entropy(one, target) + extra
        if self.stage == "scan":
            anchors, neighbors = self.network(images["strong"]).float().chunk(2)
            return scan_loss(anchors, neighbors)[0]
        if self.stage == "selflabel":
            both = self.network(torch.cat([images["plain"], images["strong"]])).float()
            plain, strong = both.chunk(2)
            return self_label_loss(strong, plain.detach().softmax(dim=1), 0.2)[0]
        with torch.no_grad():  # stage 2 embeds the views of a frozen encoder
            made = [self.average(images[name]) for name in ("weak", "strong")]
        return torch.stack([each.float().mean() for each in made]).mean()


def endless(
    data: ViewsDataModule, device: torch.device, world: tuple[int, int]
) -> Iterator[dict[str, Views]]:
    """Yield batches of views for ever, as a trainer gets them."""
    strategy = SimpleNamespace(root_device=device)
    trainer = SimpleNamespace(
        global_rank=world[0], world_size=world[1], training=True, strategy=strategy
    )
    data.trainer = trainer  # type: ignore[assignment]
    loaders = {name: data._loader(data._batches(name)) for name in data.streams}
    if device.type != "cpu" and data._pixels.store is None:
        loaders = {name: Ahead(each, device) for name, each in loaders.items()}  # type: ignore[misc]
    while True:
        for parts in zip(*loaders.values(), strict=False):
            pixels = {name: part.to(device) for name, part in zip(loaders, parts, strict=True)}
            yield {name: data._views(name, each) for name, each in pixels.items()}


def seconds(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Return the median seconds of a call, over at least `least` seconds and five rounds."""
    for _ in range(3):
        run()
    times, count = [], 1
    end = time.perf_counter() + least
    while time.perf_counter() < end or len(times) < 5:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
        times.append((time.perf_counter() - started) / count)
        count = max(1, min(50, int(least / 10 / times[-1])))
    return float(np.median(times))


def host_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the processor needs to prepare a call."""
    times = []
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def waits(run: Callable[[], object]) -> int:
    """Count the operations of a call for which the processor waits for CUDA."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def plain_loop(model: Model, images: ImageSet, size: int) -> Callable[[], object]:
    """Return a step of the usual loop: views of one image after another."""
    from torchvision.transforms import v2

    pixels, least = images.images.shape[-1], 0.2
    view = v2.Compose(
        [
            v2.RandomResizedCrop(pixels, (least, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def run() -> object:
        chosen = torch.from_numpy(images.images[np.random.default_rng().integers(0, 500, size)])
        made = {
            name: torch.stack([view(each) for each in chosen]).to(model.device)
            for name in ("query", "key")
        }
        return model.step({"images": Views(torch.arange(size), made)})

    return run


def measure(
    stage: str, images: ImageSet, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Return one row: images per second of each way, memory and waits."""
    world = options.world
    streams = {
        name: Stream(views, max(2, size // 8) if options.small else size)
        for name, (views, size) in STREAMS[stage].items()
    }
    total = sum(stream.batch_size for stream in streams.values())
    data = ViewsDataModule(images, streams, WEAK, seed=0, mode=options.data)
    data._pixels.store = resident_store(images, device, options.data, extra=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = Model(stage, device, small=options.small, world_size=world[1])
    batches = endless(data, device, world)
    fixed = next(batches)
    ways: dict[str, Callable[[], object]] = {
        "step": lambda: model.step(next(batches)),
        "resident batch": lambda: model.step(fixed),
    }
    if stage == "moco" and world[1] == 1:
        ways["plain loop"] = plain_loop(model, images, total)
    row: dict[str, Any] = {"stage": stage, "images per step": total}
    for name, run in ways.items():
        row[name] = round(total / seconds(run, device, options.seconds))
    row["share of compute"] = round(row["step"] / row["resident batch"], 3)
    if device.type == "cuda":
        row["host share"] = round(host_seconds(ways["step"], device) * row["step"] / total, 3)
        row["waits"] = waits(ways["step"])
        row["GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    if options.compile and world[1] == 1:
        model.plain.compile()
        model.average.compile()
        if device.type == "cuda":
            for view in {id(v): v for s in streams.values() for v in s.views.values()}.values():
                object.__setattr__(view, "_on_device", torch.compile(view._on_device))  # type: ignore[attr-defined]
        started = time.perf_counter()
        ways["step"]()
        synchronize(device)
        row["seconds to compile"] = round(time.perf_counter() - started, 1)
        row["compiled"] = round(total / seconds(ways["step"], device, options.seconds))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(n, "")) for n in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--small", action="store_true", help="small network and batches")
    parser.add_argument("--stages", nargs="*", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--data", default="auto", choices=("auto", "resident", "stream"))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    local, world_size = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    options.world = (int(os.environ.get("RANK", "0")), world_size)
    count, pixels = (1000 if options.small else 50000), options.pixels
    generator = np.random.default_rng(0)
    images = ImageSet(
        "random",
        generator.integers(0, 256, (count, 3, pixels, pixels), dtype=np.uint8),
        [str(i) for i in range(count)],
        "random",
    )
    rows = []
    for stage in options.stages:
        rows.append(measure(stage, images, device, options))
        torch._dynamo.reset()
        if options.world[0] == 0:
            print(json.dumps(rows[-1]), flush=True)
    if options.world[0] == 0:
        machine = torch.cuda.get_device_name(device) if cuda else platform.processor()
        about = {
            "machine": machine or platform.machine(),
            "processes": world_size,
            "torch": torch.__version__,
            "precision": auto_precision(device.type),
            "pixels": pixels,
            "small": options.small,
        }
        print(f"\n{about}\nImages per second:\n\n{table(rows)}")
        if options.json:
            options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
