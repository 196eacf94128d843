from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spice_pl.data.sampler import KeyedBatches
from spice_pl.errors import UsageError

SUBSET = torch.arange(100, 130)


def drawn(batches: KeyedBatches, epoch: int = 0) -> list[tuple[list[int], list[int]]]:
    batches.set_epoch(epoch)
    made = [(index.tolist(), rounds.tolist()) for index, rounds in batches]
    assert len(batches) == len(made)
    return made


def images(batches: KeyedBatches, epoch: int = 0) -> list[int]:
    return [image for index, _ in drawn(batches, epoch) for image in index]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 12},
        {"batch_size": 6, "num_samples": 60},
        {"batch_size": 9, "num_samples": 26, "group_size": 13, "drop_last": False},
    ],
    ids=["plain", "rounds", "groups"],
)
def test_ranks_interleaved_give_the_batches_of_one_process(
    world_size: int, settings: dict[str, Any]
) -> None:
    whole = drawn(KeyedBatches(SUBSET, seed=0, **settings))
    parts = [
        drawn(KeyedBatches(SUBSET, seed=0, rank=rank, world_size=world_size, **settings))
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for i, (index, rounds) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert part[i] == (index[rank::world_size], rounds[rank::world_size])
            assert part[i][0]  # DistributedDataParallel waits for every rank in every batch


def test_an_epoch_is_a_shuffle_of_the_subset() -> None:
    order = images(KeyedBatches(SUBSET, 10, seed=0))
    assert sorted(order) == SUBSET.tolist()
    assert order != SUBSET.tolist()


def test_order_depends_on_seed_stream_and_epoch_and_on_nothing_else() -> None:
    torch.manual_seed(0)
    first = images(KeyedBatches(SUBSET, 10, seed=0), epoch=3)
    torch.manual_seed(1)
    used = KeyedBatches(SUBSET, 10, seed=0)
    images(used, epoch=7)
    assert images(used, epoch=3) == first
    others = [
        images(KeyedBatches(SUBSET, 10, seed=1), epoch=3),
        images(KeyedBatches(SUBSET, 10, seed=0, stream=1), epoch=3),
        images(KeyedBatches(SUBSET, 10, seed=0), epoch=4),
    ]
    assert first not in others
    assert images(KeyedBatches(SUBSET, 5, seed=0), epoch=3) == first  # nor on the batch size


def test_a_longer_epoch_goes_in_whole_rounds_each_with_its_own_number() -> None:
    batches = KeyedBatches(SUBSET, 15, seed=0, num_samples=75)
    keys: list[tuple[int, int]] = []
    for epoch in range(3):
        pairs = [
            pair
            for index, rounds in drawn(batches, epoch)
            for pair in zip(index, rounds, strict=True)
        ]
        numbers = [number for _, number in pairs]
        first = 3 * epoch  # 75 samples of 30 images begin 3 rounds
        assert numbers == [first] * 30 + [first + 1] * 30 + [first + 2] * 15
        for number in range(first, first + 2):
            assert sorted(i for i, n in pairs if n == number) == SUBSET.tolist()
        keys += pairs
    assert len(set(keys)) == len(keys)  # no view is ever seen twice


def test_batches_never_span_two_groups() -> None:
    batches = KeyedBatches(SUBSET, 8, seed=0, num_samples=26, group_size=13, drop_last=False)
    made = drawn(batches)
    assert [len(index) for index, _ in made] == [8, 5, 8, 5]
    order = [image for index, _ in made for image in index]
    assert len(set(order)) == 26


@pytest.mark.parametrize(
    ("drop_last", "sizes"), [(True, [8, 8, 8]), (False, [8, 8, 8, 6])], ids=["drop", "keep"]
)
def test_incomplete_last_batch(drop_last: bool, sizes: list[int]) -> None:
    made = drawn(KeyedBatches(SUBSET, 8, seed=0, drop_last=drop_last))
    assert [len(index) for index, _ in made] == sizes


def test_few_images_fill_a_large_batch_in_rounds() -> None:
    # Stage 3 may have fewer reliable images than a batch of labels.
    few = torch.tensor([7, 11, 13])
    made = drawn(KeyedBatches(few, 8, seed=0, num_samples=16))
    assert [len(index) for index, _ in made] == [8, 8]
    order: Tensor = torch.tensor([image for index, _ in made for image in index])
    assert sorted(order[:3].tolist()) == sorted(order[3:6].tolist()) == few.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9, "world_size": 2}, "batch_size 9 cannot be shared evenly by 2 devices"),
        ({"batch_size": 31}, "batch_size 31 is larger than the 30 images .* at most 30"),
        (
            {"batch_size": 29, "drop_last": False, "world_size": 2},
            "the last batch of 1 images cannot be shared by 2 devices",
        ),
    ],
)
def test_batches_that_cannot_be_made_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KeyedBatches(SUBSET, seed=0, **settings)
