"""Measure what images and steps cost on this machine, in seconds of the wall clock.

Shapes: B images of a batch, S pixels a side, M images of a cycle, H heads, D features.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.functional.device import synchronize
from spice_pl.functional.embeddings import nearest_others
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.nn.frozen import PART, Frozen
from spice_pl.stages.base import Stage
from spice_pl.stages.proto import ProtoHeadModule

LIMIT_S = 1.0  # of one measurement, after its first call
REPEATS = 8
ROWS = 1000  # of the features that k-means and neighbours are measured on
GPU_BATCH = 128


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a stage take.

    Attributes:
        encode: the frozen encoder, per image.
        train: forward and backward through the encoder, per image.
        views: making a view, per image, by name; "plain" is one of them.
        head_step: a step of all heads of stage 2.
        head_row: all heads and their pseudo-labels, per image.
        rows: k-means and nearest neighbours of 1,000 features, which smoothing, the estimate of K
            and the choice of clusters consist of.
        idle: share of these times, in (0, 1], that they might take if nothing else ran here; 1
            where nothing else seems to run.
    """

    encode: float
    train: float
    views: Mapping[str, float]
    head_step: float
    head_row: float
    rows: tuple[float, float]
    idle: float = 1.0


def measure(
    module: Stage, views: Mapping[str, View], pixels: int, *, device: str, precision: str
) -> Costs:
    """Measure the parts of a stage on pixels of noise; their cost depends on the shape alone.

    Args:
        module: the stage; it stays as it is.
        views: its views, and "plain".
        pixels: S.
        device: "cpu" or "cuda".
        precision: precision of the trainer.
    """
    batch = GPU_BATCH if device != "cpu" else max(4, min(32, PART // pixels**2))
    generator, watch = torch.Generator().manual_seed(0), Watch(device)
    shape = (batch, 3, pixels, pixels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    made = {}
    for name, view in views.items():
        uniforms = torch.rand(batch, view.num_uniforms, generator=generator)
        made[name] = watch.seconds(lambda v=view, u=uniforms: v(images, u)) / batch  # type: ignore[misc]
    no_uniforms = torch.empty(batch, 0, device=device)
    ready = views["plain"](images, no_uniforms).contiguous(memory_format=torch.channels_last)
    network = copy.deepcopy(module.encoder).to(device).to(memory_format=torch.channels_last)
    with _precision(device, precision):
        frozen = Frozen(network)
        encode = watch.seconds(lambda: frozen(ready)) / batch
        train = 0.0
        if any(weight.requires_grad for weight in module.encoder.parameters()):
            trained = network.train().requires_grad_(True)
            train = watch.seconds(lambda: trained(ready).float().sum().backward()) / batch
    step, row = 0.0, 0.0
    if isinstance(module, ProtoHeadModule):
        step, row = _head_costs(module, generator, watch)
    rows = _row_costs(module.feature_dim, watch)
    return Costs(encode, train, made, step, row, rows, watch.idle())


class Watch:
    """Measure the time of calls.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._mean = self._least = 0.0  # sums over all that was measured

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the mean time of a few calls, without the first one if that is quick.

        The mean, because a busy machine holds up some calls much longer than others.
        """
        taken: list[float] = []
        while len(taken) < REPEATS and (len(taken) < 2 or sum(taken[1:]) < LIMIT_S):
            begun = time.perf_counter()
            call()
            synchronize(self.device)
            taken.append(time.perf_counter() - begun)
            if taken[0] > 2 * LIMIT_S:  # warming up does not count for much
                break
        counted = taken[1:] or taken
        self._mean += statistics.fmean(counted)
        self._least += min(counted)
        return statistics.fmean(counted)

    def idle(self) -> float:
        """Return the share of the measured times that an idle machine might need, in (0, 1].

        By the quickest calls, and by the programs that wait for a core (`load`).
        """
        return self._least / max(self._mean, 1e-12) / max(1.0, load())


def load() -> float:
    """Return how many programs there were per core in the last minute; 0 if it is not known."""
    if not hasattr(os, "getloadavg"):
        return 0.0
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _head_costs(
    module: ProtoHeadModule, generator: torch.Generator, watch: Watch
) -> tuple[float, float]:
    """Return the seconds of a step of all heads, and of an E-step per image."""
    device = watch.device
    heads, rows = copy.deepcopy(module.heads).to(device), 128 * module.num_clusters
    rows = min(max(rows, 512), module.buffer_size, 4096)
    features = torch.randn(rows, module.feature_dim, generator=generator).to(device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-9)

    def e_step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            found: tuple[torch.Tensor, torch.Tensor] = module.prototype_pseudo_labels(
                features, heads(features), shares=None
            )
            return found

    slots, label = e_step()  # (H, slots), and a label for each slot
    slots, label = slots[:, : module.head_batch_size], label[..., : module.head_batch_size]

    def step() -> None:
        logits = heads.logits(F.embedding(slots, features))
        optimizer.zero_grad()
        torch.autograd.backward(module.head_losses(logits, label).sum())
        optimizer.step()

    return watch.seconds(step), watch.seconds(e_step) / rows


def _row_costs(width: int, watch: Watch) -> tuple[float, float]:
    """Return the seconds of k-means in 32 dimensions, and of the neighbours of features."""
    rows = np.random.default_rng(0).standard_normal((ROWS, 32)).astype(np.float32)
    features = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    return (
        watch.seconds(lambda: kmeans_clusters(rows, 10, 0)),
        watch.seconds(lambda: nearest_others(features, 10)),
    )


def _precision(device: str, precision: str) -> AbstractContextManager[Any]:
    """Return the context of a trainer's precision."""
    if precision == "bf16-mixed":
        return torch.autocast(device, torch.bfloat16)
    if precision == "16-mixed":
        return torch.autocast(device, torch.float16)
    return nullcontext()
