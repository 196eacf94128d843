"""One DataModule for all stages; the settings decide which views of which images it yields.

Batches of uint8 images are moved to the training device and become views there, so no loader
processes are needed. On a GPU all images are kept there, or each batch is copied while the step
before it runs (`data/transfer.py`). A training batch is `Views(index, views)`, without labels.

Shapes: B images in this rank's part of a batch, S side in pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spice_pl.data.augment import PlainView, View
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.data.sampler import KeyedBatches, PartneredBatches
from spice_pl.data.transfer import Ahead, check_mode, resident_store
from spice_pl.functional.device import to_device

T = TypeVar("T")


@dataclass
class Views:
    """A batch of views that a stage trains on.

    Attributes:
        index: (B,) position of each image in the data set.
        views: (B, 3, S, S) normalised images, by name of the view; (B, n, 3, s, s) of a view that
            makes n patches per image.
    """

    index: Tensor
    views: dict[str, Tensor]


@dataclass
class Pixels:
    """A batch before its views are made: index (B,), round (B,), images (B, 3, S, S) uint8.

    Index and round stay on the processor, which draws the random numbers of the views.
    """

    index: Tensor
    round: Tensor
    images: Tensor

    def to(self, device: torch.device) -> Pixels:
        """Return the batch with its images on a device; the processor does not wait for them."""
        return Pixels(self.index, self.round, to_device(self.images, device))


@dataclass(frozen=True)
class Stream:
    """One sequence of training batches.

    Attributes:
        views: views by name; each image of a batch is shown in every view, without `turns`.
        batch_size: images in a global batch, over all ranks.
        num_samples: images in an epoch; None visits each image once.
        group_size: images in a group that batches do not cross (an E-step buffer); None means the
            whole epoch.
        drop_last: whether to drop a last batch that is not full.
        subset: (n,) indices to draw from; None means the training images.
        extra: whether to draw from the data set's extra images too, if it has any (STL10).
        partners: (N, P) candidates for the partner of each image. A random one is added to the
            second half of the batch, which is then twice as large. None adds no partners.
        turns: names of the views that are shown alone, in turn, each for an equal share of the
            epochs; a name may come several times. None shows all views in every epoch.
    """

    views: Mapping[str, View]
    batch_size: int
    num_samples: int | None = None
    group_size: int | None = None
    drop_last: bool = True
    subset: Tensor | None = None
    extra: bool = False
    partners: Tensor | None = None
    turns: Sequence[str] | None = None


class ViewsDataModule(pl.LightningDataModule):
    """Training batches of each stream's views, and the plain view of every image to predict.

    Args:
        images: the data set.
        streams: streams by name; a single one yields `Views`, several yield a dictionary of them.
        plain: the view that features and clusters are computed on.
        seed: seed of the run.
        predict_batch_size: images per rank in a batch of prediction.
        num_watched: largest number of evenly spaced images that scores during training use.
        stage: name of the stage, a part of the random key: stages draw different views of the
            same image.
        mode: where images are kept while a GPU trains: "resident", "stream", or "auto", which
            decides by the free memory. Batches are the same.

    Raises:
        UsageError: `mode` is another word.
    """

    def __init__(
        self,
        images: ImageSet,
        streams: Mapping[str, Stream],
        plain: View,
        *,
        seed: int,
        predict_batch_size: int = 256,
        num_watched: int = 2000,
        stage: str = "",
        mode: str = "auto",
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.mode = mode
        self.images, self.streams, self.plain = images, streams, plain
        self.seed, self.stage = seed, stage
        self.predict_batch_size, self.num_watched = predict_batch_size, num_watched
        self._pixels = PixelDataset(images)
        self._batches_done = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of finished batches of the epoch; their order follows from the key."""
        trainer = self.trainer
        if trainer is None:
            return {"batches_done": 0}
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return {"batches_done": 0 if done == trainer.num_training_batches else done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the batches that were finished when the state was saved."""
        self._batches_done = state_dict["batches_done"]

    def setup(self, stage: str) -> None:
        """Copy all images to the GPU, where they are to be kept there; free them after training."""
        keeps = stage == "fit" and self.trainer is not None
        extra = any(stream.extra for stream in self.streams.values())
        self._pixels.store = (
            resident_store(self.images, self._device, self.mode, extra=extra) if keeps else None
        )

    def train_dataloader(self) -> Any:
        """Return the loader of the only stream, or a combined loader of all streams."""
        loaders: dict[str, Any] = {name: self._loader(self._batches(name)) for name in self.streams}
        if self._device.type != "cpu" and self._pixels.store is None:
            loaders = {name: Ahead(loader, self._device) for name, loader in loaders.items()}
        return (
            next(iter(loaders.values()))
            if len(loaders) == 1
            else CombinedLoader(loaders, mode="min_size")
        )

    def val_dataloader(self) -> DataLoader[Pixels]:
        """Return a loader of at most `num_watched` evenly spaced images among those scored."""
        index = torch.from_numpy(self.images.score_index)
        return self._plain_loader(index[:: math.ceil(len(index) / self.num_watched)])

    def predict_dataloader(self) -> DataLoader[Pixels]:
        """Return a loader of all images in order; the ranks share them without padding."""
        return self._plain_loader(torch.arange(len(self.images)))

    def plain_batches(self, index: Tensor, device: torch.device) -> Iterator[Views]:
        """Yield plain views of this rank's share of an index: positions rank, rank + R, ..."""
        for pixels in self._plain_loader(index):
            yield self._plain_views(pixels.to(device))

    def on_after_batch_transfer(
        self, batch: Pixels | dict[str, Pixels], dataloader_idx: int
    ) -> Views | dict[str, Views]:
        """Make the views, on the device the batch was moved to."""
        if isinstance(batch, dict):
            return {name: self._views(name, pixels) for name, pixels in batch.items()}
        if self.trainer is not None and not self.trainer.training:
            return self._plain_views(batch)
        return self._views(next(iter(self.streams)), batch)

    def _batches(self, name: str) -> KeyedBatches | PartneredBatches:
        stream, key = self.streams[name], _key(self.stage, name)
        batches = KeyedBatches(
            self._drawn(stream),
            stream.batch_size,
            self.seed,
            key,
            num_samples=stream.num_samples,
            group_size=stream.group_size,
            drop_last=stream.drop_last,
            rank=self._rank[0],
            world_size=self._rank[1],
            skip=self._batches_done,
        )
        if stream.partners is None:
            return batches
        return PartneredBatches(batches, stream.partners, self.seed, key)

    def _drawn(self, stream: Stream) -> Tensor:
        if stream.subset is not None:
            return stream.subset
        return torch.from_numpy(self.images.drawn_index(extra=stream.extra))

    def make(
        self, index: Tensor, device: torch.device, views: Mapping[str, View], number: int = 0
    ) -> Views:
        """Make views of images outside of an epoch.

        Args:
            index: (B,) images.
            device: device of the views.
            views: views by name. One that has the name of a view of the first stream draws the
                same random numbers as in training.
            number: number of the round, a part of the random key.
        """
        images = torch.from_numpy(self.images.images[index.numpy()])
        pixels = Pixels(index, torch.full_like(index, number), images).to(device)
        return self._views(next(iter(self.streams)), pixels, views)

    def _views(self, stream: str, pixels: Pixels, made: Mapping[str, View] | None = None) -> Views:
        views, device = {}, pixels.images.device
        for name, view in (self._shown(self.streams[stream]) if made is None else made).items():
            key = _key(self.stage, stream, name)
            # Keyed by round, not by epoch: an epoch may draw an image more than once.
            uniforms = keyed_uniform(
                self.seed, pixels.round, pixels.index, key, view.num_uniforms
            )  # (B, U)
            if not isinstance(view, PlainView):  # a view of your own finds both on one device
                uniforms = to_device(uniforms, device)
            views[name] = view(pixels.images, uniforms)
        return Views(to_device(pixels.index, device), views)

    def _shown(self, stream: Stream) -> Mapping[str, View]:
        """Return the views of this epoch."""
        if stream.turns is None or self.trainer is None:
            return stream.views
        name = in_turn(stream.turns, self.trainer.current_epoch, self.trainer.max_epochs)
        return {name: stream.views[name]}

    def _plain_views(self, pixels: Pixels) -> Views:
        device = pixels.images.device
        no_uniforms = torch.empty(len(pixels.index), 0, device=device)
        plain = self.plain(pixels.images, no_uniforms)
        return Views(to_device(pixels.index, device), {"plain": plain})

    def _plain_loader(self, index: Tensor) -> DataLoader[Pixels]:
        rank, world_size = self._rank
        mine = torch.split(index[rank::world_size], self.predict_batch_size)
        return self._loader([(part, part) for part in mine])

    def _loader(
        self, batches: KeyedBatches | PartneredBatches | list[tuple[Tensor, Tensor]]
    ) -> DataLoader[Pixels]:
        return DataLoader(self._pixels, sampler=batches, batch_size=None, collate_fn=_whole)

    @property
    def _device(self) -> torch.device:
        trainer = self.trainer
        return torch.device("cpu") if trainer is None else trainer.strategy.root_device

    @property
    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class PixelDataset(Dataset[Pixels]):
    """Data set whose items are whole batches of uint8 pixels.

    They are copied from the memory map, or from `store`, all images on a GPU, where there is one.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.store: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, batch: tuple[Tensor, Tensor]) -> Pixels:
        """Return the pixels of a drawn batch."""
        index, rounds = batch
        if self.store is not None:
            chosen = to_device(index, self.store.device)
            return Pixels(index, rounds, self.store.index_select(0, chosen))
        return Pixels(index, rounds, torch.from_numpy(self.images.pixels(index.numpy())))


def in_turn(values: Sequence[T], epoch: int, num_epochs: int | None) -> T:
    """Return the value of an epoch, where each value has an equal share of the epochs.

    Examples:
        >>> [in_turn([16, 32], epoch, 4) for epoch in range(4)]
        [16, 16, 32, 32]
    """
    return values[min(epoch * len(values) // (num_epochs or 1), len(values) - 1)]


def _whole(batch: Any) -> Any:
    return batch


def _key(*names: str) -> int:
    """Return a hash of names that is the same in every process, unlike Python's own."""
    return zlib.crc32("/".join(names).encode())
