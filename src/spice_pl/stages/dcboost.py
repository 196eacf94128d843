"""DCBoost: images whose neighbours agree pull clusters together and push them apart.

Li et al. 2025, "You Can Trust Your Clustering Model: A Parameter-free Self-Boosting Plug-in for
Deep Clustering" (DCBoost, NeurIPS). It continues from the encoder of any clustering.

Shapes: B images of a batch, D features, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.dcboost import agreeing_images, compactness_loss, separation_loss
from spice_pl.functional.device import to_device
from spice_pl.nn.optimizers import sgd_settings
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import check_number, width_of
from spice_pl.stages.target import TargetStage, TargetTraining

PREDICTOR_LR = 10  # times that of the encoder; Appendix A


class DCBoostModule(TargetStage):
    """Fine-tune the encoder of a clustering on images that agree with their neighbours.

    In each batch an image counts if its k nearest neighbours are of its cluster, where k is the
    number for which k times the number of such images is largest. Those of a cluster are pulled
    together, and the prototypes of clusters are pushed apart. There is no weight to set. k-means
    starts at the clusters of the upstream, and later at those of the epoch before.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        hidden_dim: width of the hidden layer of the predictor, which has BatchNorm.
        max_neighbors: m, the largest k that is tried.
        lr: as in `FeatureStage`; the predictor, which starts at random weights, has ten times as
            much.
        warmup_epochs: as in `FeatureStage`; the views of an image alone are aligned in these
            epochs.
        training: as in `TargetStage`.

    Raises:
        UsageError: a number is out of range.
    """

    name = "dcboost"

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        hidden_dim: int = 512,
        max_neighbors: int = 50,
        lr: float = 5e-3,
        warmup_epochs: int = 10,
        **training: Unpack[TargetTraining],
    ) -> None:
        fits, rule = max_neighbors >= 1, "at least 1; the paper has 50"
        check_number(self.name, "max_neighbors", max_neighbors, fits, rule)
        super().__init__(
            backbone,
            UnitLength(),
            num_clusters,
            projection_dim=width_of(backbone),
            hidden_dim=hidden_dim,
            lr=lr,
            warmup_epochs=warmup_epochs,
            **training,
        )
        self.max_neighbors = max_neighbors

    def cluster_losses(
        self, online: Tensor, target: Tensor, clusters: Tensor
    ) -> Mapping[str, tuple[float, Tensor]]:
        """Return both losses on the images whose neighbours are of their cluster."""
        agreeing, num_neighbors = agreeing_images(target, clusters, self.max_neighbors)
        self.record("train/agreeing_fraction", agreeing.float().mean())
        self.record("train/num_neighbors", num_neighbors)
        chosen = clusters.where(agreeing, -1)
        read = (online, target, chosen, self.head.out_features)
        return {
            "compactness": (1.0, compactness_loss(*read)),
            "separation": (1.0, separation_loss(*read)),
        }

    def configure_optimizers(self) -> Any:
        """Return SGD with a higher rate for the predictor, and its cosine per epoch."""
        groups: list[dict[str, Any]] = [
            {"params": [*self.encoder.parameters()]},
            {"params": [*self.predictor.parameters()], "lr": PREDICTOR_LR * self.lr},
        ]
        optimizer = torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.sgd_momentum,
            weight_decay=self.weight_decay,
            **sgd_settings(self.device),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load the encoder of the upstream, and its clusters, if it has any."""
        streams = super().prepare(images, upstream, streams)
        if upstream is not None and (upstream.path / "probs.npy").is_file():
            clusters = as_tensor(upstream.answer).argmax(dim=1)  # (N,)
            if (count := upstream.answer.shape[1]) != self.head.out_features:
                raise UsageError(
                    f"{upstream.path} has {count} clusters and dataset.num_clusters is "
                    f"{self.head.out_features}; give {count}, or set dcboost.upstream to a stage "
                    "without clusters (moco, embed)"
                )
            self.clusters.copy_(clusters)
        return streams

    def start_of_kmeans(self) -> Tensor | None:
        """Return the clusters of the epoch before, at first those of the upstream."""
        clusters = self.clusters[to_device(self.train_index, self.device)]
        return clusters if bool((clusters >= 0).all()) else None

    def start(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load the encoder of the upstream."""
        self.check(images, streams)
        if upstream is None:
            raise UsageError(
                "stage=dcboost needs an upstream stage; set dcboost.upstream=proto, propos, cc or "
                "another stage that trains an encoder"
            )
        upstream.load_weights("encoder.safetensors", self.encoder)
        return streams


class UnitLength(nn.Module):
    """Scale each row to length one."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows (B, D) of length one."""
        return F.normalize(rows)
