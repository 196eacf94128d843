from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tests.stages.small import STRONG, WEAK, backbone, fit, image_set, same, state, stream
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.nn.resnet import ResNet
from spice_pl.stages.simclr import SimCLRModule

B, P = 15, 6
STREAMS = {"images": stream(B, query=WEAK, key=STRONG)}


def simclr(**settings: Any) -> SimCLRModule:
    return SimCLRModule(backbone(), projection_dim=P, hidden_dim=10, **settings)


class Watch(pl.Callback):
    """Keep batches, losses, rates and the sides of what the encoder sees."""

    def __init__(self, module: SimCLRModule) -> None:
        self.batches: list[Views] = []
        self.losses: list[Tensor] = []
        self.lr: list[float] = []
        self.sides: list[int] = []
        module.encoder.register_forward_pre_hook(lambda _, x: self.sides.append(x[0].shape[-1]))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches.append(args[1])
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(args[1]["loss"])


def test_loss_equals_a_plain_loop_over_views() -> None:
    module = simclr(lr=0.0, temperature=0.5)
    branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    watch = Watch(module)
    fit(module, STREAMS, watch, epochs=1)
    assert len(watch.losses) == 90 // B
    for batch, loss in zip(watch.batches, watch.losses, strict=True):
        both = torch.cat([batch.views["query"], batch.views["key"]])
        views = F.normalize(branch(both)).detach().double()
        losses = []
        for i in range(2 * B):
            scores = {j: float(views[i] @ views[j]) / 0.5 for j in range(2 * B) if j != i}
            total = sum(math.exp(score) for score in scores.values())
            losses.append(math.log(total) - scores[(i + B) % (2 * B)])
        assert float(loss) == pytest.approx(sum(losses) / (2 * B), abs=1e-4)


def test_training_moves_the_encoder_that_is_handed_on() -> None:
    module = simclr()
    before = state(module.encoder)
    fit(module, STREAMS)
    assert set(module.weights()) == {"encoder"}
    assert not same(state(module.weights()["encoder"]), before)


def test_views_grow_and_the_rate_warms_up_and_falls() -> None:
    module = simclr(lr=1.0, warmup_epochs=1, sizes=[8, 12])
    watch = Watch(module)
    fit(module, STREAMS, watch, epochs=4, limit_train_batches=1)
    assert watch.sides == [8, 8, 12, 12]
    cosine = [0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    assert watch.lr == pytest.approx([0.5, *cosine])


def test_stem_is_fitted_to_the_views() -> None:
    encoder = ResNet(blocks=[1], widths=[8], stem="whitened")
    module = SimCLRModule(encoder, projection_dim=P, hidden_dim=10)
    module.prepare(image_set(), None, STREAMS)
    images = torch.from_numpy(np.array(image_set().images))
    view = F.unfold(WEAK(images, torch.full((90, WEAK.num_uniforms), 0.5)), 3)
    out = encoder.get_buffer("conv1.weight")[:27].flatten(1) @ view.transpose(0, 1).flatten(1)
    variance = out.square().mean(dim=1)  # of views like those it was fitted to
    assert 0.05 < float(variance.min()) <= float(variance.max()) < 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 is not positive"),
        ({"temperature": float("nan")}, "temperature nan is not positive"),
        ({"sizes": []}, "must be sides of at least 8 pixels"),
        ({"sizes": [4, 8]}, r"sizes \[4, 8\] must be sides of at least 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        simclr(**settings)


def test_one_image_batches_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_size 1 leaves no negatives"):
        simclr().prepare(image_set(), None, {"images": stream(1, query=WEAK, key=WEAK)})
