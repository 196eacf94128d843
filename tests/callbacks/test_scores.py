import pytest
import torch
from torch import Tensor

from spice_pl.callbacks.scores import ClusteringScores
from spice_pl.functional.assignment import clustering_scores


def random_case(num_samples: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randint(5, (num_samples,), generator=generator)
    labels = torch.where(
        torch.rand(num_samples, generator=generator) < 0.3,
        torch.randint(3, (num_samples,), generator=generator),
        clusters % 3,
    )
    return clusters, labels


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_score_as_the_whole(batch_size: int) -> None:
    clusters, labels = random_case()
    metric = ClusteringScores(num_clusters=5, num_classes=3)
    for batch in zip(clusters.split(batch_size), labels.split(batch_size), strict=True):  # type: ignore[no-untyped-call]
        metric.update(*batch)
    assert metric.compute() == clustering_scores(clusters, labels)


def test_two_ranks_score_as_one() -> None:
    clusters, labels = random_case()
    other = ClusteringScores(num_clusters=5, num_classes=3)
    other.update(clusters[30:], labels[30:])
    metric = ClusteringScores(
        num_clusters=5,
        num_classes=3,
        dist_sync_fn=lambda counts, group: [counts, other.counts],
        distributed_available_fn=lambda: True,
    )
    metric.update(clusters[:30], labels[:30])
    assert metric.compute() == clustering_scores(clusters, labels)
    assert metric.counts.sum() == 30  # back to this rank's own after the score


def test_state_is_one_table_of_counts() -> None:
    metric = ClusteringScores(num_clusters=5, num_classes=3)
    metric.update(*random_case())
    assert metric.metric_state.keys() == {"counts"}
    assert metric.counts.shape == (5, 3)
    assert metric.counts.dtype == torch.long
    metric.reset()
    assert not metric.counts.any()


def test_a_batch_is_scored_on_its_way() -> None:
    clusters, labels = random_case()
    metric = ClusteringScores(num_clusters=5, num_classes=3)
    metric.update(clusters[:50], labels[:50])
    assert metric(clusters[50:], labels[50:]) == clustering_scores(clusters[50:], labels[50:])
    assert metric.compute() == clustering_scores(clusters, labels)


def test_samples_without_truth_are_ignored() -> None:
    clusters, labels = random_case()
    metric = ClusteringScores(num_clusters=5, num_classes=3)
    metric.update(clusters, labels.where(torch.arange(100) < 40, -1))
    assert metric.compute() == clustering_scores(clusters[:40], labels[:40])


def test_no_truth_at_all_gives_no_scores() -> None:
    metric = ClusteringScores(num_clusters=5, num_classes=0)
    metric.update(random_case()[0], torch.full((100,), -1))
    assert metric.compute() == {}


def test_refuses_a_class_that_was_not_announced() -> None:
    metric = ClusteringScores(num_clusters=5, num_classes=2)
    with pytest.raises(ValueError, match=r"labels lie in 0\.\.2 and -1\.\.1 is allowed"):
        metric.update(*random_case())
