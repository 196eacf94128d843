"""Stage 2: cluster heads on a frozen feature model, by prototype pseudo-labels.

Niu et al. 2022 (SPICE), Section III-B and Algorithm 1.

Shapes: N images, M images in an E-step buffer, B slots of a step, H heads, D features, K clusters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.artifacts import RunFolder, as_tensor
from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.losses import (
    double_softmax_cross_entropy,
    double_softmax_cross_entropy_per_head,
    double_softmax_floor,
)
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.nn.heads import ParallelHeads
from spice_pl.stages.base import Prediction, Stage

logger = logging.getLogger(__name__)


class ProtoHeadModule(Stage):
    """Train H heads at once in an expectation-maximisation loop; keep the best by its own loss.

    The encoder is frozen: no gradient, BatchNorm in eval mode. So every view passes it once, and
    all heads and repeats read the same features. Ranks share the encoder's work; the heads, which
    are small, take the same steps on every rank.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        num_heads: H.
        hidden_dim: width of a head's hidden layer; None means D.
        lr: of Adam, constant.
        buffer_size: M, images of an E-step; at most the data set.
        repeats: passes over the labelled slots in an M-step.
        head_batch_size: B, slots of a step for every head.
        confident_ratio: share of M/K whose mean is the prototype.
        select_ratio: share of M/K that gets the label.
        overlap: whether an image may carry several labels (Table VII).
        seed: of the run; head h starts from 1000 · seed + h, so that runs share no head.
    """

    best_loss: Tensor
    best_head: Tensor
    best_epoch: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        num_heads: int = 10,
        hidden_dim: int | None = None,
        lr: float = 5e-3,
        buffer_size: int = 5000,
        repeats: int = 8,
        head_batch_size: int = 128,
        confident_ratio: float = 0.5,
        select_ratio: float = 1.0,
        overlap: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < select_ratio <= 1:  # above 1 the slots of Eq. 4 outnumber the images
            raise UsageError(f"proto.module.select_ratio {select_ratio} is not in (0, 1]")
        self.automatic_optimization = False
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.encoder = backbone.requires_grad_(False)
        self.heads = ParallelHeads(width, hidden_dim or width, num_clusters, num_heads, 1000 * seed)
        self.selected = self.heads.head(0).requires_grad_(False)
        self.register_buffer("best_loss", torch.tensor(math.inf))
        self.register_buffer("best_head", torch.tensor(-1))
        self.register_buffer("best_epoch", torch.tensor(-1))
        self.num_clusters, self.lr, self.seed = num_clusters, lr, seed
        self.buffer_size, self.repeats, self.head_batch_size = buffer_size, repeats, head_batch_size
        self.select_ratio = select_ratio
        self.pseudo_labels = partial(
            prototype_pseudo_labels,
            confident_ratio=confident_ratio,
            select_ratio=select_ratio,
            overlap=overlap,
        )
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return the selected head's probabilities (B, K) of images (B, 3, S, S)."""
        probs: Tensor = self.selected(self.encoder(images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor | None:
        """Embed views; when the buffer is full take an E-step and an M-step (Algorithm 1)."""
        with torch.no_grad():
            weak = self.encoder(batch.views["weak"]).float()  # (b, D)
            strong = self.encoder(batch.views["strong"]).float()
        self._views.append((batch.index, weak, strong))
        if (batch_idx + 1) % self.batches_per_cycle:
            return None
        index, weak, strong = (
            self.across_buffer(list(part)) for part in zip(*self._views, strict=True)
        )
        self._views.clear()
        with torch.no_grad():
            probs = self.heads(weak)  # (H, M, K)
        # E-step, Eqs. 2-4: prototypes live in the embeddings of the untransformed images.
        slots, label = self.pseudo_labels(self.embeddings[index], probs)
        losses = self._maximise(strong, slots, label, batch_idx)  # (H,)
        if batch_idx + 1 == self.trainer.num_training_batches:
            self._select()
        return losses.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a constant rate; one optimizer for all heads."""
        return torch.optim.Adam(self.heads.parameters(), lr=self.lr, fused=True)

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that the E-step buffer is large enough."""
        num_train = len(images.train_index)
        size = min(self.buffer_size, num_train)
        per_cluster = size // self.num_clusters
        if per_cluster < 2:
            raise UsageError(
                f"a buffer of {size} images gives {per_cluster} for each of {self.num_clusters} "
                "clusters and prototypes need at least 2; raise proto.module.buffer_size to at "
                f"least {2 * self.num_clusters}, lower dataset.num_clusters or give more images"
            )
        num_slots = int(self.select_ratio * per_cluster) * self.num_clusters
        if num_slots < self.head_batch_size:
            raise UsageError(
                f"proto.module.head_batch_size {self.head_batch_size} exceeds the {num_slots} "
                f"labelled slots of a buffer of {size} images; lower it to at most {num_slots}"
            )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load encoder and features of stage 1; size the E-step buffer to the data."""
        if upstream is None:
            raise UsageError("stage=proto needs an upstream stage; set proto.upstream=moco")
        upstream.load_weights("encoder.safetensors", self.encoder)
        self.features = as_tensor(upstream.features)  # (N, D), memory-mapped
        if not bool(self.features.isfinite().all()):
            raise UsageError(f"{upstream.path}/features.npy holds NaN; make it anew")
        num_train = len(images.train_index)
        size = min(self.buffer_size, num_train)
        self.check(images, streams)
        if size < self.buffer_size:
            logger.info("buffer_size %d -> %d, all training images", self.buffer_size, size)
        stream = streams["images"]
        self.batches_per_cycle = math.ceil(size / stream.batch_size)
        self.train_index = torch.from_numpy(images.train_index)
        complete = replace(
            stream, num_samples=num_train // size * size, group_size=size, drop_last=False
        )
        return {"images": complete}

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the frozen encoder and the selected head."""
        return {"encoder": self.encoder, "head": self.selected}

    def predict(self, batch: Views) -> Prediction:
        """Return the stored features and the selected head's probabilities; nothing is encoded."""
        features = self.features[batch.index.cpu()].to(self.device)
        return Prediction(batch.index, features, self.selected(features))

    def on_fit_start(self) -> None:
        """Put the embeddings of the untransformed images (N, D) where the heads are."""
        self.embeddings = F.normalize(self.features.to(self.device))
        floor = double_softmax_floor(self.num_clusters)
        logger.info("the double-softmax loss cannot fall below %.3f nats", floor)

    def on_train_epoch_start(self) -> None:
        """Keep the frozen encoder frozen: Lightning has just put every module in train mode."""
        self.encoder.eval()
        self._views.clear()

    def across_buffer(self, parts: list[Tensor]) -> Tensor:
        """Join a cycle's batches of all ranks in the order in which they were drawn."""
        return torch.cat([self.across_ranks(part) for part in parts])

    def _maximise(self, strong: Tensor, slots: Tensor, label: Tensor, batch_idx: int) -> Tensor:
        """M-step, Eq. 5: `repeats` passes over the slots, one order a pass shared by the heads."""
        optimizer = self.optimizers()
        generator = keyed_generator(self.seed, self.current_epoch, batch_idx)
        total, steps = strong.new_zeros(len(slots)), 0
        for _ in range(self.repeats):
            order = torch.randperm(len(label), generator=generator).to(slots.device)
            for chosen in torch.split(order, self.head_batch_size):
                if len(chosen) < self.head_batch_size:
                    break  # the incomplete last batch is dropped
                probs = self.heads(strong[slots[:, chosen]])  # (H, B, K)
                losses = double_softmax_cross_entropy_per_head(probs, label[chosen])  # (H,), Eq. 5
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(losses.mean())
                optimizer.step()  # type: ignore[union-attr]
                total, steps = total + losses.detach(), steps + 1
        losses = total / steps
        self.record("train/loss", losses.mean())
        for head, loss in enumerate(losses):
            self.record(f"train/loss_head_{head}", loss)
        return losses

    @torch.no_grad()
    def _select(self) -> None:
        """Keep head and epoch of the lowest loss on all training images (Section III-B, Remark)."""
        train_index = self.train_index.to(self.device)
        features = self.features[self.train_index].to(self.device)  # (N, D)
        embeddings = self.embeddings[train_index]
        losses = []
        for head in range(self.heads.num_heads):  # one at a time: (N, K) and not (H, N, K)
            probs = self.heads.head(head)(features)
            slots, label = self.pseudo_labels(embeddings, probs)
            losses.append(double_softmax_cross_entropy(probs[slots], label))
        loss, head_index = torch.stack(losses).min(dim=0)
        self.record("val/selection_loss", loss)
        if loss < self.best_loss:
            self.best_loss.copy_(loss)
            self.best_head.copy_(head_index)
            self.best_epoch.fill_(self.current_epoch)
            self.selected.load_state_dict(self.heads.head(int(head_index)).state_dict())
        self.record("val/best_selection_loss", self.best_loss)
