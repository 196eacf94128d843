"""Where the heads of stage 2 get their features: the three branches of SPICE, Fig. 3(b).

The first branch, embeddings of plain images, is always that of stage 1. The other two, weak and
strong views, pass an encoder that is frozen (`FrozenViews`, `BankedViews`) or moves
(`MovingEncoder`).

Shapes: N images, n views of an image, b images of a batch, M images of a cycle, H heads, B slots of
a step, D features.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.keyed import keyed_uniform
from spice_pl.errors import UsageError
from spice_pl.nn.frozen import Frozen
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Stage
from spice_pl.system.progress import PAUSE, Bar

VIEWS = ("weak", "strong")  # of the E-step, of the M-step


class FrozenViews:
    """Fresh views of a frozen encoder: no gradient, BatchNorm in eval mode.

    Every view passes the encoder once, in its cycle; all heads and repeats read the same features.
    Plain features are those that stage 1 stored.

    Args:
        stage: with the encoder.
        features: (N, D) of the plain images.
    """

    def __init__(self, stage: Stage, features: Tensor) -> None:
        self.stage, self.features = stage, features

    def stream(self, stream: Stream) -> Stream:
        """Return the stream with the views that training batches need."""
        return stream

    def on_fit_start(self) -> None:
        """Make the copy of the encoder that views pass, once its weights are where they stay."""
        self.encode = Frozen(self.stage.encoder)

    def on_epoch_start(self) -> None:
        """Keep the frozen encoder frozen: Lightning has just put every module in train mode."""
        self.stage.encoder.eval()

    def embed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return features (b, D) of the weak views, and what `read` needs of the strong ones."""
        weak, strong = (self.encode(batch.views[name]).float() for name in VIEWS)
        return weak, strong

    def read(self, strong: Tensor, slots: Tensor) -> Tensor:
        """Return the strong views' features (H, B, D) of slots (H, B)."""
        return F.embedding(slots, strong)  # copies rows; `strong[slots]` is four times as slow

    def plain(self, index: Tensor) -> Tensor:
        """Return the plain images' features (b, D)."""
        return self.features[index].to(self.stage.device)

    def predict(self, batch: Views) -> Tensor:
        """Return the plain images' features (b, D) that belong to the kept head."""
        return self.plain(batch.index.cpu())

    def keep(self) -> None:
        """Remember the encoder of this moment beside the kept head."""

    def on_train_end(self) -> None:
        """Do what comes after the last epoch."""


class BankedViews(FrozenViews):
    """A frozen encoder and n weak and n strong views of each training image, embedded once.

    Each cycle draws one of the n by a keyed hash, so the encoder works n times for an image and
    kind of view, whatever the number of epochs. Banks lie on disk in half precision, memory-mapped;
    a run that goes on reuses its banks, and they are removed after the last epoch.

    Args:
        stage: with the encoder; its trainer's `default_root_dir` is the run's folder.
        features: (N, D) of the plain images.
        train_index: images that training may see.
        num_views: n, at least 1.
        seed: of the run.
        upstream: whose encoder and features these are.
    """

    def __init__(
        self,
        stage: Stage,
        features: Tensor,
        train_index: Tensor,
        num_views: int,
        seed: int,
        upstream: RunFolder,
    ) -> None:
        super().__init__(stage, features)
        self.train_index, self.num_views, self.seed = train_index, num_views, seed
        self.made_from: dict[str, Any] = {"upstream": upstream.digest(), "seed": seed}
        self.made_from |= {"shape": [num_views, *features.shape]}

    def stream(self, stream: Stream) -> Stream:
        """Return a stream of positions only; its views are what the banks hold."""
        self.made_from["views"] = {name: repr(stream.views[name]) for name in VIEWS}
        self.views = {name: stream.views[name] for name in VIEWS}
        return Stream({}, **{k: v for k, v in vars(stream).items() if k != "views"})

    def on_fit_start(self) -> None:
        """Fill the banks, unless an earlier part of this run did."""
        super().on_fit_start()
        trainer = self.stage.trainer
        self.folder = Path(trainer.default_root_dir) / "view_bank"
        stamp = self.folder / "made_from.json"
        fresh = not stamp.is_file() or json.loads(stamp.read_text()) != self.made_from
        trainer.strategy.barrier("stamp read")
        if fresh:
            if trainer.is_global_zero:
                stamp.unlink(missing_ok=True)
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in VIEWS:
                    shape = tuple(self.made_from["shape"])
                    np.lib.format.open_memmap(self._file(name), "w+", np.float16, shape)
            trainer.strategy.barrier("banks made")
            self._fill()
            trainer.strategy.barrier("banks filled")
            if trainer.is_global_zero:
                RunFolder(self.folder).write_json(stamp.name, self.made_from)
        self.banks: dict[str, NDArray[np.float16]] = {
            name: np.load(self._file(name), mmap_mode="r") for name in VIEWS
        }

    def embed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Draw one of the n embedded views of each image, (b, D) and (b, D)."""
        index, epoch = batch.index.cpu(), self.stage.current_epoch
        weak, strong = (
            as_tensor(self.banks[name][self._drawn(key, epoch, index), index.numpy()])
            for key, name in enumerate(VIEWS)
        )
        return weak.to(self.stage.device).float(), strong.to(self.stage.device).float()

    def on_train_end(self) -> None:
        """Remove the banks: nothing reads them any more."""
        self.banks.clear()
        self.stage.trainer.strategy.barrier("banks read")
        if self.stage.trainer.is_global_zero:
            for name in VIEWS:
                self._file(name).unlink()
            (self.folder / "made_from.json").unlink()
            self.folder.rmdir()

    def _drawn(self, key: int, epoch: int, index: Tensor) -> NDArray[np.int64]:
        """Which of the n views (b,) an image shows in an epoch."""
        uniform = keyed_uniform(self.seed, epoch, index, key, 1)[:, 0]
        drawn: NDArray[np.int64] = (uniform * self.num_views).long().numpy()
        return drawn

    def _fill(self) -> None:
        stage, trainer = self.stage, self.stage.trainer
        banks = {name: np.lib.format.open_memmap(self._file(name), "r+") for name in VIEWS}
        mine = self.train_index[trainer.global_rank :: trainer.world_size]
        total = self.num_views * len(mine)
        enabled = trainer.is_global_zero
        with Bar("views, once", total, enabled=enabled, pause=PAUSE) as bar:
            for part, number in product(torch.split(mine, 256), range(self.num_views)):
                batch = stage.datamodule.make(part, stage.device, self.views, number)
                for name in VIEWS:
                    with _precision(stage):
                        features = self.encode(batch.views[name])  # (b, D)
                    half = features.half()
                    if not half.isfinite().all():
                        raise UsageError(
                            f"a feature of {float(features.abs().max()):.3g} does not fit the half "
                            "precision of a bank; use proto.module.view_bank=null"
                        )
                    banks[name][number, part.numpy()] = half.cpu().numpy()
                bar.advance(len(part))
                bar.show()
        for bank in banks.values():
            bank.flush()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


class MovingEncoder(FrozenViews):
    """An encoder that changes during stage 2: what SPICE warns of, and its authors' code does.

    BatchNorm is in train mode. Without `joint` no weight moves, only BatchNorm's statistics do, as
    in the authors' code; with it the M-step trains the encoder too (Table VII, Joint). The encoder
    that belongs to the kept head is kept with it.

    Args:
        stage: with the encoder.
        features: (N, D) of the plain images by the encoder of stage 1.
        kept: a copy of the encoder, for the result.
        joint: whether the encoder's weights are trained.
    """

    def __init__(self, stage: Stage, features: Tensor, kept: nn.Module, *, joint: bool) -> None:
        super().__init__(stage, features)
        self.kept, self.joint = kept, joint

    def on_fit_start(self) -> None:
        """Refuse several processes: each would have an encoder of its own."""
        if self.stage.trainer.world_size > 1:
            raise UsageError(
                "an encoder that moves in stage 2 runs in one process; use trainer=auto, or "
                "proto.module.joint=none with proto.module.bn_mode=frozen"
            )

    def on_epoch_start(self) -> None:
        """Put the encoder in train mode, the kept one in eval mode."""
        self.stage.encoder.train()
        self.kept.eval()

    @torch.no_grad()
    def embed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return weak features (b, D), and strong ones or, to be trained on, strong images."""
        weak, strong = (batch.views[name] for name in VIEWS)
        encode = self.stage.encoder
        return encode(weak).float(), strong if self.joint else encode(strong).float()

    def read(self, strong: Tensor, slots: Tensor) -> Tensor:
        """Return features (H, B, D); `joint` encodes each image of a step once, with gradient."""
        if not self.joint:
            return super().read(strong, slots)
        images, place = torch.unique(slots, return_inverse=True)  # (u,), (H, B)
        features: Tensor = self.stage.encoder(strong[images]).float()  # (u, D)
        return features[place]

    @torch.no_grad()
    def plain(self, index: Tensor) -> Tensor:
        """Return the plain images' features (b, D) by the encoder as it is now, in eval mode."""
        self.stage.encoder.eval()
        device, make = self.stage.device, self.stage.datamodule.make
        plain = {"plain": self.stage.datamodule.plain}
        features = [
            self.stage.encoder(make(part, device, plain).views["plain"]).float()
            for part in torch.split(index, 256)
        ]
        self.stage.encoder.train()
        return torch.cat(features)

    def predict(self, batch: Views) -> Tensor:
        """Return the plain images' features (b, D) by the kept encoder."""
        features: Tensor = self.kept(batch.views["plain"]).float()
        return features

    def keep(self) -> None:
        """Copy the encoder."""
        self.kept.load_state_dict(self.stage.encoder.state_dict())


def _precision(stage: Stage) -> AbstractContextManager[Any]:
    """The trainer's precision, which Lightning enters for steps only."""
    return stage.trainer.strategy.precision_plugin.forward_context()
