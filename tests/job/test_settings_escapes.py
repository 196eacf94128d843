"""Calls behind escapes and interpolations in settings: what is built is what was checked."""

from __future__ import annotations

import os
import pickle
import random
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tests.conftest import CONF

from spice_pl.errors import UsageError
from spice_pl.job.checks import saved_settings
from spice_pl.job.job import Job, literal
from spice_pl.job.settings import build

IDENTITY = "torch.nn.Identity"  # takes any argument and ignores it
HERE = "tests.job.test_settings_escapes"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.trace,)


@pytest.fixture
def payload(tmp_path: Path) -> str:
    """A call that makes the folder `trace`; Hydra's own list of refused targets lacks it."""
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(str(tmp_path / "trace"))))
    return f"{{_target_:joblib.load,filename:{tmp_path / 'evil.pkl'}}}"


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any new process or connection."""

    def trap(*_: Any, **__: Any) -> None:
        pytest.fail("settings started a process or opened a connection")

    for module, name in ((socket, "socket"), (subprocess, "Popen"), (os, "system")):
        monkeypatch.setattr(module, name, trap)


# Doors: each returns a config whose backbone holds the escaped text


def by_call(text: str, folder: Path) -> DictConfig:
    backbone = {"_target_": IDENTITY, "x": text}
    return OmegaConf.create({"allow_targets": [], "backbone": backbone})


def composed(*overrides: str, conf: Path = CONF) -> DictConfig:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", list(overrides))


def by_command_line(text: str, folder: Path) -> DictConfig:
    return composed(f"++backbone={{_target_:{IDENTITY},x:'{text}'}}")


def by_added_key(text: str, folder: Path) -> DictConfig:
    keys = ("blocks", "widths", "stem")
    return composed(
        *("backbone=resnet_small", *(f"~backbone.{key}" for key in keys)),
        *(f"backbone._target_={IDENTITY}", f"+backbone.x='{text}'"),
    )


def by_config_dir(text: str, folder: Path) -> DictConfig:
    (folder / "backbone").mkdir()
    content = yaml.safe_dump({"_target_": IDENTITY, "x": text})
    (folder / "backbone" / "evil.yaml").write_text(content)
    return composed(f"hydra.searchpath=[file://{folder}]", "backbone=evil")


def by_experiment(text: str, folder: Path) -> DictConfig:
    (folder / "experiment").mkdir()
    content = yaml.safe_dump(
        {"defaults": [{"override /backbone": "resnet_small"}], "backbone": {"x": text}}
    )
    file = folder / "experiment" / "evil.yaml"
    file.write_text("# @package _global_\n" + content)
    keys = ("blocks", "widths", "stem")
    return composed(
        f"hydra.searchpath=[file://{folder}]",
        *("experiment=evil", f"backbone._target_={IDENTITY}", *(f"~backbone.{k}" for k in keys)),
    )


def by_saved_settings(text: str, folder: Path) -> DictConfig:
    saved = OmegaConf.to_container(composed(), resolve=True)
    assert isinstance(saved, dict)
    saved["backbone"] = {"_target_": IDENTITY, "x": text}
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(saved))
    return composed(conf=folder / ".hydra")


def by_ranks(text: str, folder: Path) -> DictConfig:
    twice = text.replace("\\", "\\\\").replace("${", "\\${")  # a dump resolves once
    cfg = by_command_line(twice, folder)
    (folder / "job.yaml").write_text(Job(cfg, (), "none", sweep=False).dump())
    return Job.load(str(folder / "job.yaml")).cfg


DOORS = (
    *(by_call, by_command_line, by_added_key, by_config_dir, by_experiment),
    *(by_saved_settings, by_ranks),
)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("escapes", [1, 3])
def test_an_escaped_call_stays_text(
    door: Callable[[str, Path], DictConfig], escapes: int, payload: str, tmp_path: Path
) -> None:
    cfg = door("\\" * escapes + "${oc.create:" + payload + "}", tmp_path)
    made = build(cfg, cfg.backbone)
    assert isinstance(made, torch.nn.Identity)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("door", DOORS[:-1], ids=lambda door: door.__name__)
def test_an_open_call_is_refused(
    door: Callable[[str, Path], DictConfig], payload: str, tmp_path: Path
) -> None:
    cfg = door("${oc.create:" + payload + "}", tmp_path)
    with pytest.raises(UsageError, match=r"_target_ joblib\.load lies outside"):
        build(cfg, cfg.backbone)
    assert not (tmp_path / "trace").exists()


def test_live_nodes_are_resolved_where_they_stand(payload: str, tmp_path: Path) -> None:
    """`${target}` is one thing in the config and another in a plain dictionary of its nodes."""
    cfg = OmegaConf.create(
        {
            "allow_targets": [],
            "target": IDENTITY,
            "dataset": {
                "_target_": IDENTITY,
                "target": "joblib.load",
                "x": {"_target_": "${target}", "filename": str(tmp_path / "evil.pkl")},
            },
        }
    )
    live = {key: value for key, value in cfg.dataset.items() if key != "mean"}
    assert isinstance(build(cfg, live), torch.nn.Identity)
    assert not (tmp_path / "trace").exists()


# Random settings


def keep(*args: Any, **arguments: Any) -> Any:
    """Return what it was called with: the one target that the random settings may call."""
    return "kept", list(args), arguments


KEEP = f"{HERE}.keep"
KEYS = ("x", "y", "_target", "target_", " _target_", "_target_ ", "_args", "x._target_")
REFUSED_KEYS = ("__target__", "_TARGET_", "_recursive_", "_convert_")


def escaped_text(draw: random.Random, calls: list[str], depth: int) -> str:
    """A text of OmegaConf's grammar: calls behind interpolations and escapes, nested to a depth."""
    if depth == 0:
        return draw.choice([*calls, *calls, "plain", "${evil}", "${oc.env:SPICE_PL_EVIL}", "7"])
    inner = escaped_text(draw, calls, depth - 1)
    return draw.choice(
        [
            "${oc.create:" + inner + "}",
            "${oc.create:" + inner + "}",
            "${oc.decode:" + inner + "}",
            "${oc.decode:'" + inner.replace("'", "\\'") + "'}",
            "${oc.select:evil,'" + inner.replace("'", "\\'") + "'}",
            inner.replace("${", "\\" * draw.choice([1, 1, 1, 2, 3]) + "${"),
            inner.replace("\\", "\\\\").replace("${", "\\${"),
            "{a:" + inner + "}",
            "[" + inner + "]",
            "x" + inner,
            "${" + draw.choice(["evil", "escaped", "oc.env:SPICE_PL_EVIL"]) + "}",
        ]
    )


def settings_node(draw: random.Random, calls: list[str], depth: int) -> Any:
    """Random settings: texts, lists, dictionaries and descriptions of calls, nested."""
    kind = draw.choice(["text", "text", "list", "dict", "call"]) if depth else "text"
    if kind == "text":
        return escaped_text(draw, calls, draw.randint(0, 6))
    inner = [settings_node(draw, calls, depth - 1) for _ in range(draw.choice([1, 1, 1, 2]))]
    if kind == "list":
        return inner
    keys = draw.sample(KEYS if draw.random() < 0.9 else REFUSED_KEYS, len(inner))
    named = dict(zip(keys, inner, strict=True))
    if kind == "dict":
        return named
    target = KEEP if draw.random() < 0.8 else escaped_text(draw, calls, draw.randint(0, 3))
    return {"_target_": target} | (named if draw.random() < 0.7 else {"_args_": inner})


def expected(resolved: Any) -> Any:
    """Evaluate resolved settings by hand; LookupError where they must be refused."""
    if isinstance(resolved, list):
        return [expected(item) for item in resolved]
    if OmegaConf.is_config(resolved):  # a node in a decoded list is left as it is
        raise LookupError
    if not isinstance(resolved, dict):
        return resolved
    if any(key in REFUSED_KEYS for key in resolved):
        raise LookupError
    if "_target_" not in resolved:
        return {key: expected(item) for key, item in resolved.items()}
    if resolved["_target_"] != KEEP:
        raise LookupError
    given = {
        key: expected(item) for key, item in resolved.items() if key[0] != "_" or key[-1] != "_"
    }
    return "kept", expected(resolved.get("_args_", [])), given


@pytest.mark.usefixtures("trapped")
def test_what_is_called_is_what_one_resolution_gives(
    payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,300 random settings: one resolution decides what is refused, called and passed on."""
    monkeypatch.setenv("SPICE_PL_EVIL", payload)
    draw = random.Random(0)  # noqa: S311 - which settings to write
    calls = [
        payload,
        f"{{_target_:{KEEP},a:1}}",
        f"{{_target_:os.mkdir,_args_:[{tmp_path}/trace]}}",
    ]
    counts = dict.fromkeys(("built", "refused", "unresolvable", "with text left", "no settings"), 0)
    for case in range(2300):
        settings = {
            "allow_targets": [HERE],
            "evil": {"_target_": "joblib.load", "filename": str(tmp_path / "evil.pkl")},
            "escaped": "\\${oc.create:" + payload + "}",
            "it": {"_target_": KEEP, "x": settings_node(draw, calls, 3)},
        }
        try:
            cfg = OmegaConf.create(settings)
        except OmegaConfBaseException:  # not of the grammar
            counts["no settings"] += 1
            continue
        try:
            resolved = OmegaConf.to_container(cfg.it, resolve=True)
        except OmegaConfBaseException:
            counts["unresolvable"] += 1
            with pytest.raises(OmegaConfBaseException):
                build(cfg, cfg.it)
            continue
        try:
            wanted = expected(resolved)
        except LookupError:
            counts["refused"] += 1
            with pytest.raises(UsageError, match=r"lies outside|is not a key|_target_ is|hold a"):
                build(cfg, cfg.it)
        else:
            counts["built"] += 1
            counts["with text left"] += "${" in str(resolved)
            assert build(cfg, cfg.it) == wanted, case
        assert not (tmp_path / "trace").exists(), case
    assert min(counts.values()) > 200, counts


def test_resolved_settings_are_not_resolved_again() -> None:
    """Any text comes back from `literal` as it is: OmegaConf's own parser is the reference."""
    draw = random.Random(0)  # noqa: S311 - which text to make
    parts = ["\\", "\\", "${", "${oc.env:SPICE_TEST_SECRET}", "}", "$", "{", "a", ":", "'", " "]
    for _ in range(5000):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 8)))
        node = OmegaConf.create({"a": literal({"b": [text]})})
        assert OmegaConf.to_container(node, resolve=True) == {"a": {"b": [text]}}, text


def test_saved_settings_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: " + "x" * 1_000_000)
    with pytest.raises(UsageError, match=r"config.yaml is damaged \(it is larger than 1000 kB\)"):
        saved_settings(file)
