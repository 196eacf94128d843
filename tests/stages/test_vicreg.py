from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tests.stages.small import STRONG, WEAK, backbone, fit, image_set, same, state, stream
from torch import Tensor

from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.stages.vicreg import VICRegModule

B, P = 15, 6
STREAMS = {"images": stream(B, query=WEAK, key=STRONG)}


def vicreg(**settings: Any) -> VICRegModule:
    return VICRegModule(backbone(), projection_dim=P, hidden_dim=10, **settings)


class Watch(pl.Callback):
    """Keep batches and losses."""

    def __init__(self) -> None:
        self.batches: list[Views] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches.append(args[1])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(args[1]["loss"])


def test_loss_is_that_of_the_weights_and_of_numpys_covariance() -> None:
    module = vicreg(lr=0.0, invariance_weight=2.0, variance_weight=3.0, covariance_weight=4.0)
    branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    watch = Watch()
    fit(module, STREAMS, watch, epochs=1)
    assert len(watch.losses) == 90 // B
    for batch, loss in zip(watch.batches, watch.losses, strict=True):
        both = torch.cat([batch.views["query"], batch.views["key"]])
        rows = branch(both).detach().double().numpy().reshape(2, B, P)
        expected = 2 * np.mean((rows[0] - rows[1]) ** 2)
        for view in rows:
            covariance = np.cov(view, rowvar=False)
            deviations = np.sqrt(covariance.diagonal() + 1e-4)
            expected += 3 / 2 * np.mean(np.maximum(0, 1 - deviations))
            expected += 4 * (np.sum(covariance**2) - np.sum(covariance.diagonal() ** 2)) / P
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_training_moves_the_encoder_that_is_handed_on() -> None:
    module = vicreg()
    before = state(module.encoder)
    fit(module, STREAMS)
    assert set(module.weights()) == {"encoder"}
    assert not same(state(module.weights()["encoder"]), before)


def test_collapsed_features_are_named_with_a_way_out(caplog: pytest.LogCaptureFixture) -> None:
    module = vicreg(lr=0.0)
    torch.nn.init.zeros_(module.projection.get_parameter("3.weight"))
    with caplog.at_level(logging.WARNING):
        fit(module, STREAMS, epochs=1)
    assert "the embeddings have collapsed" in caplog.text
    assert "lower the lr or raise variance_weight" in caplog.text


@pytest.mark.parametrize("weight", ["invariance_weight", "variance_weight", "covariance_weight"])
def test_weights_that_are_not_positive_are_refused(weight: str) -> None:
    with pytest.raises(UsageError, match=rf"vicreg\.module\.{weight} 0.0 is not positive"):
        vicreg(**{weight: 0.0})


def test_one_image_batches_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_size 1 is too small: one image has no covariance"):
        vicreg().prepare(image_set(), None, {"images": stream(1, query=WEAK, key=WEAK)})
