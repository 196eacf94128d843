"""The notebook of the tutorial: its cells run in order, and it holds no output of a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial" / "photos.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_no_output_is_kept() -> None:
    assert len(cells()) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


@pytest.mark.slow
def test_its_cells_lead_from_a_folder_to_predictions(tmp_path: Path) -> None:
    # The cells are plain Python without magics, so they need no kernel.
    code = "\n\n".join("".join(cell["source"]) for cell in cells())
    code += "\n\nnp.save('before.npy', labels)\nnp.save('after.npy', clusterer.labels_)"
    code += "\nprint('report', clusterer.report_)"
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "notebook.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (np.load(tmp_path / f"{name}.npy") for name in ("before", "after"))
    assert len(before) == len(after) == 100
    assert len(np.unique(after)) == len(np.unique(before)) - 1
    assert (before != after).sum() >= 1
    assert " merged" in done.stdout
    assert Path(tmp_path, done.stdout.rpartition("report ")[2].strip()).is_file()
    assert done.stdout.count(".png") == 30
    assert (tmp_path / "model.spice").is_file()
