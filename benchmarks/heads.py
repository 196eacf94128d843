"""What do ten heads cost beside one, and what does encoding every view once save?

    python benchmarks/heads.py [--pairs 5] [--threads 1] [--precision 32-true] [--paper]

Four questions on the processor, a table for each and, as the last line, all figures as JSON:

1. heads only: the M-step on cached features, ten heads over one.
2. whole cycle: `ProtoHeadModule` under a Trainer (views, encoder, E-step, M-step, selection) with
   the settings of conf/, ten heads over one. With --paper also at the paper's width (ResNet18,
   512 features, 32 pixels) on a small buffer, minutes more.
3. encoder passes: images that go through the encoder in one cycle of M = 5000, counted by a hook,
   against a loop that encodes the strong view anew for each head and repeat as the authors' code.
4. wall time of both ways at a small M, and whether the heads they train agree.

Sides are timed in turn, so that other programs disturb both; ratios are medians over the pairs.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from spice_pl.artifacts import RunFolder
from spice_pl.data.augment import StrongView, WeakView
from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.datasets import digits
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.functional.losses import double_softmax_cross_entropy
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.nn.heads import ParallelHeads
from spice_pl.nn.resnet import ResNet

CONF = Path(__file__).resolve().parents[1] / "conf"
NUM_HEADS, NUM_CLUSTERS, REPEATS, HEAD_BATCH_SIZE = 10, 10, 8, 128  # the paper's
PAPER_BUFFER = 5000  # M
SMALL_BUFFER, SMALL_SIZE = 150, 32  # images, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs of timings behind a ratio")
    parser.add_argument("--threads", type=int, default=1, help="threads of a matrix product")
    parser.add_argument("--precision", default="32-true", help="of the whole cycle; or bf16-mixed")
    parser.add_argument("--paper", action="store_true", help="a whole cycle at the paper's width")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")

    result: dict[str, float | int] = {}
    print(f"1, 2. {NUM_HEADS} heads over 1, medians of {args.pairs} pairs, {args.threads} threads")
    print(f"{'':34}{'1 head':>10}{'10 heads':>10}{'ratio':>8}")
    for width in (128, 512):
        one, ten, ratio = in_turn(m_step_of(width, 1), m_step_of(width, NUM_HEADS), args.pairs)
        print(f"{f'heads only, D = {width}':34}{one:9.3f}s{ten:9.3f}s{ratio:8.2f}")
        result[f"ten_over_one_heads_only_d{width}"] = ratio
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

    ours, theirs = count_module_passes(), count_passes(PAPER_BUFFER, reencode=True)
    if (ours, theirs) != (count_passes(PAPER_BUFFER, reencode=False), expected(PAPER_BUFFER)):
        raise SystemExit(f"error: {ours} and {theirs} passes are not what the loops below count")
    print(f"\n3. encoder passes in a cycle of M = {PAPER_BUFFER}, {NUM_HEADS} heads, counted")
    print(
        f"every view once {ours:,}   every head and repeat {theirs:,}   ratio {theirs / ours:.1f}"
    )
    result |= {
        "encoder_passes": ours,
        "encoder_passes_reference": theirs,
        "encoder_passes_ratio": theirs / ours,
    }

    cached, uncached, difference = wall_times()
    print(f"\n4. one cycle of M = {SMALL_BUFFER}, {SMALL_SIZE} pixels, small ResNet")
    print(
        f"every view once {cached:.2f} s   every head and repeat {uncached:.2f} s   "
        f"ratio {uncached / cached:.1f}   probabilities differ by at most {difference:.1e}"
    )
    result |= {
        "cached_over_uncached_wall": cached / uncached,
        "uncached_over_cached_wall": uncached / cached,
        "cached_uncached_largest_difference": difference,
    }
    rounded = {k: v if isinstance(v, int) else float(f"{v:.4g}") for k, v in result.items()}
    print(json.dumps(rounded))


# 1. Heads only.


def m_step_of(width: int, num_heads: int, num_images: int = 1797) -> Callable[[], float]:
    """Seconds of an M-step on cached features of a width, the number of images as in digits."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_images, width, generator=generator)
    label = torch.arange(NUM_CLUSTERS).repeat_interleave(num_images // NUM_CLUSTERS)
    slots = torch.randint(num_images, (num_heads, len(label)), generator=generator)
    heads = ParallelHeads(width, width, NUM_CLUSTERS, num_heads, seed=0)

    def run() -> float:
        start = time.perf_counter()
        m_step(heads, features.__getitem__, slots, label)
        return time.perf_counter() - start

    return run


def m_step(
    heads: ParallelHeads, features_of: Callable[[Tensor], Tensor], slots: Tensor, label: Tensor
) -> None:
    """Train on all slots `REPEATS` times in full batches, in the steps of `ProtoHeadModule`."""
    optimizer = torch.optim.Adam(heads.parameters(), lr=5e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(REPEATS):
        order = torch.randperm(len(label), generator=generator)
        for chosen in torch.split(order, HEAD_BATCH_SIZE):
            if len(chosen) < HEAD_BATCH_SIZE:
                break
            probs = heads(features_of(slots[:, chosen]))  # (H, B, K)
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


def settings(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def noise(num_images: int, size: int) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 3, size, size), np.uint8)
    return ImageSet("noise", pixels, [str(i) for i in range(num_images)], "noise")


def whole_cycles(
    cfg: DictConfig, images: ImageSet, pairs: int, precision: str
) -> tuple[float, float, float]:
    """`in_turn` of training epochs that hold one cycle each."""

    def epoch_of(num_heads: int) -> Callable[[], float]:
        def run() -> float:
            backbone = instantiate(cfg.backbone)
            with tempfile.TemporaryDirectory() as folder:
                clock = Clock()
                fit(cfg, images, backbone, num_heads, Path(folder), clock, precision)
            return statistics.median(clock.seconds[1:])  # the first epoch warms up

        return run

    return in_turn(epoch_of(1), epoch_of(NUM_HEADS), pairs)


class Clock(pl.Callback):
    """Seconds of each training epoch, and images that the encoder saw in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.passes: list[int] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start watch and counter."""
        self.counter = Counter(pl_module.get_submodule("encoder"))
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read both."""
        self.seconds.append(time.perf_counter() - self.start)
        self.passes.append(self.counter.stop())


class Counter:
    """Images that pass a module from now until `stop`."""

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        self.hook = module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.images += len(inputs[0])

    def stop(self) -> int:
        """Return the number of images and count no more."""
        self.hook.remove()
        return self.images


def fit(
    cfg: DictConfig,
    images: ImageSet,
    backbone: nn.Module,
    num_heads: int,
    folder: Path,
    clock: Clock,
    precision: Any = "32-true",
    epochs: int = 3,
) -> None:
    """Train stage 2 as train.py does, on an encoder that was not trained."""
    plain = instantiate(cfg.augment.plain, _convert_="all")
    upstream = untrained_upstream(images, backbone, folder, plain)
    module = instantiate(cfg.proto.module, backbone=backbone, num_heads=num_heads)
    stream = instantiate(cfg.proto.streams.images, _convert_="all")
    streams = module.prepare(images, upstream, {"images": stream})
    module.to(memory_format=torch.channels_last)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ViewsDataModule(images, streams, plain, seed=0, stage="proto"))


@torch.no_grad()
def untrained_upstream(
    images: ImageSet, backbone: nn.Module, path: Path, plain: Callable[[Tensor, Tensor], Tensor]
) -> RunFolder:
    """Artifacts of a stage 1 that did not train."""
    upstream = RunFolder(path)
    upstream.path.mkdir(parents=True, exist_ok=True)
    upstream.write_weights("encoder.safetensors", backbone)
    pixels = torch.split(torch.from_numpy(images.images), 256)
    encode = backbone.eval()
    features = torch.cat([encode(plain(part, torch.empty(len(part), 0))) for part in pixels])
    np.save(upstream.path / "features.npy", features.numpy())
    return upstream


# 3. Encoder passes.


class CheapEncoder(nn.Module):
    """An encoder whose passes cost nothing, for counting them."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 16) of images (B, 3, 8, 8)."""
        features: Tensor = self.linear(images.flatten(1))
        return features


def count_module_passes() -> int:
    """Passes of an epoch with one cycle of `ProtoHeadModule`, M = `PAPER_BUFFER`."""
    cfg = settings("dataset=digits", f"proto.module.buffer_size={PAPER_BUFFER}")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        images = noise(PAPER_BUFFER, 8)
        fit(cfg, images, CheapEncoder(), NUM_HEADS, Path(folder), clock, epochs=1)
    return clock.passes[0]


def count_passes(num_images: int, *, reencode: bool) -> int:
    """Passes of one `cycle`."""
    encoder, images = CheapEncoder(), torch.from_numpy(noise(num_images, 8).images)
    counter = Counter(encoder)
    cycle(encoder, new_heads(encoder), images, embeddings=None, reencode=reencode)
    return counter.stop()


def expected(num_images: int) -> int:
    """Passes when encoding anew: every weak view, and every slot for each head and repeat."""
    slots = NUM_CLUSTERS * (num_images // NUM_CLUSTERS)
    in_full_batches = slots // HEAD_BATCH_SIZE * HEAD_BATCH_SIZE
    return num_images + NUM_HEADS * REPEATS * in_full_batches


# 4. Wall time.


def wall_times() -> tuple[float, float, float]:
    """Seconds of a cycle that encodes once and of one that encodes anew; how their heads differ."""
    torch.manual_seed(0)
    encoder = ResNet((1, 1, 1), (32, 64, 128)).eval().requires_grad_(False)
    encoder.to(memory_format=torch.channels_last)
    images = torch.from_numpy(noise(SMALL_BUFFER, SMALL_SIZE).images)
    features = torch.cat(
        [encoder(part.float() / 255) for part in torch.split(images, HEAD_BATCH_SIZE)]
    )
    seconds, probs = [], []
    cycle(encoder, new_heads(encoder), images, embeddings=None, reencode=False)  # warm up
    for reencode in (False, True):
        heads = new_heads(encoder)
        start = time.perf_counter()
        cycle(encoder, heads, images, embeddings=F.normalize(features), reencode=reencode)
        seconds.append(time.perf_counter() - start)
        probs.append(heads(features).detach())
    return seconds[0], seconds[1], float((probs[0] - probs[1]).abs().max())


def new_heads(encoder: nn.Module) -> ParallelHeads:
    width = int(encoder.num_features)  # type: ignore[arg-type]
    return ParallelHeads(width, width, NUM_CLUSTERS, NUM_HEADS, seed=0)


def cycle(
    encoder: nn.Module,
    heads: ParallelHeads,
    images: Tensor,
    *,
    embeddings: Tensor | None,
    reencode: bool,
) -> None:
    """One EM cycle on a frozen encoder; `reencode` sends each slot's strong view through it.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        heads: H heads, trained in place.
        images: (M, 3, S, S) uint8.
        embeddings: (M, D) of the images themselves; None takes those of the weak views.
        reencode: whether to encode strong views for each head and repeat, or once.
    """
    index = torch.arange(len(images))
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    views = []
    for stream, view in enumerate((WeakView(mean, std), StrongView(mean, std))):
        views.append(view(images, keyed_uniform(0, 0, index, stream, view.num_uniforms)))
    weak, strong = views

    @torch.no_grad()
    def encode(batch: Tensor) -> Tensor:
        features: Tensor = encoder(batch.contiguous(memory_format=torch.channels_last))
        return features

    features = torch.cat([encode(part) for part in torch.split(weak, HEAD_BATCH_SIZE)])
    with torch.no_grad():
        probs = heads(features)  # (H, M, K)
    slots, label = prototype_pseudo_labels(
        F.normalize(features) if embeddings is None else embeddings, probs
    )
    if reencode:
        m_step(heads, lambda at: torch.stack([encode(strong[row]) for row in at]), slots, label)
    else:
        cached = torch.cat([encode(part) for part in torch.split(strong, HEAD_BATCH_SIZE)])
        m_step(heads, cached.__getitem__, slots, label)


if __name__ == "__main__":
    main()
