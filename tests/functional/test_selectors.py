from __future__ import annotations

import pytest
import torch
from tests.conftest import compose
from torch import Tensor

from spice_pl.functional.reliability import local_consistency, reliable_mask
from spice_pl.functional.selectors import (
    OracleLabels,
    best_of_each,
    clusmatch_labels,
    confident_labels,
    random_labels,
    reliable_labels,
)
from spice_pl.job.settings import build

K = 3


def probabilities(num: int = 120, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num, K, generator=generator)).softmax(dim=1)


@pytest.mark.parametrize("selector", [clusmatch_labels, confident_labels, random_labels])
@pytest.mark.parametrize("fraction", [0.05, 0.29, 0.5])
def test_each_cluster_has_its_number_of_labels(selector: object, fraction: float) -> None:
    probs = probabilities()
    label = selector(None, probs, K, torch.Generator().manual_seed(0), fraction=fraction).label  # type: ignore[operator]
    budget = int(120 // K * fraction + 1e-9)
    sizes = probs.argmax(dim=1).bincount(minlength=K)
    counts = label[label >= 0].bincount(minlength=K)
    assert counts.tolist() == [min(budget, int(size)) for size in sizes]
    kept = label >= 0
    assert torch.equal(label[kept], probs.argmax(dim=1)[kept])


def test_head_branch_keeps_the_largest_variance() -> None:
    probs = probabilities()
    label = clusmatch_labels(None, probs, K, fraction=0.25, branch="head").label
    for cluster in range(K):
        members = probs.argmax(dim=1) == cluster
        kept, left = members & (label >= 0), members & (label < 0)
        assert probs[kept].var(dim=1).min() >= probs[left].var(dim=1).max()


def test_feature_branch_keeps_the_nearest_to_each_centre() -> None:
    directions = torch.eye(3).repeat_interleave(10, dim=0)
    spread = torch.linspace(0, 0.4, 10).repeat(3)[:, None]
    embeddings = torch.nn.functional.normalize(directions + spread * directions.roll(1, dims=1))
    label = clusmatch_labels(
        embeddings, None, K, torch.Generator().manual_seed(0), fraction=0.4, branch="features"
    ).label
    assert (label >= 0).sum() == 3 * 4
    for group in range(3):
        kept = (label[10 * group : 10 * group + 10] >= 0).nonzero()[:, 0]
        assert len(kept) == 4
        assert kept.max() - kept.min() == 3  # samples around the centre, in the middle of the row
        assert 0 < int(kept.min()) <= 5


def test_auto_reads_the_head_if_there_is_one() -> None:
    embeddings, probs = torch.randn(120, 5), probabilities()
    auto = clusmatch_labels(embeddings, probs, K, fraction=0.1).label
    assert torch.equal(auto, clusmatch_labels(None, probs, K, fraction=0.1, branch="head").label)
    draw = [torch.Generator().manual_seed(5) for _ in range(2)]
    auto = clusmatch_labels(embeddings, None, K, draw[0], fraction=0.1).label
    by_features = clusmatch_labels(embeddings, probs, K, draw[1], fraction=0.1, branch="features")
    assert torch.equal(auto, by_features.label)


def test_reliable_labels_are_those_of_spice() -> None:
    embeddings, probs = torch.randn(120, 5), probabilities()
    settings = {"num_neighbors": 9, "agreement": 0.3, "confidence": 0.5, "balance": "min"}
    draws = [torch.Generator().manual_seed(2) for _ in range(2)]
    selection = reliable_labels(embeddings, probs, K, draws[0], **settings)  # type: ignore[arg-type]
    mask = reliable_mask(embeddings, probs, generator=draws[1], **settings)  # type: ignore[arg-type]
    assert torch.equal(selection.label >= 0, mask)
    assert torch.equal(selection.label[mask], probs.argmax(dim=1)[mask])
    agreements = local_consistency(embeddings, probs.argmax(dim=1), 9).tolist()
    rules = [
        (agreement > 0.299, max(row) > 0.5)
        for agreement, row in zip(agreements, probs.tolist(), strict=True)
    ]
    assert selection.passed == {
        "agreement of 9 neighbours ≥ 0.3": sum(agrees for agrees, _ in rules),
        "confidence > 0.5": sum(sure for _, sure in rules),
        "both": sum(all(each) for each in rules),
    }


def test_small_clusters_need_fewer_neighbours() -> None:
    selection = reliable_labels(torch.randn(24, 5), probabilities(24), K, num_neighbors=9)
    assert next(iter(selection.passed)) == "agreement of 4 neighbours ≥ 0.95"


def test_groups_that_lie_apart_are_reliable_however_small() -> None:
    # 30 images in each of 4 groups cannot have 95 neighbours of 100 in common.
    clusters = torch.arange(120) % 4
    embeddings = torch.eye(4)[clusters] + 0.01 * torch.randn(120, 4)
    selection = reliable_labels(embeddings, torch.eye(4)[clusters], 4)
    assert torch.equal(selection.label, clusters)


def test_an_empty_cluster_does_not_change_the_others() -> None:
    probs = probabilities()
    probs[:, 2] = 0
    label = clusmatch_labels(None, probs / probs.sum(dim=1, keepdim=True), K, fraction=0.1).label
    assert label[label >= 0].bincount(minlength=K).tolist() == [4, 4, 0]


def test_among_equal_scores_the_draw_is_random() -> None:
    # Probabilities are saturated and files in the order of classes: no class may be preferred.
    score, clusters = torch.ones(400), torch.zeros(400).long()
    drawn = [
        best_of_each(score, clusters, 1, 0.5, torch.Generator().manual_seed(seed)) == 0
        for seed in (0, 0, 1)
    ]
    assert drawn[0].sum() == 200
    assert 60 < drawn[0][:200].sum() < 140
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    score[300:] = 2  # larger scores are selected without a draw
    assert (best_of_each(score, clusters, 1, 0.25) == 0).nonzero()[:, 0].tolist() == [
        *range(300, 400)
    ]


def test_errors_name_what_is_missing_or_unknown() -> None:
    with pytest.raises(ValueError, match="reads probs and the upstream has none"):
        confident_labels(torch.eye(3), None, K)
    with pytest.raises(ValueError, match="reads embeddings and the upstream has none"):
        clusmatch_labels(None, probabilities(), K, branch="features")
    with pytest.raises(ValueError, match=r"fraction 0.01 of 40 samples per cluster gives 0 labels"):
        best_of_each(torch.zeros(120), torch.zeros(120).long(), K, 0.01)
    with pytest.raises(ValueError, match="branch 'tail' is unknown"):
        clusmatch_labels(None, probabilities(), K, branch="tail")  # type: ignore[arg-type]


def test_oracle_draws_evenly_from_known_labels() -> None:
    truth = torch.tensor([0] * 20 + [1] * 30 + [-1] * 10)
    label = OracleLabels(num_labels=9)(truth, torch.Generator().manual_seed(0)).label
    assert label[label >= 0].bincount().tolist() == [4, 4]
    assert torch.equal(label[label >= 0], truth[label >= 0])
    assert torch.equal(OracleLabels()(truth).label, truth)
    with pytest.raises(ValueError, match="num_labels 1 gives 0 labels for each of 2 classes"):
        OracleLabels(1)(truth)


def test_majority_labels_what_most_neighbours_agree_on() -> None:
    cfg = compose("dataset=digits", "reliable.num_neighbors=3")
    majority = build(cfg, cfg.selectors.majority)
    angles = torch.tensor([0.0, 0.1, 0.21, 0.33, 2.0, 2.1, 2.21])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    clusters = torch.tensor([0, 1, 0, 0, 1, 1, 1])
    probs = torch.nn.functional.one_hot(clusters, 2) * 0.8 + 0.1
    probs[6] = torch.tensor([0.5, 0.5])  # not above one half
    # Image 1 has itself alone of {0, 1, 2}; 0 has two of {0, 1, 2}; 2 has two of {1, 2, 3}.
    found = majority(embeddings, probs, 2, torch.Generator().manual_seed(0))
    assert found.label.tolist() == [0, -1, 0, 0, 1, 1, -1]
