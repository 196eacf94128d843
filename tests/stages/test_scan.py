from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tests.stages.small import (
    PLAIN,
    STRONG,
    D,
    K,
    N,
    backbone,
    fit,
    image_set,
    plain_features,
    same,
    state,
    stream,
    write_upstream,
)
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.nn.heads import ClusterHead
from spice_pl.runs.folder import RunFolder
from spice_pl.stages import scan
from spice_pl.stages.scan import ScanModule
from spice_pl.stages.selflabel import SelfLabelModule


def upstream(path: Path, **parts: Any) -> RunFolder:
    return write_upstream(path, backbone(0), **parts)


class Drawn(pl.Callback):
    """Keep what is drawn."""

    def __init__(self) -> None:
        self.index: list[Tensor] = []
        self.views: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.index.append(batch.index)
        self.views.append(batch.views["strong"])


def test_every_image_comes_with_one_of_its_neighbours(tmp_path: Path) -> None:
    module = ScanModule(backbone(1), K, num_neighbors=4)
    streams = module.prepare(image_set(), upstream(tmp_path), {"images": stream(30, strong=STRONG)})
    drawn = Drawn()
    fit(module, streams, drawn)
    features = plain_features(backbone(0))
    _, nearest = nearest_neighbors(features, features, 5)
    assert len(drawn.index) == 6
    partners = []
    for index, views in zip(drawn.index, drawn.views, strict=True):
        anchors, company = index.chunk(2)
        assert len(anchors) == 30
        assert all(int(j) in nearest[i].tolist() for i, j in zip(anchors, company, strict=True))
        partners += company.tolist()
        for i in (anchors == company).nonzero()[:, 0]:  # accompanied by another view of itself
            assert not torch.equal(views[i], views[30 + i])
    assert sorted(torch.cat([index[:30] for index in drawn.index[:3]]).tolist()) == list(range(N))
    assert len(set(partners)) > 10


def test_the_first_rank_finds_the_neighbours_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {"images": stream(30, strong=STRONG)}
    searched: list[int] = []

    def found(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        searched.append(k)
        return nearest_neighbors(queries, keys, k)

    monkeypatch.setattr(scan, "nearest_neighbors", found)
    sent: list[Tensor] = []
    partners = []
    for first in (True, False):
        module = ScanModule(backbone(1), K, num_neighbors=4)
        given = module.prepare(image_set(), upstream(tmp_path), streams)["images"].partners
        assert given is not None

        def broadcast(own: Tensor) -> Tensor:
            sent.append(own)
            return sent[0]

        strategy = SimpleNamespace(broadcast=broadcast)
        module.trainer = SimpleNamespace(is_global_zero=first, strategy=strategy)  # type: ignore[assignment]
        module.on_fit_start()
        partners.append(given)
    assert searched == [5]  # by the first rank alone, the image itself counted
    assert torch.equal(*partners)
    assert partners[0].min() >= 0


def test_the_epoch_of_the_lowest_loss_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ScanModule(backbone(1), K, num_neighbors=4, lr=3e-2)
    streams = module.prepare(image_set(), upstream(tmp_path), {"images": stream(30, strong=STRONG)})

    class Epochs(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.states: list[dict[str, Tensor]] = []

        def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.losses.append(float(trainer.callback_metrics["val/selection_loss"]))
            assert isinstance(module, ScanModule)
            self.states.append(state(module.head))

    epochs = Epochs()
    fit(module, streams, epochs, epochs=4, limit_val_batches=1.0)
    assert len(epochs.losses) == 4
    best = int(np.argmin(epochs.losses))
    assert float(module.best_loss) == pytest.approx(min(epochs.losses), abs=1e-6)
    assert same(state(module.best_head), epochs.states[best])
    assert module.weights()["head"] is module.best_head


def test_self_label_goes_on_from_any_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = ClusterHead(D, D, K)
    module = SelfLabelModule(backbone(1), K, confidence=0.3, lr=1e-2)
    streams = {"images": stream(30, plain=PLAIN, strong=STRONG)}
    assert module.prepare(image_set(), upstream(tmp_path, head=head), streams) == streams
    assert same(state(module.encoder), state(backbone(0)))
    assert same(state(module.head), state(head))
    trainer = fit(module, streams, epochs=1)
    assert float(trainer.callback_metrics["train/confident_fraction"]) > 0
    assert not same(state(module.head), state(head))


def test_missing_upstreams_are_said(tmp_path: Path) -> None:
    streams = {"images": stream(30, plain=PLAIN, strong=STRONG)}
    with pytest.raises(UsageError, match=r"set scan\.upstream=moco"):
        ScanModule(backbone(1), K).prepare(image_set(), None, streams)
    with pytest.raises(UsageError, match=r"set selflabel\.upstream=scan"):
        SelfLabelModule(backbone(1), K).prepare(image_set(), None, streams)
    with pytest.raises(UsageError, match=r"has no head\.safetensors; set selflabel\.upstream"):
        SelfLabelModule(backbone(1), K).prepare(image_set(), upstream(tmp_path), streams)
