from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy import stats
from tests.stages.small import (
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
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.callbacks.truth import TruthMonitor
from spice_pl.data.datamodule import Views
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.stages.proto import ProtoHeadModule

M, B, H, SEED = 40, 10, 3, 5
CYCLES = N // M  # 2
NAMES = list(itertools.permutations(range(K)))
STREAMS = {"images": stream(16, weak=WEAK, strong=STRONG)}


def proto(path: Path, **settings: Any) -> tuple[ProtoHeadModule, Any]:
    settings = {"num_heads": H, "buffer_size": M, "repeats": 2, "seed": SEED} | settings
    module = ProtoHeadModule(backbone(1), K, head_batch_size=B, **settings)
    encoder = backbone(0)
    for key, value in encoder.named_buffers():  # running statistics of their own
        if "running" in key:
            value.copy_(torch.rand(value.shape) + 0.5)
    streams = module.prepare(image_set(), write_upstream(path, encoder), STREAMS)
    return module, streams


def pseudo_labels(embeddings: Tensor, probs: Tensor) -> list[tuple[int, int]]:
    """Equations 2 to 4 of one head, image by image: (image, label) slots, cluster by cluster."""
    num_images = len(probs)
    share = num_images // K
    slots = []
    for k in range(K):
        by_confidence = sorted(range(num_images), key=lambda i: -float(probs[i, k]))
        prototype = torch.stack([embeddings[i] for i in by_confidence[: share // 2]]).mean(0)
        cosine = [float(embeddings[i] @ prototype / prototype.norm()) for i in range(num_images)]
        nearest = sorted(range(num_images), key=lambda i: -cosine[i])[:share]
        slots += [(i, k) for i in nearest]
    return slots


def double_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Equation 5."""
    return -torch.stack([p.softmax(0)[y].log() for p, y in zip(probs, labels, strict=True)]).mean()


def plain_head(module: ProtoHeadModule, index: int) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, K), nn.Softmax(dim=1))
    with torch.no_grad():
        for parameter, stacked in zip(head.parameters(), module.heads.parameters(), strict=True):
            parameter.copy_(stacked[index])
    return head


class Watch(pl.Callback):
    """Keep every batch, and the heads at the end of every epoch."""

    def __init__(self) -> None:
        self.batches: list[Views] = []
        self.heads: list[list[nn.Sequential]] = []
        self.training: set[bool] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, ProtoHeadModule)
        self.batches.append(batch)
        self.training |= {part.training for part in module.encoder.modules()}

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, ProtoHeadModule)
        self.heads.append([plain_head(module, h) for h in range(module.heads.num_heads)])


def test_encoder_is_frozen_bit_for_bit(tmp_path: Path) -> None:
    module, streams = proto(tmp_path)
    before, watch = state(module.encoder), Watch()
    assert any("running_var" in key for key in before)
    fit(module, streams, watch)
    assert same(before, state(module.encoder))
    assert watch.training == {False}
    assert all(parameter.grad is None for parameter in module.encoder.parameters())


@pytest.mark.parametrize(("num_heads", "repeats"), [(1, 1), (4, 3)])
def test_each_view_passes_the_encoder_once(tmp_path: Path, num_heads: int, repeats: int) -> None:
    module, streams = proto(tmp_path, num_heads=num_heads, repeats=repeats)
    passed = []
    module.encoder.register_forward_hook(lambda _, args, __: passed.append(len(args[0])))
    fit(module, streams, epochs=3)
    assert sum(passed) == 3 * CYCLES * 2 * M


def test_every_cycle_draws_a_fresh_buffer_without_repetition(tmp_path: Path) -> None:
    module, streams = proto(tmp_path)
    watch = Watch()
    fit(module, streams, watch)
    drawn = torch.cat([batch.index for batch in watch.batches]).view(2, CYCLES, M)
    for epoch in drawn:
        assert len(epoch.flatten().unique()) == CYCLES * M
    assert not torch.equal(drawn[0], drawn[1])


def cross_entropy(probs: Tensor, labels: Tensor) -> Tensor:
    """Table VII, CE."""
    return -torch.stack([p[y].log() for p, y in zip(probs, labels, strict=True)]).mean()


def sharpened(probs: Tensor, labels: Tensor) -> Tensor:
    """Table VII, TCE at temperature 0.5: softmax(z / 0.5) is p² over its sum."""
    return cross_entropy(probs**2 / (probs**2).sum(dim=1, keepdim=True), labels)


def entropy_of_mean(probs: Tensor) -> Tensor:
    """Table VII, Entropy."""
    return -torch.stack([m * m.log() for m in probs.mean(dim=0)]).sum()


@pytest.mark.parametrize(
    ("settings", "loss_of", "entropy"),
    [
        ({}, double_softmax, 0.0),
        ({"loss": "ce"}, cross_entropy, 0.0),
        ({"loss": "tce", "temperature": 0.5}, sharpened, 0.0),
        ({"entropy": 0.3}, double_softmax, 0.3),
    ],
    ids=["double softmax", "ce", "tce", "entropy"],
)
def test_maximisation_equals_a_slow_loop_over_separate_heads(
    tmp_path: Path, settings: dict[str, Any], loss_of: Any, entropy: float
) -> None:
    lr, repeats = 0.01, 3
    module, streams = proto(tmp_path, lr=lr, repeats=repeats, **settings)
    heads = [plain_head(module, h) for h in range(H)]
    optimizers = [torch.optim.Adam(head.parameters(), lr=lr) for head in heads]
    watch = Watch()
    trainer = fit(module, streams, watch, epochs=1)

    embeddings = F.normalize(plain_features(module.encoder))
    per_cycle = math.ceil(M / STREAMS["images"].batch_size)
    losses: list[list[float]] = [[] for _ in heads]
    for cycle in range(CYCLES):
        batches = watch.batches[cycle * per_cycle : (cycle + 1) * per_cycle]
        index = torch.cat([batch.index for batch in batches])
        with torch.no_grad():
            weak, strong = (
                module.encoder(torch.cat([batch.views[name] for batch in batches]))
                for name in ("weak", "strong")
            )
        slots = []
        for head in heads:
            with torch.no_grad():
                slots.append(pseudo_labels(embeddings[index], head(weak)))
        # The permutations are shared by the heads.
        generator = keyed_generator(SEED, 0, (cycle + 1) * per_cycle - 1)
        orders = [torch.randperm(M // K * K, generator=generator) for _ in range(repeats)]
        for h, (head, optimizer) in enumerate(zip(heads, optimizers, strict=True)):
            images = torch.tensor([image for image, _ in slots[h]])
            labels = torch.tensor([label for _, label in slots[h]])
            for order in orders:
                for start in range(0, len(order) - B + 1, B):  # the incomplete batch is dropped
                    chosen = order[start : start + B]
                    probs = head(strong[images[chosen]])
                    loss = loss_of(probs, labels[chosen])
                    optimizer.zero_grad()
                    torch.autograd.backward(loss - entropy * entropy_of_mean(probs))
                    optimizer.step()
                    losses[h].append(loss.item())
    for h, head in enumerate(heads):
        logged = float(trainer.callback_metrics[f"train/loss_head_{h}"])
        assert logged == pytest.approx(sum(losses[h]) / len(losses[h]), abs=1e-5)
        for parameter, stacked in zip(head.parameters(), module.heads.parameters(), strict=True):
            torch.testing.assert_close(parameter, stacked[h], rtol=0, atol=2e-4)


def test_head_and_epoch_of_the_lowest_label_free_loss_are_kept(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, lr=0.05)
    watch, epochs = Watch(), 4
    fit(module, streams, watch, epochs=epochs)
    features = plain_features(module.encoder)
    embeddings = F.normalize(features)
    table = torch.empty(epochs, H)
    for epoch, heads in enumerate(watch.heads):
        for h, head in enumerate(heads):
            with torch.no_grad():
                probs = head(features)
            slots = pseudo_labels(embeddings, probs)
            images, labels = (torch.tensor(column) for column in zip(*slots, strict=True))
            table[epoch, h] = double_softmax(probs[images], labels)
    epoch, h = divmod(int(table.argmin()), H)
    assert (int(module.best_epoch), int(module.best_head)) == (epoch, h)
    assert float(module.best_loss) == pytest.approx(float(table.min()), abs=1e-5)
    kept, expected = (list(each.parameters()) for each in (module.selected, watch.heads[epoch][h]))
    assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
    # The result: encoder and selected head, on the plain images.
    handed = module.weights()
    assert handed["head"] is module.selected
    prediction = module.predict(Views(torch.arange(N), {}))
    assert prediction.probs is not None
    torch.testing.assert_close(prediction.probs, watch.heads[epoch][h](features))


def test_head_and_epoch_of_the_highest_mutual_information_are_kept(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, lr=0.05, selection="mutual_information")
    watch, epochs = Watch(), 4
    fit(module, streams, watch, epochs=epochs)
    features = plain_features(module.encoder)
    table = np.zeros((epochs, H))
    for epoch, heads in enumerate(watch.heads):
        for h, head in enumerate(heads):
            with torch.no_grad():
                probs = head(features).double().numpy()
            table[epoch, h] = (
                stats.entropy(probs.mean(axis=0)) - stats.entropy(probs, axis=1).mean()
            )
    assert (int(module.best_epoch), int(module.best_head)) == divmod(int(table.argmax()), H)
    assert float(module.best_cost) == pytest.approx(-table.max(), abs=1e-5)


def test_truth_shows_the_chosen_head_beside_the_best_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPICE, Figure 6."""
    module, _ = proto(tmp_path)
    with torch.no_grad():  # heads that use all clusters, each in its own way
        generator = torch.Generator().manual_seed(0)
        module.heads.output_weight.normal_(generator=generator)
        module.heads.output_bias.sub_(module.heads.logits(module.features).mean(dim=1))
    monitor = TruthMonitor(np.arange(N) % K, K)
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    module.chosen_head = 1
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    module.trainer = trainer
    module.on_validation_epoch_start()
    monitor.on_validation_epoch_start(trainer, module)
    with torch.no_grad():
        for part in torch.split(torch.arange(N), 40):
            seen = module.validation_step(Views(part, {}), 0)
            monitor.on_validation_batch_end(trainer, module, seen)
        monitor.on_validation_epoch_end(trainer, module)
        found = [plain_head(module, h)(module.features).argmax(dim=1) for h in range(H)]
    accuracies = [
        max(
            float((torch.tensor(names)[c] == torch.arange(N) % K).float().mean()) for names in NAMES
        )
        for c in found
    ]
    assert len(set(accuracies)) > 1
    assert logged["truth/best_head_acc"] == pytest.approx(max(accuracies))
    assert logged["truth/epoch_head_acc"] == pytest.approx(accuracies[1])


@pytest.mark.parametrize(("head", "prior"), [(0, "uniform"), (2, "uniform"), (2, "estimated")])
def test_a_head_trains_as_if_it_were_alone(tmp_path: Path, head: int, prior: str) -> None:
    settings = {"lr": 0.01, "repeats": 3, "prior": prior}
    many, streams = proto(tmp_path, **settings)
    fit(many, streams, epochs=2)
    one, streams = proto(tmp_path, **settings, num_heads=1, first_head=head)
    fit(one, streams, epochs=2)
    for ours, theirs in zip(one.heads.parameters(), many.heads.parameters(), strict=True):
        torch.testing.assert_close(ours[0], theirs[head], rtol=0, atol=1e-5)
    if prior == "estimated":  # learned by each head for itself, and kept in checkpoints
        alone, together = one.state_dict()["shares"], many.state_dict()["shares"]
        torch.testing.assert_close(alone[0], together[head])
        torch.testing.assert_close(together.sum(dim=1), torch.ones(H))
        assert len(torch.unique(together, dim=0)) == H


def test_equal_shares_train_as_the_paper_does(tmp_path: Path) -> None:
    paper, streams = proto(tmp_path)
    fit(paper, streams)
    given, streams = proto(tmp_path, prior=[2, 2, 2])
    fit(given, streams)
    assert same(state(paper.heads), state(given.heads))
    torch.testing.assert_close(paper.best_loss, given.best_loss)


def test_labels_of_every_head_follow_the_given_shares(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, prior=[9, 3, 0])
    seen, original = [], module.prototype_pseudo_labels

    def watched(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        seen.append(original(*args, **more))
        return seen[-1]

    module.prototype_pseudo_labels = watched
    trainer = fit(module, streams, epochs=1)
    _, label = seen[0]  # (H, 39): 2 each and 33 by shares
    assert [row.bincount().tolist() for row in label] == [[27, 10, 2]] * H
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("prior", [[1, 2], [1, -1, 1], [0, 0, 0], [1, math.nan, 1], "equal"])
def test_a_prior_that_is_none_is_refused(tmp_path: Path, prior: Any) -> None:
    message = (
        "'equal' is none of uniform, estimated"
        if prior == "equal"
        else r"proto\.module\.prior \[.*\] must hold one share for each of 3 clusters"
    )
    with pytest.raises(UsageError, match=message):
        proto(tmp_path, prior=prior)


def test_a_hundred_heads_run(tmp_path: Path) -> None:
    module, streams = proto(tmp_path, num_heads=100)
    trainer = fit(module, streams, epochs=1)
    losses = [float(trainer.callback_metrics[f"train/loss_head_{h}"]) for h in range(100)]
    assert len(set(losses)) == 100
    assert all(math.isfinite(loss) for loss in losses)
    assert 0 <= int(module.best_head) < 100


@pytest.mark.parametrize("seed", [0, 1])
def test_heads_of_a_run_are_its_own(tmp_path: Path, seed: int) -> None:
    module, _ = proto(tmp_path, seed=seed)
    other, _ = proto(tmp_path, seed=1 - seed)
    weights = torch.cat([each.heads.hidden_weight.flatten(1) for each in (module, other)])
    assert len({tuple(row) for row in weights.tolist()}) == 2 * H


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer_size": 5}, "a buffer of 5 images gives 1 for each of 3 clusters"),
        ({"buffer_size": 9}, "head_batch_size 10 exceeds the 9 labelled slots"),
    ],
)
def test_buffer_too_small_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        proto(tmp_path, **settings)


def test_buffer_larger_than_the_data_is_all_of_it(tmp_path: Path) -> None:
    _, streams = proto(tmp_path, buffer_size=5000)
    assert streams["images"].group_size == streams["images"].num_samples == N


def test_features_that_are_no_number_are_refused(tmp_path: Path) -> None:
    encoder = backbone()
    nn.init.constant_(encoder.conv1.weight, math.nan)
    upstream = write_upstream(tmp_path, encoder)
    with pytest.raises(UsageError, match=r"features\.npy: 90 rows hold NaN"):
        ProtoHeadModule(backbone(), K).prepare(image_set(), upstream, STREAMS)


def test_features_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    encoder = backbone()
    nn.init.zeros_(encoder.conv1.weight)
    with pytest.raises(UsageError, match="the same feature for every image, so they cannot be"):
        ProtoHeadModule(backbone(), K).prepare(
            image_set(), write_upstream(tmp_path, encoder), STREAMS
        )


@pytest.mark.parametrize(
    ("entropy", "way"),
    [
        (0.0, "proto.module.entropy=0.03 does, the term that the paper has for 200 clusters"),
        (0.3, "lower dataset.num_clusters or proto.module.lr, or raise proto.module.buffer_size"),
    ],
)
def test_heads_that_collapse_are_counted_and_lose_to_a_head_that_did_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, entropy: float, way: str
) -> None:
    module, streams = proto(tmp_path, lr=0.0)
    with torch.no_grad():
        module.heads.output_weight[:2].zero_()
        module.heads.output_bias[:2] = torch.tensor([50.0, 0.0, 0.0])
    collapsed = {key: value[:1].expand_as(value) for key, value in state(module.heads).items()}
    fit(module, streams, epochs=1)
    assert int(module.best_head) == 2
    caplog.clear()
    module, streams = proto(tmp_path / "all", lr=0.0, entropy=entropy)
    module.heads.load_state_dict(collapsed)
    trainer = fit(module, streams, epochs=2)
    assert float(trainer.callback_metrics["val/empty_clusters"]) == K - 1
    warnings = [each.getMessage() for each in caplog.records if "empty" in each.getMessage()]
    assert warnings == [
        f"epoch 0 leaves {K - 1} of {K} clusters empty; if later epochs do not fill them, {way}"
    ]
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("prior", ["uniform", "estimated"])
def test_copies_of_one_image_fill_a_cluster_without_a_nan(tmp_path: Path, prior: str) -> None:
    encoder = backbone(0)
    upstream = write_upstream(tmp_path, encoder)
    features = upstream.features.copy()
    features[: N // 2] = features[0]
    np.save(upstream.path / "features.npy", features)
    module = ProtoHeadModule(backbone(1), K, head_batch_size=B, num_heads=H, repeats=2, prior=prior)
    streams = module.prepare(image_set(), upstream, STREAMS)
    fit(module, streams)
    prediction = module.predict(Views(torch.arange(N), {}))
    assert prediction.probs is not None
    assert prediction.probs.isfinite().all()
    assert len(torch.unique(prediction.probs[: N // 2], dim=0)) == 1  # they are clustered alike
    assert math.isfinite(float(module.best_loss))
