"""Where stage 2 reads features: new views, banks of views, an encoder that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tests.stages.small import (
    PLAIN,
    STRONG,
    WEAK,
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
from torch.nn import functional as F

from spice_pl.data.datamodule import Views
from spice_pl.data.keyed import keyed_uniform
from spice_pl.errors import UsageError
from spice_pl.functional.prototypes import prototype_pseudo_labels
from spice_pl.nn.resnet import ResNet
from spice_pl.stages.proto import ProtoHeadModule

M, H = 40, 3
STREAMS = {"images": stream(16, weak=WEAK, strong=STRONG)}


def proto(path: Path, streams: Any = STREAMS, **settings: Any) -> tuple[ProtoHeadModule, Any]:
    defaults: dict[str, Any] = {"num_heads": H, "buffer_size": M, "repeats": 2}
    module = ProtoHeadModule(backbone(1), K, head_batch_size=10, **defaults | settings)
    encoder = backbone(0)
    for key, value in encoder.named_buffers():
        if "running" in key:
            value.copy_(torch.rand(value.shape) + 0.5)
    return module, module.prepare(image_set(), write_upstream(path / "up", encoder), streams)


class Watch(pl.Callback):
    """Keep the batches, and the encoder at the end of every epoch; stop after some epochs."""

    def __init__(self, stop_in: int | None = None) -> None:
        self.batches: list[Views] = []
        self.encoders: list[dict[str, Tensor]] = []
        self.stop_in = stop_in

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        if trainer.current_epoch == self.stop_in:
            raise InterruptedError

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ProtoHeadModule)
        self.encoders.append(state(module.encoder))


def count_passes(module: ProtoHeadModule) -> list[int]:
    passed: list[int] = []
    module.encoder.register_forward_hook(lambda _, args, __: passed.append(len(args[0])))
    return passed


# Banks.


@pytest.mark.parametrize(("num_views", "epochs"), [(1, 3), (2, 1)])
def test_a_bank_costs_n_passes_of_each_view_whatever_the_epochs(
    tmp_path: Path, num_views: int, epochs: int
) -> None:
    module, streams = proto(tmp_path, view_bank=num_views)
    passed = count_passes(module)
    fit(module, streams, epochs=epochs, default_root_dir=tmp_path)
    assert sum(passed) == 2 * num_views * N
    assert not (tmp_path / "view_bank").exists()  # removed after the last epoch


def test_the_plain_view_needs_no_bank_and_no_pass(tmp_path: Path) -> None:
    streams = {"images": stream(16, weak=PLAIN, strong=STRONG)}
    module, streams = proto(tmp_path, streams, view_bank=1)
    passed = count_passes(module)
    watch = Watch(stop_in=0)
    with pytest.raises(InterruptedError):
        fit(module, streams, watch, default_root_dir=tmp_path)
    assert sum(passed) == N
    assert not (tmp_path / "view_bank/weak.npy").exists()
    index = torch.tensor([7, 0, 89])
    weak, _ = module.view_features.embed(Views(index, {}))
    assert torch.equal(weak, plain_features(module.encoder)[index])


def test_a_bank_of_one_view_equals_fresh_views_in_the_first_epoch(tmp_path: Path) -> None:
    losses = []
    for bank in (None, 1):
        module, streams = proto(tmp_path, view_bank=bank)
        trainer = fit(module, streams, epochs=1, default_root_dir=tmp_path)
        losses.append([float(trainer.callback_metrics[f"train/loss_head_{h}"]) for h in range(H)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # half precision


def test_each_epoch_draws_one_of_the_views_by_a_key(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, view_bank=4)
    with pytest.raises(InterruptedError):
        fit(module, streams, Watch(stop_in=1), epochs=2, default_root_dir=tmp_path)
    bank = np.load(tmp_path / "view_bank/weak.npy", mmap_mode="r")
    assert bank.shape == (4, N, D)
    assert bank.dtype == np.float16
    index = torch.arange(N)
    weak, strong = module.view_features.embed(Views(index, {}))
    drawn = (4 * keyed_uniform(0, 1, index, 0, 1)[:, 0]).long()  # epoch 1, view 0 of the pair
    assert torch.equal(weak, torch.from_numpy(bank[drawn, index]).float())
    assert drawn.bincount(minlength=4).min() > N / 10
    assert not torch.equal(weak, strong)


def test_an_interrupted_run_reuses_its_bank_and_another_run_does_not(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, view_bank=2)
    with pytest.raises(InterruptedError):
        fit(module, streams, Watch(stop_in=1), epochs=2, default_root_dir=tmp_path)
    passes = []
    for settings in ({"seed": 1}, {"seed": 1}, {"seed": 1, "view_bank": 3}):
        module, streams = proto(tmp_path, **{"view_bank": 2} | settings)
        passed = count_passes(module)
        with pytest.raises(InterruptedError):
            fit(module, streams, Watch(stop_in=0), default_root_dir=tmp_path)
        passes.append(sum(passed))
    assert passes == [2 * 2 * N, 0, 2 * 3 * N]


def test_features_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, view_bank=1)
    with torch.no_grad():
        norms = [m for m in module.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        norms[-1].weight.mul_(1e6)
        norms[0].weight.mul_(1e6)
    with pytest.raises(UsageError, match=r"half precision of a bank; use proto\.module\.v"):
        fit(module, streams, default_root_dir=tmp_path)


# An encoder that changes.


def test_reference_batchnorm_drifts_and_no_weight_does(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, bn_mode="reference", buffer_size=N)
    before, watch = state(module.encoder), Watch()
    passed = count_passes(module)
    fit(module, streams, watch, epochs=1)
    # By hand: every batch's weak, then strong views pass in train mode, as in the authors' code.
    encoder = backbone(0)
    encoder.load_state_dict(before)
    encoder.train()
    with torch.no_grad():
        for batch in watch.batches:
            encoder(batch.views["weak"])
            encoder(batch.views["strong"])
    assert same(state(module.encoder), state(encoder))
    assert not torch.equal(before["bn1.running_mean"], encoder.state_dict()["bn1.running_mean"])
    for key, value in module.encoder.named_parameters():
        assert torch.equal(value, before[key]), key
    assert sum(passed) == 3 * N  # weak, strong, and plain for the choice of a head
    # Prototypes stay in the embeddings of stage 1.
    torch.testing.assert_close(module.embeddings, F.normalize(module.features))


@pytest.mark.parametrize("settings", [{"bn_mode": "reference"}, {"joint": "multi_head"}])
def test_the_encoder_of_the_kept_head_is_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    module, streams = proto(tmp_path, lr=0.02, **settings)
    watch = Watch()
    fit(module, streams, watch, epochs=3)
    kept = module.weights()["encoder"]
    assert same(state(kept), watch.encoders[int(module.best_epoch)])
    assert not same(watch.encoders[0], watch.encoders[2])
    assert isinstance(kept, ResNet)
    plain = PLAIN(torch.from_numpy(image_set().images), torch.empty(N, 0))
    prediction = module.eval().predict(Views(torch.arange(N), {"plain": plain}))
    torch.testing.assert_close(prediction.features, plain_features(kept))
    # The loss it was chosen by is Eq. 5 on what is handed on.
    assert prediction.probs is not None
    slots, label = prototype_pseudo_labels(module.embeddings, prediction.probs)
    loss = F.cross_entropy(prediction.probs[slots], label)
    assert float(loss) == pytest.approx(float(module.best_loss), abs=1e-5)
    # The other heads belong to another encoder, so there is nothing to compare the kept one with.
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.on_validation_epoch_start()
    seen = module.validation_step(Views(torch.arange(N), {"plain": plain}), 0)
    assert seen.head_clusters is None


@pytest.mark.parametrize(("joint", "num_heads"), [("single_head", 1), ("multi_head", H)])
def test_joint_training_takes_the_gradient_of_equation_5_to_the_encoder(
    tmp_path: Path, joint: str, num_heads: int
) -> None:
    # One cycle of all images and one step of all its slots.
    module, _ = proto(tmp_path, joint=joint)
    heads = module.heads
    assert heads.num_heads == num_heads
    module.buffer_size, module.repeats, module.head_batch_size = N, 1, N
    streams = module.prepare(image_set(), write_upstream(tmp_path, backbone(0)), STREAMS)
    encoder, before = backbone(0).train(), state(heads)
    watch = Watch()
    fit(module, streams, watch, epochs=1)
    index = torch.cat([batch.index for batch in watch.batches])
    weak = torch.cat([encoder(batch.views["weak"]).detach() for batch in watch.batches])
    strong = torch.cat([batch.views["strong"] for batch in watch.batches])
    heads.load_state_dict(before)
    embeddings = F.normalize(plain_features(backbone(0)))[index]
    losses = []
    slots = [prototype_pseudo_labels(embeddings, probs.detach()) for probs in heads(weak)]
    used = torch.unique(
        torch.cat([images for images, _ in slots])
    )  # BatchNorm sees each image once
    features = torch.zeros(N, D).index_copy(0, used, encoder(strong[used]))
    for h, (images, label) in enumerate(slots):
        probs = heads(features[images])[h]
        losses.append(F.cross_entropy(probs, label))
    torch.autograd.backward(torch.stack(losses).sum())
    for (key, ours), theirs in zip(
        module.encoder.named_parameters(), encoder.parameters(), strict=True
    ):
        assert ours.grad is not None, key
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert not same(state(module.encoder), state(encoder))


def test_a_frozen_run_keeps_no_second_encoder(tmp_path: Path) -> None:
    module, _ = proto(tmp_path)
    assert not any(key.startswith("kept_encoder") for key in module.state_dict())
    assert module.weights()["encoder"] is module.encoder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "proto.module.loss 'mse' is none of double_softmax, ce, tce"),
        ({"bn_mode": "train"}, "bn_mode 'train' is none of frozen, reference"),
        ({"joint": "both"}, "joint 'both' is none of none, single_head, multi_head"),
        ({"view_bank": 0}, "view_bank 0 needs 1 or more views of a frozen encoder; use null"),
        ({"view_bank": 2, "joint": "multi_head"}, "view_bank 2 needs 1 or more views of a frozen"),
        ({"entropy": -1.0}, "entropy -1.0 would empty clusters; use 0 or more"),
    ],
)
def test_switches_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProtoHeadModule(backbone(), K, **settings)
