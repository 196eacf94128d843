"""The base of all stages: data, upstream, prediction and logging.

Shapes: B images, N images of the whole data set, D features, K clusters, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views, ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.device import cluster_sizes, to_device
from spice_pl.functional.reliability import local_consistency
from spice_pl.nn.heads import ClusterHead, LinearHead, head_of
from spice_pl.nn.optimizers import keep_rates
from spice_pl.runs.folder import RunFolder

WATCHED_NEIGHBORS = 10  # of some 2,000 watched images, the image itself counted


@dataclass
class Prediction:
    """What a stage predicts from the plain view of some images.

    Attributes:
        index: (B,) positions in the data set.
        features: (B, D) raw features.
        probs: (B, K) cluster probabilities; None from a stage that has no clusters.
        head_clusters: (H, B) clusters by each head of a stage that trains many, in validation;
            else None.
    """

    index: Tensor
    features: Tensor
    probs: Tensor | None
    head_clusters: Tensor | None = None


class Stage(pl.LightningModule):
    """A LightningModule that is prepared with the data set and the upstream stage.

    The job calls `check`, `prepare`, Lightning's fit and predict, then writes `weights`. A stage
    whose predictions have probabilities logs `val/*` of the watched images. No method receives a
    true label: only a callback reads them, to log `truth/*`.
    """

    name = ""  # key of its settings, such as moco, for messages; the job may set another
    has_clusters = True
    trains_encoder = True  # for the estimate of memory
    reads_many = False  # whether `upstream` may name several stages
    more_upstream: Sequence[RunFolder] = ()  # those after the first; the job sets it
    oracle = False  # whether it trains on true labels, which every result must say
    chosen_head: int | None = None  # of many, the one chosen without labels after the last epoch
    encoder: nn.Module
    _sizes: Tensor
    _seen: list[tuple[Tensor, Tensor]]

    def __init__(self) -> None:
        super().__init__()
        # Name to (sum of weighted values, sum of weights) of this epoch so far, (2,) each.
        self.epoch_sums: dict[str, Tensor] = {}
        self.restored_epoch = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the epoch that the run continues with."""
        self.restored_epoch = int(checkpoint["epoch"])

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint between these two batches would hold the whole state."""
        return True

    @property
    def feature_dim(self) -> int:
        """D, the width of the features."""
        return width_of(self.encoder)

    @property
    def datamodule(self) -> ViewsDataModule:
        """Data module of the trainer."""
        datamodule: ViewsDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check the settings against the data, before any stage starts.

        Raises:
            UsageError: a setting does not fit the data.
        """

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Load what the upstream stage made; complete the streams.

        Returns:
            The streams to train on, with the settings that depend on the data.

        Raises:
            UsageError: the upstream does not fit.
        """
        raise NotImplementedError

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the modules handed on, by the name of their file: encoder, head, heads."""
        raise NotImplementedError

    def predict(self, batch: Views) -> Prediction:
        """Return features, and probabilities if there are any, of the plain view."""
        raise NotImplementedError

    def labelled(self) -> tuple[Tensor, Tensor] | None:
        """Return the images (n,) that have a label to train on, and these labels (n,).

        None from a stage that trains on no labels. Labels are pseudo-labels, or true ones where
        `oracle` is set.
        """
        return None

    def validation_step(self, batch: Views, batch_idx: int) -> Any:
        """Collect confidences and cluster sizes; return the prediction, for callbacks."""
        prediction = self.predict(batch)
        if prediction.probs is not None:
            probs = prediction.probs
            confidence, clusters = probs.max(dim=1)
            sizes = cluster_sizes(clusters, probs.shape[1])  # (K,)
            self.record("val/confidence", confidence.mean(), weight=len(clusters))
            self._sizes = self._sizes + sizes
            self._seen.append((prediction.features, clusters))
        return prediction

    def on_validation_epoch_start(self) -> None:
        """Forget the images of the validation before."""
        self._seen = []
        self._sizes = torch.zeros((), dtype=torch.long, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the shares of the largest and the smallest cluster, and the mean agreement."""
        if self._sizes.ndim:
            sizes = self.across_ranks(self._sizes[None]).sum(dim=0).float()  # (K,)
            shares = sizes / sizes.sum()
            self.record("val/largest_cluster_fraction", shares.max())
            self.record("val/smallest_cluster_fraction", shares.min())
        if self._seen:
            features, clusters = (
                self.across_ranks(torch.cat(parts))  # not by batch: ranks may have fewer batches
                for parts in zip(*self._seen, strict=True)
            )
            neighbors = min(WATCHED_NEIGHBORS, len(clusters))
            agreement = local_consistency(features, clusters, neighbors)
            self.record("val/agreement", agreement.mean())
            self._seen = []

    def predict_step(self, batch: Views, batch_idx: int) -> Prediction:
        """Return the prediction of a batch; `PredictionWriter` writes it."""
        return self.predict(batch)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that logs the means of an epoch."""
        return [EpochMeans()]

    def on_train_start(self) -> None:
        """Keep scheduled learning rates as tensors on a GPU, also those of a checkpoint."""
        for each in self.trainer.lr_scheduler_configs:
            keep_rates(each.scheduler.optimizer, self.device)

    def on_train_end(self) -> None:
        """Give all ranks the same buffers."""
        self.share_buffers()

    def on_validation_start(self) -> None:
        """Give all ranks the same buffers, so that scores do not depend on the rank."""
        self.share_buffers()

    def share_buffers(self) -> None:
        """Copy the buffers of rank 0 to all ranks: each has its own BatchNorm statistics."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                buffer.copy_(self.gathered(buffer)[0])

    def record(self, name: str, value: Tensor | float, weight: int = 1) -> None:
        """Log the weighted mean of a value over the batches of an epoch and over ranks.

        In training the sums are kept here and not by Lightning, so that a checkpoint inside an
        epoch holds them.
        """
        if isinstance(value, Tensor):
            value = to_device(value.detach(), self.device).to(torch.float32)
        else:
            value = torch.full((), value, dtype=torch.float32, device=self.device)
        if self.trainer.training:
            sums = torch.stack([value * weight, torch.full_like(value, weight)])
            before = self.epoch_sums.get(name)
            # In place: sums keep their address on the device from step to step.
            self.epoch_sums[name] = sums if before is None else before.to(sums.device).add_(sums)
            return
        self.log(name, value, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    def epoch_means(self) -> dict[str, float]:
        """Return the mean so far of each value recorded in this epoch, on this rank alone."""
        if not self.epoch_sums:
            return {}
        sums = self.stacked_sums().cpu()  # the processor waits once
        return {
            name: float(total / weight)
            for name, (total, weight) in zip(self.epoch_sums, sums, strict=True)
        }

    def stacked_sums(self) -> Tensor:
        """Return the sums of all recorded values, (n, 2); those of a checkpoint are on no GPU."""
        return torch.stack([each.to(self.device) for each in self.epoch_sums.values()])

    def across_ranks(self, rows: Tensor, *, even: bool = False) -> Tensor:
        """Join the rows of all ranks in the order of the global batch, (b, ...) -> (B, ...).

        Rank r holds rows r, r + R, r + 2R, ... of R ranks; some ranks may hold one row less. With
        `even` all ranks hold as many, and the processor does not wait for their numbers.
        """
        world_size = self.trainer.world_size
        if world_size == 1:
            return rows
        if even:
            return self.gathered(rows).transpose(0, 1).flatten(0, 1)
        own = torch.full((), len(rows), device=rows.device)
        counts = self.gathered(own).tolist()  # R numbers
        longest = max(counts)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        gathered = self.gathered(padded)  # (R, longest, ...)
        return gathered.transpose(0, 1).flatten(0, 1)[: sum(counts)]

    def joined(self, rows: Tensor) -> Tensor:
        """Join the rows of all ranks, (b, ...) -> (B, ...), rank by rank, for a loss of the batch.

        The gradient flows back to the rank that the rows are from.
        """
        if self.trainer.world_size == 1:
            return rows
        return cast(Tensor, self.all_gather(rows, sync_grads=True)).flatten(0, 1)  # (R, b, ...)

    @torch.no_grad()
    def plain_features(self, encoder: nn.Module, index: Tensor) -> Tensor:
        """Return the features (n, D) of plain views of images (n,), equal on all ranks.

        Args:
            encoder: network in eval mode, (B, 3, S, S) -> (B, D).
            index: (n,) positions in the data set.
        """
        self.share_buffers()
        batches = self.datamodule.plain_batches(index, self.device)
        features = [encoder(batch.views["plain"]).float() for batch in batches]
        return self.across_ranks(torch.cat(features))

    def gathered(self, tensor: Tensor) -> Tensor:
        """Stack a tensor of one shape over the ranks, (...) -> (R, ...)."""
        return cast(Tensor, self.all_gather(tensor))


def as_stage(module: pl.LightningModule) -> Stage:
    """Return the module that Lightning passes to a callback, typed as a `Stage`.

    Raises:
        TypeError: the module is not a `Stage`, and lacks what the callbacks read.
    """
    if not isinstance(module, Stage):
        raise TypeError(
            f"{type(module).__name__} is not a {Stage.__module__}.Stage; derive it from that class"
        )
    return module


def width_of(backbone: nn.Module) -> int:
    """Return D, the width of a backbone's features."""
    return int(backbone.num_features)  # type: ignore[arg-type]


def load_clustering(
    upstream: RunFolder, encoder: nn.Module, head: ClusterHead | LinearHead, way_out: str
) -> ClusterHead | LinearHead:
    """Load encoder and head of an upstream stage that clusters.

    Args:
        upstream: run of that stage.
        encoder: network that gets the weights of the encoder.
        head: head of the D and K that the upstream's must have.
        way_out: end of the message where the upstream has no head.

    Returns:
        The upstream's head, of whatever kind and number of hidden units.

    Raises:
        UsageError: weights are missing or of another architecture.
    """
    upstream.load_weights("encoder.safetensors", encoder)
    if not (upstream.path / "head.safetensors").is_file():
        raise UsageError(f"{upstream.path} has no head.safetensors; {way_out}")
    given = head_of(upstream.read_weights("head.safetensors"))
    if _ends(given) == _ends(head):
        head = given
    upstream.load_weights("head.safetensors", head)
    return head


def _ends(head: ClusterHead | LinearHead) -> tuple[int, int]:
    """Return D and K of a head."""
    layers = [each for each in head.modules() if isinstance(each, nn.Linear)]
    return layers[0].in_features, layers[-1].out_features


def check_word(setting: str, word: str, words: Sequence[str]) -> None:
    """Check that a setting is one of the words it may be.

    Raises:
        UsageError: `word` is none of `words`.
    """
    if word not in words:
        raise UsageError(f"{setting} {word!r} is none of {', '.join(words)}")


def check_number(stage: str, key: str, value: float, fits: bool, rule: str) -> None:
    """Check a number of the settings of a stage.

    Args:
        stage: name of the stage.
        key: name of the number, below `module`.
        value: the number.
        fits: whether it follows the rule.
        rule: what it has to be, for the message.

    Raises:
        UsageError: it does not fit.
    """
    if not fits:
        raise UsageError(f"{stage}.module.{key} {value} is not {rule}")


def check_count(stage: str, num_clusters: int | None) -> None:
    """Check that K is known to a stage that clusters without the features of another one.

    Raises:
        UsageError: it is not.
    """
    if not num_clusters:
        raise UsageError(
            f"stage={stage} clusters from its first step and dataset.num_clusters is not a number; "
            "give one (stage=estimate_k estimates it from the features of stage=moco)"
        )


def check_batch(stage: str, streams: Mapping[str, Stream], num_clusters: int) -> None:
    """Check that a batch has at least as many images as there are clusters.

    Raises:
        UsageError: it has fewer.
    """
    for name, stream in streams.items():
        if stream.batch_size < num_clusters:
            raise UsageError(
                f"{stage}.streams.{name}.batch_size {stream.batch_size} is less than the "
                f"{num_clusters} clusters, so a batch cannot hold all of them; give at least "
                f"{num_clusters}, better several times as many"
            )


class EpochMeans(pl.callbacks.Checkpoint):
    """Log the means of what a stage recorded in an epoch; keep its sums in checkpoints.

    Derived from Checkpoint because Lightning calls such callbacks last, after the stage's own
    `on_train_epoch_end`, which may record too. A checkpoint holds the sums of each rank, so that a
    resumed run adds in the same order.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means over all ranks and clear the sums."""
        stage = as_stage(pl_module)
        if not stage.epoch_sums:
            return
        sums = stage.stacked_sums()  # (n, 2)
        if trainer.world_size > 1:
            sums = stage.gathered(sums).sum(dim=0)
        total, weight = sums.unbind(1)
        means = (total / weight).cpu()  # at once: loggers would read each number by itself
        for name, mean in zip(stage.epoch_sums, means, strict=True):
            stage.log(name, mean, on_epoch=True, batch_size=1)
        stage.epoch_sums = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the sums of all ranks, (R, 2) each."""
        stage = as_stage(pl_module)
        sums = {
            name: stage.gathered(each).reshape(-1, 2) for name, each in stage.epoch_sums.items()
        }
        checkpoint["epoch_sums"] = {name: each.cpu() for name, each in sums.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take this rank's sums."""
        stage = as_stage(pl_module)
        saved = checkpoint.get("epoch_sums", {})
        stage.epoch_sums = {name: each[trainer.global_rank] for name, each in saved.items()}
