"""The clusters of the images at hand: chosen without labels, numbered like those of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import make_job
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import clustering_scores
from spice_pl.job.finish import write_answer
from spice_pl.job.plan import plan
from spice_pl.job.run import run_stages
from spice_pl.runs.answer import NETWORK, VOTE, candidates, choose_answer
from spice_pl.runs.folder import RunFolder

GROUPS = torch.arange(200) % 4


def features(spread: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator))
    return centres[GROUPS] + spread * torch.randn(200, 16, generator=generator)


def probs_of(clusters: Tensor) -> Tensor:
    return F.one_hot(clusters, 4).float()


def test_clusters_that_neighbours_share_replace_those_of_a_poor_network() -> None:
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(200, generator=generator) < 0.4
    poor = torch.where(wrong, torch.randint(4, (200,), generator=generator), GROUPS)
    answer = choose_answer(features(), probs_of(poor), seed=0)
    assert answer.name != NETWORK
    assert answer.scores[answer.name] == max(answer.scores.values()) > answer.scores[NETWORK]
    # The groups, under the numbers that the network gives most of their images.
    assert torch.equal(answer.probs.argmax(dim=1), GROUPS)


def test_a_good_network_is_kept_as_it_is() -> None:
    probs = probs_of(GROUPS)
    answer = choose_answer(features(), probs, seed=0)
    assert answer.name == NETWORK
    assert torch.equal(answer.probs, probs)


def test_a_network_that_has_collapsed_is_not_kept() -> None:
    # All neighbours are in the one cluster of such a network.
    collapsed = probs_of(torch.zeros(200, dtype=torch.long))
    answer = choose_answer(features(0.8), collapsed, seed=0)
    assert NETWORK not in answer.scores
    assert set(answer.probs.argmax(dim=1).tolist()) == {0, 1, 2, 3}


def test_numbers_follow_the_network_whatever_they_are() -> None:
    order = torch.tensor([2, 0, 3, 1])
    generator = torch.Generator().manual_seed(1)
    poor = torch.where(torch.rand(200, generator=generator) < 0.4, 0, order[GROUPS])
    answer = choose_answer(features(), probs_of(poor), seed=0)
    assert torch.equal(answer.probs.argmax(dim=1), order[GROUPS])


def test_confidence_is_the_share_of_neighbours() -> None:
    poor = probs_of(torch.zeros(200, dtype=torch.long))
    answer = choose_answer(features(), poor, seed=0)
    torch.testing.assert_close(answer.probs.sum(dim=1), torch.ones(200))
    # Groups lie apart: all of an image's neighbours are in its cluster.
    assert answer.probs.max(dim=1).values.tolist() == pytest.approx([1.0] * 200)
    mixed = choose_answer(features(0.8), poor, seed=0).probs.max(dim=1).values
    assert 0.5 < float(mixed.min()) < 1


def answered(job_folder: RunFolder) -> None:
    metrics = job_folder.metrics
    names = [row["name"] for row in metrics["rows"]]
    assert names[-1] == f"{names[-2]}, chosen clusters"
    assert metrics["answer"]["name"] in metrics["answer"]["scores"]
    table, answer = job_folder.read_clusters(), job_folder.answer
    assert table.clusters.tolist() == answer.argmax(axis=1).tolist()
    kept = metrics["answer"]["name"] == NETWORK
    assert (job_folder.path / "answer.npy").is_file() != kept


def test_a_run_reports_both_and_the_next_stage_learns_the_chosen_ones(
    tiny: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(*tiny, "answer=auto", "proto.epochs=1", "proto.module.lr=1e-6")
    run_stages(job)
    for stage in ("proto", "fixmatch"):
        answered(job.folder(stage))
    # Heads that have learned nothing: the images' own groups are found all the same.
    proto = job.folder("proto")
    assert proto.metrics["rows"][-1]["acc"] == 1.0 > proto.metrics["rows"][-2]["acc"]
    assert "answer.npy" in proto.metrics["digests"]
    assert job.folder("fixmatch").metrics["logged"]["truth/reliable_acc"] == 1.0


def test_split_keeps_the_clusters_of_the_network(tiny: Sequence[str]) -> None:
    (step,) = plan(make_job(*tiny, "answer=auto", "stage=proto"))
    pixels = np.zeros((4, 3, 8, 8), np.uint8)
    test = np.array([False, False, False, True])
    images = ImageSet("some", pixels, list("abcd"), "0", is_test=test, protocol="split")
    assert len(images.train_index) < len(images)
    assert write_answer(step, images) is None


def test_what_you_edited_is_not_replaced(tiny: Sequence[str]) -> None:
    (step,) = plan(make_job(*tiny, "answer=auto", "stage=proto"))
    edited = replace(step, settings={**step.settings, "edits": "edits.json"})
    images = ImageSet("some", np.zeros((4, 3, 8, 8), np.uint8), list("abcd"), "0")
    assert write_answer(edited, images) is None


def test_network_and_kmeans_vote_under_the_numbers_of_the_network() -> None:
    """The network is wrong on one group in ways that neighbours do not share."""
    order = torch.tensor([3, 1, 0, 2])
    generator = torch.Generator().manual_seed(2)
    wrong = (GROUPS == 1) & (torch.rand(200, generator=generator) < 0.5)
    poor = torch.where(wrong, torch.randint(4, (200,), generator=generator), order[GROUPS])
    answer = choose_answer(features(0.1), probs_of(poor), seed=0)
    assert answer.name == VOTE
    assert torch.equal(answer.probs.argmax(dim=1), order[GROUPS])


def test_unequal_groups_are_not_cut_where_the_network_cuts_them() -> None:
    """One group has two thirds of the images, and the network's clusters are equally large."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(3).repeat_interleave(torch.tensor([400, 100, 100]))
    rows = torch.eye(8)[group] + 0.25 * torch.randn(600, 8, generator=generator)
    even = F.one_hot(torch.arange(600) // 200, 3).float()  # cuts one group, merges two
    answer = choose_answer(rows, even, seed=0)
    assert answer.name != NETWORK
    found = answer.probs.argmax(dim=1)
    assert clustering_scores(found, group)["recall"] > 0.97


def test_a_candidate_with_an_empty_cluster_is_left_out_where_another_has_none() -> None:
    three = probs_of(GROUPS.clamp_max(2))  # of a network that leaves the fourth cluster empty
    found, _ = candidates(features(), three, seed=0)
    assert NETWORK not in found
    assert all(set(row.tolist()) == {0, 1, 2, 3} for row in found.values())
    # All images are equal: every candidate has one cluster, and all are kept.
    found, _ = candidates(torch.ones(200, 16), probs_of(torch.zeros_like(GROUPS)), seed=0)
    assert NETWORK in found


SMALL = torch.eye(4)[torch.arange(40) % 4]  # ten copies of each of four images


@pytest.mark.parametrize(
    ("rows", "num_clusters"),
    [
        pytest.param(torch.ones(40, 3), 4, id="constant"),
        pytest.param(SMALL, 4, id="copies"),
        pytest.param(SMALL, 7, id="fewer images that differ than clusters"),
        pytest.param(torch.cat([SMALL, SMALL[:13] + 50 * torch.eye(4)[0]]), 3, id="in two parts"),
        pytest.param(torch.eye(6), 6, id="as many clusters as images"),
        pytest.param(torch.eye(3)[:2], 1, id="fewer images than neighbours"),
        pytest.param(torch.ones(1, 2), 1, id="one image"),
    ],
)
def test_awkward_features_have_an_answer_without_warnings(rows: Tensor, num_clusters: int) -> None:
    probs = torch.rand(len(rows), num_clusters, generator=torch.Generator().manual_seed(0))
    answer = choose_answer(rows, probs / probs.sum(dim=1, keepdim=True), seed=0)
    assert answer.probs.shape == probs.shape
    torch.testing.assert_close(answer.probs.sum(dim=1), torch.ones(len(rows)))
    assert all(np.isfinite(list(answer.scores.values())))


def test_features_that_are_not_finite_are_named() -> None:
    rows = features()
    rows[7, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 samples have a feature that is NaN.*\[7\]"):
        choose_answer(rows, probs_of(GROUPS), seed=0)


def test_many_clusters_are_not_emptied() -> None:
    """200 groups of five images: each keeps its cluster, though the network finds half of them."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(1000) % 200
    rows = torch.randn(200, 64, generator=generator)[group]
    rows += 0.05 * torch.randn(rows.shape, generator=generator)
    half = F.one_hot(group // 2, 200).float()
    found = choose_answer(rows, half, seed=0).probs.argmax(dim=1)
    assert len(set(found.tolist())) > 190
