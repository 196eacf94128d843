"""DCBoost: images that agree with their neighbours refine the encoder of a clustering."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import NUM_CLASSES
from tests.stages.small import (
    STRONG,
    WEAK,
    K,
    N,
    Watch,
    backbone,
    fit,
    image_set,
    plain_features,
    same,
    settled,
    state,
    stream,
    write_upstream,
)
from torch import Tensor
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.dcboost import compactness_loss, separation_loss
from spice_pl.stages.dcboost import PREDICTOR_LR, DCBoostModule

B = 15
STREAMS = {"images": stream(B, query=WEAK, key=STRONG)}


def dcboost(**settings: Any) -> DCBoostModule:
    small: dict[str, Any] = {"hidden_dim": 10, "warmup_epochs": 0}
    return DCBoostModule(backbone(), K, **(small | settings))


def test_starts_from_the_encoder_of_the_upstream(tmp_path: Path) -> None:
    module = dcboost()
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    for encoder in (module.encoder, module.target_encoder):
        assert same(state(encoder), state(settled(backbone(3))))


def test_loss_of_a_step_is_the_sum_of_three(tmp_path: Path) -> None:
    """One step at rate 0, without noise; neighbours by a plain loop."""
    module = dcboost(lr=0.0, noise=0.0, momentum=1.0)
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    before = copy.deepcopy(module).train()
    watch = Watch()
    fit(module, STREAMS, watch, epochs=1, limit_train_batches=1)
    (batch,), (loss,) = watch.batches, watch.losses
    with torch.no_grad():
        views = torch.cat([batch.views["query"], batch.views["key"]])
        online = F.normalize(before.encoder(views))
        target = F.normalize(before.target_encoder(views))
        predicted = F.normalize(before.predictor(online))
    target = torch.cat(target.chunk(2)[::-1])
    clusters = module.clusters[batch.index]
    assert len(set(clusters.tolist())) > 1
    aligned = (predicted - target).square().sum(dim=1).mean()
    others = []
    for own, other in zip(online.chunk(2), target.chunk(2), strict=True):
        chosen = clusters.where(chosen_by_loops(other, clusters), -1)
        read = (own, other, chosen, K)
        others.append(compactness_loss(*read) + separation_loss(*read))
    assert float(loss) == pytest.approx(float(aligned + sum(others) / 2), abs=1e-4)


def chosen_by_loops(rows: Tensor, clusters: Tensor) -> Tensor:
    """Whether all of an image's k nearest are of its cluster, for the k of the largest k n_k."""
    best: tuple[int, list[bool]] = (-1, [])
    for k in range(1, len(rows)):
        found = []
        for i in range(len(rows)):
            order = sorted(
                (j for j in range(len(rows)) if j != i), key=lambda j: -float(rows[i] @ rows[j])
            )
            found.append(all(clusters[j] == clusters[i] for j in order[:k]))
        if k * sum(found) > best[0]:
            best = (k * sum(found), found)
    return torch.tensor(best[1])


def test_kmeans_starts_at_the_clusters_of_the_upstream(tmp_path: Path) -> None:
    """Clusters keep their numbers, of which random centres know nothing."""
    truth = torch.arange(N) % NUM_CLASSES
    named = (truth + 1) % NUM_CLASSES
    probs = F.one_hot(named, K).float().numpy()
    upstream = write_upstream(tmp_path, settled(backbone(0)), probs=probs)
    module = dcboost(lr=0.0, momentum=1.0)
    module.prepare(image_set(), upstream, STREAMS)
    assert torch.equal(module.clusters, named)
    fit(module, STREAMS, epochs=1)
    assert torch.equal(module.clusters, named)
    assert torch.equal(module.head(plain_features(module.target_encoder)).argmax(dim=1), named)


def test_an_upstream_with_another_number_of_clusters_is_refused(tmp_path: Path) -> None:
    probs = torch.full((N, K + 1), 1 / (K + 1)).numpy()
    upstream = write_upstream(tmp_path, backbone(0), probs=probs)
    with pytest.raises(UsageError, match=r"has 4 clusters and dataset\.num_clusters is 3; give 4"):
        dcboost().prepare(image_set(), upstream, STREAMS)


def test_views_alone_are_aligned_in_the_warm_up(tmp_path: Path) -> None:
    module = dcboost(warmup_epochs=2)
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    fit(module, STREAMS, epochs=2)
    assert (module.clusters == -1).all()


def test_the_predictor_learns_ten_times_as_fast(tmp_path: Path) -> None:
    module = dcboost(lr=0.01)
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    trainer = fit(module, STREAMS, epochs=1)
    encoder, predictor = trainer.optimizers[0].param_groups
    assert predictor["initial_lr"] == pytest.approx(PREDICTOR_LR * encoder["initial_lr"])
    count = sum(len(group["params"]) for group in (encoder, predictor))
    assert count == len([each for each in module.parameters() if each.requires_grad])


def test_dcboost_keeps_the_three_kinds_of_photograph_and_makes_them_compact(
    tmp_path: Path,
) -> None:
    module = dcboost(lr=0.01, momentum=0.9)
    streams = {"images": stream(45, query=WEAK, key=WEAK)}
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(0))), streams)
    truth = torch.arange(N) % NUM_CLASSES

    def spread() -> float:
        rows = F.normalize(plain_features(module.target_encoder))
        return float(compactness_loss(rows, rows, truth, K))

    before = spread()
    fit(module, streams, epochs=20)
    assert spread() < before / 2
    found = module.head(plain_features(module.target_encoder)).argmax(dim=1)
    assert clustering_scores(found, truth)["acc"] > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_neighbors": 0}, r"dcboost\.module\.max_neighbors 0 is not at least 1; the paper"),
        ({"noise": -0.1}, r"dcboost\.module\.noise -0\.1 is not at least 0"),
        ({"momentum": 1.5}, r"dcboost\.module\.momentum 1\.5 is not from 0 to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dcboost(**settings)


def test_clusters_must_be_known_and_fit_into_a_batch() -> None:
    with pytest.raises(UsageError, match=r"stage=dcboost clusters from its first step"):
        DCBoostModule(backbone(), None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"batch_size 15 is less than the 16 clusters"):
        DCBoostModule(backbone(), 16).check(image_set(), STREAMS)
