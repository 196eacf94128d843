"""Stage 2: cluster heads on a frozen feature model, by prototype pseudo-labels.

Niu et al. 2022 (SPICE), Section III-B and Algorithm 1.

Shapes: N images, M images in an E-step buffer, B slots of a step, H heads, D features, K clusters.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.device import cluster_sizes, to_device
from spice_pl.functional.losses import (
    double_softmax_floor,
    mean_prediction_entropy,
    tempered_cross_entropy_per_head,
)
from spice_pl.functional.prototypes import prototype_pseudo_labels, prototype_shares
from spice_pl.nn.heads import ParallelHeads
from spice_pl.nn.optimizers import adam_settings
from spice_pl.runs.evidence import check_features
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Prediction, Stage, width_of
from spice_pl.stages.proto_choice import score_heads
from spice_pl.stages.proto_settings import (
    HeadLosses,
    check_settings,
    head_losses,
    initial_shares,
)
from spice_pl.stages.proto_start import start_clusters, start_images, start_probs
from spice_pl.stages.proto_views import BankedViews, FrozenViews, MovingEncoder

logger = logging.getLogger(__name__)

EMPTY_COST = 100.0  # nats per empty cluster; more than any loss or information
SHARES_RATE = 0.1  # weight of a cycle in the moving average of estimated shares


class ProtoHeadModule(Stage):
    """Train H heads at once by expectation-maximisation; keep one, chosen without labels.

    The encoder is frozen: it gets no gradient and its BatchNorm is in eval mode. So every view
    passes it once, and all heads and repeats read the same features. Ranks share the work of the
    encoder; the heads are small and take the same steps on every rank. The E-step reads the view
    `weak`, the M-step `strong`; conf/stage/proto.yaml decides which augmentation each name means
    (Table VIII).

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        num_heads: H.
        first_head: number of the first head; `num_heads=1 first_head=3` trains head 3 alone.
        hidden_dim: width of a head's hidden layer; None means D.
        lr: learning rate of Adam, constant.
        buffer_size: M, images of an E-step; at most all training images.
        repeats: passes over the labelled slots in an M-step.
        head_batch_size: B, slots of an optimizer step, for every head.
        confident_ratio: share of M/K images whose mean embedding is the prototype.
        select_ratio: share of M/K images that get the label of a cluster, in (0, 1].
        overlap: whether an image may carry several labels (Table VII).
        loss: loss of the M-step: "double_softmax" (Eq. 5), "ce" or "tce" (Table VII). The choice of
            head and epoch does not depend on it.
        temperature: temperature of "tce".
        entropy: weight of the entropy of a batch's mean prediction, which is maximised (Table VII).
        bn_mode: "frozen", or "reference" for BatchNorm in train mode as in the authors' code.
        joint: "none"; "single_head" and "multi_head" train the encoder too (Table VII), at `lr`.
        view_bank: number n of weak and of strong views per image that are embedded once; None makes
            new views in each cycle.
        selection: criterion for head and epoch on all training images: "loss", the lowest Eq. 5
            (the paper), or "mutual_information", the highest between images and clusters, which
            favours even clusters.
        prior: shares of the clusters: "uniform", equal as in the paper; K numbers, which all heads
            follow; or "estimated", a moving average of each head's `prototype_shares`. Ours.
        start: what the first E-step reads: "random", the predictions of heads that were not
            trained, as in the paper; or "kmeans", `start_clusters` of the training images, the same
            for all heads, which the first M-step learns with a single softmax. Shares that are
            estimated then start at the sizes of these clusters, and heads with the fewest empty
            clusters come first in the choice. Ours.
        seed: seed of the run; head h starts from 1000 · seed + h, so that runs share no head.
    """

    best_cost: Tensor  # of the kept head: its loss, or minus its information; see `_choose`
    best_loss: Tensor  # of the kept head
    best_head: Tensor  # number of the kept head
    best_epoch: Tensor  # epoch of the kept head
    shares: Tensor | None  # (H, K)
    warned = False  # whether the run has warned of empty clusters

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        num_heads: int = 10,
        first_head: int = 0,
        hidden_dim: int | None = None,
        lr: float = 5e-3,
        buffer_size: int = 5000,
        repeats: int = 8,
        head_batch_size: int = 128,
        confident_ratio: float = 0.5,
        select_ratio: float = 1.0,
        overlap: bool = True,
        loss: str = "double_softmax",
        temperature: float = 0.2,
        entropy: float = 0.0,
        bn_mode: str = "frozen",
        joint: str = "none",
        view_bank: int | None = None,
        selection: str = "loss",
        prior: str | Sequence[float] = "uniform",
        start: str = "random",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_settings(
            loss=loss,
            bn_mode=bn_mode,
            joint=joint,
            selection=selection,
            start=start,
            select_ratio=select_ratio,
            entropy=entropy,
            view_bank=view_bank,
        )
        moves = joint != "none" or bn_mode == "reference"
        if joint == "single_head":
            num_heads = 1
        self.automatic_optimization = False
        width = width_of(backbone)
        self.encoder = backbone.requires_grad_(joint != "none")
        if moves:
            self.kept_encoder = copy.deepcopy(backbone).requires_grad_(False)
        self.heads = ParallelHeads(
            width, hidden_dim or width, num_clusters, num_heads, 1000 * seed + first_head
        )
        self.selected = self.heads.head(0).requires_grad_(False)
        self.register_buffer("best_cost", torch.tensor(math.inf))
        self.register_buffer("best_loss", torch.tensor(math.inf))
        self.register_buffer("best_head", torch.tensor(-1))
        self.register_buffer("best_epoch", torch.tensor(-1))
        self.num_clusters, self.lr, self.seed = num_clusters, lr, seed
        self.buffer_size, self.repeats, self.head_batch_size = buffer_size, repeats, head_batch_size
        self.select_ratio, self.view_bank = select_ratio, view_bank
        self.selection = selection
        self.joint, self.moves, self.entropy = joint != "none", moves, entropy
        self.trains_encoder = bool(self.joint)
        self.head_losses = head_losses(loss, temperature)
        self.has_floor = loss == "double_softmax"
        settings: Any = {
            "confident_ratio": confident_ratio,
            "select_ratio": select_ratio,
            "overlap": overlap,
        }
        self.prototype_pseudo_labels: Callable[..., tuple[Tensor, Tensor]] = partial(
            prototype_pseudo_labels, **settings
        )
        self.prototype_shares: Callable[..., Tensor] = partial(prototype_shares, **settings)
        shares = initial_shares(prior, num_clusters)
        self.register_buffer("shares", None if shares is None else shares.repeat(num_heads, 1))
        self.estimated, self.start = prior == "estimated", start
        self._cycle: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def resumable(self) -> bool:
        """Whether a cycle has ended: checkpoints do not hold the views embedded so far."""
        return not self._cycle

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of images (B, 3, S, S) by the kept head."""
        probs: Tensor = self.selected(self.weights()["encoder"](images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor | None:
        """Embed views; take an E-step and an M-step once the buffer is full (Algorithm 1)."""
        self._cycle.append((batch.index, *self.view_features.embed(batch)))
        if (batch_idx + 1) % self.batches_per_cycle:
            return None
        index, weak, strong = (
            self.across_buffer(list(part)) for part in zip(*self._cycle, strict=True)
        )
        self._cycle.clear()
        with torch.no_grad():
            probs = self.heads(weak)  # (H, M, K)
        # E-step, Eqs. 2-4: prototypes are means of embeddings of the plain images.
        embeddings = self.embeddings[index]
        first = self.current_epoch == 0 and batch_idx + 1 == self.batches_per_cycle
        starts = first and self.start == "kmeans"
        if starts:
            probs = self._start(index, embeddings).expand_as(probs)
        if self.estimated and self.shares is not None:
            found = self.prototype_shares(embeddings, probs, shares=self.shares)  # (H, K)
            self.shares.lerp_(found.to(self.shares.dtype), SHARES_RATE)
        slots, label = self.prototype_pseudo_labels(embeddings, probs, shares=self.shares)
        # A double softmax hardly moves heads that are not trained (Appendix A), and the next cycle
        # reads their predictions.
        losses_of = tempered_cross_entropy_per_head if starts else self.head_losses
        losses = self._maximise(strong, slots, label, batch_idx, losses_of)  # (H,)
        if batch_idx + 1 == self.trainer.num_training_batches:
            self._choose()
        return losses.mean()

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Watch the kept head; add the clusters of all heads, if the kept encoder is theirs."""
        prediction: Prediction = super().validation_step(batch, batch_idx)
        if self.moves:
            return prediction
        clusters = self.heads(prediction.features).argmax(dim=-1)  # (H, B)
        return replace(prediction, head_clusters=clusters)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam at a constant rate for all heads, and for the encoder if it is trained."""
        trained = [*self.heads.parameters(), *(self.encoder.parameters() if self.joint else ())]
        return torch.optim.Adam(trained, lr=self.lr, **adam_settings(self.device, fused=True))

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check that the buffer of the E-step holds enough images."""
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
        check_features(upstream.features, len(images), f"{upstream.path}/features.npy")
        if bool((self.features == self.features[0]).all()):
            raise UsageError(
                f"{upstream.path}/features.npy holds the same feature for every image, so they "
                "cannot be told apart; if a stage trained them, train it again with another seed "
                "or a lower lr; if they are of a pretrained network, give another encoder=NAME"
            )
        self.embeddings = upstream.embeddings(images.train_index)  # of the plain images, (N, d)
        num_train = len(images.train_index)
        size = min(self.buffer_size, num_train)
        self.check(images, streams)
        if size < self.buffer_size:
            logger.info("buffer_size %d -> %d, all training images", self.buffer_size, size)
        stream = streams["images"]
        self.batches_per_cycle = math.ceil(size / stream.batch_size)
        self.train_index = torch.from_numpy(images.train_index)
        self.view_features = self._make_view_features(upstream)
        complete = replace(
            self.view_features.stream(stream),
            num_samples=num_train // size * size,
            group_size=size,
            drop_last=False,
        )
        return {"images": complete}

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the kept head and its encoder: the frozen one, or a copy from the same epoch.

        With a frozen encoder all heads are handed on too, so that the kept one can be judged.
        """
        if self.moves:
            return {"encoder": self.kept_encoder, "head": self.selected}
        return {"encoder": self.encoder, "head": self.selected, "heads": self.heads}

    def predict(self, batch: Views) -> Prediction:
        """Return features, stored ones if the encoder is frozen, and probs of the kept head."""
        features = self.view_features.predict(batch)
        return Prediction(batch.index, features, self.selected(features))

    def on_fit_start(self) -> None:
        """Move the embeddings (N, d) of the plain images to the device of the heads."""
        self.embeddings = self.embeddings.to(self.device)
        self.view_features.on_fit_start()
        if self.has_floor:
            floor = double_softmax_floor(self.num_clusters)
            logger.info("the double-softmax loss cannot fall below %.3f nats", floor)

    def on_train_epoch_start(self) -> None:
        """Set the mode of the encoder again: Lightning has put every module in train mode."""
        self.view_features.on_epoch_start()
        self._cycle.clear()

    def on_train_end(self) -> None:
        """Remove what the source of features left on disk."""
        super().on_train_end()
        self.view_features.on_train_end()

    def across_buffer(self, parts: list[Tensor]) -> Tensor:
        """Join the batches of a cycle from all ranks in the order in which they were drawn."""
        return torch.cat([self.across_ranks(part) for part in parts])

    def _start(self, index: Tensor, embeddings: Tensor) -> Tensor:
        """Return what the first E-step reads (M, K), and let shares start at its sizes."""
        images = start_images(index.cpu(), self.train_index, self.seed)
        clusters = start_clusters(self.features[images], self.num_clusters, self.seed)
        # Sums of k-means can differ in their last bits between processes.
        clusters = self.trainer.strategy.broadcast(clusters).to(embeddings.device)
        if self.estimated and self.shares is not None:
            self.shares.copy_(cluster_sizes(clusters, self.num_clusters) / len(clusters))
        return start_probs(embeddings, clusters[: len(index)], self.num_clusters)

    def _maximise(
        self,
        strong: Tensor,
        slots: Tensor,
        label: Tensor,
        batch_idx: int,
        losses_of: HeadLosses,
    ) -> Tensor:
        """M-step, Eq. 5: `repeats` passes over the slots (H, S), in one order for all heads."""
        optimizer = self.optimizers()
        generator = keyed_generator(self.seed, self.current_epoch, batch_idx)
        total = torch.zeros(len(slots), device=slots.device)
        orders = [torch.randperm(slots.shape[1], generator=generator) for _ in range(self.repeats)]
        whole = slots.shape[1] // self.head_batch_size  # the incomplete last batch is dropped
        batches = torch.stack(orders)[:, : whole * self.head_batch_size]
        batches = batches.reshape(-1, self.head_batch_size)  # (steps, B)
        for chosen, features in self.view_features.read(strong, slots, batches):
            logits = self.heads.logits(features)
            losses = losses_of(logits, label[..., chosen])  # (H, B, K) -> (H,), Eq. 5
            loss = losses.sum()  # not the mean: each head learns as if it were the only one
            if self.entropy:
                spread = mean_prediction_entropy(logits.softmax(dim=-1))  # (H,)
                loss = loss - self.entropy * spread.sum()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            total += losses.detach()
        losses = total / len(batches)
        self.record("train/loss", losses.mean())
        for head, loss in enumerate(losses):
            self.record(f"train/loss_head_{head}", loss)
        return losses

    def _choose(self) -> None:
        """Keep head and epoch of the lowest loss on all training images (Section III-B, Remark).

        Or, with `selection="mutual_information"`, those of the highest information. With
        `start="kmeans"`, those with the fewest empty clusters come first.
        """
        scores = score_heads(
            self.heads,
            self.view_features.plain(self.train_index),
            self.embeddings[to_device(self.train_index, self.device)],
            self.prototype_pseudo_labels,
            self.shares,
        )
        by_loss = self.selection == "loss"
        costs = scores.losses if by_loss else -scores.information  # (H,)
        if self.start == "kmeans":  # every cluster had images; a head that lost some comes last
            costs = costs + EMPTY_COST * scores.num_empty
        cost, chosen = costs.min(dim=0)
        # An index without dimensions would be read by the processor.
        loss, num_empty = (
            each.index_select(0, chosen[None])[0] for each in (scores.losses, scores.num_empty)
        )
        read = torch.stack((chosen, num_empty, cost < self.best_cost))  # the only wait of a choice
        self.chosen_head, empty, better = read.tolist()
        self._warn_of_empty(empty)
        self.record("val/selection_loss", loss)
        self.record("val/empty_clusters", num_empty)
        for head in range(self.heads.num_heads):
            self.record(f"val/selection_loss_head_{head}", scores.losses[head])
            if not by_loss:
                self.record(f"val/mutual_information_head_{head}", scores.information[head])
        if better:
            self.best_cost.copy_(cost)
            self.best_loss.copy_(loss)
            self.best_head.copy_(chosen)
            self.best_epoch.fill_(self.current_epoch)
            self.selected.load_state_dict(self.heads.head(self.chosen_head).state_dict())
            self.view_features.keep()
        self.record("val/best_selection_loss", self.best_loss)

    def _warn_of_empty(self, num_empty: int) -> None:
        """Warn once that most clusters are empty, and say what fills them."""
        if self.warned or 2 * num_empty <= self.num_clusters:
            return
        self.warned = True
        # Appendix A: an unsure head gets 1/K of the gradient, and an empty cluster hardly any.
        way = (
            "proto.module.entropy=0.03 does, the term that the paper has for 200 clusters"
            if self.has_floor and not self.entropy
            else "lower dataset.num_clusters or proto.module.lr, or raise proto.module.buffer_size"
        )
        logger.warning(
            "epoch %d leaves %d of %d clusters empty; if later epochs do not fill them, %s",
            self.current_epoch,
            num_empty,
            self.num_clusters,
            way,
        )

    def _make_view_features(self, upstream: RunFolder) -> FrozenViews:
        """Return the source of features that the settings ask for."""
        if self.moves:
            upstream.load_weights("encoder.safetensors", self.kept_encoder)
            return MovingEncoder(self, self.features, self.kept_encoder, joint=self.joint)
        if self.view_bank is not None:
            return BankedViews(
                self, self.features, self.train_index, self.view_bank, self.seed, upstream
            )
        return FrozenViews(self, self.features)
