"""Semi-supervised training: one module for every method, some images labelled, all images used.

A method is a selector (which images are labelled, `functional/selectors.py`), a threshold (which
predictions on unlabelled images are trained on, `nn/thresholds.py`) and extra losses (`LOSSES` in
`stages/semi_losses.py`). All methods share the rest: a weak and a strong view, one concatenated
forward pass, the learning rate of FixMatch, and an averaged model as result.

Shapes: N images, n of them for training, L labelled and U unlabelled images of a batch,
D features, K clusters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import count_table, match_clusters
from spice_pl.functional.consistency import weighted_cross_entropy
from spice_pl.functional.device import to_device
from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.functional.momentum import EmaPairs
from spice_pl.functional.selectors import OracleLabels
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.optimizers import sgd_settings
from spice_pl.nn.thresholds import Threshold
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage, check_word, load_clustering, width_of
from spice_pl.stages.semi_labels import LabelSource, Selector
from spice_pl.stages.semi_losses import LOSSES, Unlabelled

INIT = ("joint", "encoder", "scratch")


class SemiSupervisedModule(Stage):
    """Learn the labels of selected images, and the same cluster for both views of every image.

    The result is the exponential moving average of the weights at the last step.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        selector: one of `functional/selectors.py`: (embeddings (n, D), probs (n, K), num_clusters,
            generator) -> `SelectedLabels`.
        threshold: weight of the label that the weak view gives, and its statistics.
        losses: name in `LOSSES` to weight.
        init: "joint" starts from encoder and head of the upstream stage; "encoder" from its
            encoder, with a new linear head; "scratch" trains a new encoder and linear head, so only
            the labels carry over.
        hidden_dim: width of the head's hidden layer with "joint", unless the upstream's head has
            another one; None means D.
        steps_per_epoch: optimizer steps of an epoch.
        kmeans_steps: optimizer steps between refreshed k-means labels, for losses that read them.
        unlabeled_weight: weight of the consistency loss.
        ema_decay: share of the averaged weights that stays at each step.
        lr: learning rate of SGD with Nesterov momentum at the start; lr·cos(7πt/16T) at step t of
            T.
        encoder_lr: learning rate of the encoder, where it differs from the head's.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; parameters of one dimension have none.
        features_file: features (N, D) from elsewhere to select on: .npy, .safetensors or .csv.
        probs_file: cluster probabilities (N, K) from elsewhere to select on, likewise.
        seed: seed of the selector's draws and of k-means.
    """

    name = "semi"
    kmeans_labels: Tensor
    _ema: EmaPairs | None = None

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        selector: Selector | OracleLabels,
        threshold: Threshold,
        losses: Mapping[str, float] | None = None,
        init: str = "joint",
        hidden_dim: int | None = None,
        steps_per_epoch: int = 1024,
        kmeans_steps: int = 1024,
        unlabeled_weight: float = 1.0,
        ema_decay: float = 0.999,
        lr: float = 0.03,
        encoder_lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        features_file: str | None = None,
        probs_file: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = width_of(backbone)
        head: ClusterHead | LinearHead
        if init == "joint":
            head = ClusterHead(width, hidden_dim or width, num_clusters)
        else:
            head = linear = LinearHead(width, num_clusters)
            if init == "encoder":
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.encoder, self.head = backbone, head
        self.ema_encoder = copy.deepcopy(backbone).requires_grad_(False)
        self.ema_head = copy.deepcopy(head).requires_grad_(False)
        self.threshold = threshold
        self.losses = {key: weight for key, weight in (losses or {}).items() if weight}
        self.label_source = LabelSource(selector, num_clusters, features_file, probs_file, seed)
        self.oracle = self.label_source.oracle
        self.init, self.steps_per_epoch, self.num_clusters = init, steps_per_epoch, num_clusters
        self.kmeans_steps = kmeans_steps
        self.unlabeled_weight, self.ema_decay = unlabeled_weight, ema_decay
        self.lr, self.encoder_lr = lr, encoder_lr
        self.momentum, self.weight_decay = momentum, weight_decay
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the averaged model."""
        probs: Tensor = self.ema_head(self.ema_encoder(images).float())
        return probs

    def training_step(self, batch: dict[str, Views], batch_idx: int) -> Tensor:
        """Return the joint loss of a batch; one forward pass takes all its views."""
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        num_labelled, num_unlabelled = len(labelled.index), len(unlabelled.index)
        images = torch.cat(
            [labelled.views["weak"], unlabelled.views["weak"], unlabelled.views["strong"]]
        )  # (L + 2U, 3, S, S)
        logits = self.head.logits(self.encoder(images)).float()
        on_labelled, on_weak, on_strong = torch.split(
            logits, [num_labelled, num_unlabelled, num_unlabelled]
        )
        supervised = F.cross_entropy(on_labelled, self.pseudo_labels[labelled.index])
        probs = on_weak.detach().softmax(dim=1)  # (U, K)
        if self.threshold.learns:  # from the batches of all ranks, before it is applied
            self.threshold.update(
                *(self.across_ranks(each, even=True) for each in (unlabelled.index, probs))
            )
        # Eq. 8: the label of the weak view, of weight 0 where it is not sure enough
        weight, label = self.threshold(probs), probs.max(dim=1).indices  # (U,) each
        consistency = weighted_cross_entropy(on_strong, label, weight)
        loss = supervised + self.unlabeled_weight * consistency  # Eq. 9
        values = {
            "loss_labelled": supervised,
            "loss_unlabelled": consistency,
            "confident_fraction": weight.mean(),
        }
        read = Unlabelled(
            on_strong, probs, label, weight, self._kmeans_label(unlabelled.index), self.threshold
        )
        for name, loss_weight in self.losses.items():
            values[f"loss_{name}"] = LOSSES[name](read)
            loss = loss + loss_weight * values[f"loss_{name}"]
        for name, value in {"loss": loss, **values}.items():
            self.record(f"train/{name}", value)
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD with Nesterov momentum, and FixMatch's cosine per step."""
        if self.encoder_lr is None:
            rates = [([*self.encoder.parameters(), *self.head.parameters()], self.lr)]
        else:
            rates = [
                ([*self.encoder.parameters()], self.encoder_lr),
                ([*self.head.parameters()], self.lr),
            ]
        groups = [
            {"params": [p for p in part if (p.ndim > 1) == decays], "lr": lr, "weight_decay": decay}
            for part, lr in rates
            for decays, decay in ((True, self.weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=True,
            **sgd_settings(self.device),
        )
        steps = (self.trainer.max_epochs or 1) * self.steps_per_epoch  # T
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: math.cos(7 * math.pi * step / (16 * steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check `init`, and that the losses exist and have the statistics that they read."""
        check_word(f"{self.name}.module.init", self.init, INIT)
        if unknown := sorted(self.losses.keys() - LOSSES.keys()):
            raise UsageError(f"{self.name}.module.losses {unknown} are none of {sorted(LOSSES)}")
        if lacking := sorted(self.losses.keys() - self.threshold.supports - {"kmeans"}):
            raise UsageError(
                f"{self.name}.module.losses {lacking} need statistics that "
                f"{type(self.threshold).__name__} does not keep; drop these losses or take another "
                "threshold"
            )

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Start from the weights of the upstream as `init` says; select the labelled images."""
        self.check(images, streams)
        self._load(upstream)
        for average, model in ((self.ema_encoder, self.encoder), (self.ema_head, self.head)):
            average.load_state_dict(model.state_dict())
        self.train_index = torch.from_numpy(images.train_index)
        label = self.label_source.labels(images, upstream, self.name)  # (n,)
        self.reliable_index = self.train_index[label >= 0]
        self.pseudo_labels = torch.full((len(images),), -1)  # (N,), -1 where unlabelled
        self.pseudo_labels[self.reliable_index] = label[label >= 0]
        drawn = len(images) + (0 if images.extra is None else len(images.extra))
        self.threshold.begin(drawn)
        if "kmeans" in self.losses:  # a buffer, so that a resumed run keeps its labels
            self.register_buffer("kmeans_labels", torch.full((drawn,), -1))
        return {
            name: replace(
                stream,
                num_samples=self.steps_per_epoch * stream.batch_size,
                subset=self.reliable_index if name == "labelled" else None,
            )
            for name, stream in streams.items()
        }

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the averaged encoder and head."""
        return {"encoder": self.ema_encoder, "head": self.ema_head}

    def predict(self, batch: Views) -> Prediction:
        """Return features and probabilities of the averaged model."""
        features = self.ema_encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, self.ema_head(features).float())

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Return the images (n,) that the selector labelled, and their labels (n,)."""
        chosen = to_device(self.reliable_index, self.pseudo_labels.device)
        return self.reliable_index, self.pseudo_labels[chosen]

    def on_fit_start(self) -> None:
        """Move the labels to the device of the images; pair the models that are on it now."""
        self.pseudo_labels = self.pseudo_labels.to(self.device)
        self._ema = None

    def on_train_epoch_start(self) -> None:
        """Keep the averaged model in eval mode; log the share of images that have a label."""
        self.ema_encoder.eval()
        self.ema_head.eval()
        fraction = len(self.reliable_index) / len(self.pseudo_labels)
        self.record("train/reliable_fraction", fraction)

    def on_train_batch_start(self, *_: Any) -> None:
        """Refresh the k-means labels every `kmeans_steps`, if a loss reads them."""
        if "kmeans" in self.losses and self.global_step % self.kmeans_steps == 0:
            self._refresh_kmeans()

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the average after the optimizer's step."""
        if self._ema is None:
            self._ema = EmaPairs((self.ema_encoder, self.encoder), (self.ema_head, self.head))
        self._ema.update_(self.ema_decay)

    def on_train_epoch_end(self) -> None:
        """Log the confidence that the threshold asks of each cluster."""
        if self.threshold.learns:
            for cluster, level in enumerate(self.threshold.levels()):
                self.record(f"train/threshold_{cluster}", level)

    def _kmeans_label(self, index: Tensor) -> Tensor:
        if "kmeans" in self.losses:
            return self.kmeans_labels[index]
        return torch.full_like(index, -1)

    @torch.no_grad()
    def _refresh_kmeans(self) -> None:
        """Cluster the features of the averaged model; the labelled images alone name clusters."""
        features = self.plain_features(self.ema_encoder, self.train_index)  # (n, D)
        clusters, _ = cosine_kmeans(
            features, self.num_clusters, generator=keyed_generator(self.seed, self.global_step)
        )
        index = to_device(self.train_index, self.device)
        # Both in one copy to the processor, (n,) each.
        both = torch.stack([clusters, self.pseudo_labels[index]]).cpu().unbind()
        table = count_table(both[0], both[1], self.num_clusters, self.num_clusters)
        named = to_device(match_clusters(table), self.device)[clusters]  # (n,)
        named = self.gathered(named)[0] if self.trainer.world_size > 1 else named
        self.kmeans_labels[index] = named

    def _load(self, upstream: RunFolder | None) -> None:
        """Load what `init` takes from the upstream stage."""
        if self.init == "scratch":
            return
        if upstream is None:
            raise UsageError(
                f"{self.name}.module.init={self.init} starts from the encoder of an upstream and "
                f"{self.name}.upstream is null; name one or use {self.name}.module.init=scratch"
            )
        if self.init == "encoder":
            upstream.load_weights("encoder.safetensors", self.encoder)
            return
        way_out = (
            f"{self.name}.module.init=joint continues from a head; use "
            f"{self.name}.module.init=encoder"
        )
        self.head = load_clustering(upstream, self.encoder, self.head, way_out)
        self.ema_head = copy.deepcopy(self.head).requires_grad_(False)
