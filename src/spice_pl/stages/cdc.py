"""Calibrated deep clustering: one head clusters, another one says how sure it may be.

Jia et al. 2025, "Towards Calibrated Deep Clustering Network" (CDC, ICLR). SPICE is compared with
it.

Shapes: n training images, B images of a batch, b of them on this rank, D features,
E hidden units, R regions, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.cdc import (
    calibration_loss,
    confident_labels,
    labelled_loss,
    prototype_head,
    region_targets,
    regions_of,
)
from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.nn.heads import ClusterHead
from spice_pl.nn.optimizers import adam_settings
from spice_pl.runs.evidence import check_features
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Prediction, Stage, check_batch, check_number, width_of

NUM_FITTED = 20_000  # evenly spaced training images that the heads start from


class CdcModule(Stage):
    """Train encoder and clustering head on labels that a calibration head is sure of.

    Both heads start at k-means on the features of the upstream. The calibration head reads the weak
    view and learns the mean prediction of each region of the batch, without changing the encoder.
    It selects the images whose strong view the clustering head learns. The calibration head is the
    one handed on.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        hidden_dim: E; at most the number of training images.
        region_size: mean number of images of a region, B / R.
        entropy_weight: w_en, weight of the entropy of the calibration head's mean prediction.
        lr: learning rate of Adam for both heads, constant.
        encoder_lr: learning rate of Adam for the encoder, constant.
        weight_decay: weight decay of Adam.
        seed: seed of k-means.

    Raises:
        UsageError: a number is out of range.
    """

    name = "cdc"

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        hidden_dim: int = 512,
        region_size: float = 5,
        entropy_weight: float = 1.0,
        lr: float = 1e-4,
        encoder_lr: float = 5e-5,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least, rule in (
            ("hidden_dim", hidden_dim, 1, "at least 1; the paper has 512"),
            ("region_size", region_size, 1, "at least 1, a region's images"),
            ("entropy_weight", entropy_weight, 0, "at least 0; the paper has 1"),
        ):
            check_number(self.name, key, value, value >= least, rule)
        self.encoder = backbone
        self.num_clusters, self.hidden_dim = num_clusters, hidden_dim
        self.clustering, self.calibration = self._heads(hidden_dim)
        self.region_size, self.entropy_weight = region_size, entropy_weight
        self.lr, self.encoder_lr, self.weight_decay = lr, encoder_lr, weight_decay
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        """Return calibrated probabilities (B, K)."""
        probs: Tensor = self.calibration(self.encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every rank computes that of the global batch."""
        images = torch.cat([batch.views["weak"], batch.views["strong"]])  # (2b, 3, S, S)
        weak, strong = self.encoder(images).float().chunk(2)  # (b, D) each
        weak = weak.detach()
        calibrated = self.calibration.logits(weak)  # (b, K)
        labels, targets = self._labels_and_targets(weak, calibrated.detach())  # (b,), (b, K)
        on_clusters = labelled_loss(
            self.joined(self.clustering.logits(strong)), self.joined(labels)
        )
        on_calibration = calibration_loss(
            self.joined(calibrated), self.joined(targets), self.entropy_weight
        )
        loss = on_clusters + on_calibration
        values = {
            "loss": loss,
            "loss_clusters": on_clusters,
            "loss_calibration": on_calibration,
            "confident_fraction": (labels >= 0).float().mean(),
        }
        for name, value in values.items():
            self.record(f"train/{name}", value)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam at constant rates."""
        heads = [*self.clustering.parameters(), *self.calibration.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [*self.encoder.parameters()], "lr": self.encoder_lr},
            {"params": heads},
        ]
        return torch.optim.Adam(
            groups, lr=self.lr, weight_decay=self.weight_decay, **adam_settings(self.device)
        )

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that a batch has images for every cluster."""
        check_batch(self.name, streams, self.num_clusters)

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load the encoder of the upstream; start both heads at k-means on its features."""
        self.check(images, streams)
        if upstream is None:
            raise UsageError("stage=cdc needs an upstream stage; set cdc.upstream=moco")
        upstream.load_weights("encoder.safetensors", self.encoder)
        check_features(upstream.features, len(images), f"{upstream.path}/features.npy")
        some = torch.from_numpy(images.train_index)
        some = some[:: math.ceil(len(some) / NUM_FITTED)]
        features = as_tensor(upstream.features)[some]  # (n, D)
        embeddings = upstream.embeddings(images.train_index)[some]  # (n, d)
        generator = keyed_generator(self.seed)
        clusters, _ = cosine_kmeans(embeddings, self.num_clusters, generator=generator)
        hidden_dim = min(self.hidden_dim, len(features))
        self.clustering, self.calibration = self._heads(hidden_dim)
        state = prototype_head(features, clusters, self.num_clusters, hidden_dim, generator)
        for head in (self.clustering, self.calibration):
            head.load_state_dict(state)
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the encoder and the calibration head."""
        return {"encoder": self.encoder, "head": self.calibration}

    def predict(self, batch: Views) -> Prediction:
        """Return features and calibrated probabilities of the plain view."""
        features = self.encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, self.calibration(features).float())

    @torch.no_grad()
    def _labels_and_targets(self, features: Tensor, calibrated: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels (b,) and targets (b, K) of this rank's images, from the global batch.

        Args:
            features: (b, D), of the weak view.
            calibrated: (b, K), logits of the calibration head.
        """
        embeddings, predicted, sure = (
            self.across_ranks(each, even=True)
            for each in (
                F.normalize(features),
                self.clustering(features),
                calibrated.softmax(dim=1),
            )
        )
        num_regions = max(1, int(len(embeddings) / self.region_size))
        regions = regions_of(embeddings, num_regions)
        targets = region_targets(predicted, regions, num_regions)
        own = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return confident_labels(sure)[own], targets[own]

    def _heads(self, hidden_dim: int) -> tuple[ClusterHead, ClusterHead]:
        """Make the clustering head and the calibration head."""
        width = width_of(self.encoder)
        first, second = (ClusterHead(width, hidden_dim, self.num_clusters) for _ in range(2))
        return first, second
