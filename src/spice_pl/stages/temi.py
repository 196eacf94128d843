"""TEMI: heads that put neighbours into one cluster, by weighted pointwise mutual information.

Adaloglou et al. 2023, "Exploring the Limits of Deep Image Clustering using Pretrained Models".

Shapes: N images, n of them for training, B pairs of a step, H heads, D features, K clusters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.momentum import ema_update_
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.functional.reliability import neighbors_for
from spice_pl.functional.temi import temi_loss
from spice_pl.nn.heads import ParallelHeads
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import width_of
from spice_pl.stages.stored import Sizes, StoredFeaturesStage

PARTNERS = 1  # key of the draw of partners


class TemiModule(StoredFeaturesStage):
    """Train H heads at once on pairs of neighbours; keep the one of the lowest loss.

    Each head is a student with a teacher, its moving average. The kept head is a teacher.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        hidden_dim: width of a head's hidden layer.
        num_neighbors: nearest images from which the partner of an image is drawn, without the
            image itself.
        beta: β, exponent of the pointwise mutual information.
        teacher_momentum: share of the teacher that stays at each step.
        share_momentum: share of the teacher's mean prediction that stays at each step.
        lr: learning rate of AdamW, constant.
        weight_decay: weight decay of AdamW.
        sizes: as in `StoredFeaturesStage`; B are pairs, and head h starts from 1000 · seed + h.
    """

    name = "temi"
    shares: Tensor  # (H, K)

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        hidden_dim: int = 128,
        num_neighbors: int = 25,
        beta: float = 0.6,
        teacher_momentum: float = 0.92,
        share_momentum: float = 0.9,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        **sizes: Unpack[Sizes],
    ) -> None:
        super().__init__(backbone, num_clusters, **sizes)
        shape = (width_of(backbone), hidden_dim, num_clusters, self.num_heads)
        self.students = ParallelHeads(*shape, 1000 * self.seed)
        self.teachers = copy.deepcopy(self.students).requires_grad_(False)
        self.selected = self.teachers.head(0).requires_grad_(False)
        self.register_buffer("shares", torch.full((self.num_heads, num_clusters), 1 / num_clusters))
        self.num_neighbors, self.beta = num_neighbors, beta
        self.teacher_momentum, self.share_momentum = teacher_momentum, share_momentum
        self.lr, self.weight_decay = lr, weight_decay

    def train_epoch(self, drawn: Tensor) -> Tensor:
        """Take one step for each row of `drawn` (steps, B); return the mean losses (H,)."""
        generator = keyed_generator(self.seed, self.current_epoch, PARTNERS)
        column = torch.randint(self.partners.shape[1], drawn.shape, generator=generator)
        partner = self.partners[drawn, column.to(drawn.device)]  # (steps, B)
        pairs = self.train_index.to(self.device)[torch.cat([drawn, partner], dim=1)]
        return torch.stack([self._step(pair) for pair in pairs]).mean(dim=0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW at a constant rate for all students."""
        return torch.optim.AdamW(
            self.students.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check the numbers of the method, and that there are as many neighbours as asked for."""
        super().check(images, streams)
        num_train = len(images.train_index)
        if not 1 <= self.num_neighbors < num_train:
            raise UsageError(
                f"{self.name}.module.num_neighbors {self.num_neighbors} is not between 1 and "
                f"{num_train - 1}, the other images of {num_train}; lower it or give more images"
            )
        self.check_number("beta", 0 < self.beta <= 1, "above 0 and at most 1; the paper has 0.6")
        for key in ("teacher_momentum", "share_momentum"):
            self.check_number(key, 0 <= getattr(self, key) < 1, "from 0 up to, but not, 1")

    def prepare_heads(self, images: ImageSet, upstream: RunFolder) -> None:
        """Find the neighbours of each training image."""
        embeddings = upstream.embeddings(images.train_index)[self.train_index]  # (n, d)
        num_others = self._num_others(len(embeddings))
        _, nearest = nearest_neighbors(embeddings, embeddings, num_others + 1)
        self.partners = nearest[:, 1:]  # (n, P), positions among the training images

    def clusters_of_heads(self, index: Tensor) -> Tensor:
        """Return the clusters (H, b) of images (b,) by every teacher."""
        return self.teachers.logits(self.inputs[index]).argmax(dim=-1)

    def state_of_head(self, head: int) -> Mapping[str, Tensor]:
        """Return a teacher that reads raw features: its first layer standardises them."""
        state = self.teachers.head(head).state_dict()
        weight = state["hidden.weight"] / self.scale
        return {
            "hidden.weight": weight,
            "hidden.bias": state["hidden.bias"] - weight @ self.mean,
            "output.weight": state["output.weight"],
            "output.bias": state["output.bias"],
        }

    def on_fit_start(self) -> None:
        """Move features and neighbours to the device of the heads."""
        super().on_fit_start()
        self.partners = self.partners.to(self.device)

    def _step(self, pairs: Tensor) -> Tensor:
        """Take one step on pairs (2B,), all images first and then their partners."""
        inputs = self.inputs[pairs]
        with torch.no_grad():
            teacher = self._log_probs(self.teachers, inputs)  # (2, H, B, K)
            # Share of each cluster, a moving average of the teacher's mean prediction.
            found = teacher.exp().mean(dim=(0, 2))  # (H, K)
            self.shares.lerp_(found, 1 - self.share_momentum)
        losses = temi_loss(self._log_probs(self.students, inputs), teacher, self.shares, self.beta)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(losses.sum())  # each head learns as if it were the only one
        optimizer.step()  # type: ignore[union-attr]
        ema_update_(self.teachers, self.students, self.teacher_momentum)
        return losses.detach()

    def _log_probs(self, heads: ParallelHeads, inputs: Tensor) -> Tensor:
        """Return log-probabilities (2, H, B, K) of inputs (2B, D)."""
        log_probs = heads.logits(inputs).log_softmax(dim=-1)  # (H, 2B, K)
        return torch.stack(log_probs.chunk(2, dim=1))

    def _num_others(self, num_train: int) -> int:
        """Return how many neighbours may be partners: in small clusters fewer than asked for."""
        return max(1, neighbors_for(self.num_neighbors + 1, num_train, self.num_clusters) - 1)
