"""Samplers whose order is a pure function of (seed, epoch), so that any run can be resumed.

Shapes: n images in the subset, b images in this rank's part of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from spice_pl.data.keyed import keyed_generator, keyed_uniform
from spice_pl.errors import UsageError


class KeyedBatches(Sampler[tuple[Tensor, Tensor]]):
    """Batches of (index, round), shuffled by (seed, epoch) and the same for any number of ranks.

    An epoch has `num_samples` images: complete shuffled rounds over the subset and a part of one
    more. A batch never crosses a group of `group_size` images. Each rank takes every
    `world_size`-th image of the global batch, which therefore does not depend on the number of
    ranks.

    Args:
        subset: (n,) indices to draw from.
        batch_size: images in a global batch.
        seed: seed of the run.
        stream: number of this stream among the streams of the stage.
        num_samples: images in an epoch; None means n.
        group_size: images in a group; None means `num_samples`.
        drop_last: whether to drop a last batch that is not full.
        rank: number of this process among `world_size`.
        world_size: number of processes.
        skip: batches of the first epoch that were finished before the run was resumed.

    Raises:
        UsageError: the subset cannot fill a batch, or the ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        subset: Tensor,
        batch_size: int,
        seed: int,
        stream: int = 0,
        *,
        num_samples: int | None = None,
        group_size: int | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
    ) -> None:
        self.num_samples = len(subset) if num_samples is None else num_samples
        self.group_size = self.num_samples if group_size is None else group_size
        if drop_last and batch_size % world_size:
            raise UsageError(
                f"batch_size {batch_size} cannot be shared evenly by {world_size} devices; "
                f"choose a multiple of {world_size}"
            )
        last = self.group_size % batch_size
        if not drop_last and 0 < last < world_size:
            # DistributedDataParallel needs images of every batch on every rank.
            raise UsageError(
                f"the last batch of {last} images cannot be shared by {world_size} devices; "
                "choose another batch_size"
            )
        if drop_last and self.group_size < batch_size:
            raise UsageError(
                f"batch_size {batch_size} is larger than the {self.group_size} images to draw "
                f"from; lower it to at most {self.group_size}"
            )
        self.subset, self.batch_size, self.seed, self.stream = subset, batch_size, seed, stream
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.epoch, self.skip = 0, skip

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration draws; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_group = self.group_size / self.batch_size
        batches = math.floor(per_group) if self.drop_last else math.ceil(per_group)
        return self.num_samples // self.group_size * batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index, rounds = self._order()
        skip, self.skip = self.skip, 0
        for group in range(self.num_samples // self.group_size):
            start = group * self.group_size
            for offset in range(0, self.group_size, self.batch_size):
                end = min(offset + self.batch_size, self.group_size)
                if self.drop_last and end - offset < self.batch_size:
                    break
                skip -= 1
                if skip >= 0:
                    continue
                mine = slice(start + offset + self.rank, start + end, self.world_size)
                yield index[mine], rounds[mine]  # (b,), (b,)

    def _order(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the epoch, and the round of each, which is the key of its views."""
        n = len(self.subset)
        num_rounds = math.ceil(self.num_samples / n)
        first = self.epoch * num_rounds
        order = [
            torch.randperm(n, generator=keyed_generator(self.seed, self.stream, first + i))
            for i in range(num_rounds)
        ]
        index = self.subset[torch.cat(order)[: self.num_samples]]
        rounds = torch.arange(first, first + num_rounds).repeat_interleave(n)[: self.num_samples]
        return index, rounds


class PartneredBatches(Sampler[tuple[Tensor, Tensor]]):
    """Batches whose second half holds one random partner of each image of the first half.

    A partner is drawn by a hash of (seed, round, image). It has its own round number, so that an
    image that is its own partner is shown in another view.

    Args:
        batches: batches of the first halves.
        partners: (N, P) positions of the candidates for each image's partner.
        seed: seed of the run.
        stream: number of this stream among the streams of the stage.
    """

    def __init__(self, batches: KeyedBatches, partners: Tensor, seed: int, stream: int = 0) -> None:
        self.batches, self.partners = batches, partners
        self.seed, self.stream = seed, stream

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration draws; Lightning calls this."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, rounds in self.batches:
            drawn = keyed_uniform(self.seed, rounds, index, self.stream, 1)[:, 0]  # (b,)
            column = (drawn * self.partners.shape[1]).long()
            partner = self.partners[index, column]
            yield torch.cat([index, partner]), torch.cat([rounds, -1 - rounds])  # (2b,) each
