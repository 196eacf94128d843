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
from spice_pl.stages.fastsiam import FastSiamModule

B, P = 15, 6
STREAMS = {"images": stream(B, one=WEAK, other=STRONG, third=WEAK)}


def fastsiam(**settings: Any) -> FastSiamModule:
    return FastSiamModule(backbone(), projection_dim=P, hidden_dim=10, **settings)


class Watch(pl.Callback):
    """Keep batches, losses and the shapes of what the encoder sees."""

    def __init__(self, module: FastSiamModule) -> None:
        self.batches: list[Views] = []
        self.losses: list[Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        module.encoder.register_forward_pre_hook(lambda _, x: self.shapes.append(x[0].shape))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches.append(args[1])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(args[1]["loss"])


def test_loss_equals_a_plain_loop_over_views_and_images() -> None:
    module = fastsiam(lr=0.0)
    branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    predictor = copy.deepcopy(module.predictor).train()
    watch = Watch(module)
    fit(module, STREAMS, watch, epochs=1)
    assert len(watch.losses) == 90 // B
    for batch, loss in zip(watch.batches, watch.losses, strict=True):
        assert list(batch.views) == ["one", "other", "third"]
        projected = branch(torch.cat(list(batch.views.values()))).detach()
        z = projected.double().numpy().reshape(3, B, P)
        p = predictor(projected).detach().double().numpy().reshape(3, B, P)
        cosines = []
        for view, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
            for image in range(B):
                target = (z[others[0], image] + z[others[1], image]) / 2
                norms = np.linalg.norm(p[view, image]) * np.linalg.norm(target)
                cosines.append(p[view, image] @ target / norms)
        assert float(loss) == pytest.approx(-np.mean(cosines), abs=1e-4)


def test_training_moves_the_encoder_that_is_handed_on() -> None:
    module = fastsiam()
    before = state(module.encoder)
    fit(module, STREAMS)
    assert set(module.weights()) == {"encoder"}
    assert not same(state(module.weights()["encoder"]), before)


def test_all_views_have_the_size_of_the_epoch() -> None:
    module = fastsiam(sizes=[8, 12])
    watch = Watch(module)
    fit(module, STREAMS, watch, epochs=2, limit_train_batches=1)
    assert [tuple(shape) for shape in watch.shapes] == [(3 * B, 3, 8, 8), (3 * B, 3, 12, 12)]


def test_collapsed_features_are_named_with_a_way_out(caplog: pytest.LogCaptureFixture) -> None:
    module = fastsiam(lr=0.0)
    torch.nn.init.zeros_(module.projection.get_parameter("3.weight"))
    with caplog.at_level(logging.WARNING):
        fit(module, STREAMS, epochs=1)
    assert "the embeddings have collapsed" in caplog.text
    assert "lower the lr or show more views" in caplog.text


@pytest.mark.parametrize(
    ("batch_size", "views", "message"),
    [
        (B, {"one": WEAK}, "views has 1 view and nothing to predict"),
        (1, {"one": WEAK, "other": WEAK}, "batch_size 1 is too small"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    batch_size: int, views: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fastsiam().check(image_set(), {"images": stream(batch_size, **views)})
