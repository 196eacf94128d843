from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spice_pl.nn.thresholds import (
    ClusMatchThreshold,
    FixedThreshold,
    FlexMatchThreshold,
    FreeMatchThreshold,
    SoftMatchThreshold,
    Threshold,
)

K, U, N = 5, 64, 200


def batch(seed: int = 0, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(U, K, generator=generator)
    return torch.randperm(N, generator=generator)[:U], logits.softmax(dim=1)


def every() -> list[Threshold]:
    made: list[Threshold] = [
        FixedThreshold(),
        FreeMatchThreshold(K),
        FlexMatchThreshold(K),
        SoftMatchThreshold(K),
        ClusMatchThreshold(K),
        ClusMatchThreshold(K, empty_rows="decay"),
    ]
    for threshold in made:
        threshold.begin(N)
    return made


def test_diagonal_stays_0_and_rows_sum_to_1_minus_the_positive_threshold() -> None:
    threshold = ClusMatchThreshold(K, momentum=0.5)
    torch.testing.assert_close(threshold.levels(), torch.full((K,), 1 / K))
    for seed in range(20):
        threshold.update(*batch(seed))
        assert torch.equal(threshold.matrix.diagonal(), torch.zeros(K))
        torch.testing.assert_close(threshold.matrix.sum(dim=1), 1 - threshold.levels())
        assert ((threshold.levels() >= 1 / K - 1e-6) & (threshold.levels() <= 1)).all()


def test_matrix_by_a_plain_loop() -> None:
    threshold, (index, probs) = ClusMatchThreshold(K, momentum=0.7), batch()
    before = threshold.matrix.clone()
    threshold.update(index, probs)
    for c in range(K):
        rows = [p for p in probs if int(p.argmax()) == c]
        assert rows
        for j in range(K):
            mean = 0.0 if j == c else float(sum(p[j] for p in rows)) / len(rows)
            expected = 0.7 * float(before[c, j]) + 0.3 * mean
            assert float(threshold.matrix[c, j]) == pytest.approx(expected, abs=1e-6)


def test_absent_cluster_holds_or_decays() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    hold, decay = ClusMatchThreshold(3, 0.9), ClusMatchThreshold(3, 0.9, empty_rows="decay")
    for threshold in (hold, decay):
        threshold.update(torch.arange(2), probs)
    assert float(hold.levels()[2]) == pytest.approx(1 / 3)
    assert float(decay.levels()[2]) == pytest.approx(1 - 0.9 * 2 / 3)
    assert torch.equal(hold.matrix[:2], decay.matrix[:2])
    with pytest.raises(ValueError, match="empty_rows 'drop' is unknown; choose hold or decay"):
        ClusMatchThreshold(3, empty_rows="drop")  # type: ignore[arg-type]


def test_the_label_and_the_kmeans_label_are_never_ruled_out() -> None:
    threshold, (index, probs) = ClusMatchThreshold(K), batch()
    threshold.update(index, probs)
    kept = torch.randint(-1, K, (U,), generator=torch.Generator().manual_seed(0))
    ruled_out = threshold.negatives(probs, kept)
    rows = torch.arange(U)
    assert ruled_out.any()
    assert not ruled_out[rows, probs.argmax(dim=1)].any()
    assert not ruled_out[rows[kept >= 0], kept[kept >= 0]].any()
    for i in range(U):
        guess = int(probs[i].argmax())
        for j in range(K):
            below = bool(probs[i, j] < threshold.matrix[guess, j])
            assert bool(ruled_out[i, j]) == (below and j not in (guess, int(kept[i])))


def test_freematch_by_hand() -> None:
    threshold, (index, probs) = FreeMatchThreshold(K, momentum=0.9), batch()
    threshold.update(index, probs)
    level = 0.9 / K + 0.1 * float(probs.max(dim=1).values.mean())
    shares = 0.9 / K + 0.1 * probs.mean(dim=0)
    torch.testing.assert_close(threshold.levels(), level * shares / shares.max())
    counts = probs.argmax(dim=1).bincount(minlength=K)
    torch.testing.assert_close(threshold.shares.histogram, 0.9 / K + 0.1 * counts / U)
    expected = [float(float(p.max()) >= float(threshold.levels()[int(p.argmax())])) for p in probs]
    assert threshold(probs).tolist() == expected


def test_flexmatch_counts_the_last_confident_label_of_each_image() -> None:
    threshold = FlexMatchThreshold(2, confidence=0.9)
    threshold.begin(4)
    sure = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    assert threshold.levels().tolist() == [0.0, 0.0]  # no confident image yet: all labels are used
    threshold.update(torch.tensor([0, 1]), sure[[0, 0]])
    threshold.update(torch.tensor([0, 2]), sure[[1, 1]])  # image 0 changed its label
    assert threshold.last_label.tolist() == [1, 0, 1, -1]
    torch.testing.assert_close(threshold.levels(), torch.tensor([0.9 / 3, 0.9]))
    unsure = torch.tensor([[0.6, 0.4]])
    threshold.update(torch.tensor([1]), unsure)
    assert int(threshold.last_label[1]) == 0
    assert threshold(torch.tensor([[0.6, 0.4], [0.4, 0.6]])).tolist() == [1.0, 0.0]


def test_softmatch_weights_fall_below_the_mean_by_a_gaussian() -> None:
    threshold = SoftMatchThreshold(2, num_sigmas=2, momentum=0.0)
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.7, 0.3], [0.3, 0.7]])  # uniform on average
    threshold.update(torch.arange(4), probs)
    assert float(threshold.mean) == pytest.approx(0.8)
    variance = 4 * 0.1**2 / 3
    expected = torch.tensor([1, 1, *[-(0.1**2) * 4 / (2 * variance)] * 2])
    torch.testing.assert_close(threshold(probs)[2:], expected[2:].exp())
    assert threshold(probs)[:2].tolist() == [1, 1]


def test_softmatch_alignment_weighs_rare_clusters_higher() -> None:
    threshold = SoftMatchThreshold(2, momentum=0.0)
    probs = torch.tensor([[0.8, 0.2]] * 9 + [[0.2, 0.8]])
    threshold.update(torch.arange(10), probs)
    weights = threshold(probs)
    assert weights[9] > weights[0]


@pytest.mark.parametrize("threshold", every(), ids=lambda each: type(each).__name__)
def test_weights_are_valid_for_one_hot_and_uniform_predictions(threshold: Threshold) -> None:
    one_hot = torch.eye(K)[torch.zeros(U, dtype=torch.long)]  # one cluster, the others empty
    uniform = torch.full((U, K), 1 / K)
    for probs in (one_hot, uniform, one_hot):
        threshold.update(torch.arange(U), probs)
        weight = threshold(probs)
        assert weight.shape == (U,)
        assert ((weight >= 0) & (weight <= 1)).all()


@pytest.mark.parametrize("place", range(6))
def test_the_order_in_which_batches_of_ranks_are_joined_does_not_matter(place: int) -> None:
    one, two = every()[place], every()[place]
    for seed in range(3):
        index, probs = batch(seed)
        one.update(index, probs)
        joined = [torch.cat([each[rank::2] for rank in range(2)]) for each in (index, probs)]
        two.update(*joined)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, msg=key)
