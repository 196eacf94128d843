"""ProPos: scattered prototypes and aligned neighbours, with k-means in every epoch.

Huang et al. 2022, "Learning Representation for Clustering via Prototype Scattering and Positive
Sampling". ClusMatch continues from it.

Shapes: B images of a batch, D features, P projection, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor, nn

from spice_pl.functional.scattering import scattering_loss
from spice_pl.stages.base import check_number, width_of
from spice_pl.stages.features import perceptron
from spice_pl.stages.target import TargetStage, TargetTraining


class ProPosModule(TargetStage):
    """Align each image with a neighbour of its other view, and keep clusters apart.

    The loss on clusters contrasts the prototypes of a batch with each other.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        projection_dim: P.
        hidden_dim: width of the hidden layers of projection and predictor, which have BatchNorm.
        temperature: τ of the prototypes.
        scattering_weight: λ, weight of the loss on prototypes.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`; there is no loss on prototypes in these epochs.
        training: as in `TargetStage`.

    Raises:
        UsageError: a number is out of range.
    """

    name = "propos"

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        temperature: float = 0.5,
        scattering_weight: float = 0.1,
        lr: float = 0.05,
        warmup_epochs: int = 50,
        **training: Unpack[TargetTraining],
    ) -> None:
        fits, rule = temperature > 0, "above 0; the paper has 0.5"
        check_number(self.name, "temperature", temperature, fits, rule)
        fits, rule = scattering_weight >= 0, "at least 0; the paper has 0.1"
        check_number(self.name, "scattering_weight", scattering_weight, fits, rule)
        super().__init__(
            backbone,
            perceptron(width_of(backbone), hidden_dim, projection_dim),
            num_clusters,
            projection_dim=projection_dim,
            hidden_dim=hidden_dim,
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.temperature, self.scattering_weight = temperature, scattering_weight

    def cluster_losses(
        self, online: Tensor, target: Tensor, clusters: Tensor
    ) -> Mapping[str, tuple[float, Tensor]]:
        """Return the loss that contrasts the prototypes of a batch."""
        loss = scattering_loss(online, target, clusters, self.head.out_features, self.temperature)
        return {"scattering": (self.scattering_weight, loss)}
