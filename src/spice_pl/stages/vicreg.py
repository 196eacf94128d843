"""Stage 1 by variance, invariance and covariance: no negatives, and no second branch.

Bardes et al. 2022 (VICReg). SPICE uses MoCo; these features replace those of MoCo.

Shapes: B images of a batch, b of them on this rank, D features, P projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.covariance import vicreg_loss
from spice_pl.stages.base import check_number, width_of
from spice_pl.stages.features import FeatureStage, Training, perceptron


class VICRegModule(FeatureStage):
    """Pull two views of each image together; keep the components spread and uncorrelated.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P.
        hidden_dim: width of the hidden layer of the projection, which has BatchNorm.
        invariance_weight: λ in Eq. 6, weight of the squared distance of two views.
        variance_weight: μ in Eq. 6, weight of the hinge on the deviation of each component.
        covariance_weight: ν in Eq. 6, weight of the squared covariances.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`.
        training: as in `FeatureStage`.

    Raises:
        UsageError: a weight is not positive, or as in `FeatureStage`.
    """

    name = "vicreg"
    against_collapse = "raise variance_weight"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 512,
        hidden_dim: int = 512,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        lr: float = 0.02,
        warmup_epochs: int = 2,
        **training: Unpack[Training],
    ) -> None:
        loss_weights = {
            "invariance_weight": invariance_weight,
            "variance_weight": variance_weight,
            "covariance_weight": covariance_weight,
        }
        for key, value in loss_weights.items():
            rule = "positive; VICReg uses 25, 25 and 1 for invariance, variance and covariance"
            check_number(self.name, key, value, value > 0, rule)
        super().__init__(
            backbone,
            perceptron(width_of(backbone), hidden_dim, projection_dim),
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.loss_weights = loss_weights

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; both views get a gradient."""
        features = self.encoder(torch.cat(self.pair(batch)))  # (2b, D)
        first, second = self.projection(features).float().chunk(2)  # (b, P) each
        # Every rank computes the loss of the global batch.
        loss = vicreg_loss(self.joined(first), self.joined(second), **self.loss_weights)
        self.record_step(loss, F.normalize(first), F.normalize(second))
        return loss

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that a batch has a covariance."""
        for stream in streams.values():
            if stream.batch_size < 2:
                raise UsageError(
                    f"vicreg.streams.images.batch_size {stream.batch_size} is too small: one image "
                    "has no covariance; give at least 2, better as many as projection_dim"
                )
