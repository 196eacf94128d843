"""One DataModule for all stages; the settings decide which views of which images it yields.

Batches of uint8 images are moved to the training device and become views there, so no loader
processes are needed. A training batch is `Views(index, views)`, without labels.

Shapes: B images in this rank's part of a batch, S side in pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spice_pl.data.augment import View
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.data.sampler import KeyedBatches, PartneredBatches


@dataclass
class Views:
    """A batch of views that a stage trains on.

    Attributes:
        index: (B,) position of each image in the data set.
        views: (B, 3, S, S) normalised images, by name of the view.
    """

    index: Tensor
    views: dict[str, Tensor]


@dataclass
class Pixels:
    """A batch before its views are made: index (B,), round (B,), images (B, 3, S, S) uint8."""

    index: Tensor
    round: Tensor
    images: Tensor


@dataclass(frozen=True)
class Stream:
    """One sequence of training batches.

    Attributes:
        views: views by name; each image of a batch is shown in every view.
        batch_size: images in a global batch, over all ranks.
        num_samples: images in an epoch; None visits each image once.
        group_size: images in a group that batches do not cross (an E-step buffer); None means the
            whole epoch.
        drop_last: whether to drop a last batch that is not full.
        subset: (n,) indices to draw from; None means the training images.
        extra: whether to draw from the data set's extra images too, if it has any (STL10).
        partners: (N, P) candidates for the partner of each image. A random one is added to the
            second half of the batch, which is then twice as large. None adds no partners.
    """

    views: Mapping[str, View]
    batch_size: int
    num_samples: int | None = None
    group_size: int | None = None
    drop_last: bool = True
    subset: Tensor | None = None
    extra: bool = False
    partners: Tensor | None = None


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
    ) -> None:
        super().__init__()
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

    def train_dataloader(self) -> DataLoader[Pixels] | CombinedLoader:
        """Return the loader of the only stream, or a combined loader of all streams."""
        loaders = {name: self._loader(self._batches(name)) for name in self.streams}
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
            where = pixels.index.to(device)
            no_uniforms = torch.empty(len(where), 0, device=device)
            yield Views(where, {"plain": self.plain(pixels.images.to(device), no_uniforms)})

    def on_after_batch_transfer(
        self, batch: Pixels | dict[str, Pixels], dataloader_idx: int
    ) -> Views | dict[str, Views]:
        """Make the views, on the device the batch was moved to."""
        if isinstance(batch, dict):
            return {name: self._views(name, pixels) for name, pixels in batch.items()}
        if self.trainer is not None and not self.trainer.training:
            no_uniforms = torch.empty(len(batch.index), 0, device=batch.index.device)
            return Views(batch.index, {"plain": self.plain(batch.images, no_uniforms)})
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
        images = torch.from_numpy(self.images.images[index.numpy()]).to(device)
        pixels = Pixels(index.to(device), torch.full_like(index, number, device=device), images)
        return self._views(next(iter(self.streams)), pixels, views)

    def _views(self, stream: str, pixels: Pixels, made: Mapping[str, View] | None = None) -> Views:
        views = {}
        for name, view in (self.streams[stream].views if made is None else made).items():
            key = _key(self.stage, stream, name)
            # Keyed by round, not by epoch: an epoch may draw an image more than once.
            uniforms = keyed_uniform(
                self.seed, pixels.round, pixels.index, key, view.num_uniforms
            )  # (B, U)
            views[name] = view(pixels.images, uniforms)
        return Views(pixels.index, views)

    def _plain_loader(self, index: Tensor) -> DataLoader[Pixels]:
        rank, world_size = self._rank
        mine = torch.split(index[rank::world_size], self.predict_batch_size)
        return self._loader([(part, part) for part in mine])

    def _loader(
        self, batches: KeyedBatches | PartneredBatches | list[tuple[Tensor, Tensor]]
    ) -> DataLoader[Pixels]:
        return DataLoader(self._pixels, sampler=batches, batch_size=None, collate_fn=_whole)

    @property
    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class PixelDataset(Dataset[Pixels]):
    """Data set whose items are whole batches of uint8 pixels, copied from the memory map."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, batch: tuple[Tensor, Tensor]) -> Pixels:
        """Return the pixels of a drawn batch."""
        index, rounds = batch
        return Pixels(index, rounds, torch.from_numpy(self.images.pixels(index.numpy())))


def _whole(batch: Any) -> Any:
    return batch


def _key(*names: str) -> int:
    """Return a hash of names that is the same in every process, unlike Python's own."""
    return zlib.crc32("/".join(names).encode())
