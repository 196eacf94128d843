"""A stop in any phase of stage 2: with resume=true the run ends with the bits of a straight one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished

from spice_pl.job import finish
from spice_pl.job.run import run_stages
from spice_pl.models.portable import PortableModel
from spice_pl.runs.folder import RunFolder
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
