"""What does it save to encode every view once, and what does selection cost beside its product?

    python benchmarks/proto.py [--buffer 40] [--paper-buffer 5000] [--select 100000 1000 512]

One EM cycle of stage 2 with ten heads, ResNet18, 32 pixels and 512 features, in two ways:

- ours: `ProtoHeadModule` under a Trainer, with the selection of a head;
- theirs: a loop that works as the authors' script does: full sorts for the pseudo-labels, ten
  separate heads, and the frozen encoder run again on the strong views of every slot for each head
  and repeat.

Both do the same mathematics on the same views. In float32 this is checked: the pseudo-labels have
to be equal, and the losses of the heads to 1e-4 (median over the heads: Adam divides by the
gradient's size, so that rounding can move a head whose gradients are nearly zero further). In
bfloat16 the two ways are only timed. They round differently, since ours folds BatchNorm into the
convolutions, and bfloat16 is too coarse to rank the images of an untrained encoder alike.

Passes are counted by a hook, at --paper-buffer images and with an encoder that costs nothing. Time
is processor time of one thread, which other programs disturb little. It is taken at --buffer
images, because the other way takes 80 passes per slot. Below 128 images a batch of slots is the
whole buffer, so that the steps of the heads, which both ways take, weigh more than in the paper's
cycle: the ratio is a lower bound for larger buffers.

The last table is `prototype_pseudo_labels` alone on --select N K D random features, beside the
matrix product it contains. Prints tables and, as the last line, JSON.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from stage2 import NUM_CLUSTERS, NUM_HEADS, REPEATS, fit, noise, quiet, settings
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.keyed import keyed_generator
from spice_pl.functional.neighbors import SIMILARITIES_PER_CHUNK, similarities, unit_rows
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.job.settings import build
from spice_pl.stages.proto import ProtoHeadModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--buffer", type=int, default=40, help="images of the timed cycle")
    parser.add_argument("--paper-buffer", type=int, default=5000, help="images whose passes count")
    parser.add_argument("--select", type=int, nargs=3, default=(100_000, 1000, 512))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    result: dict[str, Any] = {}

    ours, theirs = count_passes(args.paper_buffer)
    print(f"encoder passes of a cycle, M = {args.paper_buffer}: {ours:,} and {theirs:,}")
    result |= {"encoder_passes": ours, "encoder_passes_reference": theirs}
    result["encoder_passes_ratio"] = theirs / ours

    print(f"\nprocessor time of a cycle, ResNet18, 32 pixels, M = {args.buffer}")
    print(f"{'':8}{'ours':>10}{'theirs':>10}{'ratio':>8}{'per pass':>11}{'loss difference':>18}")
    for name, precision, reason in (
        ("fp32", "32-true", None),
        ("bf16", "bf16-mixed", without_bf16()),
    ):
        result[f"wall_ratio_{name}"] = None
        if reason is not None:
            print(f"{name:8}{reason}")
            continue
        both = wall_times(args.buffer, precision)
        result |= {f"{key}_{name}": value for key, value in both.items()}
        difference = both.get("loss_difference")
        print(
            f"{name:8}{both['seconds']:9.2f}s{both['seconds_reference']:9.2f}s"
            f"{both['wall_ratio']:8.1f}{1000 * both['seconds_per_pass']:9.2f}ms"
            f"{'not compared' if difference is None else format(difference, '.1e'):>18}"
        )

    num_images, num_clusters, width = args.select
    chosen = selection(num_images, num_clusters, width)
    result |= {f"selection_{key}": value for key, value in chosen.items()}
    print(
        f"\nselection, N = {num_images:,}, K = {num_clusters}, D = {width}: "
        f"{chosen['seconds']:.2f} s, its product {chosen['product_seconds']:.2f} s, ratio "
        f"{chosen['over_product']:.2f}; {chosen['added_mb']:.0f} MB beside its arguments of "
        f"{chosen['arguments_mb']:.0f} MB"
    )
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
    print(json.dumps(rounded))


# Encoder passes.


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


class Counter:
    """Counts the images that pass a module."""

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.images += len(inputs[0])


def count_passes(buffer: int) -> tuple[int, int]:
    """Images through the encoder in a cycle: in our way, and in theirs."""
    cfg = settings("dataset=digits", f"proto.module.buffer_size={buffer}")
    encoder = CheapEncoder()
    watch, ours = our_cycle(cfg, encoder, buffer, 8, "32-true")
    counter = Counter(encoder)
    their_cycle(watch, encoder)
    return ours, counter.images


# Wall time.


class Watch(pl.Callback):
    """Keep the views, pseudo-labels, losses, time and passes of a cycle."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the watch."""
        assert isinstance(module, ProtoHeadModule)  # noqa: S101 - for the type checker
        self.views: list[tuple[Tensor, Tensor, Tensor]] = []
        self.slots: list[tuple[Tensor, Tensor]] = []
        self.heads = [module.heads.head(h) for h in range(NUM_HEADS)]
        self.embeddings, self.settings = module.embeddings, (module.lr, module.head_batch_size)
        chosen = module.prototype_pseudo_labels
        module.prototype_pseudo_labels = lambda *args, **more: self._seen(chosen(*args, **more))  # type: ignore[assignment]
        self.counter = Counter(module.view_features.encode.network)
        self.start = time.process_time()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the views."""
        self.views.append((batch.index, batch.views["weak"], batch.views["strong"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the watch."""
        self.seconds = time.process_time() - self.start

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read what was logged when the epoch had ended."""
        self.losses = [
            float(trainer.callback_metrics[f"train/loss_head_{h}"]) for h in range(NUM_HEADS)
        ]

    def _seen(self, slots: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.slots.append(slots)
        return slots


def wall_times(buffer: int, precision: str) -> dict[str, float]:
    """Seconds of a cycle in both ways; in float32 they are also compared, and have to agree."""
    cfg = settings(
        "dataset=cifar10",
        "backbone=resnet18_cifar",
        f"proto.module.buffer_size={buffer}",
        f"proto.module.head_batch_size={min(128, buffer)}",
        f"proto.streams.images.batch_size={min(250, buffer)}",
    )
    torch.manual_seed(0)
    encoder: nn.Module = build(cfg, cfg.backbone)
    our_cycle(cfg, encoder, buffer, 32, precision)  # warm up
    watch, passes = our_cycle(cfg, encoder, buffer, 32, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        start = time.process_time()
        slots, losses = their_cycle(watch, encoder)
        seconds = time.process_time() - start
    result = {
        "seconds": watch.seconds,
        "seconds_reference": seconds,
        "wall_ratio": seconds / watch.seconds,
        "seconds_per_pass": watch.seconds / passes,
    }
    if precision == "32-true":
        result["loss_difference"] = difference(watch, slots, losses)
    return result


def difference(watch: Watch, slots: Tensor, losses: list[float]) -> float:
    """Median difference of the heads' losses; ends the benchmark where the two ways disagree."""
    ours, _ = watch.slots[0]  # (H, K·n)
    per_cluster = ours.view(NUM_HEADS, NUM_CLUSTERS, -1).sort().values
    if not torch.equal(per_cluster, slots.view_as(per_cluster).sort().values):
        raise SystemExit("error: the two ways choose other pseudo-labels")
    differ = statistics.median(abs(a - b) for a, b in zip(watch.losses, losses, strict=True))
    if differ > 1e-4:
        raise SystemExit(f"error: the losses of the two ways differ by {differ:.1e}")
    return differ


def our_cycle(
    cfg: DictConfig, encoder: nn.Module, buffer: int, size: int, precision: str
) -> tuple[Watch, int]:
    """Train one cycle; return what it drew and how many images passed the encoder."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        images = noise(buffer, size)
        fit(cfg, images, encoder, NUM_HEADS, Path(folder), watch, precision, epochs=1)
    return watch, watch.counter.images


def their_cycle(watch: Watch, encoder: nn.Module) -> tuple[Tensor, list[float]]:
    """Train one cycle the way the authors' script works, on the views that ours drew.

    Returns:
        Slots (H, K·n) and the mean loss of each head.
    """
    index, weak, strong = (torch.cat(part) for part in zip(*watch.views, strict=True))
    lr, batch_size = watch.settings
    heads = watch.heads
    parameters = [parameter for head in heads for parameter in head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    encoder.eval()
    with torch.no_grad():
        parts = [encode(encoder, part) for part in torch.split(weak, batch_size)]
        features = torch.cat(parts)
        slots = torch.stack(
            [sorted_slots(watch.embeddings[index], head(features)) for head in heads]
        )
    label = torch.arange(NUM_CLUSTERS).repeat_interleave(slots.shape[1] // NUM_CLUSTERS)
    generator = keyed_generator(0, 0, len(watch.views) - 1)
    totals, steps = [0.0] * NUM_HEADS, 0
    for _ in range(REPEATS):
        order = torch.randperm(len(label), generator=generator)
        for chosen in torch.split(order, batch_size):
            if len(chosen) < batch_size:
                break
            losses = []
            for head, own in zip(heads, slots, strict=True):
                with torch.no_grad():
                    features = encode(encoder, strong[own[chosen]])
                losses.append(F.cross_entropy(head(features), label[chosen]))  # Eq. 5: of probs
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
            totals = [
                total + float(loss.detach()) for total, loss in zip(totals, losses, strict=True)
            ]
            steps += 1
    return slots, [total / steps for total in totals]


def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = encoder(images.contiguous(memory_format=torch.channels_last)).float()
    return features


def sorted_slots(embeddings: Tensor, probs: Tensor) -> Tensor:
    """Pseudo-labels (K·n,) of one head by a full sort of every cluster's scores."""
    share = len(probs) // NUM_CLUSTERS
    slots = []
    for cluster in range(NUM_CLUSTERS):
        confident = probs[:, cluster].argsort(descending=True)[: share // 2]
        cosine = embeddings @ F.normalize(embeddings[confident].mean(dim=0), dim=0)
        slots.append(cosine.argsort(descending=True)[:share])
    return torch.cat(slots)


def without_bf16() -> str | None:
    """Return why bfloat16 is not timed; None where it is."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "not timed: this processor does not multiply in bfloat16, so it would be emulated"


# Selection.


def selection(num_images: int, num_clusters: int, width: int) -> dict[str, float]:
    """Seconds and memory of the pseudo-labels of one head, and seconds of the product inside."""
    generator = torch.Generator().manual_seed(0)
    embeddings = unit_rows(torch.randn(num_images, width, generator=generator))
    probs = torch.rand(num_images, num_clusters, generator=generator)
    prototypes = embeddings[:num_clusters]
    rows = max(1, SIMILARITIES_PER_CHUNK // num_images)

    def product() -> None:
        for part in prototypes.split(rows):
            similarities(part, embeddings)

    before = peak_mb()
    seconds = timed(lambda: prototype_pseudo_labels(embeddings, probs))
    added = peak_mb() - before
    floor = timed(product)
    return {
        "seconds": seconds,
        "product_seconds": floor,
        "over_product": seconds / floor,
        "added_mb": added,
        "arguments_mb": 4e-6 * num_images * (width + num_clusters),
    }


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
