"""TEMI and TURTLE: heads on stored features, chosen without labels."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import NUM_CLASSES, Finished, compose
from tests.stages.small import (
    D,
    K,
    N,
    backbone,
    fit,
    image_set,
    plain_features,
    same,
    state,
    write_upstream,
)
from torch import Tensor

from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.turtle import soft_cross_entropy
from spice_pl.job.run import run_stages
from spice_pl.models import portable
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.stored import StoredFeaturesStage
from spice_pl.stages.temi import TemiModule
from spice_pl.stages.turtle import LinearMaps, TurtleModule, _take_step

SIZES: dict[str, Any] = {"num_heads": 3, "batch_size": 40, "steps_per_epoch": 20, "seed": 0}
STAGES = (TemiModule, TurtleModule)


def made(kind: type[Any], **settings: Any) -> StoredFeaturesStage:
    if kind is TemiModule:
        settings = {"num_neighbors": 6, "hidden_dim": 8} | settings
    module: StoredFeaturesStage = kind(backbone(1), K, **(SIZES | {"lr": 1e-2} | settings))
    return module


def trained(kind: type[Any], path: Path, epochs: int = 6, **settings: Any) -> StoredFeaturesStage:
    module = made(kind, **settings)
    streams = module.prepare(image_set(), write_upstream(path, backbone(0)), {})
    fit(module, streams, epochs=epochs)
    return module


def views(index: Tensor) -> Views:
    return Views(index, {})


@pytest.mark.parametrize("kind", STAGES)
def test_finds_the_three_kinds_of_photograph(kind: type[Any], tmp_path: Path) -> None:
    module = trained(kind, tmp_path, epochs=10, num_heads=10)
    probs = module.predict(views(torch.arange(N))).probs
    assert probs is not None
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(N))
    truth = torch.arange(N) % NUM_CLASSES
    assert clustering_scores(probs.argmax(dim=1), truth)["acc"] > 0.95


@pytest.mark.parametrize("kind", STAGES)
def test_the_head_handed_on_reads_raw_features(kind: type[Any], tmp_path: Path) -> None:
    """It gives the clusters of the chosen head, which reads standardised ones."""
    module = trained(kind, tmp_path, epochs=2)
    index = torch.arange(N)
    probs = module.weights()["head"](plain_features(backbone(0)))
    chosen = module.clusters_of_heads(index)[int(module.kept)]
    assert torch.equal(probs.argmax(dim=1), chosen)
    assert int(module.kept) == module.chosen_head
    assert same(state(module.encoder), state(backbone(0)))  # the encoder is the upstream's


@pytest.mark.parametrize("kind", STAGES)
def test_the_head_of_the_lowest_cost_is_kept(
    kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "costs", lambda self, losses: torch.tensor([0.2, -0.1, 0.3]))
    module = trained(kind, tmp_path, epochs=1)
    assert int(module.kept) == 1
    assert same(state(module.selected), dict(module.state_of_head(1)))


def test_a_labeling_with_an_empty_cluster_comes_last(tmp_path: Path) -> None:
    """Two clusters are easier to learn than three, and both score 1 here."""
    module = made(TurtleModule, num_heads=2, steps_per_epoch=1)
    assert isinstance(module, TurtleModule)
    module.prepare(image_set(), write_upstream(tmp_path, backbone(0)), {})
    truth = torch.arange(N) % NUM_CLASSES
    module.on_fit_start()
    found = torch.stack([truth.clamp(max=1), truth])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "clusters_of_heads", lambda _: found)
        costs = module.costs(torch.zeros(2))
    assert costs[1] < 0.1 < 1 <= costs[0]


def test_a_step_of_linear_maps_is_one_of_plain_adam() -> None:
    inputs, labels = torch.randn(2, 6, 5), torch.eye(3)[torch.arange(6) % 3]
    maps = LinearMaps(4, [5, 5], 3, torch.Generator().manual_seed(0))
    plain = copy.deepcopy(maps)
    fused = torch.optim.Adam(maps.parameters(), lr=0.1, fused=True)
    slow = torch.optim.Adam(plain.parameters(), lr=0.1, foreach=False, fused=False)
    for _ in range(3):
        _take_step(fused, maps, soft_cross_entropy(maps(inputs), labels).sum())
        slow.zero_grad()
        torch.autograd.backward(soft_cross_entropy(plain(inputs), labels).sum())
        slow.step()
    for one, other in zip(maps.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_partners_are_the_nearest_other_images(tmp_path: Path) -> None:
    module = made(TemiModule)
    module.prepare(image_set(), write_upstream(tmp_path, backbone(0)), {})
    assert isinstance(module, TemiModule)
    features = torch.nn.functional.normalize(plain_features(backbone(0)).double())
    cosines = (features @ features.T).fill_diagonal_(-2)
    expected = cosines.topk(6, dim=1).values
    torch.testing.assert_close(cosines.gather(1, module.partners), expected, atol=1e-6, rtol=0)
    assert not (module.partners == torch.arange(N)[:, None]).any()


def test_shares_and_teachers_are_moving_averages(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps_per_epoch": 1, "teacher_momentum": 0.75}
    module = made(TemiModule, share_momentum=0.5, **settings)
    assert isinstance(module, TemiModule)
    before = state(module.teachers)
    streams = module.prepare(image_set(), write_upstream(tmp_path, backbone(0)), {})
    fit(module, streams, epochs=1)
    for key, value in module.students.state_dict().items():
        expected = 0.75 * before[key] + 0.25 * value
        torch.testing.assert_close(module.teachers.state_dict()[key], expected)
    torch.testing.assert_close(module.shares.sum(dim=1), torch.ones(3))
    assert (module.shares != 1 / K).any()


def test_a_further_feature_space_changes_the_labels(tmp_path: Path) -> None:
    """With a space that holds the classes alone, labels are the classes."""
    truth = torch.arange(N) % NUM_CLASSES
    file = tmp_path / "other.npy"
    np.save(file, torch.nn.functional.one_hot(truth).float().numpy())
    module = trained(TurtleModule, tmp_path / "run", num_heads=10, features_files=[str(file)])
    assert isinstance(module, TurtleModule)
    assert [weight.shape for weight in module.labelings.weights] == [(10, K, D), (10, K, 3)]
    probs = module.predict(views(torch.arange(N))).probs
    assert probs is not None
    assert clustering_scores(probs.argmax(dim=1), truth)["acc"] == 1.0
    # The head needs no other network: it is the classifier that learned these labels.
    weight = module.classifiers.weights[0][int(module.kept)] / module.scale
    torch.testing.assert_close(module.state_of_head(int(module.kept))["weight"], weight)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TemiModule, {"num_neighbors": N}, r"num_neighbors 90 is not between 1 and 89"),
        (TemiModule, {"num_neighbors": 0}, r"num_neighbors 0 is not between 1 and 89"),
        (TemiModule, {"beta": 0.0}, r"temi\.module\.beta 0\.0 is not above 0"),
        (TemiModule, {"teacher_momentum": 1.0}, r"teacher_momentum 1\.0 is not from 0"),
        (TemiModule, {"num_heads": 0}, r"temi\.module\.num_heads 0 is not at least 1"),
        (TurtleModule, {"gamma": -1.0}, r"turtle\.module\.gamma -1\.0 is not at least 0"),
        (TurtleModule, {"inner_steps": 0}, r"inner_steps 0 is not at least 1"),
        (TurtleModule, {"steps_per_epoch": 0}, r"steps_per_epoch 0 is not at least 1"),
        (TurtleModule, {"features_files": ["/no.npy"]}, r"/no\.npy does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(
    kind: type[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        made(kind, **settings).check(image_set(), {})


@pytest.mark.parametrize("kind", STAGES)
def test_missing_upstreams_and_equal_features_are_said(kind: type[Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"set {kind.name}\.upstream=moco"):
        made(kind).prepare(image_set(), None, {})
    folder = write_upstream(tmp_path, backbone(0))
    folder.create("features.npy", (N, D))
    folder.publish("features.npy")
    with pytest.raises(UsageError, match=r"features\.npy holds the same feature for every image"):
        made(kind).prepare(image_set(), folder, {})


def test_a_file_of_other_images_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "few.npy"
    np.save(file, np.zeros((4, 2), np.float32))
    with pytest.raises(UsageError, match=r"few\.npy has 4 rows and the data set 90 images"):
        made(TurtleModule, features_files=[str(file)]).check(image_set(), {})


# As runs.

SHORT = ("epochs=3", "module.steps_per_epoch=4", "module.batch_size=20", "module.num_heads=3")


def overrides(stage: str) -> list[str]:
    return [f"stage={stage}", *(f"{stage}.{text}" for text in SHORT)]


@pytest.mark.parametrize("stage", ["temi", "turtle"])
def test_a_run_leaves_what_other_stages_leave(finished: Finished, stage: str) -> None:
    run_stages(finished.job(*overrides(stage), "embeddings=cosine"))
    folder = finished.folder(stage)
    for name in ("model.spice", "clusters.csv", "report.html", "table.md", "metrics.json"):
        assert (folder.path / name).is_file(), name
    assert np.array_equal(folder.features, finished.folder("moco").features)
    table = folder.read_clusters()
    assert np.array_equal(table.clusters, folder.probs.argmax(axis=1))
    model = portable.load(folder.path / "model.spice")
    made = model.network.head(torch.from_numpy(np.array(folder.features)))
    np.testing.assert_allclose(made.detach().numpy(), folder.probs, atol=1e-5)
    assert folder.metrics["objective"] is not None


@pytest.mark.parametrize("stage", ["temi", "turtle"])
def test_resumed_equals_straight(finished: Finished, tmp_path: Path, stage: str) -> None:
    run_stages(finished.job(*overrides(stage)))
    straight = finished.folder(stage)
    kept = {each: (straight.path / each).read_bytes() for each in ("probs.npy", "metrics.csv")}
    weights = straight.read_weights("head.safetensors")

    def stop(self: StoredFeaturesStage) -> None:
        if self.current_epoch == 2:
            raise UsageError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredFeaturesStage, "on_train_epoch_start", stop)
        with pytest.raises(UsageError, match="stopped"):
            run_stages(finished.job(*overrides(stage), "overwrite=true"))
    assert not straight.finished
    run_stages(finished.job(*overrides(stage), "resume=true"))
    assert same(straight.read_weights("head.safetensors"), weights)
    for name, content in kept.items():
        assert (straight.path / name).read_bytes() == content, name


@pytest.mark.parametrize("stage", ["temi", "turtle"])
def test_without_the_upstream_the_command_that_makes_it_is_named(
    finished: Finished, stage: str, tmp_path: Path
) -> None:
    empty = Finished(finished.overrides, tmp_path / "empty")
    with pytest.raises(UsageError, match=r"make it with\n.*stage=moco"):
        run_stages(empty.job(*overrides(stage)))


def test_turtle_reads_several_stages_as_it_reads_files_of_features(finished: Finished) -> None:
    moco = finished.folder("moco")
    second = RunFolder(moco.path.with_name("second"))
    shutil.copytree(moco.path, second.path)
    more = ("answer=network", "overwrite=true")
    turtle = finished.folder("turtle")
    run_stages(finished.job(*overrides("turtle"), "turtle.upstream=[moco,moco/second]", *more))
    probs = np.array(turtle.probs)
    turtle.check_upstream(moco, [second])
    with pytest.raises(UsageError, match=r"made from an earlier .*proto.*run again since"):
        turtle.check_upstream(moco, [finished.folder("proto")])
    files = f"turtle.module.features_files=['{second.path / 'features.npy'}']"
    run_stages(finished.job(*overrides("turtle"), files, *more))
    np.testing.assert_array_equal(finished.folder("turtle").probs, probs)


@pytest.mark.parametrize(
    ("stage", "upstream", "message"),
    [
        (
            "turtle",
            "[moco,moco/third]",
            r"third, and that does not exist; make it with\n.*run=third",
        ),
        (
            "temi",
            "[moco,proto]",
            r"temi\.upstream names 2 stages and this stage reads one; give one",
        ),
    ],
)
def test_lists_of_stages_that_do_not_fit_are_refused(
    finished: Finished, stage: str, upstream: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_stages(finished.job(*overrides(stage), f"{stage}.upstream={upstream}"))


def test_the_teacher_of_temi_averages_as_often_as_the_papers() -> None:
    """.996 over 200 passes of 50,000 images in batches of 512: 78 averaging times."""
    own = compose("dataset=cifar10").temi
    steps = own.epochs * own.module.steps_per_epoch
    paper = (1 - 0.996) * 200 * 50_000 / 512
    assert steps * (1 - own.module.teacher_momentum) == pytest.approx(paper, rel=0.05)


def test_more_clusters_than_images_are_refused(finished: Finished) -> None:
    with pytest.raises(UsageError, match=r"num_clusters 91 is not between 2 and the 90"):
        run_stages(finished.job(*overrides("temi"), "dataset.num_clusters=91"))
