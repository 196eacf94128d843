"""Stage 1: a feature model by momentum contrast.

Niu et al. 2022 (SPICE), Section III-A; He et al. 2020 (MoCo); Chen et al. 2020 (MoCo v2).

Shapes: B images, D features, Q queue, P projection.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.artifacts import RunFolder
from spice_pl.baselines import kmeans_clusters
from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.contrastive import alignment, info_nce, uniformity
from spice_pl.functional.momentum import ema_update_
from spice_pl.functional.reliability import local_consistency
from spice_pl.nn.queue import Queue
from spice_pl.stages.base import Prediction, Stage

logger = logging.getLogger(__name__)

COLLAPSED = 0.1  # of an even spread
NUM_NEIGHBORS = 20  # of the watched images
NUM_STEM_IMAGES = 2000  # that a stem is fitted to


class MoCoModule(Stage):
    """Contrast two views of an image against a queue of earlier keys.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P, width of queries and keys.
        queue_size: Q, number of negatives.
        temperature: tau in Eq. 1.
        momentum: m of the key branch.
        symmetric: whether each view is query and key in turn (Chen et al. 2021, MoCo v3); a step
            costs twice as much.
        bn_groups: parts of the global batch that BatchNorm normalises by themselves, queries and
            shuffled keys alike, as that many processes would; at least the number of processes.
        num_clusters: K, for watching; None watches nothing.
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
        symmetric: bool = False,
        bn_groups: int = 1,
        num_clusters: int | None = None,
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
        self.temperature, self.momentum, self.symmetric = temperature, momentum, symmetric
        self.bn_groups, self.num_clusters = bn_groups, num_clusters
        self.lr, self.sgd_momentum, self.weight_decay = lr, sgd_momentum, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return raw features (B, D) of the query encoder, without projection."""
        features: Tensor = self.encoder(images)
        return features

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of one batch; move the key branch and the queue."""
        one, other = batch.views["query"], batch.views["key"]
        ema_update_(self.key_encoder, self.encoder, self.momentum)
        ema_update_(self.key_projection, self.projection, self.momentum)
        losses, keys = [], []
        for first, second in [(one, other), (other, one)] if self.symmetric else [(one, other)]:
            query = self._in_groups(self.encoder, self.projection, first)  # (B, P)
            key = self._keys(second)  # (B, P)
            losses.append(info_nce(query, key, self.queue.keys, self.temperature))
            keys.append(key)
        for key in keys:
            self.queue.enqueue(self.across_ranks(key))
        loss = torch.stack(losses).mean()
        self.record("train/loss", loss)
        query = query.detach()
        # 0 when collapsed, 1/sqrt(P) when spread evenly
        self._spread = query.std(dim=0).mean()
        self.record("train/embedding_std", self._spread)
        self.record("train/alignment", alignment(query, key))
        self.record("train/uniformity", uniformity(query))
        return loss

    def on_train_epoch_end(self) -> None:
        """Say so when all images have come to the same place."""
        evenly = 1 / math.sqrt(self.queue.keys.shape[0])
        if self._spread < COLLAPSED * evenly:
            logger.warning(
                "moco: the embeddings have collapsed, their deviation is %.4f where %.4f is even; "
                "lower moco.module.lr or raise moco.module.temperature",
                float(self._spread),
                evenly,
            )

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Keep the features of the watched images; returns them for callbacks."""
        prediction = self.predict(batch)
        self._watched.append(prediction.features)
        return prediction

    def on_validation_epoch_start(self) -> None:
        """Forget the features of the last time."""
        self._watched: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        """Log how far two k-means agree, and how far neighbours share a cluster; no label read."""
        features = self.across_ranks(torch.cat(self._watched)).cpu()  # (W, D)
        if self.num_clusters is None or len(features) <= max(self.num_clusters, NUM_NEIGHBORS):
            return
        embeddings = F.normalize(features)
        first, second = (
            torch.from_numpy(kmeans_clusters(embeddings.numpy(), self.num_clusters, seed))
            for seed in (0, 1)
        )
        self.record("val/kmeans_agreement", clustering_scores(first, second)["ari"])
        self.record(
            "val/neighbor_agreement", local_consistency(embeddings, first, NUM_NEIGHBORS).mean()
        )

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
        """Check that queue, batch and groups fit the data set and each other."""
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
        """Fit a stem that depends on the images; return the streams. Stage 1 has no upstream."""
        self.check(images, streams)
        fit_stem = getattr(self.encoder, "fit_stem", None)
        if fit_stem is not None:
            view = streams["images"].views["query"]
            index = images.train_index[:: math.ceil(len(images.train_index) / NUM_STEM_IMAGES)]
            pixels = torch.from_numpy(np.asarray(images.images[index]))  # (n, 3, S, S)
            rows = torch.from_numpy(index)
            uniforms = keyed_uniform(0, torch.zeros_like(rows), rows, 0, view.num_uniforms)
            fit_stem(view(pixels, uniforms))
            self.key_encoder.load_state_dict(self.encoder.state_dict())
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
        if max(world_size, self.bn_groups) == 1:
            return self._in_groups(self.key_encoder, self.key_projection, images)
        everyone = self.across_ranks(images)
        # The same order on every rank; it only has to mix groups.
        generator = torch.Generator().manual_seed(self.global_step)
        order = torch.randperm(len(everyone), generator=generator).to(images.device)
        mine = everyone[order[rank::world_size]]
        shuffled = self.across_ranks(self._in_groups(self.key_encoder, self.key_projection, mine))
        return shuffled[order.argsort()[rank::world_size]]

    def _in_groups(self, encoder: nn.Module, projection: nn.Module, images: Tensor) -> Tensor:
        """Embeddings (B, P); group g of G is rows g, g + G, ... as rank g of G ranks holds them."""
        groups = max(1, self.bn_groups // self.trainer.world_size)
        parts = [projection(encoder(images[group::groups])) for group in range(groups)]
        return F.normalize(torch.stack(parts, dim=1).flatten(0, 1).float())  # (B/G, G, P) -> (B, P)
