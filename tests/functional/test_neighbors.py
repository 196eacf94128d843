import logging
import re

import pytest
import torch

from spice_pl.functional import neighbors
from spice_pl.functional.neighbors import nearest_neighbors, neighbor_chunks, unit_rows


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
def test_agrees_with_sorting_one_query_at_a_time(chunk_size: int | None) -> None:
    queries, keys = gaussian(7, 4), gaussian(20, 4, seed=1)
    similarity, index = nearest_neighbors(queries, keys, 5, chunk_size)
    for query, found, order in zip(queries, similarity, index, strict=True):
        cosine = torch.tensor([float(query @ key / query.norm() / key.norm()) for key in keys])
        expected = cosine.argsort(descending=True)[:5]
        assert order.tolist() == expected.tolist()
        torch.testing.assert_close(found, cosine[expected].double(), rtol=0, atol=1e-6)


def test_the_nearest_key_of_a_key_is_itself() -> None:
    keys = gaussian(30, 8)
    similarity, index = nearest_neighbors(keys, keys, 1)
    assert index.squeeze(-1).tolist() == list(range(30))
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


def test_k_can_be_all_keys_and_no_queries_give_no_rows() -> None:
    _, index = nearest_neighbors(gaussian(2, 3), gaussian(4, 3, seed=1), 4)
    assert index.sort().values.tolist() == [[0, 1, 2, 3]] * 2
    similarity, index = nearest_neighbors(gaussian(0, 3), gaussian(4, 3), 2)
    assert similarity.shape == index.shape == (0, 2)


@pytest.mark.parametrize("num_keys", [768, 800, 831])
def test_blocks_of_many_keys_hide_no_neighbour(num_keys: int) -> None:
    queries, keys = gaussian(200, 3), gaussian(num_keys, 3, seed=1)
    similarity, index = nearest_neighbors(queries, keys, 3)
    cosine = unit_rows(queries) @ unit_rows(keys).T
    order = cosine.argsort(dim=1, descending=True)[:, :3]
    assert torch.equal(index, order)
    assert torch.equal(similarity, cosine.gather(1, order))
    assert num_keys % 64 == 0 or int(index.max()) >= 768  # a neighbour in no whole block


def test_default_chunks_bound_the_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = neighbors.similarities

    def spy(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        sizes.append(len(left) * len(right))
        return whole(left, right, out)

    monkeypatch.setattr(neighbors, "similarities", spy)
    monkeypatch.setattr(neighbors, "SIMILARITIES_PER_CHUNK", 100)
    nearest_neighbors(gaussian(40, 4), gaussian(40, 4), 3)
    assert sizes == [80] * 20
    monkeypatch.setattr(neighbors, "SIMILARITIES_PER_CHUNK", 10)
    nearest_neighbors(gaussian(2, 4), gaussian(40, 4), 3)
    assert sizes[20:] == [40, 40]


def test_chunks_share_the_memory_of_similarities_and_keep_their_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places: list[int] = []
    whole = neighbors.similarities

    def spy(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        places.append(out.data_ptr())
        return whole(left, right, out)

    queries, keys = gaussian(10, 4).requires_grad_(), gaussian(20, 4, seed=1)
    expected = (unit_rows(queries) @ unit_rows(keys).T).topk(3)
    monkeypatch.setattr(neighbors, "similarities", spy)
    chunks = list(neighbor_chunks(queries, keys, 3, chunk_size=4))
    assert len(places) == 3
    assert len(set(places)) == 1
    assert torch.equal(torch.cat([index for _, index in chunks]), expected.indices)
    found = torch.cat([values for values, _ in chunks])
    torch.testing.assert_close(found, expected.values.detach())


def test_autocast_does_not_coarsen_the_ranking() -> None:
    base = gaussian(1, 64).float()
    keys = unit_rows(base + 0.01 * gaussian(200, 64, seed=1).float())  # cosines within 1e-3
    expected = nearest_neighbors(keys, keys, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_neighbors(keys, keys, 10)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_unit_rows_keep_unit_vectors_and_zero() -> None:
    rows = unit_rows(gaussian(10, 5))
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(unit_rows(rows), rows, rtol=0, atol=1e-15)
    assert unit_rows(torch.zeros(1, 5)).tolist() == [[0.0] * 5]
    assert unit_rows(torch.ones(1, 5, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("k", [0, 5])
def test_refuses_more_neighbours_than_keys(k: int) -> None:
    with pytest.raises(ValueError, match=f"k {k} is not between 1 and the 4 keys"):
        nearest_neighbors(gaussian(2, 3), gaussian(4, 3), k)


def test_refuses_an_empty_chunk() -> None:
    with pytest.raises(ValueError, match="chunk_size 0 holds no query; raise it to at least 1"):
        nearest_neighbors(gaussian(2, 3), gaussian(4, 3), 1, chunk_size=0)


def crowd(num_samples: int = 6000) -> torch.Tensor:
    """Samples around twenty centres."""
    centres = 2 * gaussian(20, 16)
    return (centres[torch.arange(num_samples) % 20] + gaussian(num_samples, 16, seed=1)).float()


def test_faiss_searches_many_keys_with_the_recall_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    keys = crowd()
    wanted_similarity, wanted = nearest_neighbors(keys, keys, 10)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1000)
    with caplog.at_level(logging.INFO):
        similarity, index = nearest_neighbors(keys, keys, 10)
    assert similarity.shape == index.shape == (6000, 10)
    recall = sum(len({*a} & {*b}) for a, b in zip(index.tolist(), wanted.tolist(), strict=True))
    assert 0.94 <= recall / wanted.numel() <= 1
    assert float((similarity - wanted_similarity).abs().mean()) < 1e-3
    (said,) = [record for record in caplog.records if "faiss" in record.message]
    (told,) = re.findall(r"recall ([\d.]+) on", said.getMessage())
    assert float(told) >= neighbors.RECALL
    assert abs(float(told) - recall / wanted.numel()) < 0.01


def test_cells_with_too_few_keys_are_filled_up_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    keys = crowd(1500)
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(neighbors, "RECALL", 0.0)  # eight cells, some 80 of the samples
    monkeypatch.setattr(neighbors, "_recall", lambda *_: 1.0)
    _, index = nearest_neighbors(keys, keys, 200)
    assert int(index.min()) >= 0
    assert all(len(set(row)) == 200 for row in index.tolist())


def test_without_faiss_the_search_is_exact_and_the_log_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = crowd(1200)
    wanted = nearest_neighbors(keys, keys, 5)[1]
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert torch.equal(nearest_neighbors(keys, keys, 5)[1], wanted)
    assert "1200 samples" in caplog.text
    assert "spice-pl[ann]" in caplog.text
