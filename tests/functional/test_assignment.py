import itertools

import pytest
import torch
from sklearn.metrics import (
    adjusted_rand_score,
    balanced_accuracy_score,
    normalized_mutual_info_score,
)
from torch import Tensor

from spice_pl.functional.assignment import (
    clustering_scores,
    count_table,
    match_clusters,
    scores_from_counts,
)

SCORES = ("acc", "recall", "nmi", "ari", "purity")


def random_ids(num_samples: int, num_ids: int, seed: int) -> Tensor:
    return torch.randint(num_ids, (num_samples,), generator=torch.Generator().manual_seed(seed))


def noisy(labels: Tensor, num_clusters: int, share: float, seed: int) -> Tensor:
    guess = random_ids(len(labels), num_clusters, seed)
    coin = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed + 1))
    return torch.where(coin < share, guess, labels % num_clusters)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("num_clusters", "num_classes"), [(4, 4), (3, 6), (7, 4), (1, 4), (4, 1)])
def test_agrees_with_scikit_learn(num_clusters: int, num_classes: int, share: float) -> None:
    labels = random_ids(300, num_classes, seed=0)
    clusters = noisy(labels, num_clusters, share, seed=1)
    scores = clustering_scores(clusters, labels)
    nmi = normalized_mutual_info_score(labels, clusters, average_method="geometric")
    assert scores["nmi"] == pytest.approx(nmi, abs=1e-12)
    assert scores["ari"] == pytest.approx(adjusted_rand_score(labels, clusters), abs=1e-12)


@pytest.mark.parametrize(("num_clusters", "num_classes"), [(4, 4), (3, 5), (5, 3)])
def test_accuracy_agrees_with_trying_all_matchings(num_clusters: int, num_classes: int) -> None:
    labels = random_ids(200, num_classes, seed=0)
    clusters = noisy(labels, num_clusters, 0.6, seed=1)
    table = count_table(clusters, labels, num_clusters, num_classes)
    wide = table if num_clusters <= num_classes else table.T
    best = max(
        sum(int(wide[row, column]) for row, column in enumerate(columns))
        for columns in itertools.permutations(range(wide.shape[1]), wide.shape[0])
    )
    assert clustering_scores(clusters, labels)["acc"] == best / 200


def test_by_hand() -> None:
    table = torch.tensor([[0, 3], [2, 1]])
    assert match_clusters(table).tolist() == [1, 0]
    assert scores_from_counts(table)["acc"] == 5 / 6
    # Of 15 pairs, 6 share a cluster (3 + 3), 7 a class (1 + 6), 4 both (3 + 1), 2.8 by chance.
    assert scores_from_counts(table)["ari"] == pytest.approx((4 - 2.8) / (6.5 - 2.8))


def test_the_best_matching_is_not_the_greedy_one() -> None:
    table = torch.tensor([[10, 9], [9, 0]])
    assert match_clusters(table).tolist() == [1, 0]
    assert scores_from_counts(table)["acc"] == 18 / 28


def test_more_clusters_than_classes_and_fewer() -> None:
    assert match_clusters(torch.tensor([[1, 0], [0, 5], [4, 0]])).tolist() == [-1, 1, 0]
    assert match_clusters(torch.tensor([[0, 0, 2]])).tolist() == [2]


def test_renaming_and_shuffling_change_nothing() -> None:
    labels = random_ids(100, 5, seed=0)
    clusters = noisy(labels, 5, 0.5, seed=1)
    scores = clustering_scores(clusters, labels)
    order, names = random_ids(100, 10**6, seed=2).argsort(), torch.tensor([3, 1, 4, 0, 2])
    assert clustering_scores(clusters[order], labels[order]) == pytest.approx(scores, abs=1e-14)
    assert clustering_scores(names[clusters], labels) == pytest.approx(scores, abs=1e-14)


def test_an_empty_cluster_changes_nothing() -> None:
    table = torch.tensor([[5, 1], [2, 8]])
    padded = torch.zeros(4, 3, dtype=torch.long)
    padded[[0, 2], :2] = table
    assert scores_from_counts(padded) == pytest.approx(scores_from_counts(table), abs=1e-15)


@pytest.mark.parametrize("num_samples", [1, 7])
def test_one_cluster_and_one_class_agree(num_samples: int) -> None:
    zeros = torch.zeros(num_samples, dtype=torch.long)
    assert clustering_scores(zeros, zeros) == dict.fromkeys(SCORES, 1.0)


def test_one_cluster_for_many_classes_scores_zero_nmi_and_ari() -> None:
    scores = scores_from_counts(torch.tensor([[1, 1, 1, 3, 7]]))
    assert scores == {"acc": 7 / 13, "recall": 1 / 5, "nmi": 0.0, "ari": 0.0, "purity": 7 / 13}


def test_one_cluster_per_sample() -> None:
    labels = random_ids(12, 3, seed=0)
    scores = clustering_scores(torch.arange(12), labels)
    assert scores["ari"] == 0
    nmi = normalized_mutual_info_score(labels, range(12), average_method="geometric")
    assert scores["nmi"] == pytest.approx(nmi, abs=1e-12)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_million_samples_do_not_overflow() -> None:
    labels = torch.arange(1_000_000) % 2
    clusters = labels.clone()
    clusters[:1000] = 1 - clusters[:1000]
    scores = clustering_scores(clusters, labels)
    assert scores["acc"] == 0.999
    assert scores["ari"] == pytest.approx(adjusted_rand_score(labels, clusters), abs=1e-12)
    # Products of numbers of pairs exceed 2^63 long before this.
    huge = scores_from_counts(torch.tensor([[10**9, 10**6], [10**6, 10**9]]))
    small = scores_from_counts(torch.tensor([[10**5, 10**2], [10**2, 10**5]]))
    assert huge["ari"] == pytest.approx(small["ari"], abs=1e-4)
    assert huge["nmi"] == pytest.approx(small["nmi"], abs=1e-12)


def test_a_cluster_of_one_in_a_million_samples_is_scored_without_rounding() -> None:
    table = torch.tensor([[999_999, 0], [0, 1]])
    ones = dict.fromkeys(SCORES, 1.0)
    assert scores_from_counts(table) == pytest.approx(ones)


def test_purity_counts_clusters_that_have_no_class() -> None:
    table = torch.tensor([[5, 0], [4, 1], [0, 3], [1, 6]])  # 4 clusters, 2 classes, 20 samples
    scores = scores_from_counts(table)
    assert scores["acc"] == (5 + 6) / 20
    assert scores["purity"] == (5 + 4 + 3 + 6) / 20
    merged = scores_from_counts(torch.stack([table[:2].sum(0), table[2:].sum(0)]))
    assert merged["purity"] == merged["acc"] == scores["purity"]


def test_recall_counts_a_small_class_as_much_as_a_large_one() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    clusters = torch.where(torch.arange(100) < 95, 1, 0)  # half of the small class is missed
    scores = clustering_scores(clusters, labels)
    assert (scores["acc"], scores["recall"]) == (0.95, 0.75)
    matched = torch.where(clusters == 1, 0, 1)
    assert scores["recall"] == balanced_accuracy_score(labels, matched)


def test_a_class_without_a_cluster_has_no_recall() -> None:
    scores = scores_from_counts(torch.tensor([[8, 1, 0]]))  # the third class has no sample
    assert scores["recall"] == 0.5


def test_samples_without_truth_are_not_counted() -> None:
    clusters, labels = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, -1, -1])
    assert count_table(clusters, labels, 2, 2).tolist() == [[0, 1], [1, 0]]
    assert clustering_scores(clusters, labels)["acc"] == 1.0


def test_tables_of_parts_add_up() -> None:
    labels = random_ids(50, 3, seed=0)
    clusters = random_ids(50, 4, seed=1)
    parts = [count_table(clusters[part], labels[part], 4, 3) for part in (slice(20), slice(20, 50))]
    assert torch.equal(sum(parts, torch.zeros(())).long(), count_table(clusters, labels, 4, 3))


def test_narrow_integers_count_the_same() -> None:
    clusters, labels = random_ids(50, 20, seed=1), random_ids(50, 20, seed=0)
    assert torch.equal(
        count_table(clusters.to(torch.int8), labels.to(torch.uint8), 20, 20),
        count_table(clusters, labels, 20, 20),
    )


def test_refuses_ids_out_of_range_and_lengths_that_differ() -> None:
    ids = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"clusters lie in 0\.\.2 and 0\.\.1 is allowed; number"):
        count_table(ids, ids, 2, 3)
    with pytest.raises(ValueError, match=r"labels lie in -2\.\.0 and -1\.\.2 is allowed"):
        count_table(ids, ids - 2, 3, 3)
    with pytest.raises(ValueError, match=r"\(3,\) and labels \(N,\) = \(2,\) differ"):
        clustering_scores(ids, ids[:2])


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_refuses_to_score_without_labels(labels: list[int]) -> None:
    clusters = torch.zeros(len(labels), dtype=torch.long)
    with pytest.raises(ValueError, match=r"0 samples have a cluster and a label; .* at least 1"):
        clustering_scores(clusters, torch.tensor(labels, dtype=torch.long))
