"""A stop in any phase of stage 2: with resume=true the run ends with the bits of a straight one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Finished

from spice_pl.callbacks.checkpoints import Checkpoints
from spice_pl.job import finish
from spice_pl.job.run import run_stages
from spice_pl.models.portable import PortableModel
from spice_pl.nn.frozen import Frozen
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.proto_views import BankedViews
from spice_pl.system.interrupts import Stopped

FILES = (
    *("encoder.safetensors", "head.safetensors", "heads.safetensors", "features.npy"),
    *("probs.npy", "clusters.csv"),
)
PHASES: dict[str, tuple[Any, str]] = {
    "rows of a prediction": (RunFolder, "write_rows"),
    "prediction": (RunFolder, "publish"),
    "embeddings": (RunFolder, "write_embeddings"),
    "table of clusters": (RunFolder, "write_clusters"),
    "weights": (RunFolder, "write_weights"),
    "model.spice": (PortableModel, "save"),
    "attention": (finish, "write_attention"),
    "report": (finish, "write_report"),
    "results": (finish, "stage_metrics"),
}


BANKED = ("stage=proto", "proto.module.view_bank=2", "embeddings=smoothed")
BANK_PHASES: dict[str, tuple[Any, str, int]] = {  # and at which call
    "before the banks": (BankedViews, "_fill", 1),
    "views of the banks": (Frozen, "__call__", 3),
    "mark of the banks": (RunFolder, "write_json", 1),
    "end of training": (Checkpoints, "on_train_end", 1),
    "banks are removed": (BankedViews, "_remove", 1),
    "half of the banks is removed": (shutil, "rmtree", 1),
    "the banks are gone": (RunFolder, "write_rows", 1),
    "smoothed embeddings": (np, "save", 1),
}


@pytest.fixture(scope="module")
def banked(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Stage 2 with banks of views and smoothed embeddings, never stopped."""
    runs = straight.copy(tmp_path_factory.mktemp("banked"), without="proto")
    run_stages(runs.job(*BANKED))
    return runs


@pytest.mark.parametrize("phase", BANK_PHASES)
def test_a_stop_while_banks_or_embeddings_are_made_changes_nothing(
    straight: Finished,
    banked: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    runs = straight.copy(tmp_path, without="proto")
    holder, name, at = BANK_PHASES[phase]
    original, calls = getattr(holder, name), []

    def stop(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) < at:
            return original(*args, **more)
        if holder is shutil:
            next(Path(args[0]).glob("*.npy")).unlink()
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(holder, name, stop)
        with pytest.raises(Stopped):
            run_stages(runs.job(*BANKED))
    assert not runs.folder("proto").finished
    run_stages(runs.job(*BANKED, "resume=true"))
    for each in (*FILES, "embeddings.npy"):
        one, other = (made.folder("proto").path / each for made in (runs, banked))
        assert one.read_bytes() == other.read_bytes(), each
    left = [path.name for path in runs.folder("proto").path.iterdir()]
    assert "view_bank" not in left
    assert [name for name in left if name.startswith(".")] == [".hydra"]


@pytest.mark.parametrize(
    ("phase", "late"),
    [*((phase, False) for phase in PHASES), ("prediction", True), ("model.spice", True)],
)
def test_a_stop_in_a_phase_changes_nothing(
    straight: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, late: bool
) -> None:
    runs = straight.copy(tmp_path, without="proto")
    holder, name = PHASES[phase]
    original = getattr(holder, name)

    def stop(*args: Any, **more: Any) -> Any:
        if late:
            original(*args, **more)
        raise Stopped

    monkeypatch.setattr(holder, name, stop)
    with pytest.raises(Stopped):
        run_stages(runs.job("stage=proto"))
    assert not runs.folder("proto").finished
    monkeypatch.setattr(holder, name, original)
    run_stages(runs.job("stage=proto", "resume=true"))
    for each in FILES:
        one, other = (made.folder("proto").path / each for made in (runs, straight))
        assert one.read_bytes() == other.read_bytes(), each
    assert runs.folder("proto").digest() == straight.folder("proto").digest()
    runs.folder("fixmatch").check_upstream(runs.folder("proto"))
