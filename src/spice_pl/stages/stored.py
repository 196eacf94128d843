"""The base of stages that train heads on the stored features of an upstream stage, and no more.

Shapes: N images, n of them for training, B images of a step, H heads, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.runs.evidence import check_features
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Prediction, Stage, check_number, width_of


class Sizes(TypedDict):
    """Settings that subclasses pass on as they are; `StoredFeaturesStage` explains them."""

    num_heads: int
    batch_size: int
    steps_per_epoch: int
    seed: int


class StoredFeaturesStage(Stage):
    """Train heads on features that the upstream stage stored; its encoder stays as it is.

    No view passes the encoder. An epoch is one batch of the data module, whose images are not read:
    the stage draws its own batches of features. Every rank takes the same steps.

    A subclass sets `selected` and defines `train_epoch`, `clusters_of_heads`, `state_of_head` and
    `configure_optimizers`.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        num_heads: H.
        batch_size: B, images of an optimizer step, drawn with replacement.
        steps_per_epoch: optimizer steps of an epoch.
        seed: seed of the run.

    Raises:
        UsageError: a number is less than 1.
    """

    selected: nn.Module  # chosen head, which reads raw features
    mean: Tensor  # (D,) of the training features
    kept: Tensor  # number of the chosen head
    scale: Tensor  # (), root mean square of the centred training features

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        num_heads: int,
        batch_size: int,
        steps_per_epoch: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = backbone.requires_grad_(False)
        self.num_clusters, self.num_heads = num_clusters, num_heads
        self.batch_size, self.steps_per_epoch, self.seed = batch_size, steps_per_epoch, seed
        for key in ("num_heads", "batch_size", "steps_per_epoch"):
            self.check_number(key, getattr(self, key) >= 1, "at least 1")
        self.register_buffer("mean", torch.zeros(width_of(backbone)))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("kept", torch.tensor(0))

    def train_epoch(self, drawn: Tensor) -> Tensor:
        """Take one step for each row of `drawn`; return the mean loss (H,) of each head.

        Args:
            drawn: (steps, B), positions among the training images.
        """
        raise NotImplementedError

    def costs(self, losses: Tensor) -> Tensor:
        """Return costs (H,), which choose the head, without labels: here the losses."""
        return losses

    def clusters_of_heads(self, index: Tensor) -> Tensor:
        """Return the clusters (H, b) of images (b,) by every head."""
        raise NotImplementedError

    def state_of_head(self, head: int) -> Mapping[str, Tensor]:
        """Return the state of `selected` that computes what a head does, from raw features."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of images (B, 3, S, S) by the chosen head."""
        probs: Tensor = self.selected(self.encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Train for one epoch; choose the head of the lowest cost, without labels."""
        generator = keyed_generator(self.seed, self.current_epoch)
        size = (self.steps_per_epoch, self.batch_size)
        drawn = torch.randint(len(self.train_index), size, generator=generator)
        losses = self.train_epoch(drawn.to(self.device))  # (H,)
        costs = self.costs(losses)  # (H,)
        self.chosen_head = int(costs.argmin())
        self.kept.fill_(self.chosen_head)
        self.selected.load_state_dict(self.state_of_head(self.chosen_head))
        self.record("train/loss", losses.mean())
        for head in range(self.num_heads):
            self.record(f"train/loss_head_{head}", losses[head])
            self.record(f"val/selection_loss_head_{head}", costs[head])
        self.record("val/best_selection_loss", costs[self.chosen_head])
        return losses.mean()

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Watch the chosen head; add the clusters of all heads."""
        prediction: Prediction = super().validation_step(batch, batch_idx)
        return replace(prediction, head_clusters=self.clusters_of_heads(batch.index))

    def check_number(self, key: str, fits: bool, rule: str) -> None:
        """Check a number of the settings that is also an attribute, as `base.check_number` does."""
        check_number(self.name, key, getattr(self, key), fits, rule)

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load encoder and features of the upstream stage."""
        self.check(images, streams)
        if upstream is None:
            raise UsageError(
                f"stage={self.name} needs an upstream stage; set {self.name}.upstream=moco"
            )
        upstream.load_weights("encoder.safetensors", self.encoder)
        check_features(upstream.features, len(images), f"{upstream.path}/features.npy")
        self.features = as_tensor(upstream.features)  # (N, D), memory-mapped
        self.train_index = torch.from_numpy(images.train_index)
        mean, scale = moments(self.features[self.train_index], f"{upstream.path}/features.npy")
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.prepare_heads(images, upstream)
        return {"images": Stream({}, batch_size=1, num_samples=1, drop_last=False)}

    def prepare_heads(self, images: ImageSet, upstream: RunFolder) -> None:
        """Load what else the heads need from the upstream stage."""

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the encoder and the chosen head."""
        return {"encoder": self.encoder, "head": self.selected}

    def predict(self, batch: Views) -> Prediction:
        """Return stored features, and probabilities of the chosen head."""
        features = self.features[batch.index.cpu()].to(self.device)
        return Prediction(batch.index, features, self.selected(features))

    def on_fit_start(self) -> None:
        """Standardise the features (N, D) on the device of the heads."""
        self.inputs = (self.features.to(self.device) - self.mean) / self.scale

    def on_train_epoch_start(self) -> None:
        """Put the encoder, whose weights no longer change, in eval mode."""
        self.encoder.eval()


def moments(features: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of features (n, D), and the root mean square () around it.

    Args:
        features: (n, D).
        where: name of the features, for the message.

    Raises:
        UsageError: all features are equal.
    """
    mean = features.mean(dim=0)
    scale = (features - mean).square().mean().sqrt()
    if not scale > 0:
        raise UsageError(
            f"{where} holds the same feature for every image, so they cannot be told apart; make "
            "it again with another seed or a lower lr"
        )
    return mean, scale
