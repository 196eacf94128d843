"""Paths become one value of the command line, whatever they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from spice_pl.cli import with_folder, with_verb
from spice_pl.job.words import as_typed, with_quotes
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
        *("seed=1,2", "-m", "--config-dir", "conf"),
    ]
    assert with_folder(["-m", name, "seed=1,2"])[2:] == ["seed=1,2", "-m"]
    assert with_folder(["elsewhere", "seed=3"]) == ["elsewhere", "seed=3"]
    assert with_folder(["hf://ann/birds", "seed=3"]) == [
        *("dataset=hugging_face", "dataset.root='hf://ann/birds'", "seed=3")
    ]


def test_options_may_be_anywhere_among_settings() -> None:
    """argparse alone refuses `stage=proto -m seed=1,2`: seed=1,2 is not among the first words."""
    for given in (["-m", "stage=proto", "seed=1,2"], ["stage=proto", "-m", "seed=1,2"]):
        assert with_folder(given) == ["stage=proto", "seed=1,2", "-m"]
    assert with_folder(["seed=1", "--cfg", "job", "-cd=conf", "stage=moco"]) == [
        *("seed=1", "stage=moco", "--cfg", "job", "-cd=conf"),
    ]
    assert with_verb(["trust", "--cfg", "job", "photos", "-m", "seed=1,2"]) == [
        *("stage=trust", "of='photos'", "seed=1,2", "--cfg", "job", "-m"),
    ]


@pytest.mark.parametrize("name", [*NAMES, "runs/photos", "7", "a,b", "true", "photos=2024", "'a'"])
@pytest.mark.parametrize("key", ["of", "run"])
def test_a_command_in_a_message_is_read_as_the_one_that_was_typed(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    word = f"{key}={quoted(name)}"
    (again,) = with_quotes([as_typed(word)])
    read, wanted = (OverridesParser.create().parse_override(each).value() for each in (again, word))
    assert (read, type(read)) == (wanted, type(wanted))


def test_quotes_for_hydra_alone_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_typed("of='runs/photos'") == "of=runs/photos"
    assert as_typed("of='a b,c=4'") == "of=a b,c=4"  # as it was typed
    assert as_typed("run='a,b'") == "run='a,b'"  # without quotes these are two values
    assert as_typed("of='a,b'", sweep=True) == "of='a,b'"
    assert as_typed("run='true'") == "run='true'"  # without quotes it is not text
    for kept in ("dataset.exclude=['a']", "x='a','b'", "~x", "seed=1", "x='[a'"):
        assert as_typed(kept) == kept
