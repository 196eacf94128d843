"""Contrastive clustering: one training that contrasts images by rows and clusters by columns.

Li et al. 2021, "Contrastive Clustering" (CC). SPICE is compared with it.

Shapes: B images of a batch, b of them on this rank, D features, P projection, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.functional.contrastive import cluster_contrast, nt_xent
from spice_pl.nn.heads import ClusterHead
from spice_pl.nn.optimizers import adam_settings
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage, check_batch, check_count, check_number, width_of
from spice_pl.stages.features import fit_stem


class ContrastiveClusteringModule(Stage):
    """Train encoder, projection and cluster head together, from random weights.

    Two views of each image give a projection and a prediction each. The projections of an image
    are contrasted with those of other images; a cluster, as the column of its predictions, with
    the other clusters.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        projection_dim: P.
        temperature: τ_I, of the images.
        cluster_temperature: τ_C, of the clusters.
        lr: learning rate of Adam, constant.
        weight_decay: weight decay of Adam.

    Raises:
        UsageError: a temperature is not positive.
    """

    name = "cc"

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        projection_dim: int = 128,
        temperature: float = 0.5,
        cluster_temperature: float = 1.0,
        lr: float = 3e-4,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        check_count(self.name, num_clusters)
        for key, value, paper in (
            ("temperature", temperature, 0.5),
            ("cluster_temperature", cluster_temperature, 1.0),
        ):
            check_number(self.name, key, value, value > 0, f"positive; the paper has {paper}")
        width = width_of(backbone)
        self.encoder = backbone
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)
        )
        self.head = ClusterHead(width, width, num_clusters)
        self.num_clusters = num_clusters
        self.temperature, self.cluster_temperature = temperature, cluster_temperature
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (B, K)."""
        probs: Tensor = self.head(self.encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every rank computes that of the global batch."""
        images = torch.cat([batch.views["query"], batch.views["key"]])
        features = self.encoder(images)  # (2b, D)
        one, other = F.normalize(self.projection(features).float()).chunk(2)  # (b, P) each
        on_images = nt_xent(self.joined(one), self.joined(other), self.temperature)
        one, other = self.head(features).float().chunk(2)  # (b, K) each
        on_clusters = cluster_contrast(
            self.joined(one), self.joined(other), self.cluster_temperature
        )
        loss = on_images + on_clusters
        values = {"loss": loss, "loss_images": on_images, "loss_clusters": on_clusters}
        for name, value in values.items():
            self.record(f"train/{name}", value)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam at a constant rate."""
        return torch.optim.Adam(
            self.parameters(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            **adam_settings(self.device),
        )

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that a batch has images for every cluster."""
        check_batch(self.name, streams, self.num_clusters)

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Fit a stem that depends on the images."""
        self.check(images, streams)
        fit_stem(self.encoder, images, streams["images"].views["query"])
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return encoder and cluster head; the projection is dropped."""
        return {"encoder": self.encoder, "head": self.head}

    def predict(self, batch: Views) -> Prediction:
        """Return features and probabilities of the plain view."""
        features = self.encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, self.head(features).float())
