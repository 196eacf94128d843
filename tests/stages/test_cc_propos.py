"""Contrastive clustering and ProPos: features and clusters from one training."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import pytorch_lightning as pl
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
    state,
    stream,
)
from torch import Tensor
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.stages.cc import ContrastiveClusteringModule
from spice_pl.stages.propos import ProPosModule

B, P = 15, 6
STREAMS = {"images": stream(B, query=WEAK, key=STRONG)}


def cc(**settings: Any) -> ContrastiveClusteringModule:
    return ContrastiveClusteringModule(backbone(), K, projection_dim=P, **settings)


def propos(**settings: Any) -> ProPosModule:
    small: dict[str, Any] = {"projection_dim": P, "hidden_dim": 10, "warmup_epochs": 0}
    return ProPosModule(backbone(), K, **(small | settings))


# CC.


def test_loss_of_cc_equals_plain_loops_over_rows_and_columns() -> None:
    module = cc(lr=0.0, temperature=0.5, cluster_temperature=0.8)
    encoder, projection, head = (
        copy.deepcopy(each).train() for each in (module.encoder, module.projection, module.head)
    )
    watch = Watch()
    fit(module, STREAMS, watch, epochs=1)
    assert len(watch.losses) == N // B

    def contrast(vectors: Tensor, temperature: float) -> float:
        count, losses = len(vectors), []
        for i in range(count):
            scores = {
                j: float(F.cosine_similarity(vectors[i], vectors[j], dim=0)) / temperature
                for j in range(count)
                if j != i
            }
            total = sum(math.exp(score) for score in scores.values())
            losses.append(math.log(total) - scores[(i + count // 2) % count])
        return sum(losses) / count

    for batch, loss in zip(watch.batches, watch.losses, strict=True):
        features = encoder(torch.cat([batch.views["query"], batch.views["key"]])).detach()
        rows = projection(features).detach().double()
        first, second = head(features).detach().double().chunk(2)
        entropy = -sum(
            float(share) * math.log(float(share))
            for each in (first, second)
            for share in each.mean(dim=0)
        )
        expected = contrast(rows, 0.5) + contrast(torch.cat([first.T, second.T]), 0.8) - entropy
        assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_cc_finds_the_three_kinds_of_photograph() -> None:
    torch.manual_seed(0)
    module = cc(lr=3e-3)
    streams = {"images": stream(45, query=WEAK, key=WEAK)}
    fit(module, module.prepare(image_set(), None, streams), epochs=60)
    module.eval()
    with torch.no_grad():
        probs = module.head(plain_features(module.encoder))
    truth = torch.arange(N) % NUM_CLASSES
    assert clustering_scores(probs.argmax(dim=1), truth)["acc"] > 0.9


# ProPos.


def test_loss_of_propos_equals_a_plain_loop() -> None:
    """One step at rate 0 from networks that differ, without noise: BYOL's loss and prototypes."""
    module = propos(lr=0.0, noise=0.0, momentum=1.0, scattering_weight=0.5, temperature=0.4)
    module.prepare(image_set(), None, STREAMS)
    torch.manual_seed(1)
    for parameter in module.target_projection.parameters():
        parameter.copy_(torch.randn_like(parameter))
    before = copy.deepcopy(module).train()
    watch = Watch()
    fit(module, STREAMS, watch, epochs=1, limit_train_batches=1)
    (batch,), (loss,) = watch.batches, watch.losses
    views = torch.cat([batch.views["query"], batch.views["key"]])
    with torch.no_grad():
        projected = before.projection(before.encoder(views))
        online = F.normalize(before.predictor(projected)).double()
        target = F.normalize(before.target_projection(before.target_encoder(views))).double()
    own = F.normalize(projected).double()
    aligned = [float((online[i] - target[(i + B) % (2 * B)]).square().sum()) for i in range(2 * B)]
    clusters = module.clusters[batch.index]
    present = sorted(set(clusters.tolist()))
    scattered = []
    for first, other in ((0, B), (B, 0)):
        mean, moved = (
            {
                k: F.normalize(rows[start : start + B][clusters == k].sum(dim=0), dim=0)
                for k in present
            }
            for rows, start in ((own, first), (target, other))
        )
        for k in present:
            positive = math.exp(float(mean[k] @ moved[k]) / 0.4)
            others = [math.exp(float(mean[k] @ mean[j]) / 0.4) for j in present if j != k]
            scattered.append(-math.log(positive / (positive + sum(others))))
    assert len(present) > 1
    expected = sum(aligned) / (2 * B) + 0.5 * sum(scattered) / len(scattered)
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_clusters_are_those_of_kmeans_on_the_target_before_the_epoch() -> None:
    module = propos(lr=0.0, momentum=1.0)
    module.prepare(image_set(), None, STREAMS)
    features = plain_features(module.target_encoder)
    fit(module, STREAMS, epochs=1)
    truth, _ = cosine_kmeans(features, K, generator=torch.Generator().manual_seed(0))
    assert clustering_scores(module.clusters, truth)["ari"] == 1.0
    probs = module.head(features)
    assert torch.equal(probs.argmax(dim=1), module.clusters)  # the head has the same centres


def test_without_prototypes_in_the_warm_up() -> None:
    module = propos(warmup_epochs=2)
    module.prepare(image_set(), None, STREAMS)
    fit(module, STREAMS, epochs=2)
    assert (module.clusters == -1).all()
    assert not module.head.weight.equal(torch.zeros_like(module.head.weight))
    module.prepare(image_set(), None, STREAMS)
    fit(module, STREAMS, epochs=3)
    assert sorted(set(module.clusters.tolist())) == list(range(K))


def test_the_target_is_a_moving_average() -> None:
    module = propos(momentum=0.75, lr=0.05)
    module.prepare(image_set(), None, STREAMS)
    watched: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Parts(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            watched.append((state(module.target_projection), state(module.projection)))

    fit(module, STREAMS, Parts(), epochs=1, limit_train_batches=2)
    target, online = watched[1]
    for key, value in state(module.target_projection).items():
        if value.is_floating_point() and "running" not in key:
            torch.testing.assert_close(value, 0.75 * target[key] + 0.25 * online[key])
    assert not same(target, online)


def test_samples_are_normal_and_the_same_for_an_image_in_any_batch() -> None:
    module = propos(projection_dim=200)
    module.trainer = type("Trainer", (), {"current_epoch": 3})()
    index = torch.arange(100)
    noise = module._noise(index)  # (2B, P)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    one, other = noise.chunk(2)
    assert not torch.equal(one, other)
    part = module._noise(index[[7, 3]])
    torch.testing.assert_close(part, torch.cat([one[[7, 3]], other[[7, 3]]]))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (cc, {"temperature": 0.0}, r"cc\.module\.temperature 0\.0 is not positive"),
        (cc, {"cluster_temperature": -1.0}, r"cluster_temperature -1\.0 is not positive"),
        (propos, {"temperature": 0.0}, r"propos\.module\.temperature 0\.0 is not above 0"),
        (propos, {"noise": -0.1}, r"noise -0\.1 is not at least 0"),
        (propos, {"momentum": 1.5}, r"momentum 1\.5 is not from 0 to 1"),
        (propos, {"scattering_weight": -1.0}, r"scattering_weight -1\.0 is not at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    make: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make(**settings)


@pytest.mark.parametrize("kind", [ContrastiveClusteringModule, ProPosModule])
def test_clusters_must_be_known_and_fit_into_a_batch(kind: Any) -> None:
    with pytest.raises(UsageError, match=rf"stage={kind.name} clusters from its first step"):
        kind(backbone(), None)
    module = kind(backbone(), 16)
    with pytest.raises(UsageError, match=r"batch_size 15 is less than the 16 clusters"):
        module.check(image_set(), STREAMS)
