"""Checkpoint files are read as tensors, and no code in them is run."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from spice_pl.errors import UsageError
from spice_pl.models.tensor_files import find_state_dict, read_file


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "hook": Evil()}, path)
    with pytest.raises(UsageError, match="cannot be read as weights alone"):
        read_file(path)
    assert not (tmp_path / "was_run").exists()


def test_objects_of_other_kinds_do_not_hinder_the_tensors(tmp_path: Path) -> None:
    weight = torch.arange(3.0)
    content = {"state_dict": {"module.fc.weight": weight}, "counts": defaultdict(list)}
    torch.save(content, tmp_path / "x.pth")
    state, wrapper = find_state_dict(read_file(tmp_path / "x.pth"), "x.pth")
    assert wrapper == "state_dict"
    assert list(state) == ["fc.weight"]
    assert torch.equal(state["fc.weight"], weight)


def test_the_average_is_preferred_to_the_trained_model() -> None:
    models = {name: {"weight": torch.tensor([i])} for i, name in enumerate(["model", "ema_model"])}
    state, wrapper = find_state_dict(models, "x.pth")
    assert (wrapper, int(state["weight"])) == ("ema_model", 1)


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        read_file(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UsageError, match=r"cannot be read as weights alone \("):
        read_file(tmp_path / "text.pth")
