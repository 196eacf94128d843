"""Stage 1 without training: the features of a pretrained encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.models.interop import load_backbone_weights
from spice_pl.nn.frozen import Frozen
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage

logger = logging.getLogger(__name__)


class EmbedModule(Stage):
    """Embed every image once, for a stage 2 with `proto.upstream=embed`.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        weights: local file of its weights, .safetensors or .pth; None keeps those it was built
            with.
        partial: whether a file may fit in part; then only that part is loaded.
    """

    has_clusters = False

    def __init__(
        self, backbone: nn.Module, *, weights: str | None = None, partial: bool = False
    ) -> None:
        super().__init__()
        self.encoder = backbone.requires_grad_(False)
        self.file, self.partial = weights, partial

    @cached_property
    def frozen(self) -> Frozen:
        """A fast copy of the encoder, made at its first use, which is after `prepare`."""
        return Frozen(self.encoder)

    def forward(self, images: Tensor) -> Tensor:
        """Return raw features (B, D)."""
        features: Tensor = self.encoder(images)
        return features

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that the file exists and that the network takes images of this size."""
        if self.file is not None and not Path(self.file).expanduser().is_file():
            raise UsageError(
                f"embed.module.weights={self.file} is not a file; give a .safetensors or .pth "
                "file, or null for the weights that the backbone was built with"
            )
        pixels, width = images.images.shape[-1], self.feature_dim
        try:
            with torch.no_grad():
                shape = tuple(self.encoder.eval()(torch.zeros(1, 3, pixels, pixels)).shape)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"the backbone does not take images of {pixels} pixels "
                f"({str(error).splitlines()[0]}); set dataset.image_size to the size that it takes"
            ) from error
        if shape != (1, width):
            raise UsageError(
                f"the backbone gives {shape} for one image and its num_features is {width}; it "
                "must give (1, num_features), as networks of timm do with num_classes=0"
            )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load the weights."""
        if self.file is None:
            logger.info("the encoder has the weights that it comes with")
        else:
            logger.info(load_backbone_weights(self.encoder, self.file, partial=self.partial))
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the encoder, which stage 2 reads."""
        return {"encoder": self.encoder}

    def predict(self, batch: Views) -> Prediction:
        """Return raw features of the plain view."""
        return Prediction(batch.index, self.frozen(batch.views["plain"]).float(), None)
