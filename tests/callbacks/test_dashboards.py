"""What a run logs, read back from where each logger keeps it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.conftest import NUM_CLASSES, NUM_IMAGES, Finished, compose, make_job
from tests.process import train
from tests.wandb_file import read_run

from spice_pl.callbacks.dashboards import assignments, cluster_pictures, confusion, run_id
from spice_pl.data.images import ImageSet
from spice_pl.job.run import run_stages
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder

STAGE_KEYS = {
    "moco": {"train/loss", "train/embedding_std"},
    "proto": {
        "train/loss",
        *(f"train/loss_head_{head}" for head in range(3)),
        "val/selection_loss",
        "val/largest_cluster_fraction",
        "val/smallest_cluster_fraction",
        "val/confidence",
    },
    "fixmatch": {
        "train/loss",
        "train/loss_labelled",
        "train/loss_unlabelled",
        "train/confident_fraction",
        "train/reliable_fraction",
        "val/confidence",
    },
}


@pytest.mark.parametrize("stage", STAGE_KEYS)
def test_csv_holds_a_curve_of_every_quantity(straight: Finished, stage: str) -> None:
    with (straight.folder(stage).path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    logged = {key for line in lines for key, value in line.items() if value}
    assert STAGE_KEYS[stage] <= logged
    assert not any(key.startswith("truth/") for key in logged)  # these images have no labels


@pytest.mark.slow
def test_tensorboard_and_offline_wandb_tell_the_whole_run(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = (
        "+logger.tensorboard._target_=pytorch_lightning.loggers.TensorBoardLogger",
        "+logger.tensorboard.name=''",
        "+logger.tensorboard.version=tensorboard",
    )
    done = train("logger=wandb", *board, *tiny, timeout=400)
    assert done.returncode == 0, done.stderr
    folders = {
        stage: RunFolder(tmp_path / "runs" / "photos" / stage / "seed0") for stage in STAGE_KEYS
    }
    before: RunFolder | None = None
    for stage, folder in folders.items():
        check_run(folder, stage, before)
        if stage != "moco":
            check_pictures_and_tables(folder)
        before = folder
    # A resumed run is the same run.
    folder = folders["moco"]
    (folder.path / "metrics.json").unlink()
    again = train("stage=moco", "resume=true", "logger=wandb", *tiny, timeout=400)
    assert again.returncode == 0, again.stderr
    records = wandb_records(folder)
    assert len(records) == 2
    assert len({read_run(record).id for record in records}) == 1


def wandb_records(folder: RunFolder) -> list[Path]:
    return list(folder.path.glob("wandb/offline-run-*/run-*.wandb"))


def tensorboard(folder: RunFolder) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder.path / "tensorboard")).Reload()


def check_run(folder: RunFolder, stage: str, before: RunFolder | None) -> None:
    """Curves, final scores, config and lineage of a stage."""
    expected = STAGE_KEYS[stage] | {"truth/final_acc"}
    events = tensorboard(folder)
    assert expected <= set(events.Tags()["scalars"])
    (record,) = wandb_records(folder)  # one run per stage
    run = read_run(record)
    assert all(run.values(key) for key in expected)
    # Both hold the same curve, and its last value is in metrics.json.
    curve = [event.value for event in events.Scalars("train/loss")]
    assert run.values("train/loss") == pytest.approx(curve)
    (final,) = run.values("truth/final_acc")
    assert final == pytest.approx(folder.metrics["rows"][-1]["acc"])
    assert run.config["seed"] == 0
    assert f"{stage}.epochs" in run.config
    # The artifact of a stage, and the one it was made from, both by digest.
    assert folder.metrics["digest"] in run.artifacts[f"photos-{stage}-seed0"]
    if before is not None:
        used = f"photos-{before.path.parent.name}-seed0:{before.metrics['digest']}"
        assert run.config["upstream_artifact"] == used


def check_pictures_and_tables(folder: RunFolder) -> None:
    """Pictures of every cluster that is not empty, in both; tables."""
    (record,) = wandb_records(folder)
    run = read_run(record)
    sizes = [size for size in folder.metrics["cluster_sizes"] if size]
    tags = tensorboard(folder).Tags()["images"]
    assert len([tag for tag in tags if tag.startswith("clusters/")]) == len(sizes)
    (captions,) = run.values("clusters/captions")
    assert [text.rpartition(": ")[2] for text in captions] == [f"{size} images" for size in sizes]
    (files,) = run.values("clusters/filenames")
    assert all((record.parent / "files" / file).is_file() for file in files)
    assert (run.values("assignments/ncols"), run.values("assignments/nrows")) == ([5], [NUM_IMAGES])
    (table,) = run.values("truth/confusion/path")
    rows = json.loads((record.parent / "files" / table).read_text())["data"]
    assert len(rows) == NUM_CLASSES
    assert sum(sum(row[1:]) for row in rows) == NUM_IMAGES


def test_a_run_that_is_overwritten_has_another_id(tmp_path: Path) -> None:
    first = run_id(tmp_path, keep=True)
    assert run_id(tmp_path, keep=True) == first
    assert run_id(tmp_path, keep=False) != first


def test_pictures_and_tables_stay_small() -> None:
    size, num_clusters = 25_000, 150
    generator = np.random.default_rng(0)
    table = ClusterTable(
        keys=[f"{i}\udcff.png" for i in range(size)],
        clusters=np.minimum(np.arange(size) % 200, num_clusters - 2),  # the last one is empty
        confidence=generator.random(size, dtype=np.float32),
        agreement=np.zeros(size, dtype=np.float32),  # all "not sure"
        reliable=np.zeros(size, dtype=np.bool_),
    )
    images = ImageSet(
        name="noise",
        images=np.zeros((size, 3, 4, 4), dtype=np.uint8),
        keys=table.keys,
        fingerprint="",
        labels=np.arange(size) % 7 - 1,  # -1: unknown
    )
    pictures = cluster_pictures(table, images, num_clusters)
    assert len(pictures) == 100
    assert pictures[-1][:2] == (148, 25_000 // 200 * 52)  # the largest is among them
    assert {picture.shape for *_, picture in pictures} == {(32, 12 * 32, 3)}
    columns, rows = assignments(table)
    assert len(rows) == 8334
    assert rows[1][:2] == ["3?.png", 3]
    assert len(columns) == len(rows[0])
    columns, rows = confusion(table, images, {"num_clusters": num_clusters})
    assert columns == ["cluster", "0", "1", "2", "3", "4", "5"]
    assert len(rows) == num_clusters
    assert sum(sum(row[1:]) for row in rows) == int((np.arange(size) % 7 > 0).sum())


class FakeMlflow:
    """What Lightning's MLFlowLogger uses of mlflow; the package is an extra with many parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self.names = "", dict[str, str]()
        self.metrics: dict[str, dict[str, list[float]]] = {}
        self.params: dict[str, dict[str, str]] = {}
        self.ended: dict[str, str] = {}
        entities = SimpleNamespace(Metric=SimpleNamespace, Param=SimpleNamespace)
        tags = SimpleNamespace(MLFLOW_RUN_NAME="mlflow.runName")
        context = SimpleNamespace(resolve_tags=lambda given: given)
        modules = {
            "mlflow": SimpleNamespace(set_tracking_uri=lambda uri: None),
            "mlflow.entities": entities,
            "mlflow.utils": SimpleNamespace(mlflow_tags=tags),
            "mlflow.utils.mlflow_tags": tags,
            "mlflow.tracking": SimpleNamespace(MlflowClient=self.client, context=context),
            "mlflow.tracking.context": context,
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("pytorch_lightning.loggers.mlflow._MLFLOW_AVAILABLE", True)

    def client(self, uri: str) -> FakeMlflow:
        self.uri = uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(lifecycle_stage="active", experiment_id=name)

    def create_run(self, *, experiment_id: str, tags: dict[str, str]) -> Any:
        name = f"{experiment_id}/{tags['mlflow.runName']}"
        self.metrics[name], self.params[name] = {}, {}
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def log_batch(self, *, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        for each in metrics:
            self.metrics[run_id].setdefault(each.key, []).append(float(each.value))
        self.params[run_id].update({each.key: each.value for each in params})

    def get_run(self, run_id: str) -> str:
        return run_id

    def set_terminated(self, run_id: str, status: str) -> None:
        self.ended[run_id] = status


def test_mlflow_gets_settings_curves_and_final_scores(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake = FakeMlflow(monkeypatch)
    job = make_job(*tiny, "logger=mlflow", "stages=[moco,proto]")
    run_stages(job)
    assert fake.uri == f"sqlite:///{tmp_path / 'runs'}/mlflow.db"
    assert fake.ended == {"photos/moco-seed0": "FINISHED", "photos/proto-seed0": "FINISHED"}
    assert len(fake.metrics["photos/moco-seed0"]["train/loss"]) == 2  # epochs
    found = fake.metrics["photos/proto-seed0"]
    assert STAGE_KEYS["proto"] <= set(found)
    row = job.folder("proto").metrics["rows"][-1]
    assert found["truth/final_acc"] == [pytest.approx(row["acc"])]
    assert fake.params["photos/proto-seed0"]["proto.epochs"] == "3"


def test_mlflow_talks_to_the_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert compose("logger=mlflow").logger.mlflow.tracking_uri == "https://mlflow.example"
