"""Paths become one value of the command line, whatever they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from spice_pl.cli import with_folder
from spice_pl.system.command import quoted

NAMES = ["it's 50 %, a=b", "back\\slash\\", "Müller 🎉", "#1 (copy)", "${seed}", "a\\'b", "[x]"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_comes_back_as_it_was(name: str) -> None:
    override = OverridesParser.create().parse_override(f"root={quoted(name)}")
    cfg = OmegaConf.create({"root": override.value(), "seed": 1})
    assert cfg.root == name


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_by_itself_is_the_data_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    assert with_folder([name, "seed=3", "--cfg"]) == [
        "dataset=folder",
        f"dataset.root={quoted(name)}",
        "seed=3",
        "--cfg",
    ]
    assert with_folder([name, "-m", "seed=1,2", "--config-dir", "conf"])[2:] == [
        *("seed=1,2", "--config-dir", "conf", "-m"),
    ]
    assert with_folder(["elsewhere", "seed=3"]) == ["elsewhere", "seed=3"]
