"""Ground truth reaches `truth/*` and the table, and nothing else."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import CONF, NUM_CLASSES, NUM_IMAGES, Finished, authors_names, make_job
from torch import Tensor

from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job import run, stage
from spice_pl.job.parts import open_images
from spice_pl.job.trainer import make_trainer
from spice_pl.runs.results import objective

STAGES = ("moco", "proto", "fixmatch")
NAMES = ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy", "clusters.csv")
TRUE = np.arange(NUM_IMAGES, dtype=np.int64) % NUM_CLASSES


def run_with(
    labels: NDArray[np.int64] | None,
    straight: Finished,
    runs: Path,
    num_clusters: int,
    *overrides: str,
) -> Finished:
    """Run all stages, or those that are asked for, on `straight`'s images with our labels."""
    made = open_images

    def images(*args: Any, **more: Any) -> ImageSet:
        found: ImageSet = made(*args, **more)
        return ImageSet(found.name, found.images, found.keys, found.fingerprint, labels=labels)

    finished = Finished(straight.overrides, runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_images", images)
        run.run_stages(finished.job(f"dataset.num_clusters={num_clusters}", *overrides))
    return finished


@pytest.fixture(scope="module")
def true(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_with(TRUE, straight, tmp_path_factory.mktemp("true"), NUM_CLASSES)


@pytest.fixture(scope="module", params=["shuffled", "one class", "more classes", "half unknown"])
def false(
    request: pytest.FixtureRequest, straight: Finished, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    labels = {
        "shuffled": np.random.default_rng(0).permutation(TRUE),
        "one class": np.zeros_like(TRUE),
        "more classes": np.arange(NUM_IMAGES, dtype=np.int64) % 7,
        "half unknown": np.where(np.arange(NUM_IMAGES) % 2, TRUE[::-1] // 2, -1),
    }[str(request.param)]
    return run_with(labels, straight, tmp_path_factory.mktemp("false"), NUM_CLASSES)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat(item, f"{prefix}.{i}")
    else:
        yield prefix, value


@pytest.mark.parametrize("stage", STAGES)
def test_false_labels_change_no_weight_and_no_cluster(
    true: Finished, false: Finished, straight: Finished, stage: str
) -> None:
    folders = [each.folder(stage).path for each in (true, false, straight)]
    for name in NAMES:
        if name == "encoder.safetensors":
            assert all((folder / name).is_file() for folder in folders)
        if (folders[0] / name).is_file():
            written = {(folder / name).read_bytes() for folder in folders}
            assert len(written) == 1, name


@pytest.mark.parametrize("stage", STAGES)
def test_false_labels_change_no_training_state(
    true: Finished, false: Finished, straight: Finished, stage: str
) -> None:
    states = [
        dict(flat(torch.load(each.folder(stage).path / "last.ckpt", weights_only=True)))
        for each in (true, false, straight)
    ]
    compared = 0
    for key, value in states[0].items():
        if key.startswith((".state_dict", ".optimizer_states", ".lr_schedulers", ".global_step")):
            for other in states[1:]:
                equal = torch.equal(value, other[key]) if isinstance(value, Tensor) else None
                assert value == other[key] if equal is None else equal, key
            compared += 1
    assert compared > 20
    assert not [key for key in states[0] if "truth" in key]


@pytest.mark.parametrize("stage", STAGES)
def test_false_labels_change_scores_alone(true: Finished, false: Finished, stage: str) -> None:
    metrics = [dict(flat(each.folder(stage).metrics)) for each in (true, false)]
    volatile = ("seconds", "peak_memory_mb", "runs_dir", "data_wait_fraction")
    assert metrics[0].keys() == metrics[1].keys()
    changed = {
        key.rpartition(".")[2]
        for key in metrics[0]
        if metrics[0][key] != metrics[1][key]
        and not any(word in key for word in volatile)
        and not str(metrics[0][key]).startswith("runs_dir=")
    }
    assert not {
        key
        for key in changed - {"acc", "recall", "nmi", "ari", "purity"}
        if not key.startswith("truth/")
    }
    assert changed  # the scores did see the labels
    logs = []
    for each in (true, false):
        with (each.folder(stage).path / "metrics.csv").open(newline="") as file:
            logs.append(
                [
                    {key: value for key, value in row.items() if not key.startswith("truth/")}
                    for row in csv.DictReader(file)
                ]
            )
    assert logs[0] == logs[1]


# The stages and tasks beside SPICE's three, each in one epoch of a few steps.

STEPS = (
    *("epochs=1", "module.steps_per_epoch=3"),
    *("streams.labelled.batch_size=2", "streams.unlabelled.batch_size=10"),
)
SEMI = (*STEPS, "selector=variance")
LEARNS = {
    "simclr": ("epochs=1", "watch_epochs=1", "streams.images.batch_size=30"),
    "empssl": ("epochs=1", "watch_epochs=1", "streams.images.batch_size=30"),
    "vicreg": ("epochs=1", "watch_epochs=1", "streams.images.batch_size=30"),
    "fastsiam": ("epochs=1", "watch_epochs=1", "streams.images.batch_size=30"),
    "cc": ("epochs=1", "watch_epochs=1", "streams.images.batch_size=30"),
    "propos": (
        *("epochs=2", "watch_epochs=1", "streams.images.batch_size=30"),
        *("module.warmup_epochs=1", "module.hidden_dim=16"),
    ),
    "cdc": ("epochs=1", "streams.images.batch_size=30", "module.hidden_dim=16"),
    "dcboost": (
        *("epochs=2", "watch_epochs=1", "streams.images.batch_size=30", "upstream=proto"),
        *("module.warmup_epochs=1", "module.hidden_dim=16"),
    ),
    "embed": (),
    "import": ("module.stem=conv3",),
    "scan": ("epochs=2", "streams.images.batch_size=30"),
    "selflabel": ("epochs=1", "streams.images.batch_size=30", "upstream=proto"),
    "temi": ("epochs=2", "module.steps_per_epoch=3", "module.batch_size=20"),
    "turtle": ("epochs=2", "module.steps_per_epoch=3", "module.batch_size=20"),
    "kmeans": (),
    "clusmatch": (*SEMI, "module.kmeans_steps=2"),
    "freematch": SEMI,
    "flexmatch": SEMI,
    "softmatch": SEMI,
}
JUDGES: dict[str, tuple[str, ...]] = {
    "estimate_k": ("task.largest=4",),
    "trust": ("task.num_nulls=2",),
    "predict": (),
}


@pytest.fixture(scope="module")
def pair(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Finished]:
    """The three stages twice, to go on from with true labels and with shuffled ones."""
    first, second = (straight.copy(tmp_path_factory.mktemp("pair")) for _ in range(2))
    return first, second


def ran(
    pair: tuple[Finished, Finished], stage: str, settings: Sequence[str], file: Path
) -> list[Path]:
    """Run a stage with true and with shuffled labels; return its two folders."""
    labels = (TRUE, np.random.default_rng(1).permutation(TRUE))
    more = [f"{stage}.{text}" for text in settings]
    if stage == "import":
        torch.save(authors_names(pair[0].folder("proto")), file)
        more.append(f"path={file}")
    if stage == "predict":
        more.append(f"predict.model={pair[0].folder('fixmatch').path}")
    return [
        run_with(each, start, start.runs, NUM_CLASSES, f"stage={stage}", *more).folder(stage).path
        for each, start in zip(labels, pair, strict=True)
    ]


def handed_on(folder: Path) -> dict[str, bytes]:
    """Everything that a stage hands on or a person reads as its answer, scores left out."""
    kinds = (
        *("*.safetensors", "*.npy", "*.spice", "clusters.csv", "predictions.csv"),
        *("trust.html", "k.csv", "k.svg"),
    )
    return {file.name: file.read_bytes() for kind in kinds for file in folder.glob(kind)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*LEARNS, *JUDGES])
def test_other_stages_do_not_see_labels(
    pair: tuple[Finished, Finished], stage: str, tmp_path: Path
) -> None:
    settings = (LEARNS | JUDGES)[stage]
    found = [handed_on(folder) for folder in ran(pair, stage, settings, tmp_path / "file.pth")]
    assert found[0]
    assert [name for name in found[0] if found[0][name] != found[1].get(name)] == []
    assert found[0].keys() == found[1].keys()


@pytest.mark.slow
def test_the_comparison_finds_a_stage_that_sees_labels(
    pair: tuple[Finished, Finished], tmp_path: Path
) -> None:
    one, other = (handed_on(path) for path in ran(pair, "supervised", STEPS, tmp_path))
    assert {"encoder.safetensors", "head.safetensors", "probs.npy"} <= {
        name for name in one if one[name] != other[name]
    }


def test_no_setting_chooses_by_truth() -> None:
    files = sorted(CONF.rglob("*.yaml"))
    assert len(files) > 20
    for file in files:
        for line in file.read_text().splitlines():
            setting = line.partition("#")[0]
            assert "truth" not in setting, f"{file}: {line}"


def test_batches_of_a_run_have_no_labels(straight: Finished, tmp_path: Path) -> None:
    seen: set[tuple[str, ...]] = set()
    original = ViewsDataModule.on_after_batch_transfer

    def on_after_batch_transfer(self: ViewsDataModule, batch: Any, dataloader_idx: int) -> Any:
        views = original(self, batch, dataloader_idx)
        for each in views.values() if isinstance(views, dict) else [views]:
            seen.add(tuple(vars(each)))
        return views

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViewsDataModule, "on_after_batch_transfer", on_after_batch_transfer)
        run_with(TRUE, straight, tmp_path / "runs", NUM_CLASSES)
    assert seen == {("index", "views")}


def test_stage_1_is_watched_without_labels_and_beside_them(tiny: Sequence[str]) -> None:
    job = make_job(*tiny, "stage=moco", "moco.watch_epochs=1")
    run.run_stages(job)
    logged = job.folder("moco").metrics["logged"]
    assert -1 <= logged["val/kmeans_agreement"] <= 1
    assert 1 / 20 <= logged["val/neighbor_agreement"] <= 1
    assert logged["truth/knn_acc"] > 0.9  # three colours in three corners
    assert 0 <= logged["train/alignment"] <= 4
    assert -8 <= logged["train/uniformity"] <= 0
    assert 0 < job.folder("moco").metrics["data_wait_fraction"] < 1


def test_no_objective_reads_truth() -> None:
    assert objective({"truth/acc": 0.9, "truth/nmi": 0.9, "truth/reliable_acc": 0.9}) is None
    logged = {"truth/acc": 0.1, "train/loss": 2.0, "val/best_selection_loss": 1.0}
    changed = logged | {"truth/acc": 0.9}
    assert objective(logged) == objective(changed) == 1.0


def test_no_callback_of_a_run_watches_truth(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def trainer(*arguments: Any, **more: Any) -> Any:
        made = make_trainer(*arguments, **more)
        seen.extend(made.callbacks)  # type: ignore[attr-defined]
        seen.append(made)
        raise UsageError("seen")

    monkeypatch.setattr(stage, "make_trainer", trainer)
    with pytest.raises(UsageError, match="seen"):
        run.run_stages(finished.job("stage=moco", "overwrite=true"))
    assert len(seen) > 4
    for each in seen:
        monitors = {key: value for key, value in vars(each).items() if "monitor" in key}
        assert not [value for value in monitors.values() if "truth" in str(value)], monitors
    assert not seen[-1].early_stopping_callbacks
    assert not [each for each in seen[-1].checkpoint_callbacks if getattr(each, "monitor", None)]


# Who may name a metric of truth: who logs it, who shows it to people.
SHOWS_TRUTH = {
    *("callbacks/dashboards.py", "callbacks/stage_progress.py", "callbacks/truth.py"),
    "tasks/linear_probe.py",
}


def test_only_what_logs_or_shows_names_truth() -> None:
    source = Path(run.__file__).parents[1]
    naming = set()
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and value.startswith("truth/"):  # docstrings begin otherwise
                naming.add(file.relative_to(source).as_posix())
    assert "callbacks/truth.py" in naming
    assert not {each for each in naming if not each.startswith("reports/")} - SHOWS_TRUTH
