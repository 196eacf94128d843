"""Stage 1 by contrast within the batch, for runs too short to renew MoCo's queue of keys.

Chen et al. 2020 (SimCLR). SPICE uses MoCo; these features replace those of MoCo.

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
from spice_pl.functional.contrastive import nt_xent
from spice_pl.stages.base import check_number, width_of
from spice_pl.stages.features import FeatureStage, Training, perceptron


class SimCLRModule(FeatureStage):
    """Contrast two views of each image with the views of all other images of the batch.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P.
        hidden_dim: width of the hidden layer of the projection, which has BatchNorm.
        temperature: tau in Eq. 1.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`.
        training: as in `FeatureStage`.
    """

    name = "simclr"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 128,
        hidden_dim: int = 512,
        temperature: float = 0.2,
        lr: float = 0.3,
        warmup_epochs: int = 2,
        **training: Unpack[Training],
    ) -> None:
        rule = "positive; our default is 0.2"
        check_number(self.name, "temperature", temperature, temperature > 0, rule)
        super().__init__(
            backbone,
            perceptron(width_of(backbone), hidden_dim, projection_dim),
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.temperature = temperature

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; both views get a gradient."""
        features = self.encoder(torch.cat(self.pair(batch)))  # (2b, D)
        query, key = F.normalize(self.projection(features).float()).chunk(2)  # (b, P) each
        # Every rank computes the loss of the global batch.
        loss = nt_xent(self.joined(query), self.joined(key), self.temperature)
        self.record_step(loss, query, key)
        return loss

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that a batch has negatives."""
        for stream in streams.values():
            if stream.batch_size < 2:
                raise UsageError(
                    f"simclr.streams.images.batch_size {stream.batch_size} leaves no negatives for "
                    "an image; give at least 2"
                )
