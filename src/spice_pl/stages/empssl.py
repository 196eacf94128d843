"""Stage 1 by many patches per image and no negatives, for runs of few epochs.

Tong et al. 2023 (EMP-SSL). SPICE uses MoCo; these features replace those of MoCo.

Shapes: B images of a batch, b of them on this rank, n patches per image, D features, P projection,
s side of a patch in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Unpack, cast

from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.crop_views import PatchView
from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.coding_rate import multi_patch_loss
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import check_number, width_of
from spice_pl.stages.features import FeatureStage, Training, perceptron


class EmpSSLModule(FeatureStage):
    """Pull the patches of each image to their mean; spread the images by their coding rate.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        projection_dim: P.
        hidden_dim: width of the hidden layer of the projection, which has BatchNorm.
        rate_weight: weight of the coding rate beside the cosines; 1/λ of the paper.
        distortion: ε², squared error that the code allows.
        lr: as in `FeatureStage`.
        warmup_epochs: as in `FeatureStage`.
        training: as in `FeatureStage`, except that `sizes` are sides s of the patches. Patches
            smaller than the images are cut from them and not scaled; others cover the areas of
            their view, scaled to the side. Without sizes all are scaled to the size of the images.

    Raises:
        UsageError: a weight or the distortion is not positive, or as in `FeatureStage`.
    """

    name = "empssl"
    against_collapse = "raise rate_weight"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 128,
        hidden_dim: int = 512,
        rate_weight: float = 0.05,
        distortion: float = 0.2,
        lr: float = 1.0,
        warmup_epochs: int = 1,
        **training: Unpack[Training],
    ) -> None:
        for key, value, usual in (
            ("rate_weight", rate_weight, "our default is 0.05; without it all features are equal"),
            ("distortion", distortion, "EMP-SSL uses 0.2"),
        ):
            check_number(self.name, key, value, value > 0, f"positive; {usual}")
        super().__init__(
            backbone,
            perceptron(width_of(backbone), hidden_dim, projection_dim),
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.rate_weight, self.distortion = rate_weight, distortion

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch; all patches get a gradient."""
        (patches,) = batch.views.values()  # (b, n, 3, s, s)
        features = self.encoder(patches.flatten(0, 1))  # (b n, D)
        embeddings = F.normalize(self.projection(features).float())  # (b n, P)
        embeddings = embeddings.view(*patches.shape[:2], -1)  # (b, n, P)
        everyone = embeddings
        if self.trainer.world_size > 1:  # every rank computes the loss of the global batch
            everyone = self._everyone(embeddings)
        loss = multi_patch_loss(everyone, self.rate_weight, self.distortion)
        self.record_step(loss, embeddings[:, 0], embeddings[:, 1])
        return loss

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that patches fit into the images, and that a batch has something to spread."""
        side = images.images.shape[-1]
        if self.sizes is not None and max(self.sizes) > side:
            raise UsageError(
                f"empssl.module.sizes {list(self.sizes)} has patches larger than the images, which "
                f"have {side} pixels a side; give sides of at most {side}, or null"
            )
        for stream in streams.values():
            if stream.batch_size < 2:
                raise UsageError(
                    f"empssl.streams.images.batch_size {stream.batch_size} leaves no images to "
                    "spread: one image has no covariance; give at least 2"
                )
            kinds = [type(view) for view in stream.views.values()]
            if len(kinds) != 1 or not issubclass(kinds[0], PatchView):
                found = ", ".join(kind.__name__ for kind in kinds)
                raise UsageError(
                    f"empssl.streams.images.views has {found}; give one PatchView, such as "
                    "${augment.patches}"
                )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Fit a stem that must be fitted; make patches at the size of the epoch."""
        streams = super().prepare(images, upstream, streams)
        if self.sizes is None:
            return streams
        stream = streams["images"]
        (view,) = stream.views.values()
        pixels = images.images.shape[-1]
        views = {str(side): _sized(cast(PatchView, view), side, pixels) for side in self.sizes}
        turns = [str(side) for side in self.sizes]
        return {**streams, "images": replace(stream, views=views, turns=turns)}

    def _everyone(self, rows: Tensor) -> Tensor:
        """Gather (b, n, P) to (B, n, P); the gradient flows back to the rank that they are from.

        As a matrix, so that its gradient is contiguous: torch's backward of gathering mixes up the
        entries of one that is not, and the loss transposes images and patches.
        """
        gathered = cast(Tensor, self.all_gather(rows.flatten(1), sync_grads=True))  # (R, b, n P)
        return gathered.view(-1, *rows.shape[1:])


def _sized(view: PatchView, side: int, pixels: int) -> PatchView:
    """Return the view with patches of a side; smaller than the image, they are not scaled."""
    if side == pixels:
        return replace(view, side=side)
    share = (side / pixels) ** 2  # of the area of the image
    return replace(view, side=side, min_scale=share, max_scale=share, ratio=(1.0, 1.0))
