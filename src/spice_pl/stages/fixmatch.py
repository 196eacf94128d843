"""Stage 3: encoder and head trained jointly on reliable pseudo-labels.

Niu et al. 2022 (SPICE), Section III-C; Sohn et al. 2020 (FixMatch).

Shapes: n training images, D features, K clusters.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.reliability import (
    Balance,
    agreement_for_count,
    local_consistency,
    select_reliable,
)
from spice_pl.functional.selectors import reliable_labels
from spice_pl.nn.thresholds import FixedThreshold
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.semi import SemiSupervisedModule

logger = logging.getLogger(__name__)

INIT = ("joint", "scratch")


class ReliableFixMatchModule(SemiSupervisedModule):
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
        target_count: reliable images before balancing, at least: `agreement` becomes the largest
            value that as many confident images reach. None keeps `agreement`.
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
        target_count: int | None = None,
        consistency_threshold: float = 0.95,
        unlabeled_weight: float = 1.0,
        ema_decay: float = 0.999,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        if init not in INIT:
            raise UsageError(f"fixmatch.module.init {init!r} is none of {INIT}")
        super().__init__(
            backbone,
            num_clusters,
            selector=reliable_labels,
            threshold=FixedThreshold(consistency_threshold),  # Eq. 8
            init=init,
            hidden_dim=hidden_dim,
            steps_per_epoch=steps_per_epoch,
            unlabeled_weight=unlabeled_weight,
            ema_decay=ema_decay,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            name="fixmatch",
            seed=seed,
        )
        self.num_neighbors, self.agreement, self.confidence = num_neighbors, agreement, confidence
        self.balance: Balance = balance
        self.target_count = target_count

    def _select(self, images: ImageSet, upstream: RunFolder | None) -> Tensor:
        """Find the reliable images of stage 2 (Eqs. 6-7)."""
        features, probs = self._evidence(images, upstream)
        if features is None or probs is None:
            raise UsageError(
                "stage=fixmatch needs an upstream with features and clusters; set "
                "fixmatch.upstream=proto"
            )
        confidence, clusters = probs.max(dim=1)
        neighbors = min(self.num_neighbors, len(features))
        if neighbors < self.num_neighbors:
            logger.info("num_neighbors %d -> %d, all images", self.num_neighbors, neighbors)
        agreement = local_consistency(F.normalize(features), clusters, neighbors)  # Eq. 6
        least = self.agreement
        if self.target_count is not None:
            least = agreement_for_count(agreement, confidence, self.target_count, self.confidence)
            logger.info("agreement ≥ %.4f gives %d reliable images", least, self.target_count)
        reliable = select_reliable(
            agreement,
            confidence,
            clusters,
            agreement=least,
            confidence=self.confidence,
            balance=self.balance,
            generator=keyed_generator(self.seed),
        )  # Eq. 7
        counts = torch.bincount(clusters[reliable], minlength=self.num_clusters)
        agrees, sure = agreement >= least, confidence > self.confidence
        found = (
            f"{int(reliable.sum())} reliable images of {len(features)} "
            f"(agreement ≥ {least}: {int(agrees.sum())}, "
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
        return torch.where(reliable, clusters, -1)
