from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
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

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.selectors import (
    OracleLabels,
    clusmatch_labels,
    confident_labels,
    reliable_labels,
)
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.thresholds import (
    ClusMatchThreshold,
    FixedThreshold,
    FlexMatchThreshold,
    FreeMatchThreshold,
    SoftMatchThreshold,
    Threshold,
)
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.semi import SemiSupervisedModule

STREAMS = {"labelled": stream(6, weak=WEAK), "unlabelled": stream(14, weak=WEAK, strong=STRONG)}
STEPS = 4
CLUSMATCH = {"kmeans": 0.5, "negative": 0.5, "fairness": 0.001}
ROOMY = partial(clusmatch_labels, fraction=0.5)
SPICE = partial(reliable_labels, num_neighbors=5, agreement=0.0, confidence=0.9, balance="none")


def certain() -> NDArray[np.float32]:
    """Be sure of i % K for images 0 to 59, and unsure of the rest."""
    probs = np.full((N, K), 0.001, dtype=np.float32)
    probs[np.arange(N), np.arange(N) % K] = 0.998
    probs[60:] = (0.4, 0.3, 0.3)
    return probs


def upstream(path: Path, **settings: Any) -> RunFolder:
    torch.manual_seed(0)
    made: dict[str, Any] = {"probs": certain(), "head": ClusterHead(D, D, K), **settings}
    return write_upstream(path, backbone(0), **{k: v for k, v in made.items() if v is not None})


def semi(
    folder: RunFolder | None, threshold: Threshold | None = None, **settings: Any
) -> tuple[SemiSupervisedModule, Mapping[str, Any]]:
    plain: dict[str, Any] = {"selector": ROOMY, "init": "encoder", "steps_per_epoch": STEPS}
    images: ImageSet = settings.pop("images", image_set())
    torch.manual_seed(7)
    module = SemiSupervisedModule(
        backbone(1), K, threshold=threshold or ClusMatchThreshold(K), **plain | settings
    )
    return module, module.prepare(images, folder, STREAMS)


class Watch(pl.Callback):
    """Keep losses, labels of k-means and rates at every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kmeans: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        assert isinstance(module, SemiSupervisedModule)
        self.losses.append(float(outputs["loss"]))
        if "kmeans" in module.losses:
            self.kmeans.append(module.kmeans_labels.clone())


METHODS: Mapping[str, tuple[Callable[..., Threshold], Mapping[str, float]]] = {
    "fixmatch": (lambda _: FixedThreshold(), {}),
    "freematch": (FreeMatchThreshold, {"fairness": 0.01}),
    "flexmatch": (partial(FlexMatchThreshold, confidence=0.3), {}),
    "softmatch": (SoftMatchThreshold, {}),
    "clusmatch": (ClusMatchThreshold, CLUSMATCH),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_the_same_selected_labels(tmp_path: Path, name: str) -> None:
    make, losses = METHODS[name]
    threshold = make(K)
    module, streams = semi(upstream(tmp_path), threshold, losses=losses, selector=SPICE)
    assert module.reliable_index.tolist() == list(range(60))
    before, watch = state(module), Watch()
    trainer = fit(module, streams, watch)
    assert len(watch.losses) == 2 * STEPS
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert not torch.equal(before["encoder.conv1.weight"], state(module)["encoder.conv1.weight"])
    learnt = {
        key
        for key, value in state(threshold).items()
        if not torch.equal(value, before[f"threshold.{key}"])
    }
    assert bool(learnt) == threshold.learns
    if threshold.learns:
        assert f"train/threshold_{K - 1}" in trainer.callback_metrics
    assert all(f"train/loss_{loss}" in trainer.callback_metrics for loss in losses)


def test_unified_loss_equals_its_terms_by_hand(tmp_path: Path) -> None:
    module, streams = semi(upstream(tmp_path), losses=CLUSMATCH, unlabeled_weight=0.5)
    trainer = fit(module, streams, epochs=1, limit_train_batches=1)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    weights = {"labelled": 1, "unlabelled": 0.5, **CLUSMATCH}
    expected = sum(weight * found[f"train/loss_{name}"] for name, weight in weights.items())
    assert found["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert found["train/loss_negative"] > 0


def test_kmeans_labels_are_refreshed_and_named_by_the_labelled_images(tmp_path: Path) -> None:
    module, streams = semi(upstream(tmp_path), losses=CLUSMATCH, kmeans_steps=3, lr=0.5)
    assert (module.kmeans_labels == -1).all()
    watch = Watch()
    fit(module, streams, watch)
    assert len(watch.kmeans) == 2 * STEPS
    for step, labels in enumerate(watch.kmeans):
        assert labels.min() >= 0
        assert labels.max() < K
        if step % 3:
            assert torch.equal(labels, watch.kmeans[step - 1])
    # The red, green and blue images are far apart: k-means finds them, the labelled ones name them.
    assert watch.kmeans[0].tolist() == [i % K for i in range(N)]


def test_naming_reads_no_unlabelled_image(tmp_path: Path) -> None:
    """Labels of three images alone name all clusters, in whatever order they come."""
    names = torch.tensor([2, 0, 1])
    module, streams = semi(upstream(tmp_path), losses=CLUSMATCH)
    module.pseudo_labels.fill_(-1)
    module.reliable_index = torch.arange(3)
    module.pseudo_labels[:3] = names
    streams = {
        key: replace(value, subset=module.reliable_index) if key == "labelled" else value
        for key, value in streams.items()
    }
    watch = Watch()
    fit(module, streams, watch, epochs=1)
    assert watch.kmeans[0].tolist() == [int(names[i % K]) for i in range(N)]


def test_encoder_and_head_have_their_own_rates(tmp_path: Path) -> None:
    module, streams = semi(upstream(tmp_path), lr=0.2, encoder_lr=0.0)
    before = state(module)
    trainer = fit(module, streams, epochs=1)
    after = state(module)
    parameters = {name for name, _ in module.encoder.named_parameters()}
    assert all(torch.equal(before[f"encoder.{k}"], after[f"encoder.{k}"]) for k in parameters)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    groups = trainer.optimizers[0].param_groups
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [
        *[(0.0, 5e-4), (0.0, 0.0)],
        *[(0.2, 5e-4), (0.2, 0.0)],
    ]


def test_starts(tmp_path: Path) -> None:
    folder = upstream(tmp_path)
    given, _ = semi(folder, init="encoder")
    assert same(state(given.encoder), state(backbone(0)))
    assert isinstance(given.head, LinearHead)
    assert torch.equal(given.head.bias, torch.zeros(K))
    assert float(given.head.weight.detach().abs().max()) <= math.sqrt(6 / (D + K))  # Xavier
    fresh, _ = semi(folder, init="scratch")
    assert same(state(fresh.encoder), state(backbone(1)))
    linear = LinearHead(D, K)
    joint, _ = semi(upstream(tmp_path / "linear", head=linear), init="joint")
    for head in (joint.head, joint.ema_head):  # whatever head the upstream has
        assert same(state(head), state(linear))


def test_resumed_run_equals_a_straight_one(tmp_path: Path) -> None:
    folder, ends = upstream(tmp_path), []
    settings: dict[str, Any] = {"losses": CLUSMATCH, "kmeans_steps": 3, "lr": 0.1}
    straight, streams = semi(folder, **settings)
    fit(straight, streams, epochs=2)
    ends.append(state(straight))

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            raise KeyboardInterrupt

    half, streams = semi(folder, **settings)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(half, streams, Stop(), epochs=2)
    again, streams = semi(folder, **settings)
    fit(again, streams, epochs=2, resume=tmp_path / "half.ckpt")
    ends.append(state(again))
    assert same(*ends)
    assert "kmeans_labels" in ends[0]
    assert "threshold.matrix" in ends[0]


# Evidence that is missing, incomplete or wrong.


def test_features_alone_take_the_feature_branch(tmp_path: Path) -> None:
    module, _ = semi(upstream(tmp_path, probs=None, head=None))
    counts = torch.bincount(module.pseudo_labels[module.reliable_index], minlength=K)
    assert counts.tolist() == [15, 15, 15]  # half of the 30 images per cluster


def test_a_file_of_probabilities_replaces_the_upstream(tmp_path: Path) -> None:
    probs = certain()[:, [1, 2, 0]]
    np.save(tmp_path / "probs.npy", probs)
    file = str(tmp_path / "probs.npy")
    module, _ = semi(upstream(tmp_path / "up"), probs_file=file)
    assert torch.equal(
        module.pseudo_labels[module.reliable_index],
        torch.from_numpy(probs)[module.reliable_index].argmax(dim=1),
    )
    module, streams = semi(None, init="scratch", probs_file=file)
    fit(module, streams, epochs=1)
    with pytest.raises(UsageError, match=r"semi\.upstream is null; name one or use"):
        semi(None, probs_file=file)


def test_wrong_evidence_is_refused(tmp_path: Path) -> None:
    folder = upstream(tmp_path / "up")
    for name, array, message in (
        ("rows", certain()[:50], "has 50 rows and the data set 90 images"),
        ("clusters", np.full((N, 4), 0.25, dtype=np.float32), "has 4 clusters and dataset"),
        ("sums", certain() * 2, "are not probabilities"),
        ("nan", np.full((N, K), np.nan, dtype=np.float32), "90 rows hold NaN"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(UsageError, match=message):
            semi(folder, probs_file=str(tmp_path / f"{name}.npy"))
    with pytest.raises(UsageError, match="has nothing to select labelled images on"):
        semi(None, init="scratch")
    with pytest.raises(
        UsageError,
        match=r"no head.*=joint continues from a head; use semi\.module\.init=enc",
    ):
        semi(upstream(tmp_path / "bare", probs=None, head=None), init="joint")
    with pytest.raises(UsageError, match=r"semi\.selector: this selector reads probs"):
        semi(upstream(tmp_path / "moco", probs=None, head=None), selector=confident_labels)


def test_no_selected_image_says_so(tmp_path: Path) -> None:
    strict = partial(SPICE, confidence=0.9999)
    with pytest.raises(UsageError, match=r"0 of 90 images are labelled .*per cluster \[0, 0, 0\]"):
        semi(upstream(tmp_path), selector=strict)


def test_empty_cluster_and_fewer_labels_than_a_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probs = np.zeros((N, K), dtype=np.float32)
    probs[np.arange(N), np.arange(N) % 2] = 1
    few = partial(clusmatch_labels, fraction=1 / 30)  # one image per cluster, batches of 6
    module, streams = semi(upstream(tmp_path, probs=probs), selector=few, losses=CLUSMATCH)
    assert len(module.reliable_index) == 2
    assert "clusters [2] have no labelled image" in caplog.text
    watch = Watch()
    fit(module, streams, watch)
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert all(value.isfinite().all() for value in state(module).values())


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"semi\.module\.losses \['fear'\] are none of"):
        semi(None, losses={"fear": 1.0})
    with pytest.raises(UsageError, match=r"\['negative'\] need statistics that FreeMatchThresh"):
        semi(None, FreeMatchThreshold(K), losses={"negative": 1.0})
    with pytest.raises(UsageError, match=r"semi\.module\.init 'both' is none of"):
        semi(None, init="both")
    module = SemiSupervisedModule(
        backbone(), K, selector=ROOMY, threshold=ClusMatchThreshold(K), init="both"
    )
    module.name = "clusmatch"  # the job sets it: several stages are of this class
    with pytest.raises(UsageError, match=r"clusmatch\.module\.init 'both' is none of joint, enc"):
        module.check(image_set(), STREAMS)


# True labels.


def test_oracle_is_marked_and_refused_without_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = upstream(tmp_path)
    with pytest.raises(UsageError, match="photos has no true labels"):
        semi(folder, selector=OracleLabels(9))
    truth = np.arange(N, dtype=np.int64) % K
    module, _ = semi(folder, selector=OracleLabels(9), images=replace(image_set(), labels=truth))
    assert module.oracle
    assert "ORACLE: semi trains on true labels" in caplog.text
    assert len(module.reliable_index) == 9
    assert torch.equal(
        module.pseudo_labels[module.reliable_index], torch.from_numpy(truth)[module.reliable_index]
    )
    too_many = replace(image_set(), labels=np.arange(N, dtype=np.int64) % 5)
    with pytest.raises(UsageError, match=r"true labels reach 4 and dataset\.num_clusters is 3"):
        semi(folder, selector=OracleLabels(9), images=too_many)
    assert not semi(folder)[0].oracle
