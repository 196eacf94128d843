"""Stage 1 by averaged targets: several views per image, no negatives, and no second branch.

Pototzky et al. 2022 (FastSiam), after Chen and He 2021 (SimSiam). SPICE uses MoCo; these features
replace those of MoCo.

Shapes: B images of a batch, b of them on this rank, V views, D features, P projection.
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
from spice_pl.functional.averaged import averaged_target_loss
from spice_pl.stages.base import width_of
from spice_pl.stages.features import FeatureStage, Training, perceptron


class FastSiamModule(FeatureStage):
    """Predict the mean projection of the other views of an image from each of its views.

    The stream has as many views as targets are wanted, and one more; with two this is SimSiam.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P.
        hidden_dim: width of the hidden layers of projection and predictor, which have BatchNorm.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`.
        training: as in `FeatureStage`.

    Raises:
        UsageError: as in `FeatureStage`.
    """

    name = "fastsiam"
    against_collapse = "show more views"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 128,
        hidden_dim: int = 512,
        lr: float = 0.1,
        warmup_epochs: int = 2,
        **training: Unpack[Training],
    ) -> None:
        super().__init__(
            backbone,
            perceptron(width_of(backbone), hidden_dim, projection_dim),
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.predictor = perceptron(projection_dim, hidden_dim, projection_dim)

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; the targets get no gradient."""
        views = self.at_size(list(batch.views.values()))
        projected = self.projection(self.encoder(torch.cat(views)))  # (V b, P)
        predicted = self.predictor(projected).float().unflatten(0, (len(views), -1))  # (V, b, P)
        targets = projected.float().view_as(predicted)
        loss = averaged_target_loss(predicted, targets)
        self.record_step(loss, F.normalize(targets[0]), F.normalize(targets[1]))
        return loss

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that there are views to predict, and images that BatchNorm can tell apart."""
        for stream in streams.values():
            if len(stream.views) < 2:
                raise UsageError(
                    f"fastsiam.streams.images.views has {len(stream.views)} view and nothing to "
                    "predict from it; give at least 2, better 4"
                )
            if stream.batch_size < 2:
                raise UsageError(
                    f"fastsiam.streams.images.batch_size {stream.batch_size} is too small: one "
                    "image has nothing to be told apart from; give at least 2"
                )
