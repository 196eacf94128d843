import math

import pytest
import torch
from torch import Tensor

from spice_pl.functional.contrastive import info_nce
from spice_pl.functional.neighbors import unit_rows


def embeddings(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(num, 8, generator=generator, dtype=torch.float64))


def test_agrees_with_the_formula_written_out() -> None:
    query, key, negatives = embeddings(5, 0), embeddings(5, 1), embeddings(11, 2)
    total = 0.0
    for q, k in zip(query, key, strict=True):
        positive = math.exp(float(q @ k) / 0.2)
        negative = sum(math.exp(float(q @ n) / 0.2) for n in negatives)
        total -= math.log(positive / (positive + negative))
    loss = info_nce(query, key, negatives.T, temperature=0.2)
    assert loss.item() == pytest.approx(total / 5, abs=1e-12)


def test_equal_similarities_give_the_logarithm_of_their_number() -> None:
    row = embeddings(1, 0)
    queue = row.T.expand(-1, 7)
    assert info_nce(row, row, queue, 0.2).item() == pytest.approx(math.log(8))


def test_an_empty_queue_gives_no_loss() -> None:
    query, key = embeddings(3, 0), embeddings(3, 1)
    assert info_nce(query, key, query.new_zeros(8, 0), 0.2).item() == 0


def test_order_of_the_queue_does_not_matter() -> None:
    query, key, queue = embeddings(3, 0), embeddings(3, 1), embeddings(9, 2).T
    torch.testing.assert_close(
        info_nce(query, key, queue.flip(1), 0.2), info_nce(query, key, queue, 0.2)
    )


def test_only_the_query_gets_a_gradient() -> None:
    query, key, queue = (embeddings(4, seed).requires_grad_() for seed in range(3))
    info_nce(query, key, queue.T, 0.2).backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert query.grad.abs().sum() > 0
    assert key.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    row = embeddings(1, 0)
    with pytest.raises(ValueError, match=f"temperature {temperature} is not positive"):
        info_nce(row, row, row.T, temperature)


def test_refuses_a_queue_with_one_key_per_row() -> None:
    row, queue = embeddings(2, 0), embeddings(5, 1)
    with pytest.raises(ValueError, match=r"queue \(D, Q\) = \(5, 8\) disagree; .* per column"):
        info_nce(row, row, queue, 0.2)
