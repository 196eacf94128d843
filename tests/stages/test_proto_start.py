"""Where the heads start: clusters of the first buffer, which may have any sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.small import K, N, fit
from tests.stages.test_proto import CYCLES, B, H, M, Watch, proto
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.stages import proto_start
from spice_pl.stages.proto_choice import HeadScores
from spice_pl.stages.proto_start import start_clusters, start_images, start_probs

SIZES = [300, 60, 30, 15, 15]  # 20 : 1


def groups(sizes: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make features around one centre per group, and the groups."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = 4 * torch.randn(len(sizes), 20, generator=generator)
    features = centres[truth] + torch.randn(len(truth), 20, generator=generator)
    return features, truth


def pairs(clusters: Tensor) -> Tensor:
    """Return which samples are together."""
    return clusters[:, None] == clusters


@pytest.mark.parametrize("sizes", [SIZES, [60] * 5, [400, 15, 15]])
def test_groups_of_any_size_are_found(sizes: list[int]) -> None:
    features, truth = groups(sizes)
    clusters = start_clusters(features, len(sizes), seed=0)
    assert torch.equal(pairs(clusters), pairs(truth))
    scaled = start_clusters(3 * features.half(), len(sizes), seed=1)
    assert torch.equal(pairs(scaled), pairs(truth))


def test_errors_that_each_k_means_makes_alone_are_outvoted(monkeypatch: pytest.MonkeyPatch) -> None:
    features, truth = groups([40, 40, 40])
    walked = truth.repeat(4, 1)
    for row, names in enumerate([[1, 2, 0], [0, 2, 1], [2, 1, 0]]):
        walked[row, 3 * row :: 9] = (truth[3 * row :: 9] + 1) % 3  # one image in nine
        walked[row] = torch.tensor(names)[walked[row]]
    walked[3] = truth.clamp_max(1)  # 100 steps join two groups
    monkeypatch.setattr(proto_start, "walk_clusters", lambda *_, **__: walked)
    assert torch.equal(pairs(start_clusters(features, 3, seed=0)), pairs(truth))


def test_a_vote_that_empties_a_cluster_gives_way_to_k_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each k-means has one image alone, a different one: no vote keeps it."""
    features, truth = groups([40, 40])
    walked = truth.repeat(4, 1)
    for row in range(4):
        walked[row, 10 * row] = 2
    monkeypatch.setattr(proto_start, "walk_clusters", lambda *_, **__: walked)
    found = start_clusters(features, 3, seed=0)
    assert set(found.tolist()) == {0, 1, 2}
    assert any(torch.equal(found, row) for row in walked[2:])


def test_the_buffer_comes_first_and_other_training_images_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_index = torch.arange(0, 100, 2)
    buffer = torch.tensor([8, 2, 90])
    images = start_images(buffer, train_index, seed=0)
    assert images[:3].tolist() == [8, 2, 90]
    assert images.sort().values.tolist() == train_index.tolist()
    monkeypatch.setattr(proto_start, "START_AT_MOST", 10)
    some = start_images(buffer, train_index, seed=0)
    assert torch.equal(some, images[:10])
    assert start_images(buffer, train_index, seed=1)[:3].tolist() == [8, 2, 90]
    assert not torch.equal(start_images(buffer, train_index, seed=1), some)
    assert torch.equal(start_images(train_index, train_index, seed=0), train_index)  # no limit


def test_members_near_their_mean_rank_first() -> None:
    """Directions 0, 60 and 90 degrees: the mean of the first two is at 30."""
    angles = torch.tensor([0.0, 60.0, 90.0]).deg2rad()
    embeddings = 5 * torch.stack([angles.cos(), angles.sin()], dim=1)
    probs = start_probs(embeddings, torch.tensor([1, 1, 0]), num_clusters=3)
    near = (3 + math.cos(math.radians(30))) / 4
    expected = torch.tensor([[0.0, near, 0.0], [0.0, near, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(probs, expected)


def seen_by_e_steps(module: Any, streams: Any, epochs: int = 2) -> tuple[list[Tensor], list[Any]]:
    """Train, and return probabilities and shares of the E-steps, without those of the choice."""
    probs: list[Tensor] = []
    shares: list[Any] = []
    original = module.prototype_pseudo_labels

    def watched(embeddings: Tensor, given: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        if given.ndim == 3:
            probs.append(given.clone())
            shares.append(None if more["shares"] is None else more["shares"].clone())
        return original(embeddings, given, **more)  # type: ignore[no-any-return]

    module.prototype_pseudo_labels = watched
    fit(module, streams, epochs=epochs)
    return probs, shares


def test_only_the_first_cycle_reads_kmeans(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, start="kmeans")
    probs, shares = seen_by_e_steps(module, streams)
    assert len(probs) == 2 * CYCLES
    assert set((probs[0] > 0).sum(dim=-1).flatten().tolist()) == {1}
    assert all(torch.equal(row, probs[0][0]) for row in probs[0])  # the same for all heads
    for later in probs[1:]:
        torch.testing.assert_close(later.sum(dim=-1), torch.ones(H, M))
    assert shares == [None] * len(shares)


def test_the_first_m_step_learns_with_a_single_softmax(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, start="kmeans")
    original, steps = module.head_losses, []

    def counted(logits: Tensor, label: Tensor) -> Tensor:
        steps.append(len(label))
        return original(logits, label)

    module.head_losses = counted
    fit(module, streams, epochs=2)
    per_cycle = 2 * (M // K * K // B)  # repeats, and full batches of slots
    assert len(steps) == (2 * CYCLES - 1) * per_cycle


def test_all_training_images_are_clustered_the_buffer_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, streams = proto(tmp_path, start="kmeans")
    given: list[Tensor] = []

    def watched(features: Tensor, num_clusters: int, seed: int) -> Tensor:
        given.append(features)
        return start_clusters(features, num_clusters, seed)

    monkeypatch.setattr("spice_pl.stages.proto.start_clusters", watched)
    watch = Watch()
    fit(module, streams, watch, epochs=1)
    (features,) = given
    index = torch.cat([batch.index for batch in watch.batches])
    assert torch.equal(features[:M], module.features[index[:M]])
    assert torch.equal(features.sort(dim=0).values, module.features.sort(dim=0).values)
    assert len(features) == N > M


def test_estimated_shares_start_at_the_sizes_of_the_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, streams = proto(tmp_path, start="kmeans", prior="estimated")
    module.prototype_shares = lambda *_, shares: shares  # what is estimated moves nothing
    found = torch.arange(N) ** 2 % K
    monkeypatch.setattr("spice_pl.stages.proto.start_clusters", lambda *_: found)
    probs, shares = seen_by_e_steps(module, streams)
    assert torch.equal(probs[0][0].argmax(dim=1), found[:M])
    for each in shares:
        torch.testing.assert_close(each, (found.bincount(minlength=K) / N).expand(H, K))


@pytest.mark.parametrize(("start", "kept"), [("random", 1), ("kmeans", 0)])
def test_heads_without_an_empty_cluster_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, kept: int
) -> None:
    found = HeadScores(
        losses=torch.tensor([0.9, 0.7, 1.0]),
        information=torch.zeros(3),
        num_empty=torch.tensor([0, 1, 0]),
    )
    monkeypatch.setattr("spice_pl.stages.proto.score_heads", lambda *_: found)
    module, streams = proto(tmp_path, start=start)
    fit(module, streams, epochs=1)
    assert int(module.best_head) == kept
    assert float(module.best_loss) == pytest.approx(float(found.losses[kept]))


def test_random_is_the_paper(tmp_path: Path) -> None:
    module, streams = proto(tmp_path)
    probs, _ = seen_by_e_steps(module, streams, epochs=1)
    torch.testing.assert_close(probs[0].sum(dim=-1), torch.ones(H, M))


def test_an_unknown_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'spectral' is none of random, kmeans"):
        proto(tmp_path, start="spectral")
