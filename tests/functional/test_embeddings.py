from __future__ import annotations

import logging
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_pl.functional import neighbors
from spice_pl.functional.embeddings import (
    Whitening,
    fit_projection,
    join_walk,
    neighbor_graph,
    neighbor_walk,
    project,
    smooth,
    smoothed_embeddings,
)
from spice_pl.functional.neighbors import unit_rows

POWERS = {"none": 0.0, "half": 0.5, "full": 1.0}


def blobs(num_samples: int = 120, width: int = 12, num_groups: int = 4, seed: int = 0) -> Tensor:
    """Rows around a few centres, with an offset that all share, as features have."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_groups, width, generator=generator)
    noise = 0.6 * torch.randn(num_samples, width, generator=generator)
    return 2 + centres[torch.arange(num_samples) % num_groups] + noise


def cosines(embeddings: Tensor) -> Tensor:
    return embeddings @ embeddings.T


# The reference: dense, in float64, by a singular value decomposition and loops.


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([row / max(float(np.sqrt((row**2).sum())), 1e-12) for row in rows])


def reference_projection(
    fitted: NDArray[np.float64], new: NDArray[np.float64], d: int, power: float
) -> NDArray[np.float64]:
    mean = unit(fitted).mean(axis=0)
    _, values, directions = np.linalg.svd(unit(fitted) - mean, full_matrices=False)
    return unit((unit(new) - mean) @ directions[:d].T / values[:d] ** power)


def reference_neighbors(
    query: NDArray[np.float64], keys: NDArray[np.float64], k: int, left_out: int | None = None
) -> list[int]:
    order = [int(i) for i in np.argsort(-(keys @ query)) if i != left_out]
    return order[:k]


def reference_states(starts: NDArray[np.float64], k: int, t: int) -> list[NDArray[np.float64]]:
    adjacency = np.zeros((len(starts), len(starts)))
    for i, row in enumerate(starts):
        for j in reference_neighbors(row, starts, k, left_out=i):
            adjacency[i, j] = 1 / k
    weights = (adjacency + adjacency.T) / 2
    weights /= weights.sum(axis=1, keepdims=True)
    states = [starts]
    for _ in range(t):
        states.append(0.5 * states[-1] + 0.5 * weights @ states[-1])
    return states


@pytest.mark.parametrize("whitening", ["none", "half", "full"])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("t", [0, 1, 4])
def test_agrees_with_a_dense_reference(whitening: Whitening, k: int, t: int) -> None:
    features = blobs()
    rows = features.numpy().astype(np.float64)
    starts = reference_projection(rows, rows, 6, POWERS[whitening])
    wanted = unit(reference_states(starts, k, t)[-1])
    found = smoothed_embeddings(
        features, num_components=6, num_neighbors=k, num_steps=t, whitening=whitening
    )
    assert found.dtype == torch.float32
    assert found.shape == (120, 6)
    np.testing.assert_allclose(cosines(found).numpy(), wanted @ wanted.T, atol=2e-5)


def test_samples_outside_the_fit_agree_with_the_same_walk_step_by_step() -> None:
    features, k, t = blobs(), 5, 3
    chosen = torch.randperm(120, generator=torch.Generator().manual_seed(1))[:80]
    rows = features.numpy().astype(np.float64)
    every = reference_projection(rows[chosen.numpy()], rows, 6, 0.5)
    starts = every[chosen.numpy()]
    states = reference_states(starts, k, t)
    wanted = np.empty_like(every)
    wanted[chosen.numpy()] = unit(states[-1])
    for i in set(range(120)) - set(chosen.tolist()):
        near = reference_neighbors(every[i], starts, k)
        current = every[i]
        for state in states[:t]:
            current = 0.5 * current + 0.5 * state[near].mean(axis=0)
        wanted[i] = unit(current[None])[0]
    found = smoothed_embeddings(
        features, num_components=6, num_neighbors=k, num_steps=t, fit_index=chosen
    )
    np.testing.assert_allclose(cosines(found).numpy(), wanted @ wanted.T, atol=2e-5)


def test_no_step_is_the_projection() -> None:
    features = blobs()
    projected = project(features, fit_projection(features, 5))
    assert torch.equal(smoothed_embeddings(features, num_components=5, num_steps=0), projected)
    walk = neighbor_walk(projected, num_steps=0)
    assert torch.equal(join_walk(projected[:3], walk), projected[:3])
    assert torch.equal(
        smoothed_embeddings(
            features, num_components=5, num_steps=0, fit_index=torch.arange(len(features))
        ),
        projected,
    )


def test_one_step_by_hand() -> None:
    root = 0.5**0.5
    # 0 and 1 are each other's nearest, 1 is also the nearest of 2.
    starts = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    # A: 0→1, 1→0, 2→1. (A + Aᵀ)/2: 01 1, 12 ½. Row 1: ⅔ to 0, ⅓ to 2.
    middle = [0.5 * 0.8 + 0.5 * 2 / 3, 0.5 * 0.6 + 0.5 / 3]
    wanted = unit_rows(torch.tensor([[0.9, 0.3], middle, [0.4, 0.8]]))
    torch.testing.assert_close(smooth(starts, 1, 1), wanted)
    walk = neighbor_walk(starts, 1, 1)
    joined = join_walk(torch.tensor([[0.0, -1.0], [root, root]]), walk)
    # (0, -1) is nearest to (1, 0), and (√½, √½) to (0.8, 0.6).
    wanted = unit_rows(torch.tensor([[0.5, -0.5], [(root + 0.8) / 2, (root + 0.6) / 2]]))
    torch.testing.assert_close(joined, wanted)


def test_rows_follow_a_permutation_of_the_samples() -> None:
    features = blobs()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(2))
    found = smoothed_embeddings(features, num_components=6)
    torch.testing.assert_close(
        cosines(smoothed_embeddings(features[order], num_components=6)),
        cosines(found)[order][:, order],
        rtol=0,
        atol=1e-5,
    )


def test_neither_rotation_nor_lengths_of_the_features_matter() -> None:
    features = blobs().double()
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    lengths = 0.1 + 9 * torch.rand(len(features), 1, generator=generator)
    wanted = cosines(smoothed_embeddings(features, num_components=6))
    for other in (features @ rotation, 1e-3 * features, features * lengths):
        found = cosines(smoothed_embeddings(other, num_components=6))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_half_whitening_is_between_none_and_full() -> None:
    features = blobs()
    spread = {}
    names: tuple[Whitening, ...] = ("none", "half", "full")
    for name in names:
        mean, components = fit_projection(features, 6, name)
        spread[name] = ((unit_rows(features) - mean) @ components).std(dim=0, correction=0)
    torch.testing.assert_close(spread["full"], torch.ones(6))
    torch.testing.assert_close(spread["half"], spread["none"].sqrt())
    assert bool((spread["none"].diff() < 0).all())  # largest first


def test_the_largest_entry_of_a_component_is_positive() -> None:
    components = fit_projection(blobs(), 6).components
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


def test_a_copy_of_a_fitted_sample_comes_out_nearly_where_that_sample_does() -> None:
    features = blobs(300, num_groups=5)
    twice = torch.cat([features, features])
    found = smoothed_embeddings(twice, num_components=8, fit_index=torch.arange(300))
    copies = (found[:300] * found[300:]).sum(dim=1)
    assert float(copies.min()) > 0.95
    assert float(copies.mean()) > 0.99
    projected = project(features, fit_projection(features, 8))  # what no neighbour gives
    assert float((projected * found[:300]).sum(dim=1).mean()) < 0.97


def test_samples_outside_the_fit_change_no_other_sample() -> None:
    features = blobs()
    index = torch.arange(80)
    found = smoothed_embeddings(features, num_components=6, fit_index=index)
    alone = smoothed_embeddings(features[:80], num_components=6)
    assert torch.equal(found[:80], alone)
    fewer = smoothed_embeddings(features[:90], num_components=6, fit_index=index)
    torch.testing.assert_close(fewer, found[:90], rtol=0, atol=1e-6)


def test_the_order_of_fit_index_does_not_matter() -> None:
    features = blobs()
    index = torch.arange(0, 120, 2)
    found = smoothed_embeddings(features, num_components=6, fit_index=index)
    turned = smoothed_embeddings(features, num_components=6, fit_index=index.flip(0))
    torch.testing.assert_close(cosines(turned), cosines(found), rtol=0, atol=1e-5)


def test_smoothing_brings_groups_together() -> None:
    features = blobs(400, width=32, num_groups=4)
    group = torch.arange(400) % 4
    same = group[:, None] == group

    def gap(embeddings: Tensor) -> float:
        likeness = cosines(embeddings)
        return float(likeness[same].mean() - likeness[~same].mean())

    gaps = [gap(smoothed_embeddings(features, num_components=16, num_steps=t)) for t in range(4)]
    assert gaps == sorted(gaps)
    assert gaps[3] > gaps[0] + 0.1


@pytest.mark.parametrize(
    ("num_samples", "width", "num_components"), [(1, 4, 3), (2, 4, 3), (5, 3, 64), (6, 40, 10)]
)
def test_few_samples_or_features_leave_zero_columns(
    num_samples: int, width: int, num_components: int
) -> None:
    features = blobs(num_samples, width, num_groups=1)
    found = smoothed_embeddings(features, num_components=num_components, num_neighbors=10)
    assert found.shape == (num_samples, num_components)
    rank = min(num_samples - 1, width, num_components)
    assert bool((found[:, rank:] == 0).all())
    lengths = found.norm(dim=1)
    assert bool((((lengths - 1).abs() < 1e-5) | (lengths == 0)).all())
    assert bool(found.isfinite().all())


def test_with_few_samples_all_others_are_neighbours() -> None:
    starts = unit_rows(blobs(4, 3, num_groups=1) - 2)
    torch.testing.assert_close(smooth(starts, 10), smooth(starts, 3))
    graph = neighbor_graph(starts, 10).toarray()
    np.testing.assert_allclose(graph, (1 - np.eye(4)) / 3, rtol=1e-6)
    assert neighbor_graph(starts[:1]).toarray().tolist() == [[1.0]]
    torch.testing.assert_close(smooth(starts[:1]), starts[:1])


def test_features_that_tell_no_samples_apart_give_zeros() -> None:
    lengths = 0.1 + torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    same = torch.arange(1.0, 8.0) * lengths  # equal directions up to rounding
    assert bool((unit_rows(same) != unit_rows(same)[0]).any())
    for features in (same, torch.zeros(50, 7)):
        for index in (None, torch.arange(20)):
            found = smoothed_embeddings(features, num_components=4, fit_index=index)
            assert bool((found == 0).all())


def test_rank_deficient_features_divide_by_no_zero() -> None:
    wide = blobs(100, 3, num_groups=3) @ torch.randn(
        3, 20, generator=torch.Generator().manual_seed(5)
    )
    found = smoothed_embeddings(wide, num_components=10)
    assert bool((found[:, 3:] == 0).all())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(100))


def test_more_copies_than_neighbours_stay_together() -> None:
    starts = unit_rows(blobs(60) - 2)
    starts[:30] = starts[0]
    graph = neighbor_graph(starts, 10)
    assert graph.diagonal().tolist() == [0.0] * 60
    found = smooth(starts, 10)
    assert float(cosines(found[:30]).min()) > 0.9
    starts = torch.eye(12)[0] + 0.1 * unit_rows(blobs(60) - 2)
    starts[:30] = -torch.eye(12)[0]  # far from all others, whose neighbours they are not
    torch.testing.assert_close(smooth(starts, 10)[:30], starts[:30])


def test_groups_without_an_edge_between_them_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(6)
    one = torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(20, 4, generator=generator)
    two = torch.tensor([0, 0, 1.0, 0]) + 0.1 * torch.randn(20, 4, generator=generator)
    starts = unit_rows(torch.cat([one, two]))
    assert neighbor_graph(starts, 5)[:20, 20:].sum() == 0
    together = smooth(starts, 5, num_steps=10)
    apart = torch.cat([smooth(starts[:20], 5, 10), smooth(starts[20:], 5, 10)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_features_that_are_not_finite(bad: float) -> None:
    features = blobs(20)
    features[3, 2] = features[7, 0] = bad
    with pytest.raises(ValueError, match=r"2 samples have a .*, the first at \[3, 7\]; train or"):
        smoothed_embeddings(features)
    with pytest.raises(ValueError, match="1 samples have a feature that is NaN or infinite"):
        smoothed_embeddings(features[:5], fit_index=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_components": 0}, "num_components 0 is not positive; use at least 1"),
        ({"num_neighbors": 0}, "num_neighbors 0 is not positive; use at least 1"),
        ({"num_steps": -1}, "num_steps -1 is negative; use 0"),
        ({"whitening": "zca"}, "whitening 'zca' is unknown; choose none, half or full"),
        ({"fit_index": torch.tensor([], dtype=torch.long)}, "fit_index names 0 samples with 0 ids"),
        ({"fit_index": torch.tensor([1, 1])}, "names 1 samples with 2 ids; .*none twice"),
    ],
)
def test_refuses_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smoothed_embeddings(blobs(20), **settings)


def test_refuses_no_samples() -> None:
    with pytest.raises(ValueError, match=r"features \(0, 12\) are empty"):
        smoothed_embeddings(blobs(20)[:0])


def test_the_same_input_gives_the_same_bits_and_keeps_it() -> None:
    features = blobs()
    before = features.clone()
    index = torch.arange(80)
    first = smoothed_embeddings(features, num_components=6, fit_index=index)
    assert torch.equal(first, smoothed_embeddings(features, num_components=6, fit_index=index))
    assert torch.equal(features, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_gives_float32(dtype: torch.dtype) -> None:
    features = blobs().to(dtype)
    found = smoothed_embeddings(features, num_components=6)
    assert found.dtype == torch.float32
    wanted = smoothed_embeddings(features.float(), num_components=6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_autocast_does_not_coarsen_the_embeddings() -> None:
    features = blobs()
    wanted = smoothed_embeddings(features, num_components=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = smoothed_embeddings(features, num_components=6)
    assert torch.equal(found, wanted)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features = blobs()
    wanted = smoothed_embeddings(features, num_components=6, fit_index=torch.arange(60))
    monkeypatch.setattr("spice_pl.functional.embeddings.ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(neighbors, "SIMILARITIES_PER_CHUNK", 300)
    found = smoothed_embeddings(features, num_components=6, fit_index=torch.arange(60))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_graph_is_sparse() -> None:
    starts = unit_rows(blobs(2000, 16))
    graph = neighbor_graph(starts, 10)
    assert 2000 * 10 <= graph.nnz <= 2 * 2000 * 10
    assert graph.dtype == np.float32
    assert abs(graph - graph.T).max() == 0
    tracemalloc.start()  # numpy's and scipy's memory; dense would be 16 MB
    neighbor_walk(starts, 10)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_very_many_samples_are_searched_by_faiss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    features = blobs(3000, 16, num_groups=20)
    wanted = smoothed_embeddings(features, num_components=12)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1000)
    with caplog.at_level(logging.INFO):
        found = smoothed_embeddings(features, num_components=12)
    assert "faiss" in caplog.text
    assert float((found * wanted).sum(dim=1).mean()) > 0.99
