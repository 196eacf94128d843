"""SCAN's clustering step: neighbours in the feature space of stage 1 share a cluster.

Van Gansbeke et al. 2020 (SCAN), Section 2.2. SPICE is compared with it.

Shapes: N images, n watched, B images of a batch, D features, K clusters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.functional.scan import scan_loss
from spice_pl.nn.heads import LinearHead
from spice_pl.nn.optimizers import adam_settings
from spice_pl.runs.evidence import check_features
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage

NUM_WATCHED_NEIGHBORS = 5  # neighbours of a watched image among the watched images


class ScanModule(Stage):
    """Train encoder and a linear head; keep the epoch of the lowest loss on the watched images.

    The choice of the epoch reads no label. Its loss is the consistency of the plain views of
    neighbours, minus the entropy of the mean prediction.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        num_neighbors: nearest images from which the partner of an image is drawn, besides itself.
        entropy_weight: λ, weight of the entropy.
        lr: learning rate of Adam, constant.
        weight_decay: weight decay of Adam.
    """

    best_loss: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        num_neighbors: int = 20,
        entropy_weight: float = 5.0,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.encoder = backbone
        self.head = LinearHead(self.feature_dim, num_clusters)
        self.best_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.best_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("best_loss", torch.tensor(math.inf))
        self.num_neighbors, self.entropy_weight = num_neighbors, entropy_weight
        self.lr, self.weight_decay = lr, weight_decay
        self._watched: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the kept epoch."""
        probs: Tensor = self.best_head(self.best_encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the loss of a batch, whose halves are anchors and their neighbours."""
        logits = self.head.logits(self.encoder(batch.views["strong"])).float()  # (2B, K)
        anchors, neighbors = logits.chunk(2)
        loss, consistency, entropy = scan_loss(anchors, neighbors, self.entropy_weight)
        for name, value in (("loss", loss), ("consistency", consistency), ("entropy", entropy)):
            self.record(f"train/{name}", value)
        return loss

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Keep the predictions of the present epoch; return them, for callbacks."""
        prediction = super().validation_step(batch, batch_idx)
        self._watched.append((prediction.index, prediction.probs))
        return prediction

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam at a constant rate."""
        trained = [*self.encoder.parameters(), *self.head.parameters()]
        return torch.optim.Adam(
            trained, lr=self.lr, weight_decay=self.weight_decay, **adam_settings(self.device)
        )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load the encoder of stage 1; make room for the neighbours of each training image."""
        if upstream is None:
            raise UsageError("stage=scan needs an upstream stage; set scan.upstream=moco")
        upstream.load_weights("encoder.safetensors", self.encoder)
        check_features(upstream.features, len(images), f"{upstream.path}/features.npy")
        self.embeddings = upstream.embeddings(images.train_index)  # (N, d)
        self.train_index = torch.from_numpy(images.train_index)
        count = min(self.num_neighbors + 1, len(self.train_index))  # the image itself counted
        self.partners = torch.full((len(images), count), -1)
        return {"images": replace(streams["images"], partners=self.partners)}

    def weights(self) -> Mapping[str, nn.Module]:
        """Return encoder and head of the kept epoch."""
        return {"encoder": self.best_encoder, "head": self.best_head}

    def predict(self, batch: Views) -> Prediction:
        """Return predictions of the kept epoch; in validation those of the present epoch."""
        if self.trainer.predicting:
            encoder, head = self.best_encoder, self.best_head
        else:
            encoder, head = self.encoder, self.head
        features = encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, head(features).float())

    def on_fit_start(self) -> None:
        """Find the neighbours of each training image, once for all ranks."""
        found = self._neighbors() if self.trainer.is_global_zero else torch.empty(0)
        self.partners[self.train_index] = self.trainer.strategy.broadcast(found)

    def on_validation_epoch_start(self) -> None:
        """Forget the predictions of the validation before."""
        super().on_validation_epoch_start()
        self._watched.clear()

    def on_validation_epoch_end(self) -> None:
        """Keep this epoch if it has the lowest loss on the watched images so far."""
        super().on_validation_epoch_end()
        index, probs = (
            self.across_ranks(torch.cat(list(part))) for part in zip(*self._watched, strict=True)
        )
        embeddings = self.embeddings[index.cpu()].to(self.device)  # (n, d)
        count = min(NUM_WATCHED_NEIGHBORS + 1, len(index))
        _, nearest = nearest_neighbors(embeddings, embeddings, count)
        logits = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()  # (n, K)
        pairs = logits.repeat_interleave(count, dim=0), logits[nearest.flatten()]
        loss, _, _ = scan_loss(*pairs, entropy_weight=1.0)
        self.record("val/selection_loss", loss)
        if loss < self.best_loss:
            self._keep(loss)
        self.record("val/best_selection_loss", self.best_loss)

    def on_train_epoch_start(self) -> None:
        """Keep the kept model in eval mode."""
        self.best_encoder.eval()
        self.best_head.eval()

    def on_train_end(self) -> None:
        """Keep the last epoch if there was no validation."""
        super().on_train_end()
        if not bool(self.best_loss.isfinite()):
            self._keep(self.best_loss)

    def _neighbors(self) -> Tensor:
        """Return the nearest training images of each training image, itself counted."""
        embeddings = self.embeddings[self.train_index].to(self.device)  # (n, d)
        _, nearest = nearest_neighbors(embeddings, embeddings, self.partners.shape[1])
        return self.train_index[nearest.cpu()]

    def _keep(self, loss: Tensor) -> None:
        self.best_loss.copy_(loss)
        self.best_encoder.load_state_dict(self.encoder.state_dict())
        self.best_head.load_state_dict(self.head.state_dict())
