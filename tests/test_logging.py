"""What a run logs, read back from where each logger keeps it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import Finished
from tests.process import train

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
def test_tensorboard_and_offline_wandb_get_the_same_scalars(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    board = (
        "+logger.tensorboard._target_=pytorch_lightning.loggers.TensorBoardLogger",
        "+logger.tensorboard.name=''",
        "+logger.tensorboard.version=tensorboard",
    )
    done = train("logger=wandb", *board, *tiny)
    assert done.returncode == 0, done.stderr
    for stage, keys in STAGE_KEYS.items():
        folder = tmp_path / "runs" / "photos" / stage / "seed0"
        expected = keys | {"truth/acc"} if stage != "moco" else keys
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert expected <= set(events.Tags()["scalars"])
        (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")  # one run a stage
        content = record.read_bytes()
        assert all(key.encode() in content for key in expected)
