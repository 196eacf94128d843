"""The base of stages whose target network is a moving average and gives each epoch its clusters.

Shapes: N images, n of them for training, B images of a batch, b of them on this rank, D features,
P projection, K clusters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator, keyed_uniform
from spice_pl.functional.contrastive import alignment
from spice_pl.functional.device import to_device
from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.functional.momentum import EmaPairs
from spice_pl.nn.heads import LinearHead
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, check_batch, check_count, check_number, width_of
from spice_pl.stages.features import FeatureStage, perceptron

NOISE = 0x9A0  # key of the noise; + 1 for the other view
# Divides the cosines between features and centres in the probabilities of the head.
HEAD_TEMPERATURE = 0.05


class TargetTraining(TypedDict, total=False):
    """Settings that subclasses pass on as they are; `TargetStage` explains them."""

    noise: float
    momentum: float
    sizes: Sequence[int] | None
    sgd_momentum: float
    weight_decay: float
    seed: int


class TargetStage(FeatureStage):
    """Align each image with its other view by a target network, and cluster by k-means.

    E-step, before each epoch after the warm-up: k-means on the features of the target network, a
    moving average. M-step: a sample near the projection of a view is mapped onto the target's
    projection of the other view, and a subclass adds losses on the clusters. The head handed on
    compares features with the centres of a last k-means.

    A subclass defines `cluster_losses`.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection: (B, D) -> (B, P), dropped when training ends.
        num_clusters: K.
        projection_dim: P.
        hidden_dim: width of the hidden layer of the predictor, which has BatchNorm.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`; there is no loss on clusters in these epochs.
        noise: σ, standard deviation of a sample around a projection.
        momentum: share of the target network that stays at each step.
        sizes: as in `FeatureStage`.
        sgd_momentum: as in `FeatureStage`.
        weight_decay: as in `FeatureStage`.
        seed: seed of k-means and of the samples.

    Raises:
        UsageError: a number is out of range.
    """

    has_clusters = True
    clusters: Tensor  # (N,) of the last E-step; -1 where there was none
    _ema: EmaPairs | None = None

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        num_clusters: int,
        *,
        projection_dim: int,
        hidden_dim: int,
        lr: float,
        warmup_epochs: int,
        noise: float = 0.001,
        momentum: float = 0.996,
        sizes: Sequence[int] | None = None,
        sgd_momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        check_count(self.name, num_clusters)
        check_number(self.name, "noise", noise, noise >= 0, "at least 0; the paper has 0.001")
        in_range, rule = 0 <= momentum <= 1, "from 0 to 1; the paper has 0.996"
        check_number(self.name, "momentum", momentum, in_range, rule)
        super().__init__(
            backbone,
            projection,
            num_clusters=num_clusters,
            sizes=sizes,
            lr=lr,
            warmup_epochs=warmup_epochs,
            sgd_momentum=sgd_momentum,
            weight_decay=weight_decay,
        )
        self.predictor = perceptron(projection_dim, hidden_dim, projection_dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.head = LinearHead(width_of(backbone), num_clusters).requires_grad_(False)
        self.noise, self.momentum, self.seed = noise, momentum, seed
        self.projection_dim = projection_dim

    def cluster_losses(
        self, online: Tensor, target: Tensor, clusters: Tensor
    ) -> Mapping[str, tuple[float, Tensor]]:
        """Return the weight and the value of each loss on the clusters of the global batch.

        Args:
            online: (B, P), l2-normalised projections of one view.
            target: (B, P), l2-normalised projections of the other view by the target network.
            clusters: (B,), of the last E-step.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the target network."""
        probs: Tensor = self.head(self.target_encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch, each view predicting the other; update the target."""
        if self._ema is None:
            self._ema = EmaPairs(
                (self.target_encoder, self.encoder), (self.target_projection, self.projection)
            )
        self._ema.update_(self.momentum)
        views = torch.cat(self.pair(batch))  # (2b, 3, S, S)
        projected = self.projection(self.encoder(views)).float()  # (2b, P)
        with torch.no_grad():
            target = F.normalize(self.target_projection(self.target_encoder(views)).float())
        samples = self.predictor(projected + self.noise * self._noise(batch.index)).float()
        predicted = F.normalize(samples)
        target = torch.cat(target.chunk(2)[::-1])  # of the other view
        aligned = alignment(predicted, target)
        values, loss = {"loss_alignment": aligned}, aligned
        if self.current_epoch >= self.warmup_epochs:
            for name, (weight, value) in self._on_clusters(projected, target, batch.index).items():
                values[f"loss_{name}"] = value
                loss = loss + weight * value
        for name, value in values.items():
            self.record(f"train/{name}", value)
        self.record_step(loss, *F.normalize(projected).chunk(2))
        return loss

    def on_train_batch_start(self, batch: Views, batch_idx: int) -> None:
        """E-step, before the first batch of an epoch after the warm-up."""
        if batch_idx == 0 and self.current_epoch >= self.warmup_epochs:
            self._cluster()

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that a batch can hold several clusters."""
        check_batch(self.name, streams, self.head.out_features)

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Start the encoder; give the target network the same weights."""
        streams = self.start(images, upstream, streams)
        self.target_encoder.load_state_dict(self.encoder.state_dict())
        self.train_index = torch.from_numpy(images.train_index)
        # A buffer, so that a run that is resumed inside an epoch keeps its clusters.
        self.register_buffer("clusters", torch.full((len(images),), -1))
        return streams

    def start_of_kmeans(self) -> Tensor | None:
        """Return clusters (n,) that k-means starts from; None for random centres, and restarts."""
        return None

    def start(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Start the encoder, here from random weights and a stem that is fitted to the images."""
        return super().prepare(images, upstream, streams)

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the target's encoder, and the head of the last k-means."""
        return {"encoder": self.target_encoder, "head": self.head}

    def predict(self, batch: Views) -> Prediction:
        """Return features of the target network and, after the warm-up, probabilities."""
        features = self.target_encoder(batch.views["plain"]).float()
        clustered = self.trainer.predicting or self.current_epoch >= self.warmup_epochs
        return Prediction(batch.index, features, self.head(features) if clustered else None)

    def on_fit_start(self) -> None:
        """Pair the networks from scratch, now that they are on their device."""
        self._ema = None

    def on_predict_start(self) -> None:
        """Cluster the features that are handed on."""
        self._cluster()

    @torch.no_grad()
    def _cluster(self) -> None:
        """Run k-means on the target's features of plain training images; set clusters and head."""
        training = self.target_encoder.training
        self.target_encoder.eval()
        features = self.plain_features(self.target_encoder, self.train_index)  # (n, D)
        self.target_encoder.train(training)
        generator = keyed_generator(self.seed, self.current_epoch)
        found, centres = cosine_kmeans(
            features, self.head.out_features, generator=generator, start=self.start_of_kmeans()
        )
        weight = centres / (HEAD_TEMPERATURE * features.norm(dim=1).mean())
        self.head.weight.copy_(self.gathered(weight[None])[0].view_as(weight))
        self.head.bias.zero_()
        self.clusters[to_device(self.train_index, self.device)] = found
        self.share_buffers()

    def _on_clusters(
        self, projected: Tensor, target: Tensor, index: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Return weights and values of the losses on clusters, the means over both views."""
        parts = (self.joined(each) for each in F.normalize(projected).chunk(2))  # (B, P) each
        others = (self.joined(each) for each in target.chunk(2))
        clusters = self.joined(self.clusters[index])  # (B,)
        found = [
            self.cluster_losses(own, other, clusters)
            for own, other in zip(parts, others, strict=True)
        ]
        return {
            name: (weight, torch.stack([each[name][1] for each in found]).mean())
            for name, (weight, _) in found[0].items()
        }

    def _noise(self, index: Tensor) -> Tensor:
        """Return standard normal numbers (2b, P) for both views, by image and epoch."""
        epoch = torch.full_like(index, self.current_epoch)
        uniform = [
            keyed_uniform(self.seed, epoch, index, NOISE + view, self.projection_dim)
            for view in (0, 1)
        ]
        # 0 has no finite normal number, and neither has 1.
        normal: Tensor = torch.special.ndtri(torch.cat(uniform).clamp_min(2.0**-25))
        return normal
