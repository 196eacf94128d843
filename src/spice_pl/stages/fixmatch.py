"""Stage 3: encoder and head trained jointly on reliable pseudo-labels.

Niu et al. 2022 (SPICE), Section III-C; Sohn et al. 2020 (FixMatch).

Shapes: N images, L labelled and U unlabelled images of a batch, D features, K clusters.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.artifacts import RunFolder, as_tensor
from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.losses import consistency_cross_entropy
from spice_pl.functional.momentum import ema_update_
from spice_pl.functional.reliability import Balance, local_consistency, select_reliable
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.stages.base import Prediction, Stage

logger = logging.getLogger(__name__)

INIT = ("joint", "scratch")


class ReliableFixMatchModule(Stage):
    """FixMatch whose labelled images are the reliable ones of stage 2 (Eq. 9).

    Reliable images keep their label; all images must be clustered alike under weak and strong
    views. The result is the exponential moving average of the weights at the last step.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        init: "joint" goes on from encoder and best head of stage 2 (the paper); "scratch" trains
            a fresh encoder with a linear head, only the labels carry over (the authors' code).
        hidden_dim: width of the head's hidden layer in stage 2; None means D.
        steps_per_epoch: optimizer steps between checkpoints.
        num_neighbors: N_s in Eq. 6, the image itself counted.
        agreement: lambda in Eq. 7, share of neighbours in the same cluster, at least.
        confidence: largest probability of a reliable image, more than.
        balance: "min", "cap" or "none"; how many reliable images a cluster keeps.
        consistency_threshold: eta in Eq. 8.
        unlabeled_weight: lambda_u in Eq. 9.
        ema_decay: of the moving average.
        lr: of SGD with Nesterov momentum at the start; lr·cos(7πt/16T) at step t of T.
        momentum: of SGD.
        weight_decay: of SGD, none on one-dimensional parameters.
        seed: of the draw of reliable images where `balance` keeps some of a cluster.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        init: str = "joint",
        hidden_dim: int | None = None,
        steps_per_epoch: int = 1024,
        num_neighbors: int = 100,
        agreement: float = 0.95,
        confidence: float = 0.99,
        balance: Balance = "min",
        consistency_threshold: float = 0.95,
        unlabeled_weight: float = 1.0,
        ema_decay: float = 0.999,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if init not in INIT:
            raise UsageError(f"fixmatch.module.init {init!r} is none of {INIT}")
        width = int(backbone.num_features)  # type: ignore[arg-type]
        head = (
            ClusterHead(width, hidden_dim or width, num_clusters)
            if init == "joint"
            else LinearHead(width, num_clusters)
        )
        self.encoder, self.head = backbone, head
        self.ema_encoder = copy.deepcopy(backbone).requires_grad_(False)
        self.ema_head = copy.deepcopy(head).requires_grad_(False)
        self.init, self.steps_per_epoch, self.num_clusters = init, steps_per_epoch, num_clusters
        self.num_neighbors, self.agreement, self.confidence = num_neighbors, agreement, confidence
        self.balance: Balance = balance
        self.consistency_threshold = consistency_threshold
        self.unlabeled_weight, self.ema_decay = unlabeled_weight, ema_decay
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        """Return the averaged model's probabilities (B, K)."""
        probs: Tensor = self.ema_head(self.ema_encoder(images).float())
        return probs

    def training_step(self, batch: dict[str, Views], batch_idx: int) -> Tensor:
        """Return the joint loss (Eq. 9): one forward of all views together."""
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        num_labelled, num_unlabelled = len(labelled.index), len(unlabelled.index)
        images = torch.cat(
            [labelled.views["weak"], unlabelled.views["weak"], unlabelled.views["strong"]]
        )  # (L + 2U, 3, S, S)
        logits = self.head.logits(self.encoder(images)).float()
        on_labelled, on_weak, on_strong = torch.split(
            logits, [num_labelled, num_unlabelled, num_unlabelled]
        )
        label = self.pseudo_labels[labelled.index]
        supervised = F.cross_entropy(on_labelled, label)
        consistency, confident = consistency_cross_entropy(
            on_strong, on_weak.detach().softmax(dim=1), self.consistency_threshold
        )  # Eq. 8
        loss = supervised + self.unlabeled_weight * consistency
        for name, value in (
            ("loss", loss),
            ("loss_labelled", supervised),
            ("loss_unlabelled", consistency),
            ("confident_fraction", confident.float().mean()),
        ):
            self.record(f"train/{name}", value)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with Nesterov momentum and FixMatch's cosine per step."""
        trained = [*self.encoder.parameters(), *self.head.parameters()]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, nesterov=True, foreach=True
        )
        steps = (self.trainer.max_epochs or 1) * self.steps_per_epoch  # T
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: math.cos(7 * math.pi * step / (16 * steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Find the reliable images of stage 2 (Eqs. 6-7) and, with init=joint, load its weights."""
        if upstream is None:
            raise UsageError("stage=fixmatch needs an upstream stage; set fixmatch.upstream=proto")
        if self.init == "joint":
            upstream.load_weights("encoder.safetensors", self.encoder)
            upstream.load_weights("head.safetensors", self.head)
        for average, model in ((self.ema_encoder, self.encoder), (self.ema_head, self.head)):
            average.load_state_dict(model.state_dict())
        train_index = torch.from_numpy(images.train_index)
        probs = as_tensor(upstream.probs)[train_index]  # (n, K)
        features = as_tensor(upstream.features)[train_index]  # (n, D)
        reliable = self._reliable(features, probs)  # (n,)
        self.reliable_index = train_index[reliable]
        self.pseudo_labels = torch.full((len(images),), -1)  # (N,), -1 where unreliable
        self.pseudo_labels[self.reliable_index] = probs[reliable].argmax(dim=1)
        return {
            name: replace(
                stream,
                num_samples=self.steps_per_epoch * stream.batch_size,
                subset=self.reliable_index if name == "labelled" else None,
            )
            for name, stream in streams.items()
        }

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the averaged encoder and head."""
        return {"encoder": self.ema_encoder, "head": self.ema_head}

    def predict(self, batch: Views) -> Prediction:
        """Return features and probabilities of the averaged model."""
        features = self.ema_encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, self.ema_head(features).float())

    def on_fit_start(self) -> None:
        """Put the labels where the images will be."""
        self.pseudo_labels = self.pseudo_labels.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Keep the averaged model in eval mode; log how many labels it learns from."""
        self.ema_encoder.eval()
        self.ema_head.eval()
        fraction = len(self.reliable_index) / len(self.pseudo_labels)
        self.record("train/reliable_fraction", fraction)

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the average after the optimizer's step."""
        ema_update_(self.ema_encoder, self.encoder, self.ema_decay)
        ema_update_(self.ema_head, self.head, self.ema_decay)

    def _reliable(self, features: Tensor, probs: Tensor) -> Tensor:
        confidence, clusters = probs.max(dim=1)
        neighbors = min(self.num_neighbors, len(features))
        if neighbors < self.num_neighbors:
            logger.info("num_neighbors %d -> %d, all images", self.num_neighbors, neighbors)
        agreement = local_consistency(F.normalize(features), clusters, neighbors)  # Eq. 6
        reliable = select_reliable(
            agreement,
            confidence,
            clusters,
            agreement=self.agreement,
            confidence=self.confidence,
            balance=self.balance,
            generator=keyed_generator(self.seed),
        )  # Eq. 7
        counts = torch.bincount(clusters[reliable], minlength=self.num_clusters)
        agrees, sure = agreement >= self.agreement, confidence > self.confidence
        found = (
            f"{int(reliable.sum())} reliable images of {len(features)} "
            f"(agreement ≥ {self.agreement}: {int(agrees.sum())}, "
            f"confidence > {self.confidence}: {int(sure.sum())}, "
            f"both: {int((agrees & sure).sum())}; per cluster {counts.tolist()})"
        )
        if not reliable.any():
            raise UsageError(
                f"{found}; stage 3 has nothing to learn from: lower fixmatch.module.agreement or "
                "fixmatch.module.confidence, or train stage 2 longer (proto.epochs)"
            )
        logger.info(found)
        without = (counts == 0).nonzero()[:, 0].tolist()
        if without:
            logger.warning("clusters %s have no reliable image and start without a label", without)
        return reliable
