"""Calibrated deep clustering: labels by one head, clusters by another."""

from __future__ import annotations

import copy
import math
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
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.nn.heads import ClusterHead
from spice_pl.stages.cdc import CdcModule

B = 15
STREAMS = {"images": stream(B, weak=WEAK, strong=STRONG)}


def cdc(**settings: Any) -> CdcModule:
    small: dict[str, Any] = {"hidden_dim": 10, "region_size": 3}
    return CdcModule(backbone(), K, **(small | settings))


def test_both_heads_start_at_kmeans_on_the_upstream(tmp_path: Path) -> None:
    module = cdc(hidden_dim=40)
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    assert same(state(module.encoder), state(settled(backbone(3))))
    assert same(state(module.clustering), state(module.calibration))
    features = plain_features(module.encoder)
    clusters, _ = cosine_kmeans(features, K, generator=torch.Generator().manual_seed(0))
    found = module.calibration(features).argmax(dim=1)
    assert clustering_scores(found, clusters)["acc"] > 0.9  # cosines there, distances here


def test_a_head_has_at_most_as_many_hidden_units_as_there_are_images(tmp_path: Path) -> None:
    module = cdc(hidden_dim=512)
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    assert module.calibration.hidden.out_features == N


def test_loss_of_a_step_equals_a_plain_loop(tmp_path: Path) -> None:
    module = cdc(lr=0.0, encoder_lr=0.0, entropy_weight=0.7)
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    encoder = copy.deepcopy(module.encoder).train()
    watch = Watch()
    fit(module, STREAMS, watch, epochs=1, limit_train_batches=1)
    (batch,), (loss,) = watch.batches, watch.losses
    with torch.no_grad():
        views = torch.cat([batch.views["weak"], batch.views["strong"]])
        weak, strong = encoder(views).chunk(2)
        sure, predicted, learned = (
            head.logits(rows).double().softmax(dim=1)
            for head, rows in (
                (module.calibration, weak),
                (module.clustering, weak),
                (module.clustering, strong),
            )
        )
    # Labels: M of the largest of each column, M the sum of the B / K largest.
    takers: dict[int, list[tuple[float, int]]] = {}
    for c in range(K):
        order = sorted(range(B), key=lambda i: -float(sure[i, c]))
        count = max(1, math.floor(sum(float(sure[i, c]) for i in order[: B // K])))
        for i in order[:count]:
            takers.setdefault(i, []).append((float(sure[i, c]), c))
    own = [-math.log(float(learned[i, max(taken)[1]])) for i, taken in takers.items()]
    # Targets: k-means from the first five images.
    rows = F.normalize(weak).double()
    centres = rows[:5].clone()
    for _ in range(11):
        region = [max(range(5), key=lambda r: float(rows[i] @ centres[r])) for i in range(B)]
        for r in range(5):
            if r in region:
                mine = [rows[i] for i in range(B) if region[i] == r]
                centres[r] = F.normalize(torch.stack(mine).sum(dim=0), dim=0)
    cross = 0.0
    for i in range(B):
        mates = [predicted[j] for j in range(B) if region[j] == region[i]]
        target = torch.stack(mates).mean(dim=0)
        cross -= float((target * sure[i].log()).sum()) / B
    mean = sure.mean(dim=0)
    entropy = -float((mean * mean.log()).sum())
    expected = sum(own) / len(own) + cross - 0.7 * entropy
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_calibration_does_not_change_the_encoder(tmp_path: Path) -> None:
    """With a clustering head that cannot learn, only the calibration head has a gradient."""
    module = cdc()
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(3))), STREAMS)
    before = state(module)

    def unlabelled(logits: Any, labels: Any) -> Any:
        return logits.sum() * 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spice_pl.stages.cdc.labelled_loss", unlabelled)
        fit(module, STREAMS, epochs=1)
    for key, value in state(module).items():
        if "running" in key or "num_batches" in key:
            continue
        changed = not torch.equal(value, before[key])
        assert changed is key.startswith("calibration."), key


def test_cdc_finds_the_three_kinds_of_photograph(tmp_path: Path) -> None:
    module = cdc(lr=3e-3, encoder_lr=3e-3, hidden_dim=20)
    streams = {"images": stream(45, weak=WEAK, strong=WEAK)}
    module.prepare(image_set(), write_upstream(tmp_path, settled(backbone(0))), streams)
    fit(module, streams, epochs=20)
    module.eval()
    with torch.no_grad():
        probs = module.calibration(plain_features(module.encoder))
    truth = torch.arange(N) % NUM_CLASSES
    assert clustering_scores(probs.argmax(dim=1), truth)["acc"] > 0.9
    assert set(module.weights()) == {"encoder", "head"}
    assert isinstance(module.weights()["head"], ClusterHead)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_dim": 0}, r"cdc\.module\.hidden_dim 0 is not at least 1; the paper has 512"),
        ({"region_size": 0.5}, r"cdc\.module\.region_size 0\.5 is not at least 1"),
        ({"entropy_weight": -1.0}, r"entropy_weight -1\.0 is not at least 0; the paper has 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cdc(**settings)


def test_clusters_must_fit_into_a_batch() -> None:
    with pytest.raises(UsageError, match=r"batch_size 15 is less than the 16 clusters"):
        CdcModule(backbone(), 16).check(image_set(), STREAMS)
