"""Stage 1: a feature model by momentum contrast.

Niu et al. 2022 (SPICE), Section III-A; He et al. 2020 (MoCo); Chen et al. 2020 (MoCo v2).

Shapes: B images of a batch, b of them on this rank, D features, Q queue, P projection.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.contrastive import info_nce
from spice_pl.functional.device import to_device
from spice_pl.functional.momentum import EmaPairs
from spice_pl.nn.queue import Queue
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import check_number, width_of
from spice_pl.stages.features import FeatureStage, Training


class MoCoModule(FeatureStage):
    """Contrast two views of each image with a queue of earlier keys.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P, width of queries and keys.
        queue_size: Q, number of negatives.
        temperature: tau in Eq. 1.
        momentum: m, share of the key branch that stays at each step.
        symmetric: whether each view is query and key in turn (Chen et al. 2021, MoCo v3), which
            doubles the cost of a step.
        bn_groups: number of parts of the global batch that BatchNorm normalises separately, queries
            and shuffled keys alike; with several processes there is at least one part per process.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`.
        training: as in `FeatureStage`.
    """

    name = "moco"
    _ema: EmaPairs | None = None
    _order: tuple[Tensor, Tensor]  # which images of a batch this rank encodes, and the way back

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 128,
        queue_size: int = 12800,
        temperature: float = 0.2,
        momentum: float = 0.999,
        symmetric: bool = False,
        bn_groups: int = 1,
        lr: float = 0.015,
        warmup_epochs: int = 0,
        **training: Unpack[Training],
    ) -> None:
        rule = "positive; MoCo v2 uses 0.2"
        check_number(self.name, "temperature", temperature, temperature > 0, rule)
        width = width_of(backbone)
        super().__init__(
            backbone,
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)),
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.queue = Queue(projection_dim, queue_size)
        self.temperature, self.momentum = temperature, momentum
        self.symmetric, self.bn_groups = symmetric, bn_groups

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; update the key branch."""
        one, other = self.pair(batch)
        if self._ema is None:
            self._ema = EmaPairs(
                (self.key_encoder, self.encoder), (self.key_projection, self.projection)
            )
        self._ema.update_(self.momentum)
        losses, keys = [], []
        for first, second in [(one, other), (other, one)] if self.symmetric else [(one, other)]:
            query = self._in_groups(self.encoder, self.projection, first)  # (B, P)
            key = self._keys(second)  # (B, P)
            losses.append(info_nce(query, key, self.queue.keys, self.temperature))
            keys.append(key)
        self._new_keys = [self.across_ranks(each, even=True) for each in keys]  # (B, P) each
        loss = torch.stack(losses).mean()
        self.record_step(loss, query, key)
        return loss

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that queue, batch and groups fit the data set and each other."""
        extra = any(stream.extra for stream in streams.values())
        queue_size, num_train = self.queue.keys.shape[1], len(images.drawn_index(extra=extra))
        if queue_size > num_train:
            raise UsageError(
                f"moco.module.queue_size {queue_size} exceeds the {num_train} training images, so "
                "older keys of an image would be negatives of itself; lower it to at most "
                f"{num_train}"
            )
        for stream in streams.values():
            if stream.batch_size > queue_size:
                raise UsageError(
                    f"batch_size {stream.batch_size} exceeds moco.module.queue_size {queue_size}; "
                    "lower the one or raise the other"
                )
            per_group, rest = divmod(stream.batch_size, self.bn_groups)
            if rest or per_group < 2:
                raise UsageError(
                    f"batch_size {stream.batch_size} does not make {self.bn_groups} equal groups "
                    "of at least 2 images; change moco.module.bn_groups or "
                    "moco.streams.images.batch_size"
                )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Fit a stem that depends on the images, in both branches."""
        streams = super().prepare(images, upstream, streams)
        self.key_encoder.load_state_dict(self.encoder.state_dict())
        return streams

    def on_fit_start(self) -> None:
        """Pair the branches from scratch, now that they are on their device."""
        self._ema = None

    def on_train_batch_start(self, batch: Views, batch_idx: int) -> None:
        """Draw which images BatchNorm of the key branch normalises together (shuffle-BN)."""
        if not self._shuffles:
            return
        images = batch.views["key"]
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        # The same order on every rank; any order that mixes the groups will do.
        generator = torch.Generator().manual_seed(self.global_step)
        order = torch.randperm(len(images) * world_size, generator=generator)
        drawn, back = (
            to_device(each[rank::world_size].contiguous(), images.device)
            for each in (order, order.argsort())
        )
        self._order = drawn, back

    def on_train_batch_end(self, *_: Any) -> None:
        """Put the keys into the queue, which the backward pass still read."""
        for keys in self._new_keys:
            self.queue.enqueue(keys)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Return keys (b, P); BatchNorm groups them differently from the queries (shuffle-BN)."""
        if not self._shuffles:
            return self._in_groups(self.key_encoder, self.key_projection, images)
        (drawn, back), everyone = self._order, self.across_ranks(images, even=True)
        keys = self._in_groups(self.key_encoder, self.key_projection, everyone[drawn])
        return self.across_ranks(keys, even=True)[back]

    @property
    def _shuffles(self) -> bool:
        return max(self.trainer.world_size, self.bn_groups) > 1

    def _in_groups(self, encoder: nn.Module, projection: nn.Module, images: Tensor) -> Tensor:
        """Return embeddings (b, P); group g of G is rows g, g + G, ... as on rank g of G ranks."""
        groups = max(1, self.bn_groups // self.trainer.world_size)
        parts = [projection(encoder(images[group::groups])) for group in range(groups)]
        return F.normalize(torch.stack(parts, dim=1).flatten(0, 1).float())  # (b/G, G, P) -> (b, P)
