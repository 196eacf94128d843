"""SCAN's self-labelling step: the model learns its own confident labels.

Van Gansbeke et al. 2020 (SCAN), Section 2.3.

Shapes: B images of a batch, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.scan import self_label_loss
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.optimizers import adam_settings
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage, load_clustering, width_of


class SelfLabelModule(Stage):
    """Train encoder and head of any clustering on its own confident labels.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        confidence: probability in the plain view above which its cluster becomes a label.
        lr: learning rate of Adam, constant.
        weight_decay: weight decay of Adam.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        confidence: float = 0.99,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.encoder = backbone
        width = width_of(backbone)
        self.head: ClusterHead | LinearHead = LinearHead(width, num_clusters)
        self.confidence, self.lr, self.weight_decay = confidence, lr, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (B, K)."""
        probs: Tensor = self.head(self.encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of the strong views of images whose plain view is confident."""
        images = torch.cat([batch.views["plain"], batch.views["strong"]])  # (2B, 3, S, S)
        plain, strong = self.head.logits(self.encoder(images)).float().chunk(2)
        loss, mask = self_label_loss(strong, plain.detach().softmax(dim=1), self.confidence)
        self.record("train/loss", loss)
        self.record("train/confident_fraction", mask.float().mean())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam at a constant rate."""
        return torch.optim.Adam(
            self.parameters(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            **adam_settings(self.device),
        )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load encoder and head of the upstream; the head may be of either kind."""
        if upstream is None:
            raise UsageError("stage=selflabel needs an upstream stage; set selflabel.upstream=scan")
        way_out = "set selflabel.upstream to a stage that clusters (scan, proto, fixmatch)"
        self.head = load_clustering(upstream, self.encoder, self.head, way_out)
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return encoder and head."""
        return {"encoder": self.encoder, "head": self.head}

    def predict(self, batch: Views) -> Prediction:
        """Return features and probabilities of the plain view."""
        features = self.encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, self.head(features).float())
