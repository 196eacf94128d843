"""The GitHub workflow and the Dockerfile name what is there. Neither service is asked."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEAST = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


def jobs() -> dict[str, Any]:
    text = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)["jobs"]
    return found


def commands() -> list[str]:
    return [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]


def test_checks_run_on_linux_and_macos_with_the_oldest_python() -> None:
    matrix = jobs()["checks"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    assert min(tuple(map(int, each.split("."))) for each in matrix["python"]) == LEAST
    for job in jobs().values():
        assert job["timeout-minutes"] <= 90
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert job["steps"][0]["uses"].startswith("actions/checkout@v")


def test_each_command_is_a_target_of_the_makefile_and_names_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):(?! export)", makefile, re.MULTILINE))
    assert len(commands()) >= 4
    for command in commands():
        make, target, *settings = shlex.split(command)
        assert make == "make", command
        assert target in targets, command
        for name, _, value in (setting.partition("=") for setting in settings):
            assert f"$({name})" in makefile, command
            for word in shlex.split(value):
                assert not word.startswith("tests/") or (ROOT / word).is_file(), word
    assert any("test_notebook.py" in command for command in commands())


def test_the_image_installs_extras_and_a_command_that_exist() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    said = {name: rest.strip() for name, _, rest in instructions}
    assert {"FROM", "COPY", "RUN", "ENTRYPOINT"} <= set(said)
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", said["FROM"])
    assert version is not None
    assert tuple(map(int, version.groups())) >= LEAST
    (extras,) = re.findall(r" '?\.(?:\[([\w,]+)\])?'? ", said["RUN"])
    assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])
    assert json.loads(said["ENTRYPOINT"])[0] in PROJECT["scripts"]


def test_what_the_wheel_needs_is_copied_into_the_image() -> None:
    left_out = set((ROOT / ".dockerignore").read_text().split())
    assert left_out.isdisjoint({"src", "conf", "pyproject.toml", PROJECT["readme"], "LICENSE"})
    assert {".git", ".venv", "runs"} <= left_out


def test_each_extra_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("[project.optional-dependencies]") :]
    block = block[: block.index("\n[", 1)]
    for name, packages in PROJECT["optional-dependencies"].items():
        if len(packages) == 1:
            (said,) = re.findall(rf"^{name} = (\[.*?\].*?)$", block, re.MULTILINE | re.DOTALL)
            assert "#" in said, f"{name} has no reason: {said}"
