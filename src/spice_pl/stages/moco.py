"""Stage 1: a feature model by momentum contrast.

Niu et al. 2022 (SPICE), Section III-A; He et al. 2020 (MoCo); Chen et al. 2020 (MoCo v2).

Shapes: B images, D features, Q queue, P projection.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.artifacts import RunFolder
from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.contrastive import info_nce
from spice_pl.functional.momentum import ema_update_
from spice_pl.nn.queue import Queue
from spice_pl.stages.base import Prediction, Stage


class MoCoModule(Stage):
    """Contrast two views of an image against a queue of earlier keys.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P, width of queries and keys.
        queue_size: Q, number of negatives.
        temperature: tau in Eq. 1.
        momentum: m of the key branch.
        lr: of SGD at the start; falls to 0 by a cosine per epoch.
        sgd_momentum: of SGD.
        weight_decay: of SGD, on all parameters.
    """

    has_clusters = False

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 128,
        queue_size: int = 12800,
        temperature: float = 0.2,
        momentum: float = 0.999,
        lr: float = 0.015,
        sgd_momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UsageError(f"moco.module.temperature {temperature} is not positive; MoCo v2: 0.2")
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.encoder = backbone
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)
        )
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.queue = Queue(projection_dim, queue_size)
        self.temperature, self.momentum = temperature, momentum
        self.lr, self.sgd_momentum, self.weight_decay = lr, sgd_momentum, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return raw features (B, D) of the query encoder, without projection."""
        features: Tensor = self.encoder(images)
        return features

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of one batch; move the key branch and the queue."""
        query = F.normalize(self.projection(self.encoder(batch.views["query"])).float())  # (B, P)
        ema_update_(self.key_encoder, self.encoder, self.momentum)
        ema_update_(self.key_projection, self.projection, self.momentum)
        key = self._keys(batch.views["key"])  # (B, P)
        loss = info_nce(query, key, self.queue.keys, self.temperature)
        self.queue.enqueue(self.across_ranks(key))
        self.record("train/loss", loss)
        # 0 when collapsed, 1/sqrt(P) when spread evenly
        self.record("train/embedding_std", query.detach().std(dim=0).mean())
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with a cosine per epoch, no warm-up."""
        optimizer = torch.optim.SGD(
            [*self.encoder.parameters(), *self.projection.parameters()],
            lr=self.lr,
            momentum=self.sgd_momentum,
            weight_decay=self.weight_decay,
            foreach=True,
        )
        epochs = self.trainer.max_epochs or 1
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that queue and batch fit the data set."""
        queue_size, num_train = self.queue.keys.shape[1], len(images.train_index)
        if queue_size > num_train:
            raise UsageError(
                f"moco.module.queue_size {queue_size} exceeds the {num_train} training images, so "
                "an image would meet older keys of itself as negatives; lower it to at most "
                f"{num_train}"
            )
        for stream in streams.values():
            if stream.batch_size > queue_size:
                raise UsageError(
                    f"batch_size {stream.batch_size} exceeds moco.module.queue_size {queue_size}; "
                    "lower the one or raise the other"
                )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Return the streams; stage 1 has no upstream."""
        self.check(images, streams)
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the query encoder, which is what stage 2 reads."""
        return {"encoder": self.encoder}

    def predict(self, batch: Views) -> Prediction:
        """Return raw features of the plain view."""
        return Prediction(batch.index, self(batch.views["plain"]).float(), None)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Keys (B, P); BatchNorm sees them in another grouping than the queries (shuffle-BN)."""
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        if world_size == 1:
            return F.normalize(self.key_projection(self.key_encoder(images)).float())
        everyone = self.across_ranks(images)
        # The same order on every rank; it only has to mix ranks.
        generator = torch.Generator().manual_seed(self.global_step)
        order = torch.randperm(len(everyone), generator=generator).to(images.device)
        mine = everyone[order[rank::world_size]]
        keys = F.normalize(self.key_projection(self.key_encoder(mine)).float())
        shuffled = self.across_ranks(keys)
        return shuffled[order.argsort()[rank::world_size]]
