"""TURTLE: search for labels that linear classifiers can learn, in one feature space or in several.

Gadetsky et al. 2024, "Let Go of Your Labels with Unsupervised Transfer".

Shapes: N images, n of them for training, B images of a step, H labelings, S feature spaces,
D features, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.functional.turtle import generalization_scores, soft_cross_entropy, turtle_loss
from spice_pl.nn.heads import LinearHead
from spice_pl.runs.evidence import check_features, read_array
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Prediction, width_of
from spice_pl.stages.stored import Sizes, StoredFeaturesStage, moments

NUM_SCORED = 5000  # evenly spaced training images that the generalization score is computed on


class TurtleModule(StoredFeaturesStage):
    """Search for H labelings at once; keep the one whose labels generalise best.

    A labeling τ is the mean over feature spaces of a linear-softmax map of each. In each space a
    linear classifier learns its labels. The labels are moved towards what these classifiers
    predict. With one space the head handed on is τ itself. With several it is the classifier of
    the upstream's space, which new images need no other network for, while images at hand get τ.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        features_files: features (N, D) of the same images from elsewhere: .npy, .safetensors or
            .csv; each is one more feature space, as is each further stage that `upstream` names.
        gamma: γ, weight of the entropy of the mean label.
        inner_steps: steps of the classifiers per step of the labels; they continue from where they
            were (warm start).
        lr: learning rate of both Adam optimizers, constant.
        sizes: as in `StoredFeaturesStage`; H are labelings, and a step is one of the labels.
    """

    name = "turtle"
    reads_many = True
    labelings: LinearMaps  # θ; made in `prepare`, where the widths of all spaces are known
    classifiers: LinearMaps  # w

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        features_files: Sequence[str] = (),
        gamma: float = 10.0,
        inner_steps: int = 10,
        lr: float = 1e-3,
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__(backbone, num_clusters, **sizes)
        self.features_files, self.more_features = list(features_files), list[Tensor]()
        self.gamma, self.inner_steps, self.lr = gamma, inner_steps, lr
        self.selected = LinearHead(width_of(backbone), num_clusters).requires_grad_(False)

    def train_epoch(self, drawn: Tensor) -> Tensor:
        """Take one step for each row of `drawn` (steps, B); return the mean objectives (H,)."""
        index = self.train_index.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return torch.stack([self._step(index[rows]) for rows in drawn]).mean(dim=0)

    def costs(self, losses: Tensor) -> Tensor:
        """Return 1 − generalization score of each labeling, plus 1 for each empty cluster.

        The score is the mean over spaces. Alone it would reward empty clusters: fewer clusters are
        easier to learn.
        """
        some = self.train_index.to(self.device)
        some = some[:: math.ceil(len(some) / NUM_SCORED)]
        clusters = self.clusters_of_heads(some)  # (H, n)
        scores = [
            generalization_scores(space[some], clusters, self.num_clusters) for space in self.spaces
        ]
        sizes = F.one_hot(clusters, self.num_clusters).sum(dim=1)  # (H, K)
        costs = 1 - torch.stack(scores).mean(dim=0) + (sizes == 0).sum(dim=1)
        return costs.float()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam at a constant rate for the labels, and another one for the classifiers."""
        parts = (self.labelings, self.classifiers)
        return [torch.optim.Adam(part.parameters(), lr=self.lr, fused=True) for part in parts]

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check the numbers of the method, and the files of further feature spaces."""
        super().check(images, streams)
        self.check_number("gamma", self.gamma >= 0, "at least 0; the paper has 10")
        self.check_number("inner_steps", self.inner_steps >= 1, "at least 1")
        self._read(images)

    def prepare_heads(self, images: ImageSet, upstream: RunFolder) -> None:
        """Read further feature spaces; make the maps of each space."""
        for folder in self.more_upstream:
            check_features(folder.features, len(images), f"{folder.path}/features.npy")
            self.more_features.append(as_tensor(folder.features))
        self.more_features += self._read(images)
        widths = [features.shape[1] for features in (self.features, *self.more_features)]
        generator = keyed_generator(self.seed)
        self.labelings, self.classifiers = (
            LinearMaps(self.num_heads, widths, self.num_clusters, generator) for _ in range(2)
        )

    def clusters_of_heads(self, index: Tensor) -> Tensor:
        """Return the clusters (H, b) of images (b,) by every labeling."""
        return self._labels(index).argmax(dim=-1)

    def state_of_head(self, head: int) -> Mapping[str, Tensor]:
        """Return a labeling, or its classifier, that reads raw features: it standardises them."""
        maps = self.classifiers if self.more_features else self.labelings
        weight = maps.weights[0][head] / self.scale  # (K, D)
        return {"weight": weight, "bias": maps.biases[0][head] - weight @ self.mean}

    def predict(self, batch: Views) -> Prediction:
        """Return stored features, and the labels τ of the kept labeling."""
        prediction = super().predict(batch)
        if not self.more_features:
            return prediction
        return replace(prediction, probs=self._labels(batch.index)[int(self.kept)])

    def on_fit_start(self) -> None:
        """Move the features of all spaces to the device of the heads."""
        super().on_fit_start()
        self.spaces = [self.inputs]
        for features in self.more_features:
            mean, scale = moments(features[self.train_index], "a further feature space")
            self.spaces.append(((features - mean) / scale).to(self.device))

    def _step(self, index: Tensor) -> Tensor:
        """Take one step of the labels, and `inner_steps` of the classifiers before it."""
        outer, inner = (each for each in self.optimizers())  # type: ignore[union-attr]
        inputs = [space[index] for space in self.spaces]
        labels = self._labels_of(inputs)  # (H, B, K)
        # Inner problem: classifiers learn the labels, from where they were.
        for _ in range(self.inner_steps):
            fit = soft_cross_entropy(self.classifiers(inputs), labels.detach()).sum()
            _take_step(inner, self.classifiers, fit)
        # Outer problem: labels move towards what the classifiers predict.
        losses = turtle_loss(self.classifiers(inputs).detach(), labels, self.gamma)  # (H,)
        _take_step(outer, self.labelings, losses.sum())  # each learns as if it were the only one
        return losses.detach()

    def _labels_of(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return labels τ (H, B, K): the mean over spaces of softmax(θ_k φ_k(x))."""
        logits: Tensor = self.labelings(inputs)  # (S, H, B, K)
        return logits.softmax(dim=-1).mean(dim=0)

    def _labels(self, index: Tensor) -> Tensor:
        """Return labels (H, b, K) of images (b,), without gradient."""
        with torch.no_grad():
            return self._labels_of([space[index] for space in self.spaces])

    def _read(self, images: ImageSet) -> list[Tensor]:
        """Read the further feature spaces, (N, D) each.

        Raises:
            UsageError: a file is missing or does not fit the data set.
        """
        found = []
        for file in self.features_files:
            features = read_array(file, images.keys, images.fingerprint)
            check_features(features, len(images), file)
            found.append(as_tensor(features))
        return found


class LinearMaps(nn.Module):
    """H linear maps in each of S feature spaces.

    Args:
        num_maps: H.
        widths: D of each space.
        num_clusters: K.
        generator: generator of the initial weights, uniform in ±1/√D; biases start at 0.
    """

    def __init__(
        self, num_maps: int, widths: Sequence[int], num_clusters: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for width in widths:
            uniform = torch.rand(num_maps, num_clusters, width, generator=generator)
            self.weights.append((2 * uniform - 1) / math.sqrt(width))
            self.biases.append(torch.zeros(num_maps, num_clusters))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return logits (S, H, B, K) of inputs (B, D) in each space."""
        parts = zip(inputs, self.weights, self.biases, strict=True)
        return torch.stack([each @ weight.mT + bias[:, None] for each, weight, bias in parts])


def _take_step(
    optimizer: LightningOptimizer | torch.optim.Optimizer, maps: LinearMaps, loss: Tensor
) -> None:
    """Take one step of some maps alone.

    Gradients are not averaged over ranks: every rank has the same ones.
    """
    parameters = list(maps.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # Fused Adam on a CPU pairs the values of both in memory, whatever their strides are.
        parameter.grad = gradient.contiguous()
    optimizer.step()
