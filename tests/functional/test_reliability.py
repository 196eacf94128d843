import pytest
import torch
from torch import Tensor

from spice_pl.functional.neighbors import unit_rows
from spice_pl.functional.reliability import (
    Balance,
    is_not_sure,
    local_consistency,
    reliable_mask,
    select_reliable,
)


def random_case(num_samples: int = 80, num_clusters: int = 4) -> tuple[Tensor, Tensor]:
    """Return embeddings around one centre per cluster, and probabilities that are mostly right."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(num_clusters, 6, generator=generator, dtype=torch.float64)
    truth = torch.randint(num_clusters, (num_samples,), generator=generator)
    noise = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    logits = torch.randn(num_samples, num_clusters, generator=generator, dtype=torch.float64)
    logits[torch.arange(num_samples), truth] += 4
    return unit_rows(centre[truth] + 0.4 * noise), logits.softmax(-1)


def slow_counts(embeddings: Tensor, clusters: Tensor, num_neighbors: int) -> list[int]:
    vectors, ids = embeddings.tolist(), clusters.tolist()
    counts = []
    for vector, own in zip(vectors, ids, strict=True):
        cosines = [sum(a * b for a, b in zip(vector, other, strict=True)) for other in vectors]
        nearest = sorted(range(len(vectors)), key=lambda i: -cosines[i])[:num_neighbors]
        counts.append(sum(ids[i] == own for i in nearest))
    return counts


@pytest.mark.parametrize("chunk_size", [1, 7, 80, None])
@pytest.mark.parametrize("num_neighbors", [1, 9, 80])
def test_consistency_agrees_with_plain_loops(chunk_size: int | None, num_neighbors: int) -> None:
    embeddings, probs = random_case()
    clusters = probs.argmax(-1)
    agreement = local_consistency(embeddings, clusters, num_neighbors, chunk_size)
    expected = slow_counts(embeddings, clusters, num_neighbors)
    assert agreement.tolist() == (torch.tensor(expected) / num_neighbors).tolist()


def test_consistency_by_hand() -> None:
    degrees = torch.tensor([0.0, 10, 21, 90, 100])
    embeddings = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)
    agreement = local_consistency(embeddings, torch.tensor([0, 0, 1, 1, 1]), num_neighbors=3)
    # Image 2 is near images 0 and 1; the third neighbour of 3 and 4 is image 2.
    torch.testing.assert_close(agreement, torch.tensor([2, 2, 1, 3, 3]) / 3)


def test_small_clusters_are_compared_with_fewer() -> None:
    degrees = torch.tensor([0.0, 10, 21, 90, 100])
    embeddings = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)
    clusters = torch.tensor([0, 0, 1, 1, 1])
    agreement = local_consistency(embeddings, clusters, num_neighbors=4, by_size=True)
    # Each with itself and one more; image 2 is nearest to image 1.
    assert agreement.tolist() == [1, 1, 0.5, 1, 1]
    # A cluster of N_s images or more is compared with all N_s.
    agreement = local_consistency(embeddings, clusters, num_neighbors=3, by_size=True)
    torch.testing.assert_close(agreement, torch.tensor([1, 1, 1 / 3, 1, 1]))


def test_the_first_neighbour_is_the_sample_itself() -> None:
    embeddings, probs = random_case()
    assert local_consistency(embeddings, probs.argmax(-1), num_neighbors=1).eq(1).all()


def test_renaming_clusters_and_shuffling_samples_change_nothing() -> None:
    embeddings, probs = random_case()
    clusters = probs.argmax(-1)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    agreement = local_consistency(embeddings, clusters, 9)
    assert torch.equal(local_consistency(embeddings, 3 - clusters, 9), agreement)
    assert torch.equal(local_consistency(embeddings[order], clusters[order], 9), agreement[order])


def test_an_agreement_equal_to_the_threshold_is_reliable() -> None:
    agreements = torch.arange(101).float() / 100
    ones, zeros = torch.ones(101), torch.zeros(101, dtype=torch.long)
    for percent in range(101):
        mask = select_reliable(agreements, ones, zeros, agreement=percent / 100, balance="none")
        assert mask.tolist() == [i >= percent for i in range(101)]


def test_reliable_before_balancing_agrees_with_plain_loops() -> None:
    embeddings, probs = random_case()
    counts = slow_counts(embeddings, probs.argmax(-1), 10)
    mask = reliable_mask(
        embeddings, probs, num_neighbors=10, agreement=0.8, confidence=0.9, balance="none"
    )
    expected = [n >= 8 and max(p) > 0.9 for n, p in zip(counts, probs.tolist(), strict=True)]
    assert mask.tolist() == expected
    assert 0 < sum(expected) < 80


def test_thresholds_include_agreement_and_exclude_confidence() -> None:
    mask = select_reliable(
        torch.tensor([0.95, 0.94, 1.0]),
        torch.tensor([1.0, 1.0, 0.99]),
        torch.zeros(3, dtype=torch.long),
    )
    assert mask.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("balance", "kept"),
    [("none", [5, 0, 2, 9, 3]), ("min", [2, 0, 2, 2, 2]), ("cap", [3, 0, 2, 3, 3])],
)
def test_balance_counts_by_hand_with_one_cluster_empty(balance: Balance, kept: list[int]) -> None:
    clusters = torch.tensor([0] * 5 + [1] * 4 + [2] * 2 + [3] * 9 + [4] * 3)
    confidences = (clusters != 1).float()  # no sample of cluster 1 is reliable
    mask = select_reliable(torch.ones(23), confidences, clusters, balance=balance)
    assert clusters[mask].bincount(minlength=5).tolist() == kept


def test_the_draw_depends_on_the_generator_and_not_on_the_numbering() -> None:
    clusters = torch.tensor([0] * 50 + [1] * 5)
    masks = [
        select_reliable(
            torch.ones(55), torch.ones(55), ids, generator=torch.Generator().manual_seed(seed)
        )
        for ids, seed in [(clusters, 0), (clusters, 0), (clusters, 1), (1 - clusters, 0)]
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[0], masks[3])


def test_the_draw_without_a_generator_depends_on_the_seed_of_torch() -> None:
    clusters = torch.tensor([0] * 50 + [1] * 5)
    masks = []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            masks.append(select_reliable(torch.ones(55), torch.ones(55), clusters))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_draw_is_fair() -> None:
    clusters = torch.tensor([0] * 8 + [1] * 4)
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(12)
    times = sum(
        select_reliable(ones, ones, clusters, generator=generator).long() for _ in range(400)
    )
    assert isinstance(times, Tensor)
    assert (times[8:] == 400).all()
    assert (times[:8] - 200).abs().max() < 50  # five standard deviations


@pytest.mark.parametrize("balance", ["none", "min", "cap"])
def test_no_reliable_sample_is_a_result(balance: Balance) -> None:
    embeddings, probs = random_case()
    mask = reliable_mask(embeddings, probs, num_neighbors=5, confidence=1.0, balance=balance)
    assert mask.shape == (80,)
    assert mask.dtype == torch.bool
    assert not mask.any()


def test_one_cluster_is_consistent_everywhere() -> None:
    embeddings, _ = random_case()
    assert reliable_mask(embeddings, torch.ones(80, 1), num_neighbors=10).all()


@pytest.mark.parametrize("num_neighbors", [0, 81])
def test_refuses_more_neighbours_than_samples(num_neighbors: int) -> None:
    embeddings, probs = random_case()
    message = f"num_neighbors {num_neighbors} is not between 1 and the 80 samples; lower it"
    with pytest.raises(ValueError, match=message):
        reliable_mask(embeddings, probs, num_neighbors=num_neighbors)


def test_refuses_lengths_that_differ_and_unknown_balances() -> None:
    embeddings, probs = random_case()
    with pytest.raises(ValueError, match=r"embeddings \(79, 6\), probs \(80, 4\) differ in length"):
        reliable_mask(embeddings[:79], probs)
    with pytest.raises(ValueError, match="balance 'max' is unknown; choose none, min or cap"):
        reliable_mask(embeddings, probs, num_neighbors=5, balance="max")  # type: ignore[arg-type]


def test_not_sure_is_fewer_than_half_of_what_the_cluster_can_give() -> None:
    # Clusters of 8, 4, 2 and 1 images, with 6 neighbours: 3, 2, 1.5 and 1.5 of them are needed.
    clusters = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3])
    counts = torch.tensor([6, 6, 6, 6, 6, 6, 3, 2, 4, 3, 2, 1, 2, 1, 1])
    agreement = (counts / 6).double().numpy().round(4)  # as in clusters.csv
    found = is_not_sure(torch.from_numpy(agreement), clusters, 6)
    assert found.nonzero().flatten().tolist() == [7, 11, 13, 14]
    # Without the number of neighbours half of all is needed, for every cluster.
    assert is_not_sure(torch.from_numpy(agreement), clusters, 0).tolist() == (counts < 3).tolist()
