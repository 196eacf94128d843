from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.stats import entropy
from sklearn.cluster import SpectralClustering
from sklearn.metrics import cohen_kappa_score, silhouette_samples
from torch import Tensor

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.candidates import (
    assortativity,
    cluster_scores,
    connect,
    evenness,
    modularity,
    neighbor_agreement,
    silhouettes,
    spectral_clusters,
    vote_clusters,
    walk_clusters,
)
from spice_pl.functional.embeddings import (
    nearest_others,
    neighbor_graph,
    smoothed_embeddings,
)
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.functional.neighbors import unit_rows
from spice_pl.functional.reliability import local_consistency


def groups(
    sizes: list[int], noise: float = 0.25, width: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows around orthogonal centres, and their group."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = torch.eye(width)[group] + noise * torch.randn(len(group), width, generator=generator)
    order = torch.randperm(len(group), generator=generator)
    return rows[order], group[order]


def acc(clusters: Tensor, group: Tensor) -> float:
    return float(clustering_scores(clusters, group)["acc"])


def scores(features: Tensor, candidates: Tensor, num_neighbors: int = 10) -> Tensor:
    return cluster_scores(features, nearest_others(features, num_neighbors), candidates)


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two clusterings are equal up to the names of clusters."""
    return acc(left, right) == acc(right, left) == 1


# Walks.


def test_a_walk_is_kmeans_on_smoothed_embeddings() -> None:
    features, group = groups([40, 40, 40])
    found = walk_clusters(features, 3, walks=(0, 3), num_components=8, seed=4)
    for clusters, steps in zip(found, (0, 3), strict=True):
        embeddings = smoothed_embeddings(features, num_components=8, num_steps=steps)
        wanted = torch.from_numpy(kmeans_clusters(embeddings.numpy(), 3, 4))
        assert same(clusters, wanted)
    assert acc(found[1], group) > 0.97
    again = walk_clusters(features, 3, walks=(0, 3), num_components=8, seed=4)
    assert torch.equal(found, again)


def test_a_long_walk_keeps_unequal_groups_whole_and_the_score_chooses_it() -> None:
    features, group = groups([900, 40, 40, 20], noise=0.3)
    found = walk_clusters(features, 4, walks=(0, 100))
    assert acc(found[0], group) < 0.7  # the large group is cut
    assert acc(found[1], group) > 0.95
    assert int(scores(features, found).argmax()) == 1


def test_the_score_keeps_even_groups_from_a_walk_that_is_too_long() -> None:
    features, group = groups([40] * 8, noise=0.35)
    found = walk_clusters(features, 8, walks=(3, 2000))
    assert acc(found[1], group) < acc(found[0], group) - 0.2
    assert int(scores(features, found).argmax()) == 0


def test_walks_of_copies_and_of_equal_features_give_clusters_without_warnings() -> None:
    features, _ = groups([30, 30])
    copies = torch.cat([features[:1].expand(40, -1), features])
    assert walk_clusters(copies, 3).shape == (4, 100)
    assert walk_clusters(torch.ones(6, 4), 3).shape == (4, 6)
    assert walk_clusters(features[:1], 1).tolist() == [[0]] * 4


@pytest.mark.parametrize("walks", [(), (3, 3), (5, 3), (-1, 2)])
def test_refuses_walks_that_do_not_rise(walks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not rise from 0 or more; give at least one"):
        walk_clusters(torch.eye(4), 2, walks=walks)


# Modularity.


def test_modularity_counts_groups_of_unequal_sizes() -> None:
    features, group = groups([60, 30, 15], noise=0.1)
    others = nearest_others(features, 5)
    # Neighbours never leave a group: 1 - Σ p², by hand; merged and cut groups have less.
    whole = 1 - (60**2 + 30**2 + 15**2) / 105**2
    assert modularity(others, group) == pytest.approx(whole)
    merged, cut = group.clamp_max(1), torch.where(torch.arange(105) % 2 == 0, group, group + 3)
    assert modularity(others, merged) < whole - 0.05
    assert modularity(others, cut) < whole - 0.05
    assert modularity(others, torch.zeros_like(group)) == 0


# Spectral clustering.


def test_spectral_clusters_agree_with_scikit_learn_on_the_same_graph() -> None:
    features, group = groups([150, 100, 60], noise=0.3)
    embeddings = unit_rows(features)
    graph = neighbor_graph(embeddings, 10)
    assert connected_components(graph)[0] == 1
    found = spectral_clusters(embeddings, graph, 3)
    model = SpectralClustering(3, affinity="precomputed", random_state=0)
    theirs = torch.from_numpy(model.fit_predict(sparse.csr_matrix(graph))).long()
    assert acc(found, theirs) > 0.98
    assert acc(found, group) > 0.98
    assert torch.equal(found, spectral_clusters(embeddings, graph, 3))


def test_spectral_clusters_of_few_samples_are_found_without_iteration() -> None:
    features, group = groups([40, 30, 20])
    embeddings = unit_rows(features)
    assert acc(spectral_clusters(embeddings, neighbor_graph(embeddings, 10), 3), group) > 0.98


def test_spectral_clusters_separate_rings_that_kmeans_does_not() -> None:
    angle = torch.linspace(0, 2 * torch.pi, 151)[:150]
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    heights = torch.tensor([[1.0], [2.5]]).repeat_interleave(150, dim=0)
    rows = torch.cat([torch.cat([ring, ring]), heights], dim=1)  # two rings on one cone each
    embeddings = unit_rows(rows)
    truth = torch.arange(2).repeat_interleave(150)
    found = spectral_clusters(embeddings, neighbor_graph(embeddings, 4), 2)
    assert acc(found, truth) == 1
    assert acc(torch.from_numpy(kmeans_clusters(rows[:, :2].numpy(), 2, 0)), truth) < 0.6


def test_many_samples_need_no_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.linalg, "eigh", None)
    features, group = groups([2600, 1500, 700, 400], noise=0.25)
    embeddings = unit_rows(features)
    graph = neighbor_graph(embeddings, 10)
    assert acc(spectral_clusters(embeddings, graph, 4), group) > 0.98


@pytest.mark.parametrize("num_clusters", [1, 2, 5, 6])
def test_any_number_of_clusters_up_to_the_samples(num_clusters: int) -> None:
    embeddings = unit_rows(groups([3, 3])[0])
    graph = neighbor_graph(embeddings, 10)
    for clusters in (
        spectral_clusters(embeddings, graph, num_clusters),
        walk_clusters(embeddings, num_clusters, walks=(1,))[0],
    ):
        assert clusters.dtype == torch.int64
        assert len(set(clusters.tolist())) == num_clusters
    single = embeddings[:1]
    assert spectral_clusters(single, neighbor_graph(single), 1).tolist() == [0]


@pytest.mark.parametrize("num_clusters", [0, 7])
def test_refuses_a_number_of_clusters_out_of_range(num_clusters: int) -> None:
    embeddings = unit_rows(groups([3, 3])[0])
    graph = neighbor_graph(embeddings, 2)
    message = f"num_clusters {num_clusters} is not between 1 and the 6 samples; lower it"
    with pytest.raises(ValueError, match=message):
        spectral_clusters(embeddings, graph, num_clusters)
    with pytest.raises(ValueError, match=message):
        walk_clusters(embeddings, num_clusters)


# Graphs in several parts.


def separate(sizes: list[int]) -> tuple[Tensor, sparse.csr_array]:
    embeddings = unit_rows(groups(sizes, noise=0.05)[0])
    graph = neighbor_graph(embeddings, 5)
    assert connected_components(graph)[0] == len(sizes)
    return embeddings, graph


def test_parts_are_joined_by_one_weak_edge_each() -> None:
    embeddings, graph = separate([30, 20, 10, 8])
    joined = connect(graph, embeddings)
    assert connected_components(joined)[0] == 1
    assert joined.nnz == graph.nnz + 2 * 3
    added = joined - graph
    assert abs(added - added.T).max() == 0
    assert added.data[added.data > 0].max() == graph.data.min()
    assert joined.dtype == graph.dtype
    assert connect(joined, embeddings) is joined


def test_a_part_is_joined_to_the_nearest_larger_part_at_their_middles() -> None:
    degrees = [50, 56, 70, 0, 4, 5, 15, 100, 110, 111, 113, 130]
    sizes = [3, 4, 5]  # with their middles, the samples nearest to the mean, at 56, 5 and 113
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    embeddings = torch.stack([angle.cos(), angle.sin()], dim=1)
    graph = sparse.csr_array(sparse.block_diag([np.ones((n, n)) for n in sizes]))
    added = sparse.coo_array(sparse.triu(connect(graph, embeddings) - graph))
    added.eliminate_zeros()
    edges = {(degrees[i], degrees[j]) for i, j in zip(*added.coords, strict=True)}
    assert edges == {(56, 5), (5, 113)}  # from 56 it is 51 to 5 and 57 to 113


@pytest.mark.parametrize("num_clusters", [2, 3, 4, 6])
def test_graphs_in_several_parts_are_clustered_without_warnings(num_clusters: int) -> None:
    sizes = [120, 60, 40, 30]  # iterated, not dense
    embeddings, graph = separate(sizes)
    parts = torch.from_numpy(connected_components(graph)[1]).long()
    found = spectral_clusters(embeddings, graph, num_clusters)
    assert len(set(found.tolist())) == num_clusters
    if num_clusters <= 4:  # no part is cut
        assert all(len(set(found[parts == part].tolist())) == 1 for part in range(4))


# The choice.


def test_agreement_counts_neighbours_one_by_one() -> None:
    features, group = groups([20, 15], noise=0.6)
    candidates = torch.stack([group, torch.arange(35) % 3, torch.zeros(35, dtype=torch.long)])
    unit = unit_rows(features)
    likeness = (unit @ unit.T).fill_diagonal_(-2).numpy()
    wanted = [
        np.mean([row[i] == row[j] for i in range(35) for j in np.argsort(-likeness[i])[:4]])
        for row in candidates.numpy()
    ]
    np.testing.assert_allclose(
        neighbor_agreement(nearest_others(features, 4), candidates).numpy(), wanted
    )
    assert wanted[2] == 1 > wanted[0] > wanted[1]


def test_agreement_is_local_consistency_without_the_sample_itself() -> None:
    features, group = groups([40, 30], noise=0.6)
    whole = float(local_consistency(features, group, 11).double().mean())  # the sample counted
    found = float(neighbor_agreement(nearest_others(features, 10), group[None]))
    assert found == pytest.approx((11 * whole - 1) / 10, abs=1e-6)


def test_agreement_with_few_samples() -> None:
    features = torch.eye(3)
    candidates = torch.tensor([[0, 0, 1]])
    assert float(neighbor_agreement(nearest_others(features, 10), candidates)) == pytest.approx(
        2 / 6
    )
    assert neighbor_agreement(nearest_others(features[:1], 10), candidates[:, :1]).tolist() == [1.0]


@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [17, 1, 1, 1], [20, 0, 0, 0], [10, 6, 4, 0]])
def test_evenness_is_the_entropy_of_sizes(sizes: list[int]) -> None:
    clusters = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    assert evenness(clusters, 4) == pytest.approx(float(entropy(sizes, base=4)))
    assert evenness(torch.zeros(5, dtype=torch.long), 1) == 1


@pytest.mark.parametrize("num_samples", [60, 4200])  # above 2,000 every third is looked at
def test_silhouettes_are_those_of_scikit_learn(num_samples: int) -> None:
    rows, group = groups([num_samples - 25, 20, 5], noise=0.5)
    candidates = torch.stack([group, torch.arange(num_samples) % 4])
    candidates[1, 7] = 6  # alone in its cluster; cluster 5 is empty
    found = silhouettes(rows, candidates)
    every = slice(None, None, 3 if num_samples > 2000 else 1)
    wanted = [silhouette_samples(rows.numpy(), each)[every].mean() for each in candidates.numpy()]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_silhouettes_of_copies_and_of_one_cluster_are_zero() -> None:
    halves = torch.arange(20) % 2
    found = silhouettes(torch.ones(20, 3), torch.stack([halves, torch.zeros_like(halves)]))
    assert found.tolist() == [0, 0]
    assert silhouettes(torch.ones(1, 3), torch.zeros(1, 1, dtype=torch.long)).tolist() == [0]


def test_assortativity_is_cohens_kappa_of_neighbours_on_a_ring() -> None:
    """Every sample has and is two neighbours, so that both marginals are the sizes."""
    ring = torch.arange(60)
    others = torch.stack([(ring - 1) % 60, (ring + 1) % 60], dim=1)
    generator = torch.Generator().manual_seed(0)
    unequal = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 60, True, generator=generator)
    candidates = torch.stack([ring // 20, ring * 60 // 70, unequal])
    found = assortativity(neighbor_agreement(others, candidates), candidates)
    wanted = [
        cohen_kappa_score(row.repeat_interleave(2), row[others].flatten()) for row in candidates
    ]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


def test_the_score_is_the_sum_of_silhouette_and_assortativity() -> None:
    """Two pairs at the ends of a line: assortativity 1, and ½ − ⅝ over 1 − ⅝."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    candidates = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    # Silhouettes of the second: 0 alone; -1 beside a copy elsewhere; ½ for both others.
    wanted = [1 + 1, -1 / 3 + (0 - 1 + 0.5 + 0.5) / 4]
    np.testing.assert_allclose(scores(features, candidates, 1).numpy(), wanted, atol=1e-6)


def test_neither_names_of_clusters_nor_order_of_samples_change_the_score() -> None:
    features, group = groups([40, 20, 10], noise=0.6)
    wanted = scores(features, group[None])
    renamed = torch.tensor([2, 0, 1])[group]
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(scores(features, renamed[None]), wanted)
    torch.testing.assert_close(scores(features[order], group[order][None]), wanted)


def test_the_score_prefers_the_truth_to_a_merge_a_cut_and_noise() -> None:
    for sizes in ([100, 100, 100, 100], [300, 60, 30, 30]):
        features, group = groups(sizes, noise=0.3)
        odd = features[group == 3] @ torch.randn(
            16, generator=torch.Generator().manual_seed(2)
        )  # a direction at random cuts group 3
        merged = group.clone()
        merged[group == 2] = 1
        merged[(group == 3).nonzero()[odd > odd.median(), 0]] = 2
        cut = torch.where(group == 3, 2, group)
        cut[(group == 0).nonzero()[::2, 0]] = 3
        noisy = group.clone()
        noisy[::5] = torch.randint(
            4, (len(noisy[::5]),), generator=torch.Generator().manual_seed(3)
        )
        found = scores(features, torch.stack([merged, cut, group, noisy]))
        assert int(found.argmax()) == 2


def test_refuses_candidates_of_another_length() -> None:
    others = torch.tensor([[1], [2], [0]])
    with pytest.raises(ValueError, match=r"\(1, 4\) are not \(R, N\) with the N = 3"):
        neighbor_agreement(others, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"candidates \(3,\) are not \(R, N\)"):
        neighbor_agreement(others, torch.zeros(3, dtype=torch.long))


# The vote.


def test_the_vote_takes_the_majority_whatever_the_numbers_of_clusters() -> None:
    """Each of three clusterings is wrong on other samples, so two of three are always right."""
    features, group = groups([30, 30, 30], noise=0.1)
    found = torch.stack([(group + shift) % 3 for shift in (1, 2, 0)])
    for row in range(3):
        found[row, 10 * row : 10 * row + 10] = (found[row, 10 * row : 10 * row + 10] + 1) % 3
    voted = vote_clusters(found, nearest_others(features, 5), 3)
    assert torch.equal(voted, group)


def test_neighbours_decide_where_all_clusterings_differ() -> None:
    found = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 2, 1, 1, 2, 2]])
    neighbours = [[1], [0], [4], [4], [3], [6], [5]]
    assert vote_clusters(found, torch.tensor(neighbours), 3).tolist() == [0, 0, 1, 1, 1, 2, 2]
    neighbours[2] = [6]
    assert vote_clusters(found, torch.tensor(neighbours), 3).tolist() == [0, 0, 2, 1, 1, 2, 2]


def test_the_vote_of_equal_clusterings_and_of_one_sample() -> None:
    group = torch.tensor([0, 0, 1, 1])
    others = torch.tensor([[1], [0], [3], [2]])
    assert torch.equal(vote_clusters(torch.stack([group, 1 - group]), others, 2), 1 - group)
    single = vote_clusters(
        torch.zeros(2, 1, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), 1
    )
    assert single.tolist() == [0]
