from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tests.stages.small import STRONG, WEAK, D, backbone, fit, image_set, same, state, stream
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.functional.contrastive import info_nce
from spice_pl.stages.moco import MoCoModule

Q, P, B = 40, 6, 15
STREAMS = {"images": stream(B, query=WEAK, key=STRONG)}


def moco(**settings: Any) -> MoCoModule:
    return MoCoModule(backbone(), projection_dim=P, queue_size=Q, **settings)


class Watch(pl.Callback):
    """Keep what goes into every step and what comes out."""

    def __init__(self) -> None:
        self.batches: list[Views] = []
        self.losses: list[Tensor] = []
        self.query: list[list[Tensor]] = []
        self.key: list[list[Tensor]] = []
        self.lr: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        self._keep(module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(outputs["loss"])

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._keep(module)

    def _keep(self, module: pl.LightningModule) -> None:
        assert isinstance(module, MoCoModule)
        for kept, encoder, projection in (
            (self.query, module.encoder, module.projection),
            (self.key, module.key_encoder, module.key_projection),
        ):
            parameters = [*encoder.parameters(), *projection.parameters()]
            kept.append([parameter.detach().clone() for parameter in parameters])


def test_key_branch_starts_as_a_deep_copy() -> None:
    module = moco()
    assert same(state(module.encoder), state(module.key_encoder))
    assert same(state(module.projection), state(module.key_projection))
    own = {value.data_ptr() for value in module.encoder.state_dict().values()}
    assert own.isdisjoint(value.data_ptr() for value in module.key_encoder.state_dict().values())


def test_key_branch_has_no_gradient_and_moves_by_the_average_only() -> None:
    module, watch = moco(momentum=0.9, lr=0.1), Watch()
    fit(module, STREAMS, watch)
    assert len(watch.batches) == 2 * (90 // B)
    for step in range(len(watch.batches)):
        # He et al. 2020, Eq. 2, with the query weights as they are before the step.
        expected = [
            0.9 * key + 0.1 * query
            for key, query in zip(watch.key[step], watch.query[step], strict=True)
        ]
        torch.testing.assert_close(watch.key[step + 1], expected, rtol=0, atol=1e-6)
    keys = [*module.key_encoder.parameters(), *module.key_projection.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in keys)
    assert not torch.equal(watch.query[0][0], watch.query[-1][0])


def test_loss_and_queue_equal_a_plain_loop() -> None:
    # With momentum 1 the key branch stays what it was, so every key can be computed again.
    module, watch = moco(momentum=1.0, lr=0.1, temperature=0.5), Watch()
    queue = module.queue.keys.T.clone()  # (Q, P), oldest first
    key_branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    query_branch = copy.deepcopy(key_branch)
    fit(module, STREAMS, watch)
    for step, batch in enumerate(watch.batches):
        with torch.no_grad():
            for parameter, value in zip(query_branch.parameters(), watch.query[step], strict=True):
                parameter.copy_(value)
            key = F.normalize(key_branch(batch.views["key"]))
            query = F.normalize(query_branch(batch.views["query"]))
        losses = []
        for q, k in zip(query, key, strict=True):
            scores = torch.stack([q @ k, *(queue @ q)]) / 0.5
            losses.append(-math.log(float(scores.softmax(0)[0])))
        assert float(watch.losses[step]) == pytest.approx(sum(losses) / B, abs=1e-4)
        queue = torch.cat([queue, key])[-Q:]  # first in, first out
    held = module.queue.keys.T.roll(-int(module.queue.pointer), dims=0)
    torch.testing.assert_close(held, queue, rtol=0, atol=1e-5)


def test_query_encoder_without_projection_is_handed_on() -> None:
    module = moco(momentum=1.0)
    start = state(module.key_encoder)
    fit(module, STREAMS)
    handed = module.weights()
    assert set(handed) == {"encoder"}
    assert same(state(handed["encoder"]), state(module.encoder))
    assert not torch.equal(handed["encoder"].state_dict()["conv1.weight"], start["conv1.weight"])
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, D)


def test_learning_rate_falls_by_a_cosine_per_epoch() -> None:
    watch = Watch()
    fit(moco(lr=0.5), STREAMS, watch, epochs=4, limit_train_batches=2)
    expected = [0.5, 0.25 * (1 + math.sqrt(0.5)), 0.25, 0.25 * (1 - math.sqrt(0.5))]
    assert watch.lr == pytest.approx([rate for rate in expected for _ in range(2)])


def test_groups_have_batch_statistics_of_their_own_and_keys_are_shuffled() -> None:
    module, watch = moco(momentum=1.0, lr=0.0, temperature=0.5, bn_groups=3), Watch()
    queue = module.queue.keys.T.clone()
    branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    fit(module, STREAMS, watch, epochs=1)
    for step, batch in enumerate(watch.batches):
        order = torch.randperm(B, generator=torch.Generator().manual_seed(step))
        query, key = torch.empty(B, P), torch.empty(B, P)
        with torch.no_grad():
            for group in range(3):
                query[group::3] = branch(batch.views["query"][group::3])
                members = order[group::3]
                key[members] = branch(batch.views["key"][members])
        query, key = F.normalize(query), F.normalize(key)
        loss = info_nce(query, key, queue[-Q:].T, temperature=0.5)
        torch.testing.assert_close(watch.losses[step], loss, rtol=0, atol=1e-5)
        queue = torch.cat([queue, key])
    assert not torch.allclose(
        F.normalize(branch(watch.batches[0].views["query"])), query, atol=1e-3
    )


def test_symmetric_loss_is_the_mean_of_both_directions() -> None:
    module, watch = moco(momentum=1.0, lr=0.0, temperature=0.5, symmetric=True), Watch()
    queue = module.queue.keys.clone()
    branch = copy.deepcopy(torch.nn.Sequential(module.encoder, module.projection)).train()
    fit(module, STREAMS, watch, epochs=1, limit_train_batches=1)
    with torch.no_grad():
        one, other = (F.normalize(branch(watch.batches[0].views[n])) for n in ("query", "key"))
    losses = [info_nce(*pair, queue, temperature=0.5) for pair in ((one, other), (other, one))]
    torch.testing.assert_close(watch.losses[0], sum(losses) / 2, rtol=0, atol=1e-5)
    # Both sets of keys are in the queue: of the second view first.
    torch.testing.assert_close(module.queue.keys[:, : 2 * B], torch.cat([other, one]).T)


def test_collapse_is_said(caplog: pytest.LogCaptureFixture) -> None:
    module = moco(momentum=1.0, lr=0.0)
    for branch in (module.projection, module.key_projection):
        last = branch.get_submodule("2")
        assert isinstance(last, torch.nn.Linear)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.ones_(last.bias)
    with caplog.at_level("WARNING"):
        fit(module, STREAMS, epochs=1)
    assert "have collapsed: their standard deviation is 0.0000" in caplog.text


def test_groups_that_do_not_fit_the_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_size 15 does not make 4 equal groups"):
        moco(bn_groups=4).prepare(image_set(), None, STREAMS)
    with pytest.raises(UsageError, match="15 equal groups of at least 2"):
        moco(bn_groups=15).prepare(image_set(), None, STREAMS)


def test_queue_longer_than_the_data_is_refused() -> None:
    module = MoCoModule(backbone(), queue_size=91)
    with pytest.raises(UsageError, match="queue_size 91 exceeds the 90 training images"):
        module.prepare(image_set(), None, STREAMS)


def test_batch_longer_than_the_queue_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size 41 exceeds moco\.module\.queue_size 40"):
        moco().prepare(image_set(), None, {"images": stream(41, query=WEAK, key=WEAK)})
