from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tests.conftest import make_job
from tests.stages.small import MEAN, STD, WEAK, backbone, fit, image_set, same, state, stream
from torch import Tensor
from torch.nn import functional as F

from spice_pl.callbacks.checkpoints import Checkpoints
from spice_pl.data.crop_views import PatchView
from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.nn.resnet import ResNet
from spice_pl.stages.empssl import EmpSSLModule
from spice_pl.system.interrupts import Stopped

B, P, PATCHES = 15, 6, 3
VIEW = PatchView(MEAN, STD, num_patches=PATCHES)
STREAMS = {"images": stream(B, patches=VIEW)}


def empssl(**settings: Any) -> EmpSSLModule:
    return EmpSSLModule(backbone(), projection_dim=P, hidden_dim=10, **settings)


class Watch(pl.Callback):
    """Keep batches, losses and the shapes of what the encoder sees."""

    def __init__(self, module: EmpSSLModule) -> None:
        self.batches: list[Views] = []
        self.losses: list[Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        module.encoder.register_forward_pre_hook(lambda _, x: self.shapes.append(x[0].shape))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches.append(args[1])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(args[1]["loss"])


def test_loss_equals_a_plain_loop_over_images() -> None:
    module = empssl(lr=0.0, rate_weight=0.3, distortion=0.5)
    branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    watch = Watch(module)
    fit(module, STREAMS, watch, epochs=1)
    assert len(watch.losses) == 90 // B
    for batch, loss in zip(watch.batches, watch.losses, strict=True):
        patches = batch.views["patches"]
        assert patches.shape == (B, PATCHES, 3, 8, 8)
        rows = F.normalize(branch(patches.flatten(0, 1))).detach().double().numpy()
        of_image = rows.reshape(B, PATCHES, P)
        cosines = []
        for image in of_image:
            mean = image.mean(axis=0)
            cosines += [z @ mean / np.linalg.norm(mean) for z in image]
        rates = []
        for i in range(PATCHES):
            z = of_image[:, i]
            rates.append(0.5 * np.linalg.slogdet(np.eye(P) + P / (B * 0.5) * z.T @ z)[1])
        expected = -np.mean(cosines) - 0.3 * np.mean(rates)
        assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_training_moves_the_encoder_that_is_handed_on() -> None:
    module = empssl()
    before = state(module.encoder)
    fit(module, STREAMS)
    assert set(module.weights()) == {"encoder"}
    assert not same(state(module.weights()["encoder"]), before)


def test_patches_have_their_size_and_the_last_share_of_the_epochs_is_at_full_size() -> None:
    module = empssl(sizes=[8, 8, 8, 8, 16])
    pixels = image_set().images
    images = replace(image_set(), images=np.kron(pixels, np.ones((2, 2), np.uint8)))  # 16 pixels
    streams = module.prepare(images, None, STREAMS)
    assert set(streams["images"].views) == {"8", "16"}
    small, large = (streams["images"].views[side] for side in ("8", "16"))
    assert isinstance(small, PatchView)
    assert (small.min_scale, small.max_scale, small.ratio) == (0.25, 0.25, (1.0, 1.0))
    assert large == replace(VIEW, side=16)
    watch = Watch(module)
    fit(module, streams, watch, epochs=5, images=images, limit_train_batches=1)
    assert [shape[-1] for shape in watch.shapes] == [8, 8, 8, 8, 16]
    assert {shape[0] for shape in watch.shapes} == {B * PATCHES}


def test_stem_is_fitted_to_one_patch_of_each_image() -> None:
    encoder = ResNet(blocks=[1], widths=[8], stem="whitened")
    module = EmpSSLModule(encoder, projection_dim=P, hidden_dim=10)
    before = encoder.get_buffer("conv1.weight").clone()
    seen: list[tuple[int, ...]] = []
    original = encoder.fit_stem
    encoder.fit_stem = lambda images: (seen.append(images.shape), original(images))[1]  # type: ignore[method-assign, func-returns-value]
    module.prepare(image_set(), None, STREAMS)
    assert seen == [(90, 3, 8, 8)]
    assert not torch.equal(encoder.get_buffer("conv1.weight"), before)


def test_collapsed_features_are_named_with_a_way_out(caplog: pytest.LogCaptureFixture) -> None:
    module = empssl(lr=0.0)
    torch.nn.init.zeros_(module.projection.get_parameter("3.weight"))
    with caplog.at_level(logging.WARNING):
        fit(module, STREAMS, epochs=1)
    assert "the embeddings have collapsed" in caplog.text
    assert "lower the lr or raise rate_weight" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_weight": float("nan")}, r"rate_weight nan is not positive"),
        ({"rate_weight": 0.0}, r"empssl\.module\.rate_weight 0.0 is not positive"),
        ({"distortion": -1.0}, r"empssl\.module\.distortion -1.0 is not positive; EMP-SSL uses"),
        ({"sizes": []}, "must be sides of at least 8 pixels"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        empssl(**settings)


@pytest.mark.parametrize(
    ("settings", "batch_size", "views", "message"),
    [
        (
            {"sizes": [8, 16]},
            B,
            {"patches": VIEW},
            r"sizes \[8, 16\] has patches larger .* 8 pixel",
        ),
        ({}, 1, {"patches": VIEW}, "batch_size 1 leaves no images to spread"),
        ({}, B, {"query": WEAK}, "views has WeakView; give one PatchView"),
        ({}, B, {"one": VIEW, "two": VIEW}, "has PatchView, PatchView; give one PatchView"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    settings: dict[str, Any], batch_size: int, views: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        empssl(**settings).check(image_set(), {"images": stream(batch_size, **views)})


@pytest.mark.parametrize("stage", ["simclr", "empssl", "vicreg", "fastsiam"])
def test_a_run_stopped_inside_an_epoch_and_resumed_ends_with_the_same_bits(
    stage: str, tiny: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = (f"{stage}.epochs=3", f"{stage}.streams.images.batch_size=30", f"stage={stage}")
    straight, stopped = (make_job(*tiny, *short, f"run={run}") for run in ("straight", "stopped"))
    run_stages(straight)
    with monkeypatch.context() as patch:
        answers = iter([(False, False)] * 4 + [(True, True)])  # in the second batch of epoch 1
        patch.setattr(Checkpoints, "_agreed", lambda *_, **__: next(answers))
        with pytest.raises(Stopped):
            run_stages(stopped)
    run_stages(make_job(*tiny, *short, "run=stopped", "resume=true"))
    for name in ("encoder.safetensors", "features.npy", "metrics.csv"):
        left, right = ((job.folder(stage).path / name).read_bytes() for job in (straight, stopped))
        assert left == right, name
