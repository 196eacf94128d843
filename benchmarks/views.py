"""How fast are batched views, compared with torchvision's image-by-image pipeline on PIL images?

    python benchmarks/views.py [--seconds 2]

Prints a table of images per second of processor time of one thread and, as the last line, the same
as JSON. Both sides apply the same recipe at the same size (but torchvision's RandAugment has a
fixed magnitude and its own ranges). Loading and decoding are left out on both sides.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from spice_pl.data.augment import StrongView, View, WeakView
from spice_pl.data.crop_views import MoCoView
from spice_pl.data.keyed import keyed_uniform

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # CIFAR-10
BATCH_SIZES = {32: 512, 96: 128}
NUM_PIL_IMAGES = 32


def pipelines(size: int) -> dict[str, tuple[View, v2.Transform]]:
    """Return, by name, our batched view and the same recipe in torchvision."""
    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    flip = v2.RandomHorizontalFlip()
    blur = v2.GaussianBlur(min(13, 2 * size - 1), (0.1, 2.0))
    moco = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], p=0.5),
        flip,
    ]
    weak = [v2.RandomCrop(size, padding=4), flip]
    strong = [flip, v2.RandAugment(num_ops=4)]
    erase = v2.RandomErasing(p=1.0, scale=(0.0, 0.25), ratio=(1.0, 1.0))
    return {
        "moco": (MoCoView(MEAN, STD), v2.Compose([*moco, *finish])),
        "weak": (WeakView(MEAN, STD), v2.Compose([*weak, *finish])),
        "strong": (
            StrongView(MEAN, STD, max_cutout=size // 2 if size <= 32 else 32),
            v2.Compose([*strong, *finish, erase]),
        ),
    }


def photographs(num_images: int, size: int) -> Tensor:
    """Return smooth colour noise (N, 3, S, S) uint8: as many edges as a small photograph."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_images, 3, size // 4, size // 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (fine * 255).to(torch.uint8)


def fastest(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the seconds of the fastest of many turns: other programs can only slow a call down.

    The calls take turns, so that a busy machine slows all of them alike.
    """
    durations: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(durations[0]) < 4 or time.perf_counter() < end:
        for call, spent in zip(calls, durations, strict=True):
            start = time.process_time()
            call()
            spent.append(time.process_time() - start)
    return [min(spent[1:]) for spent in durations]  # the first turn warms up


def compare(size: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Return, by name, images per second of our batched view and of torchvision."""
    images = photographs(BATCH_SIZES[size], size)
    index = torch.arange(len(images))
    pil = [v2.functional.to_pil_image(image) for image in images[:NUM_PIL_IMAGES]]
    rates = {}
    for name, (view, transform) in pipelines(size).items():

        def batched(view: View = view) -> Tensor:
            return view(images, keyed_uniform(0, 0, index, 0, view.num_uniforms))

        def one_by_one(transform: v2.Transform = transform) -> Tensor:
            return torch.stack([transform(image) for image in pil])

        ours, theirs = fastest([batched, one_by_one], seconds)
        rates[name] = len(images) / ours, len(pil) / theirs
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per measurement")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, float] = {}
    print(f"{'view':8}{'side':>6}{'batched':>12}{'torchvision':>14}{'ratio':>8}   (images/s)")
    for size in BATCH_SIZES:
        for name, (ours, theirs) in compare(size, seconds).items():
            print(f"{name:8}{size:6}{ours:12,.0f}{theirs:14,.0f}{ours / theirs:8.1f}")
            suffix = f"{size}" if name == "moco" else f"{name}_{size}"
            result |= {
                f"ratio_{suffix}": round(ours / theirs, 2),
                f"batched_{suffix}": round(ours),
                f"torchvision_{suffix}": round(theirs),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
