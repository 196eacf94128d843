"""What callbacks ask of a stage."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from spice_pl.callbacks.truth import TruthMonitor
from spice_pl.stages.base import Stage, as_stage


class Labelled(Stage):
    """A stage that trains on labels of four of six images."""

    def labelled(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([0, 2, 3, 5]), torch.tensor([1, 1, 0, 1])


def logged(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is logged at the end of an epoch where image 5 has no true label."""
    values: dict[str, float] = {}
    monkeypatch.setattr(stage, "log", lambda name, value, **_: values.update({name: value}))
    monitor = TruthMonitor(np.array([0, 0, 0, 1, 1, -1]), 2)
    monitor.on_train_epoch_end(pl.Trainer(logger=False, accelerator="cpu"), stage)
    return values


def test_accuracy_of_the_labels_that_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # Images 0, 2 and 3 are known; clusters 1, 1, 0 are classes 0, 0, 1 under other names.
    assert logged(Labelled(), monkeypatch) == {"truth/reliable_acc": 1.0}
    assert logged(Stage(), monkeypatch) == {}


def test_bar_shows_the_means_so_far() -> None:
    stage = Stage()
    stage.epoch_sums = {"train/loss": torch.tensor([6.0, 4.0]), "train/other": torch.ones(2)}
    assert stage.epoch_means() == {"train/loss": 1.5, "train/other": 1.0}


def test_another_module_is_refused_by_name() -> None:
    module = pl.LightningModule()
    with pytest.raises(TypeError, match=r"LightningModule is not a spice_pl\.stages\.base\.Stage"):
        as_stage(module)
    with pytest.raises(TypeError, match="LightningModule is not"):
        TruthMonitor(np.zeros(3, dtype=np.int64), 2).on_train_epoch_end(pl.Trainer(), module)
