from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from tests.stages.small import (
    STRONG,
    WEAK,
    D,
    K,
    N,
    backbone,
    fit,
    image_set,
    same,
    state,
    stream,
    write_upstream,
)
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.functional.selectors import reliable_labels
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.thresholds import FixedThreshold
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.fixmatch import ReliableFixMatchModule

STREAMS = {"labelled": stream(6, weak=WEAK), "unlabelled": stream(14, weak=WEAK, strong=STRONG)}
STEPS = 4


def certain(num_clusters: int = K) -> NDArray[np.float32]:
    """Be sure of i % num_clusters for images 0 to 59, and unsure of the rest."""
    probs = np.full((N, K), 0.001, dtype=np.float32)
    probs[np.arange(N), np.arange(N) % num_clusters] = 0.998
    probs[60:] = (0.4, 0.3, 0.3)
    return probs


def upstream(path: Path, probs: NDArray[np.float32] | None = None) -> RunFolder:
    torch.manual_seed(0)
    head = ClusterHead(D, D, K)
    return write_upstream(path, backbone(0), probs=certain() if probs is None else probs, head=head)


def fixmatch(
    folder: RunFolder,
    *,
    threshold: float = 0.95,
    agreement: float = 0.0,
    confidence: float = 0.99,
    balance: str = "none",
    **settings: Any,
) -> tuple[ReliableFixMatchModule, Any]:
    selector = partial(
        reliable_labels,
        num_neighbors=5,
        agreement=agreement,
        confidence=confidence,
        balance=balance,  # type: ignore[arg-type]
    )
    module = ReliableFixMatchModule(
        backbone(1),
        K,
        selector=selector,
        threshold=FixedThreshold(threshold),
        steps_per_epoch=STEPS,
        **settings,
    )
    return module, module.prepare(image_set(), folder, STREAMS)


class Watch(pl.Callback):
    """Keep batches, losses and the trained weights after every step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.weights: list[list[Tensor]] = []
        self.rates: list[float] = []
        self.averaged_training: set[bool] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, ReliableFixMatchModule)
        self.batches.append(batch)
        self.weights.append([p.detach().clone() for p in trained(module)])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.averaged_training |= {part.training for part in module.ema_encoder.modules()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ReliableFixMatchModule)
        self.weights.append([p.detach().clone() for p in trained(module)])


def trained(module: ReliableFixMatchModule) -> list[torch.nn.Parameter]:
    return [*module.encoder.parameters(), *module.head.parameters()]


def test_goes_on_from_encoder_and_head_of_stage_2(tmp_path: Path) -> None:
    folder = upstream(tmp_path)
    module, _ = fixmatch(folder)
    torch.manual_seed(0)
    head = ClusterHead(D, D, K)
    for encoder in (module.encoder, module.ema_encoder):
        assert same(state(encoder), state(backbone(0)))
    for each in (module.head, module.ema_head):
        assert same(state(each), state(head))


@pytest.mark.parametrize("head", [ClusterHead(D, 5, K), LinearHead(D, K)])
def test_goes_on_from_a_head_of_any_width_or_kind(
    tmp_path: Path, head: ClusterHead | LinearHead
) -> None:
    folder = upstream(tmp_path)
    folder.write_weights("head.safetensors", head)
    module, _ = fixmatch(folder)
    for each in (module.head, module.ema_head):
        assert same(state(each), state(head))


def test_from_scratch_only_the_labels_carry_over(tmp_path: Path) -> None:
    folder = upstream(tmp_path)
    module, streams = fixmatch(folder, init="scratch")
    assert same(state(module.encoder), state(backbone(1)))
    assert isinstance(module.head, LinearHead)
    assert module.pseudo_labels[:60].tolist() == [i % K for i in range(60)]
    before = state(module.encoder)
    fit(module, streams, epochs=1)
    assert not torch.equal(before["conv1.weight"], module.encoder.state_dict()["conv1.weight"])


def test_reliable_images_and_their_labels_by_hand(tmp_path: Path) -> None:
    module, streams = fixmatch(upstream(tmp_path))
    assert module.reliable_index.tolist() == list(range(60))
    assert module.pseudo_labels.tolist() == [i % K for i in range(60)] + [-1] * 30
    assert torch.equal(streams["labelled"].subset, module.reliable_index)
    assert streams["unlabelled"].subset is None  # all images, reliable ones too


def test_reliable_labels_never_change(tmp_path: Path) -> None:
    module, streams = fixmatch(upstream(tmp_path), lr=0.5)
    labels, watch = module.pseudo_labels.clone(), Watch()
    fit(module, streams, watch)
    assert torch.equal(module.pseudo_labels, labels)
    drawn = torch.cat([batch["labelled"].index for batch in watch.batches])
    assert set(drawn.tolist()) <= set(range(60))
    unlabelled = torch.cat([batch["unlabelled"].index for batch in watch.batches])
    assert len(set(unlabelled[: STEPS * 14].tolist())) == STEPS * 14  # an epoch repeats no image
    assert unlabelled.max() >= 60  # unreliable images are clustered too


def test_labels_of_unreliable_images_are_never_used(tmp_path: Path) -> None:
    folder = upstream(tmp_path)
    ends = []
    for poison in (None, 0, 2):
        module, streams = fixmatch(folder)
        if poison is not None:
            module.pseudo_labels[60:] = poison
        fit(module, streams)
        ends.append(state(module))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_loss_equals_equation_9_by_a_plain_loop(tmp_path: Path) -> None:
    folder, weight = upstream(tmp_path), 0.7
    module, streams = fixmatch(folder)
    watch, first_step = Watch(), {"epochs": 1, "limit_train_batches": 1}
    encoder, head = copy.deepcopy(module.encoder).train(), copy.deepcopy(module.head)
    fit(module, streams, watch, **first_step)
    labelled, unlabelled = (watch.batches[0][name] for name in ("labelled", "unlabelled"))
    views = [labelled.views["weak"], unlabelled.views["weak"], unlabelled.views["strong"]]
    with torch.no_grad():
        assert isinstance(head, ClusterHead)
        probs = head(encoder(torch.cat(views)))  # BatchNorm sees all views together
    on_labelled, weak, strong = probs.split([6, 14, 14])
    supervised = [
        -math.log(float(p[int(i) % K])) for p, i in zip(on_labelled, labelled.index, strict=True)
    ]
    threshold = float(weak.max(dim=1).values.median()) - 1e-6  # that half of the images pass
    consistent = [
        -math.log(float(s[int(w.argmax())])) if float(w.max()) >= threshold else 0.0
        for w, s in zip(weak, strong, strict=True)
    ]
    assert 0 < consistent.count(0.0) < 14
    expected = sum(supervised) / 6 + weight * sum(consistent) / 14

    watch = Watch()
    module, streams = fixmatch(folder, threshold=threshold, unlabeled_weight=weight)
    fit(module, streams, watch, **first_step)
    assert watch.losses[0] == pytest.approx(expected, abs=1e-5)


def test_average_equals_the_hand_computation(tmp_path: Path) -> None:
    module, streams = fixmatch(upstream(tmp_path), ema_decay=0.8, lr=0.1)
    watch = Watch()
    fit(module, streams, watch)
    average = watch.weights[0]
    for weights in watch.weights[1:]:  # after every step of the optimizer
        average = [0.8 * a + 0.2 * w for a, w in zip(average, weights, strict=True)]
    averaged = [*module.ema_encoder.parameters(), *module.ema_head.parameters()]
    torch.testing.assert_close(list(averaged), average, rtol=0, atol=1e-6)
    buffers = [dict(each.named_buffers()) for each in (module.encoder, module.ema_encoder)]
    assert same(*buffers)  # BatchNorm statistics are copied
    assert all(parameter.grad is None for parameter in averaged)
    assert watch.averaged_training == {False}
    # The averaged model is the result.
    assert module.weights()["encoder"] is module.ema_encoder
    assert module.weights()["head"] is module.ema_head


def test_no_weight_decay_on_one_dimensional_parameters(tmp_path: Path) -> None:
    module, streams = fixmatch(upstream(tmp_path), weight_decay=0.3)
    trainer = fit(module, streams, epochs=1)
    decay = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    found = {
        name: decay[id(parameter)]
        for part in (module.encoder, module.head)
        for name, parameter in part.named_parameters()
    }
    assert len(found) == len(decay) == len(trained(module))
    for name, value in found.items():
        assert value == (0.0 if "bn" in name or name.endswith("bias") else 0.3), name


def test_learning_rate_follows_fixmatch_per_step(tmp_path: Path) -> None:
    module, streams = fixmatch(upstream(tmp_path), lr=2.0)
    watch, total = Watch(), 2 * STEPS
    trainer = fit(module, streams, watch)
    assert len(watch.rates) == total
    assert watch.rates[0] == 2.0
    assert watch.rates[total // 2] == pytest.approx(2 * math.cos(7 * math.pi / 32))
    at_the_end = trainer.optimizers[0].param_groups[0]["lr"]
    assert at_the_end == pytest.approx(2 * math.cos(7 * math.pi / 16))


def test_cluster_without_reliable_images_takes_nothing_from_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, streams = fixmatch(upstream(tmp_path, certain(num_clusters=2)), balance="min")
    counts = torch.bincount(module.pseudo_labels[module.reliable_index], minlength=K)
    assert counts.tolist() == [30, 30, 0]
    assert "[2] have no labelled image" in caplog.text
    trainer = fit(module, streams, epochs=1)
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


def test_no_reliable_image_says_what_was_found_and_what_to_change(tmp_path: Path) -> None:
    folder = upstream(tmp_path)
    with pytest.raises(UsageError) as error:
        fixmatch(folder, confidence=0.999)
    message = str(error.value)
    assert message.startswith(
        "0 of 90 images are labelled (agreement of 5 neighbours ≥ 0.0: 90, "
        "confidence > 0.999: 0, both: 0; per cluster [0, 0, 0])"
    )
    for way_out in ("reliable.agreement", "reliable.confidence", "proto.epochs"):
        assert way_out in message


def test_log_says_how_many_images_pass_each_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    probs = certain()
    probs[60:] = 0.3
    probs[np.arange(60, N), np.arange(60, N) % K] = 0.4
    probs[:3] = np.roll(probs[:3], 1, axis=1)  # sure of another cluster than their neighbours
    # The 5 nearest images of each image are of its colour, and one of 30 has the wrong cluster.
    fixmatch(upstream(tmp_path, probs), agreement=0.8)
    assert (
        "57 of 90 images are labelled (agreement of 5 neighbours ≥ 0.8: 87, "
        "confidence > 0.99: 60, both: 57; per cluster [19, 19, 19])" in caplog.text
    )


def test_unknown_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fixmatch\.module\.init 'both' is none of joint, enc"):
        fixmatch(upstream(tmp_path), init="both")
