"""The base of stages that learn features without clusters: training by SGD, and validation.

Shapes: B images, W watched images, D features, K clusters, S pixels a side.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.data.datamodule import Stream, Views, in_turn
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.contrastive import alignment, uniformity
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.functional.reliability import local_consistency
from spice_pl.nn.optimizers import sgd_settings
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage

logger = logging.getLogger(__name__)

COLLAPSED = 0.1  # share of an even spread below which embeddings count as collapsed
NUM_NEIGHBORS = 20  # neighbours of a watched image among the watched images, itself counted
NUM_STEM_IMAGES = 2000  # images that a stem is fitted to


class Training(TypedDict, total=False):
    """Settings that subclasses pass on as they are; `FeatureStage` explains them."""

    num_clusters: int | None
    sizes: Sequence[int] | None
    sgd_momentum: float
    weight_decay: float


class FeatureStage(Stage):
    """An encoder with a projection, trained by SGD: stage 1 with any loss.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection: (B, D) -> (B, P), dropped when training ends.
        lr: learning rate of SGD after the warm-up; falls to 0 by a cosine per epoch.
        warmup_epochs: epochs at the start in which the learning rate rises evenly.
        num_clusters: K of the k-means that validation logs; None logs none.
        sizes: sides in pixels that views are scaled to in turn, each for an equal share of the
            epochs; None leaves views as they are.
        sgd_momentum: momentum of SGD.
        weight_decay: weight decay of SGD, on all parameters.

    Raises:
        UsageError: `sizes` is empty or holds a side below 8 pixels.
    """

    has_clusters = False
    against_collapse = "raise the temperature"  # what else to do beside a lower lr

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        lr: float,
        warmup_epochs: int,
        num_clusters: int | None = None,
        sizes: Sequence[int] | None = None,
        sgd_momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        if sizes is not None and (not sizes or min(sizes) < 8):
            raise UsageError(
                f"{self.name}.module.sizes {sizes} must be sides of at least 8 pixels, or null for "
                "views as they are"
            )
        self.encoder, self.projection = backbone, projection
        self.num_clusters, self.sizes = num_clusters, sizes
        self.lr, self.warmup_epochs = lr, warmup_epochs
        self.sgd_momentum, self.weight_decay = sgd_momentum, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return raw features (B, D) of the trained encoder, without the projection."""
        features: Tensor = self.encoder(images)
        return features

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Keep the features of the watched images; return the prediction, for callbacks."""
        prediction = self.predict(batch)
        self._watched.append(prediction.features)
        return prediction

    def on_validation_epoch_start(self) -> None:
        """Forget the features of the validation before."""
        self._watched: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        """Log how far two k-means agree, and how far neighbours share a cluster, without labels."""
        features = self.across_ranks(torch.cat(self._watched)).cpu()  # (W, D)
        if self.num_clusters is None or len(features) <= max(self.num_clusters, NUM_NEIGHBORS):
            return
        if not bool(features.isfinite().all()):
            return  # the loss is not finite either, and `NanGuard` stops the run
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
        """Return SGD, and its cosine per epoch after the warm-up."""
        optimizer = torch.optim.SGD(
            [each for each in self.parameters() if each.requires_grad],
            lr=self.lr,
            momentum=self.sgd_momentum,
            weight_decay=self.weight_decay,
            **sgd_settings(self.device),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate),
        }

    def on_train_epoch_end(self) -> None:
        """Warn if the embeddings of all images are nearly the same."""
        spread = float(self._spread)
        if spread < COLLAPSED * self._even_spread:
            logger.warning(
                "the embeddings have collapsed: their standard deviation is %.4f, and %.4f when "
                "spread evenly; lower the lr or %s of this stage",
                spread,
                self._even_spread,
                self.against_collapse,
            )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Fit the stem to some of the images, if the encoder has one that must be fitted."""
        self.check(images, streams)
        fit_stem(self.encoder, images, next(iter(streams["images"].views.values())))
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the trained encoder, which stage 2 reads."""
        return {"encoder": self.encoder}

    def predict(self, batch: Views) -> Prediction:
        """Return raw features of the plain view."""
        return Prediction(batch.index, self(batch.views["plain"]).float(), None)

    def pair(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return both views, (B, 3, s, s) each, at the size of this epoch."""
        first, second = self.at_size([batch.views["query"], batch.views["key"]])
        return first, second

    def at_size(self, views: list[Tensor]) -> list[Tensor]:
        """Return views (B, 3, S, S), scaled to the size of this epoch, (B, 3, s, s)."""
        if self.sizes is None:
            return views
        size = in_turn(self.sizes, self.current_epoch, self.trainer.max_epochs)
        return [_scaled(view, size) for view in views]

    def record_step(self, loss: Tensor, query: Tensor, key: Tensor) -> None:
        """Log the loss of a step, and the geometry of its embeddings (B, P)."""
        query, key = query.detach(), key.detach()
        spread = query.std(dim=0).mean()  # 0 when collapsed
        self._spread, self._even_spread = spread, 1 / math.sqrt(query.shape[1])
        self.record("train/loss", loss)
        self.record("train/embedding_std", spread)
        self.record("train/alignment", alignment(query, key))
        self.record("train/uniformity", uniformity(query))

    def _rate(self, epoch: int) -> float:
        if epoch < self.warmup_epochs:
            return (epoch + 1) / (self.warmup_epochs + 1)
        epochs = max(1, (self.trainer.max_epochs or 1) - self.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / epochs))


def perceptron(width: int, hidden_dim: int, out: int) -> nn.Sequential:
    """Return a linear layer with BatchNorm and ReLU, and a linear layer: (B, width) -> (B, out)."""
    return nn.Sequential(
        nn.Linear(width, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, out),
    )


def fit_stem(encoder: nn.Module, images: ImageSet, view: View) -> None:
    """Fit the stem of an encoder to views of some training images, if it has one to be fitted."""
    fit = getattr(encoder, "fit_stem", None)
    if fit is None:
        return
    index = images.train_index[:: math.ceil(len(images.train_index) / NUM_STEM_IMAGES)]
    pixels = torch.from_numpy(np.asarray(images.images[index]))  # (n, 3, S, S)
    rows = torch.from_numpy(index)
    uniforms = keyed_uniform(0, torch.zeros_like(rows), rows, 0, view.num_uniforms)
    views = view(pixels, uniforms)
    fit(views if views.ndim == 4 else views[:, 0])  # one patch per image is enough


def _scaled(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
