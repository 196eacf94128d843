"""What do ten heads cost compared with one?

    python benchmarks/heads.py [--pairs 5] [--threads 1] [--precision 32-true] [--paper]

Answers three questions on the processor. Prints a table and, as the last line, all figures as JSON:

1. Heads only: the M-step on cached features, ten heads over one head, and ten heads over the bare
   matrix products of their steps, forward and backward.
2. Whole cycle: `ProtoHeadModule` under a Trainer (views, encoder, E-step, M-step, selection) with
   the settings of conf/, ten heads over one. With --paper also at the paper's width (ResNet18,
   512 features, 32 pixels) on a small buffer, which takes minutes more.
3. Passes: images through the encoder in a cycle of 5,000 images, encoded again for each head and
   repeat over encoded once. benchmarks/proto.py measures what that costs in time.

The two sides of a ratio are timed in turn, so that other programs disturb both. Ratios are medians
over the pairs.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from proto import count_passes
from stage2 import (
    HEAD_BATCH_SIZE,
    NUM_CLUSTERS,
    NUM_HEADS,
    REPEATS,
    fit,
    noise,
    quiet,
    settings,
)
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.images import ImageSet
from spice_pl.data.sources.torchvision import digits
from spice_pl.functional.losses import double_softmax_cross_entropy
from spice_pl.job.settings import build
from spice_pl.nn.heads import ParallelHeads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs of timings behind a ratio")
    parser.add_argument("--threads", type=int, default=1, help="threads of a matrix product")
    parser.add_argument("--precision", default="32-true", help="of the cycle: 32-true, bf16-mixed")
    parser.add_argument("--paper", action="store_true", help="also a cycle at the paper's width")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    quiet()
    result: dict[str, float | int] = {}
    print(f"{NUM_HEADS} heads over 1, medians of {args.pairs} pairs, {args.threads} threads")
    print(f"{'':34}{'1 head':>10}{'10 heads':>10}{'ratio':>8}")
    for width in (128, 512):
        one, ten, ratio = in_turn(m_step_of(width, 1), m_step_of(width, NUM_HEADS), args.pairs)
        print(f"{f'heads only, D = {width}':34}{one:9.3f}s{ten:9.3f}s{ratio:8.2f}")
        result[f"ten_over_one_heads_only_d{width}"] = ratio
        bare, ten, ratio = in_turn(products_of(width), m_step_of(width, NUM_HEADS), args.pairs)
        print(f"{f'  over bare products, D = {width}':34}{bare:9.3f}s{ten:9.3f}s{ratio:8.2f}")
        result[f"ten_over_products_d{width}"] = ratio
    cfg = settings("dataset=digits")
    images = digits(image_size=cfg.dataset.image_size)
    cycles = {"ten_over_one": (cfg, images, args.pairs)}
    if args.paper:
        noisy = noise(260, 32)
        cycles["ten_over_one_paper_width"] = (
            settings("dataset=cifar10"),
            noisy,
            min(2, args.pairs),
        )
    for key, (cfg, images, pairs) in cycles.items():
        one, ten, ratio = whole_cycles(cfg, images, pairs, args.precision)
        what = f"whole cycle, {images.name}, M = {len(images)}"
        print(f"{what:34}{one:9.3f}s{ten:9.3f}s{ratio:8.2f}")
        result |= {key: ratio, f"{key}_seconds": ten}
    once, each_time = count_passes(5000)
    print(
        f"encoder passes of a cycle, M = 5000: {once:,} with every view encoded once, "
        f"{each_time:,} for each head and repeat, ratio {each_time / once:.2f}"
    )
    result |= {"encoder_passes": once, "encoder_passes_ratio": each_time / once}
    rounded = {k: v if isinstance(v, int) else float(f"{v:.4g}") for k, v in result.items()}
    print(json.dumps(rounded))


# 1. Heads only.


def m_step_of(width: int, num_heads: int, num_images: int = 1797) -> Callable[[], float]:
    """Return a timer of an M-step on cached features (seconds); as many images as the digits."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_images, width, generator=generator)
    label = torch.arange(NUM_CLUSTERS).repeat_interleave(num_images // NUM_CLUSTERS)
    slots = torch.randint(num_images, (num_heads, len(label)), generator=generator)
    heads = ParallelHeads(width, width, NUM_CLUSTERS, num_heads, seed=0)

    def run() -> float:
        start = time.perf_counter()
        m_step(heads, features, slots, label)
        return time.perf_counter() - start

    return run


def products_of(width: int, num_images: int = 1797) -> Callable[[], float]:
    """Return a timer of the matrix products of an M-step of ten heads, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_HEADS, HEAD_BATCH_SIZE, width, generator=generator)
    hidden = torch.randn(NUM_HEADS, width, width, generator=generator)
    output = torch.randn(NUM_HEADS, NUM_CLUSTERS, width, generator=generator)
    slope = torch.randn(NUM_HEADS, HEAD_BATCH_SIZE, NUM_CLUSTERS, generator=generator)
    steps = REPEATS * (num_images // NUM_CLUSTERS * NUM_CLUSTERS // HEAD_BATCH_SIZE)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            units = features @ hidden.mT  # (H, B, E)
            _ = units @ output.mT  # (H, B, K)
            _ = slope.mT @ units  # gradient of the output's weight
            back = slope @ output  # (H, B, E)
            _ = back.mT @ features  # gradient of the hidden weight
        return time.perf_counter() - start

    return run


def m_step(heads: ParallelHeads, features: Tensor, slots: Tensor, label: Tensor) -> None:
    """Train on all slots `REPEATS` times in full batches, in the steps of `ProtoHeadModule`."""
    optimizer = torch.optim.Adam(heads.parameters(), lr=5e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(REPEATS):
        order = torch.randperm(len(label), generator=generator)
        for chosen in torch.split(order, HEAD_BATCH_SIZE):
            if len(chosen) < HEAD_BATCH_SIZE:
                break
            probs = heads(F.embedding(slots[:, chosen], features))  # (H, B, K)
            loss = double_softmax_cross_entropy(probs, label[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()


def in_turn(
    one: Callable[[], float], ten: Callable[[], float], pairs: int
) -> tuple[float, float, float]:
    """Median seconds of both sides, and the median of ten / one over the pairs."""
    one(), ten()  # warm up
    seconds = [(one(), ten()) for _ in range(pairs)]
    median_one, median_ten = (statistics.median(side) for side in zip(*seconds, strict=True))
    return median_one, median_ten, statistics.median(b / a for a, b in seconds)


# 2. The whole cycle.


def whole_cycles(
    cfg: DictConfig, images: ImageSet, pairs: int, precision: str
) -> tuple[float, float, float]:
    """Compare training epochs of one cycle each, as `in_turn` does."""

    def epoch_of(num_heads: int) -> Callable[[], float]:
        def run() -> float:
            backbone = build(cfg, cfg.backbone)
            with tempfile.TemporaryDirectory() as folder:
                clock = Clock()
                fit(cfg, images, backbone, num_heads, Path(folder), clock, precision)
            return statistics.median(clock.seconds[1:])  # the first epoch warms up

        return run

    return in_turn(epoch_of(1), epoch_of(NUM_HEADS), pairs)


class Clock(pl.Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the watch."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the watch."""
        self.seconds.append(time.perf_counter() - self.start)


if __name__ == "__main__":
    main()
