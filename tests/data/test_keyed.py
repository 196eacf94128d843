import math

import pytest
import torch

from spice_pl.data.keyed import keyed_generator, keyed_seed, keyed_uniform

INDEX = torch.arange(4000)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


def test_numbers_are_fixed_for_good() -> None:
    """A changed hash would change every view of every published run."""
    drawn = keyed_uniform(1, 2, torch.tensor([3, 1_000_003]), 4, 3)
    expected = [[8424336, 3658217, 10656500], [14295706, 140620, 16738103]]
    assert (drawn * 2**24).long().tolist() == expected
    assert keyed_seed(1, 2, 3) == 4906264314479254948


def test_numbers_are_uniform_in_the_unit_interval() -> None:
    drawn = keyed_uniform(0, 0, INDEX, 0, 25)  # 100,000 numbers
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom: 99 ± 14
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.004)
    low_bits = (drawn * 2**24).long() % 256
    assert float(torch.bincount(low_bits.flatten()).float().std()) < 2 * math.sqrt(100_000 / 256)


@pytest.mark.parametrize(
    ("seed", "epoch", "shift", "stream"), [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
)
def test_neighbouring_keys_are_independent(seed: int, epoch: int, shift: int, stream: int) -> None:
    one = keyed_uniform(0, 0, INDEX, 0, 8)
    other = keyed_uniform(seed, epoch, INDEX + shift, stream, 8)
    if shift:
        assert torch.equal(one[1:], other[:-1])
        one, other = one[:-1] + 0, one[1:]
    assert abs(_correlation(one, other)) < 0.025  # 4.5 standard errors
    assert not (one == other).all(dim=1).any()


def test_numbers_of_one_image_are_independent() -> None:
    drawn = keyed_uniform(0, 0, INDEX, 0, 12)
    table = torch.corrcoef(drawn.T) - torch.eye(12)
    assert float(table.abs().max()) < 0.08


def test_arguments_do_not_stand_in_for_each_other() -> None:
    keys = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    drawn = {
        tuple(keyed_uniform(seed, epoch, torch.tensor([index]), stream, 2)[0].tolist())
        for seed, epoch, index in keys
        for stream in range(4)
    }
    assert len(drawn) == 256


def test_an_image_draws_the_same_in_any_batch() -> None:
    whole = keyed_uniform(7, 3, INDEX, 1, 5)
    order = torch.randperm(len(INDEX), generator=keyed_generator(0))
    assert torch.equal(keyed_uniform(7, 3, INDEX[order], 1, 5), whole[order])
    assert torch.equal(keyed_uniform(7, 3, INDEX[17:18], 1, 5), whole[17:18])
    assert torch.equal(keyed_uniform(7, 3, INDEX, 1, 2), whole[:, :2])


def test_epoch_may_differ_from_image_to_image() -> None:
    epoch = torch.tensor([0, 5, 2**40])
    drawn = keyed_uniform(0, epoch, torch.tensor([9, 9, 9]), 0, 4)
    for row, value in zip(drawn, epoch.tolist(), strict=True):
        assert torch.equal(row, keyed_uniform(0, value, torch.tensor([9]), 0, 4)[0])


def test_extreme_keys_and_empty_draws() -> None:
    index = torch.tensor([0, 2**62, -1])
    assert keyed_uniform(2**63 - 1, 2**62, index, -5, 4).isfinite().all()
    assert keyed_uniform(0, 0, index, 0, 0).shape == (3, 0)
    assert keyed_uniform(0, 0, index[:0], 0, 4).shape == (0, 4)


def test_generators_follow_their_key() -> None:
    one, same, other = (
        torch.randperm(100, generator=keyed_generator(*key)) for key in ((0, 1), (0, 1), (1, 0))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0 <= keyed_seed(0, -1) < 2**63


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_numbers() -> None:
    assert torch.equal(
        keyed_uniform(3, 1, INDEX.cuda(), 2, 9).cpu(), keyed_uniform(3, 1, INDEX, 2, 9)
    )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"index .* is not a vector of int64"):
        keyed_uniform(0, 0, torch.zeros(3), 0, 1)
    with pytest.raises(ValueError, match="num -1 is negative"):
        keyed_uniform(0, 0, INDEX, 0, -1)
