"""A stage that learned from clusters does not replace them by worse ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import NUM_CLASSES, NUM_IMAGES, make_job
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.datamodule import Views
from spice_pl.job.run import run_stages
from spice_pl.runs.answer import NETWORK, Answer
from spice_pl.runs.earlier import better_of, warn_if_worse
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction
from spice_pl.stages.fixmatch import ReliableFixMatchModule

GROUPS = torch.arange(200) % 4
ORDER = torch.tensor([2, 0, 3, 1])


def probs_of(clusters: Tensor) -> Tensor:
    return 0.8 * F.one_hot(clusters, 4).float() + 0.05


def upstream(path: Path, clusters: Tensor) -> RunFolder:
    folder = RunFolder(path / "proto" / "seed0")
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator))
    features = centres[GROUPS] + 0.05 * torch.randn(200, 16, generator=generator)
    for name, array in (("features.npy", features), ("probs.npy", probs_of(clusters))):
        folder.create(name, tuple(array.shape))
        folder.write_rows(name, np.arange(200), array.numpy())
        folder.publish(name)
    return folder


def wrong(share: float) -> Tensor:
    """The groups, with a share of images in any cluster."""
    generator = torch.Generator().manual_seed(1)
    moved = torch.rand(200, generator=generator) < share
    return torch.where(moved, torch.randint(4, (200,), generator=generator), GROUPS)


def answer_of(clusters: Tensor) -> Answer:
    return Answer(NETWORK, {NETWORK: 1.0}, probs_of(clusters))


def test_worse_clusters_give_way_to_the_earlier_ones_under_their_own_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worse = ORDER[wrong(0.3)]  # the network numbers clusters in another way
    with caplog.at_level(logging.INFO):
        kept = better_of(answer_of(worse), probs_of(worse), "fixmatch", upstream(tmp_path, GROUPS))
    assert kept.name == "stage=proto"
    assert kept.scores["stage=proto"] > kept.scores["stage=fixmatch"]
    assert torch.equal(kept.probs.argmax(dim=1), ORDER[GROUPS])
    assert kept.probs.max(dim=1).values.tolist() == pytest.approx([0.85] * 200)
    assert "clusters of stage=proto are kept: without labels" in caplog.text


def test_better_and_equal_clusters_stay(tmp_path: Path) -> None:
    better = answer_of(GROUPS)
    folder = upstream(tmp_path, wrong(0.3))
    assert better_of(better, better.probs, "fixmatch", folder) is better
    same = answer_of(wrong(0.3))
    assert better_of(same, same.probs, "fixmatch", folder) is same


def test_only_worse_clusters_of_a_network_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_worse(probs_of(GROUPS), "fixmatch", upstream(tmp_path / "a", wrong(0.3)))
    assert not caplog.text
    warn_if_worse(probs_of(wrong(0.3)), "fixmatch", upstream(tmp_path / "b", GROUPS))
    assert "a lower fixmatch.module.lr" in caplog.text.lower()


def spoiled(answer: str, tiny: Sequence[str]) -> tuple[RunFolder, RunFolder]:
    """Run all stages with a stage 3 whose probabilities and features are noise."""

    def predict(self: ReliableFixMatchModule, batch: Views) -> Prediction:
        noise = torch.rand(NUM_IMAGES, 8, generator=torch.Generator().manual_seed(0))[batch.index]
        return Prediction(batch.index, noise, noise[:, :NUM_CLASSES].softmax(dim=1))

    job = make_job(*tiny, answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReliableFixMatchModule, "predict", predict)
        run_stages(job)
    return job.folder("proto"), job.folder("fixmatch")


def test_a_spoiled_stage_3_keeps_the_clusters_of_stage_2_and_says_so(tiny: Sequence[str]) -> None:
    proto, fixmatch = spoiled("answer=auto", tiny)
    one, other = proto.answer.argmax(axis=1), fixmatch.read_clusters().clusters
    assert len({*zip(one.tolist(), other.tolist(), strict=True)}) == NUM_CLASSES  # renumbered
    found = fixmatch.metrics["answer"]
    assert found["name"] == "stage=proto"
    assert found["scores"]["stage=proto"] > found["scores"]["stage=fixmatch"]
    assert fixmatch.metrics["rows"][-1]["acc"] == proto.metrics["rows"][-1]["acc"]
    page = (fixmatch.path / "report.html").read_text()
    assert "This page shows the clusters of “stage=proto”" in page


def test_the_paper_keeps_the_network_and_a_warning_says_that_it_is_worse(
    tiny: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, fixmatch = spoiled("answer=network", tiny)
    assert "those of stage=fixmatch" in caplog.text
    assert "answer=auto keeps the better ones" in caplog.text
    assert fixmatch.metrics["answer"] is None
    assert np.array_equal(fixmatch.read_clusters().clusters, fixmatch.probs.argmax(axis=1))
