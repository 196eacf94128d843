"""Where the heads of stage 2 get their features: the three branches of SPICE, Fig. 3(b).

The first branch, embeddings of plain images, always uses the encoder of stage 1. The other two
branches, weak and strong views, pass an encoder that is frozen (`FrozenViews`, `BankedViews`) or
changes during stage 2 (`MovingEncoder`).

Shapes: N images, n views of an image, b images of a batch, M images of a cycle, H heads, B slots of
a step, D features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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
from spice_pl.data.transfer import keeps
from spice_pl.errors import UsageError
from spice_pl.functional.device import to_device
from spice_pl.nn.frozen import Frozen
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.stages.base import Stage
from spice_pl.system.progress import PAUSE, Bar

VIEWS = ("weak", "strong")  # for the E-step, for the M-step


class FrozenViews:
    """New views in each cycle by a frozen encoder: no gradient, BatchNorm in eval mode.

    Every view passes the encoder once; all heads and repeats of its cycle read the same features.
    Features of plain images are those that stage 1 stored.

    Args:
        stage: stage whose encoder is used.
        features: (N, D) features of the plain images.
    """

    def __init__(self, stage: Stage, features: Tensor) -> None:
        self.stage, self.features = stage, features

    def stream(self, stream: Stream) -> Stream:
        """Return the stream with the views that training batches need: all of them here."""
        return stream

    def on_fit_start(self) -> None:
        """Copy the encoder for the views, now that its weights are on their device.

        A GPU with room for the features of plain images keeps them, as it keeps images.
        """
        self.encode = Frozen(self.stage.encoder)
        device, mode = self.stage.device, self.stage.datamodule.mode
        if keeps(self.features.nbytes, device, mode):
            self.features = self.features.to(device)

    def on_epoch_start(self) -> None:
        """Put the encoder in eval mode again: Lightning has put every module in train mode."""
        self.stage.encoder.eval()

    def embed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return features (b, D) of the weak views, and what `read` needs for the strong views."""
        weak, strong = (self.encode(batch.views[name]).float() for name in VIEWS)
        return weak, strong

    def read(
        self, strong: Tensor, slots: Tensor, batches: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batch (B,) of each step, and the features (H, B, D) of its strong views.

        Args:
            strong: what `embed` returned for the strong views, of all images of a cycle.
            slots: (H, S) images that have a label.
            batches: (steps, B) positions among the S, on the processor.
        """
        for chosen in to_device(batches, slots.device):
            # `strong[slots]` takes four times as long
            yield chosen, F.embedding(slots[:, chosen], strong)

    def plain(self, index: Tensor) -> Tensor:
        """Return features (b, D) of plain images."""
        rows = self.features[to_device(index, self.features.device)]
        return to_device(rows, self.stage.device)

    def predict(self, batch: Views) -> Tensor:
        """Return features (b, D) of plain images by the encoder that belongs to the kept head."""
        on_gpu = self.features.device.type != "cpu"
        return self.plain(batch.index if on_gpu else batch.index.cpu())

    def keep(self) -> None:
        """Keep the present encoder with the kept head; a frozen one is the same all the time."""

    def on_train_end(self) -> None:
        """Remove what was stored for training."""


class BankedViews(FrozenViews):
    """n weak and n strong views of each training image, embedded once by a frozen encoder.

    Each cycle draws one of the n by a keyed hash, so 2n views per image pass the encoder, whatever
    the number of epochs. A view that is the plain one needs no bank: its features are those that
    stage 1 stored. The banks are memory-mapped files in half precision, in the folder of the run:
    a resumed run reuses them, and they are removed after the last epoch. A GPU with room for them
    gets a copy, so that no batch waits for the files.

    Args:
        stage: stage whose encoder is used; `default_root_dir` of its trainer is the folder.
        features: (N, D) features of the plain images.
        train_index: positions of the training images.
        num_views: n, at least 1.
        seed: seed of the run.
        upstream: run that encoder and features are from.
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
        self.banks: dict[str, NDArray[np.float16]] = {}
        self.resident: dict[str, Tensor] = {}

    def stream(self, stream: Stream) -> Stream:
        """Return the stream without views: batches hold positions, and the banks hold the views."""
        self.made_from["views"] = {name: repr(stream.views[name]) for name in VIEWS}
        self.views = {name: stream.views[name] for name in VIEWS}
        return Stream({}, **{k: v for k, v in vars(stream).items() if k != "views"})

    def on_fit_start(self) -> None:
        """Fill the banks, unless an earlier part of this run has filled them."""
        super().on_fit_start()
        trainer = self.stage.trainer
        plain = self.stage.datamodule.plain
        self.banked = [name for name in VIEWS if self.views[name] != plain]
        self.folder = Path(trainer.default_root_dir) / "view_bank"
        stamp = self.folder / "made_from.json"
        if self.stage.restored_epoch >= (trainer.max_epochs or 0):  # only the prediction is left
            self._remove()
            return
        fresh = not stamp.is_file() or json.loads(stamp.read_text()) != self.made_from
        trainer.strategy.barrier("stamp read")
        if fresh:
            if trainer.is_global_zero:
                stamp.unlink(missing_ok=True)
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in self.banked:
                    shape = tuple(self.made_from["shape"])
                    np.lib.format.open_memmap(self._file(name), "w+", np.float16, shape)
            trainer.strategy.barrier("banks made")
            self._fill()
            trainer.strategy.barrier("banks filled")
            if trainer.is_global_zero:
                RunFolder(self.folder).write_json(stamp.name, self.made_from)
        self.banks = {name: np.load(self._file(name), mmap_mode="r") for name in self.banked}
        self.resident = self._copied()

    def embed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return one weak and one strong view per image out of the n, (b, D) each."""
        epoch = self.stage.current_epoch
        if self.resident:
            weak, strong = (
                self.resident[name][self._drawn(key, epoch, batch.index), batch.index]
                if name in self.banks
                else self.resident[name][batch.index]
                for key, name in enumerate(VIEWS)
            )
            return weak.float(), strong.float()
        index = batch.index.cpu()
        weak, strong = (
            as_tensor(self.banks[name][self._drawn(key, epoch, index).numpy(), index.numpy()])
            if name in self.banks
            else self.features[to_device(index, self.features.device)]
            for key, name in enumerate(VIEWS)
        )
        device = self.stage.device
        return to_device(weak, device).float(), to_device(strong, device).float()

    def on_train_end(self) -> None:
        """Remove the banks."""
        self.banks.clear()
        self.resident = {}
        self.stage.trainer.strategy.barrier("banks read")
        self._remove()

    def _remove(self) -> None:
        """Remove the banks; the stamp first, so that none is taken for whole after a stop."""
        if self.stage.trainer.is_global_zero and self.folder.is_dir():
            (self.folder / "made_from.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _copied(self) -> dict[str, Tensor]:
        """Return banks and plain features on a GPU where images may be kept too; else nothing."""
        device, mode = self.stage.device, self.stage.datamodule.mode
        tables = {
            name: as_tensor(self.banks[name]) if name in self.banks else self.features
            for name in VIEWS
        }
        if not keeps(sum(each.nbytes for each in tables.values()), device, mode):
            return {}
        return {name: each.to(device) for name, each in tables.items()}

    def _drawn(self, key: int, epoch: int, index: Tensor) -> Tensor:
        """Return the numbers (b,), 0 to n - 1, of the views that the images have in an epoch."""
        uniform = keyed_uniform(self.seed, epoch, index, key, 1)[:, 0]
        return (uniform * self.num_views).long()

    def _fill(self) -> None:
        stage, trainer = self.stage, self.stage.trainer
        banks = {name: np.lib.format.open_memmap(self._file(name), "r+") for name in self.banked}
        views = {name: self.views[name] for name in self.banked}
        mine = self.train_index[trainer.global_rank :: trainer.world_size]
        total = self.num_views * len(mine)
        enabled = trainer.is_global_zero
        with Bar("changed images (views)", total, enabled=enabled, pause=PAUSE) as bar:
            for part, number in product(torch.split(mine, 256), range(self.num_views)):
                batch = stage.datamodule.make(part, stage.device, views, number)
                for name in self.banked:
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
    """An encoder that changes during stage 2; the paper freezes it, its authors' code does not.

    BatchNorm is in train mode. Without `joint` its running statistics change and no weight does, as
    in the authors' code; with `joint` the M-step trains the encoder too (Table VII, Joint). A copy
    of the encoder is kept together with the kept head.

    Args:
        stage: stage whose encoder is used.
        features: (N, D) features of the plain images by the encoder of stage 1.
        kept: copy of the encoder, which gets the weights that belong to the kept head.
        joint: whether the weights of the encoder are trained.
    """

    def __init__(self, stage: Stage, features: Tensor, kept: nn.Module, *, joint: bool) -> None:
        super().__init__(stage, features)
        self.kept, self.joint = kept, joint

    def on_fit_start(self) -> None:
        """Refuse several processes: the encoder of each would change differently."""
        if self.stage.trainer.world_size > 1:
            raise UsageError(
                "an encoder that changes in stage 2 runs in one process; use trainer=auto, or "
                "proto.module.joint=none with proto.module.bn_mode=frozen"
            )

    def on_epoch_start(self) -> None:
        """Put the encoder in train mode and the kept one in eval mode."""
        self.stage.encoder.train()
        self.kept.eval()

    @torch.no_grad()
    def embed(self, batch: Views) -> tuple[Tensor, Tensor]:
        """Return features (b, D) of the weak views, and of the strong ones; images with `joint`."""
        weak, strong = (batch.views[name] for name in VIEWS)
        encode = self.stage.encoder
        return encode(weak).float(), strong if self.joint else encode(strong).float()

    def read(
        self, strong: Tensor, slots: Tensor, batches: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield as above; `joint` encodes each image of a step once, with gradient."""
        if not self.joint:
            yield from super().read(strong, slots, batches)
            return
        device, here = strong.device, slots.cpu()  # one wait per cycle; `unique` waits on a GPU
        for chosen, there in zip(batches, to_device(batches, device), strict=True):
            images, place = torch.unique(here[:, chosen], return_inverse=True)  # (u,), (H, B)
            features: Tensor = self.stage.encoder(strong[to_device(images, device)]).float()
            yield there, features[to_device(place, device)]  # (u, D) -> (H, B, D)

    @torch.no_grad()
    def plain(self, index: Tensor) -> Tensor:
        """Return features (b, D) of plain images by the present encoder, in eval mode."""
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
        """Return features (b, D) of plain images by the kept encoder."""
        features: Tensor = self.kept(batch.views["plain"]).float()
        return features

    def keep(self) -> None:
        """Copy the present encoder."""
        self.kept.load_state_dict(self.stage.encoder.state_dict())


def _precision(stage: Stage) -> AbstractContextManager[Any]:
    """Return the context of the trainer's precision, which Lightning enters for steps alone."""
    return stage.trainer.strategy.precision_plugin.forward_context()
