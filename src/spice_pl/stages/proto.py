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
from spice_pl.functional.losses import (
    double_softmax_cross_entropy,
    double_softmax_cross_entropy_per_head,
    double_softmax_floor,
    mean_prediction_entropy,
    mutual_information,
    tempered_cross_entropy_per_head,
)
from spice_pl.functional.prototypes import prototype_pseudo_labels, prototype_shares
from spice_pl.nn.heads import ParallelHeads
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Prediction, Stage, check_word, width_of
from spice_pl.stages.proto_views import BankedViews, FrozenViews, MovingEncoder

logger = logging.getLogger(__name__)

BN_MODES = ("frozen", "reference")
JOINT = ("none", "single_head", "multi_head")
SELECTION = ("loss", "mutual_information")
PRIORS = ("uniform", "estimated")
SHARES_RATE = 0.1  # of the moving average of estimated shares, a cycle
HeadLosses = Callable[[Tensor, Tensor], Tensor]  # logits (H, B, K), label (B,) or (H, B) -> (H,)


class ProtoHeadModule(Stage):
    """Train H heads at once in an expectation-maximisation loop; keep one, chosen without labels.

    The encoder is frozen: no gradient, BatchNorm in eval mode. So every view passes it once, and
    all heads and repeats read the same features. Ranks share the encoder's work; the heads, which
    are small, take the same steps on every rank. The E-step reads the stream's view `weak`, the
    M-step `strong`; what these names show is the stream's business (Table VIII).

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        num_heads: H.
        first_head: number of the first head; `num_heads=1 first_head=3` trains head 3 alone.
        hidden_dim: width of a head's hidden layer; None means D.
        lr: of Adam, constant.
        buffer_size: M, images of an E-step; at most the data set.
        repeats: passes over the labelled slots in an M-step.
        head_batch_size: B, slots of a step for every head.
        confident_ratio: share of M/K whose mean is the prototype.
        select_ratio: share of M/K that gets the label.
        overlap: whether an image may carry several labels (Table VII).
        loss: "double_softmax" (Eq. 5), "ce" or "tce", what the M-step minimises (Table VII). Head
            and epoch are chosen by `selection` whatever it is.
        temperature: of "tce".
        entropy: weight of the entropy of a batch's mean prediction, which is maximised (Table VII).
        bn_mode: "frozen", or "reference" for BatchNorm in train mode as in the authors' code.
        joint: "none"; "single_head" and "multi_head" train the encoder too (Table VII), at `lr`.
        view_bank: n weak and n strong views an image, embedded once; None makes them anew each
            cycle.
        selection: what chooses head and epoch: "loss", the lowest Eq. 5 on all training images
            (the paper), or "mutual_information", the highest between images and clusters, which
            favours even clusters.
        prior: "uniform", as the paper: clusters of equal size; K shares, which all heads follow; or
            "estimated", a moving average of each head's `prototype_shares`. Ours.
        seed: of the run; head h starts from 1000 · seed + h, so that runs share no head.
    """

    best_cost: Tensor  # what `selection` minimises: the loss, or minus the information
    best_loss: Tensor  # of the head that is kept
    best_head: Tensor
    best_epoch: Tensor
    shares: Tensor | None
    warned = False  # of empty clusters, once a run

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
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < select_ratio <= 1:  # above 1 the slots of Eq. 4 outnumber the images
            raise UsageError(f"proto.module.select_ratio {select_ratio} is not in (0, 1]")
        losses = _losses(temperature)
        check_word("proto.module.loss", loss, tuple(losses))
        check_word("proto.module.bn_mode", bn_mode, BN_MODES)
        check_word("proto.module.joint", joint, JOINT)
        check_word("proto.module.selection", selection, SELECTION)
        moves = joint != "none" or bn_mode == "reference"
        if view_bank is not None and (view_bank < 1 or moves):
            raise UsageError(
                f"proto.module.view_bank {view_bank} needs 1 or more views of a frozen encoder; "
                "use null for fresh views, or joint=none and bn_mode=frozen"
            )
        if entropy < 0:
            raise UsageError(f"proto.module.entropy {entropy} would empty clusters; use 0 or more")
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
        self.head_losses, self.has_floor = losses[loss], loss == "double_softmax"
        self.pseudo_labels = partial(
            prototype_pseudo_labels,
            confident_ratio=confident_ratio,
            select_ratio=select_ratio,
            overlap=overlap,
        )
        self.estimate = partial(
            prototype_shares,
            confident_ratio=confident_ratio,
            select_ratio=select_ratio,
            overlap=overlap,
        )
        shares = _shares(prior, num_clusters)
        # (H, K), kept in checkpoints; None for equal shares, which need no memory.
        self.register_buffer("shares", None if shares is None else shares.repeat(num_heads, 1))
        self.estimated = prior == "estimated"
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def resumable(self) -> bool:
        """Between two cycles: the embedded views of a buffer are in no checkpoint."""
        return not self._views

    def forward(self, images: Tensor) -> Tensor:
        """Return the selected head's probabilities (B, K) of images (B, 3, S, S)."""
        probs: Tensor = self.selected(self.weights()["encoder"](images).float())
        return probs

    def training_step(self, batch: Views, batch_idx: int) -> Tensor | None:
        """Embed views; when the buffer is full take an E-step and an M-step (Algorithm 1)."""
        self._views.append((batch.index, *self.branches.embed(batch)))
        if (batch_idx + 1) % self.batches_per_cycle:
            return None
        index, weak, strong = (
            self.across_buffer(list(part)) for part in zip(*self._views, strict=True)
        )
        self._views.clear()
        with torch.no_grad():
            probs = self.heads(weak)  # (H, M, K)
        # E-step, Eqs. 2-4: prototypes live in the embeddings of the untransformed images.
        embeddings = self.embeddings[index]
        if self.estimated and self.shares is not None:
            found = self.estimate(embeddings, probs, shares=self.shares)  # (H, K)
            self.shares.lerp_(found.to(self.shares.dtype), SHARES_RATE)
        slots, label = self.pseudo_labels(embeddings, probs, shares=self.shares)
        losses = self._maximise(strong, slots, label, batch_idx)  # (H,)
        if batch_idx + 1 == self.trainer.num_training_batches:
            self._select()
        return losses.mean()

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Watch the kept head; add the clusters of all heads, if the kept encoder is theirs."""
        prediction: Prediction = super().validation_step(batch, batch_idx)
        if self.moves:
            return prediction
        clusters = self.heads(prediction.features).argmax(dim=-1)  # (H, B)
        return replace(prediction, head_clusters=clusters)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a constant rate; one optimizer for all heads, and for a `joint` encoder."""
        trained = [*self.heads.parameters(), *(self.encoder.parameters() if self.joint else ())]
        return torch.optim.Adam(trained, lr=self.lr, fused=True)

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
        if bool((self.features == self.features[0]).all()):
            raise UsageError(
                f"{upstream.path}/features.npy holds the same feature for every image, so nothing "
                f"tells them apart; train stage={upstream.path.parent.name} anew with another seed "
                "or a lower lr"
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
        self.branches = self._branches(upstream)
        complete = replace(
            self.branches.stream(stream),
            num_samples=num_train // size * size,
            group_size=size,
            drop_last=False,
        )
        return {"images": complete}

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the selected head and its encoder: the frozen one, or a copy of that epoch's.

        On a frozen encoder all heads go with them, to judge the selected one by.
        """
        if self.moves:
            return {"encoder": self.kept_encoder, "head": self.selected}
        return {"encoder": self.encoder, "head": self.selected, "heads": self.heads}

    def predict(self, batch: Views) -> Prediction:
        """Return features, those stored if the encoder is frozen, and the kept head's probs."""
        features = self.branches.predict(batch)
        return Prediction(batch.index, features, self.selected(features))

    def on_fit_start(self) -> None:
        """Put the embeddings of the untransformed images (N, D) where the heads are."""
        self.embeddings = self.embeddings.to(self.device)
        self.branches.on_fit_start()
        if self.has_floor:
            floor = double_softmax_floor(self.num_clusters)
            logger.info("the double-softmax loss cannot fall below %.3f nats", floor)

    def on_train_epoch_start(self) -> None:
        """Set the encoder's mode anew: Lightning has just put every module in train mode."""
        self.branches.on_epoch_start()
        self._views.clear()

    def on_train_end(self) -> None:
        """End what the branches began."""
        super().on_train_end()
        self.branches.on_train_end()

    def across_buffer(self, parts: list[Tensor]) -> Tensor:
        """Join a cycle's batches of all ranks in the order in which they were drawn."""
        return torch.cat([self.across_ranks(part) for part in parts])

    def _maximise(self, strong: Tensor, slots: Tensor, label: Tensor, batch_idx: int) -> Tensor:
        """M-step, Eq. 5: `repeats` passes over the slots (H, S), in one order for all heads."""
        optimizer = self.optimizers()
        generator = keyed_generator(self.seed, self.current_epoch, batch_idx)
        total, steps = torch.zeros(len(slots), device=slots.device), 0
        for _ in range(self.repeats):
            order = torch.randperm(slots.shape[1], generator=generator).to(slots.device)
            for chosen in torch.split(order, self.head_batch_size):
                if len(chosen) < self.head_batch_size:
                    break  # the incomplete last batch is dropped
                logits = self.heads.logits(self.branches.read(strong, slots[:, chosen]))
                losses = self.head_losses(logits, label[..., chosen])  # (H, B, K) -> (H,), Eq. 5
                loss = losses.sum()  # each head learns as if alone: Adam forgets a factor 1/H
                if self.entropy:
                    spread = mean_prediction_entropy(logits.softmax(dim=-1))  # (H,)
                    loss = loss - self.entropy * spread.sum()
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(loss)
                optimizer.step()  # type: ignore[union-attr]
                total, steps = total + losses.detach(), steps + 1
        losses = total / steps
        self.record("train/loss", losses.mean())
        for head, loss in enumerate(losses):
            self.record(f"train/loss_head_{head}", loss)
        return losses

    @torch.no_grad()
    def _select(self) -> None:
        """Keep head and epoch of the lowest loss on all training images (Section III-B, Remark).

        Or, with `selection="mutual_information"`, those of the highest information.
        """
        train_index = self.train_index.to(self.device)
        features = self.branches.plain(self.train_index)  # (N, D)
        embeddings = self.embeddings[train_index]
        losses, information, num_empty = [], [], []
        for head in range(self.heads.num_heads):  # one at a time: (N, K) and not (H, N, K)
            probs = self.heads.head(head)(features)
            shares = None if self.shares is None else self.shares[head]
            slots, label = self.pseudo_labels(embeddings, probs, shares=shares)
            # Clusters count alike: a head must not win by clusters that it emptied.
            balanced = shares is not None
            losses.append(double_softmax_cross_entropy(probs[slots], label, balanced=balanced))
            if self.selection == "mutual_information":
                information.append(mutual_information(probs))
                self.record(f"val/mutual_information_head_{head}", information[-1])
            num_empty.append(self.num_clusters - len(probs.argmax(dim=1).unique()))
        costs = -torch.stack(information) if information else torch.stack(losses)  # (H,)
        cost, head_index = costs.min(dim=0)
        chosen = self.chosen_head = int(head_index)
        loss = losses[chosen]
        self._warn_of_empty(num_empty[chosen])
        self.record("val/selection_loss", loss)
        self.record("val/empty_clusters", num_empty[chosen])
        for head, each in enumerate(losses):
            self.record(f"val/selection_loss_head_{head}", each)
        if cost < self.best_cost:
            self.best_cost.copy_(cost)
            self.best_loss.copy_(loss)
            self.best_head.copy_(head_index)
            self.best_epoch.fill_(self.current_epoch)
            self.selected.load_state_dict(self.heads.head(chosen).state_dict())
            self.branches.keep()
        self.record("val/best_selection_loss", self.best_loss)

    def _warn_of_empty(self, num_empty: int) -> None:
        """Say once that most clusters are empty, and what fills them."""
        if self.warned or 2 * num_empty <= self.num_clusters:
            return
        self.warned = True
        # Appendix A: an unsure head gets 1/K of the gradient, an empty cluster hardly any.
        way = (
            "proto.module.entropy=0.03 does, the term that the paper has for 200 clusters"
            if self.has_floor and not self.entropy
            else "lower dataset.num_clusters or proto.module.lr, or raise proto.module.buffer_size"
        )
        logger.warning(
            "epoch %d leaves %d of %d clusters empty; if later ones do not fill them, %s",
            self.current_epoch,
            num_empty,
            self.num_clusters,
            way,
        )

    def _branches(self, upstream: RunFolder) -> FrozenViews:
        """Choose where features of views come from."""
        if self.moves:
            upstream.load_weights("encoder.safetensors", self.kept_encoder)
            return MovingEncoder(self, self.features, self.kept_encoder, joint=self.joint)
        if self.view_bank is not None:
            return BankedViews(
                self, self.features, self.train_index, self.view_bank, self.seed, upstream
            )
        return FrozenViews(self, self.features)


def _losses(temperature: float) -> dict[str, HeadLosses]:
    """Losses of the M-step by their word, as `HeadLosses`."""

    def double_softmax(logits: Tensor, label: Tensor) -> Tensor:
        return double_softmax_cross_entropy_per_head(logits.softmax(dim=-1), label)

    return {
        "double_softmax": double_softmax,
        "ce": tempered_cross_entropy_per_head,
        "tce": partial(tempered_cross_entropy_per_head, temperature=temperature),
    }


def _shares(prior: str | Sequence[float], num_clusters: int) -> Tensor | None:
    """Shares (K,) of the clusters that training starts with; None where they stay equal."""
    if isinstance(prior, str):
        check_word("proto.module.prior", prior, PRIORS)
        return None if prior == "uniform" else torch.full((num_clusters,), 1 / num_clusters)
    shares = torch.tensor(prior, dtype=torch.float32)  # (K,)
    fits = shares.shape == (num_clusters,) and bool((shares >= 0).all())
    if not fits or not 0 < float(shares.sum()) < math.inf:
        raise UsageError(
            f"proto.module.prior {list(prior)} must hold one share for each of {num_clusters} "
            "clusters, none negative and not all 0; or give the word uniform or estimated"
        )
    return shares / shares.sum()
