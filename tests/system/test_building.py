"""Objects from plain data: what is described is called, nothing else, and all is checked first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from spice_pl.errors import UsageError
from spice_pl.system.building import MAX_DEPTH, BuildError, build_plain, locate

called: list[str] = []
known: dict[str, Callable[..., Any]] = {"Fraction": Fraction, "dict": dict, "note": called.append}


def rule(name: str, given: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Allow Fraction, dict and a function that notes that it was called."""
    if name not in known:
        raise UsageError(f"{name} is not allowed")
    return known[name], given


def test_nested_descriptions_are_built_innermost_first() -> None:
    half = {"_target_": "Fraction", "_args_": [1, 2]}
    assert build_plain(half, rule) == Fraction(1, 2)
    assert build_plain({"a": [half, {"b": half}], "c": "${x}"}, rule) == {
        "a": [Fraction(1, 2), {"b": Fraction(1, 2)}],
        "c": "${x}",
    }
    third = {"_target_": "Fraction", "numerator": half, "denominator": 3}
    assert build_plain(third, rule) == Fraction(1, 6)
    assert build_plain([None, 1, 2.5, True, "x"], rule) == [None, 1, 2.5, True, "x"]


def test_a_partial_waits_for_the_rest() -> None:
    made = build_plain({"_target_": "Fraction", "_partial_": True, "_args_": [1]}, rule)
    assert isinstance(made, functools.partial)
    assert made(4) == Fraction(1, 4)


def test_more_arguments_are_passed_on_as_they_are() -> None:
    more = [object(), {"_target_": "os.system"}]
    made = build_plain({"_target_": "dict", "a": 1, "b": 2}, rule, b=more)
    assert made["a"] == 1
    assert made["b"] is more
    with pytest.raises(UsageError, match="without _target_ make nothing that takes b"):
        build_plain({"a": 1}, rule, b=1)


def test_nothing_is_called_before_everything_is_checked() -> None:
    called.clear()
    note = {"_target_": "note", "_args_": ["here"]}
    with pytest.raises(UsageError, match=r"os\.system is not allowed"):
        build_plain([note, {"a": {"_target_": "os.system"}}], rule)
    assert called == []
    build_plain([note], rule)
    assert called == ["here"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": (1, 2)}, "hold a tuple"),
        ({"a": {1, 2}}, "hold a set"),
        ({"a": b"x"}, "hold a bytes"),
        ({"a": Path("x")}, "hold a PosixPath"),
        ({"a": OmegaConf.create({"b": 1})}, "hold a DictConfig"),
        (OmegaConf.create([1]), "hold a ListConfig"),
        ({(1, 2): 3}, r"a key of settings is \(1, 2\)"),
        ({"_convert_": "all"}, "_convert_ is not a key of settings of objects; they are _target_"),
        ({"_target_": "dict", "_recursive_": False}, "_recursive_ is not a key"),
        ({"_target_": "dict", "__class__": "x"}, "__class__ is not a key"),
        ({"_partial_": True}, "_partial_ is given without _target_"),
        ({"_args_": []}, "_args_ is given without _target_"),
        ({"_target_": None}, "_target_ is None; give the dotted name"),
        ({"_target_": ["dict"]}, r"_target_ is \['dict'\]; give the dotted name"),
        ({"_target_": "dict", 1: 2}, "dict has an argument named 1; give names as text"),
        ({"_target_": "dict", "_args_": "ab"}, "dict: _args_ is 'ab'; give a list"),
        ({"_target_": "dict", "_partial_": 1}, "dict: _partial_ is 1; give true or false"),
    ],
)
def test_anything_else_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_plain(value, rule)


def test_depth_is_bounded() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert build_plain(deep, rule) == deep
    with pytest.raises(UsageError, match=f"deeper than {MAX_DEPTH} levels"):
        build_plain([deep], rule)


def test_what_refuses_its_arguments_is_named() -> None:
    inner = {"_target_": "Fraction", "_args_": ["x"]}
    with pytest.raises(BuildError, match="Fraction cannot be made") as failed:
        build_plain({"_target_": "dict", "a": inner}, rule)
    assert failed.value.target == "Fraction"
    assert isinstance(failed.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("spice_pl.system.building.locate", True),
        ("spice_pl.system.building.BuildError", True),
        ("spice_pl.system.building.UsageError", False),  # defined elsewhere
        ("spice_pl.system.building.importlib.import_module", False),
        ("spice_pl.system.building.BuildError.with_traceback", False),
        ("spice_pl.system.building._resolved", False),
        ("spice_pl.system.building.TARGET", False),  # not a function
        ("spice_pl.systems.x", False),
        ("spice_pl.system.", False),
        ("spice_pl.system.building:locate", False),
        (" spice_pl.system.building.locate", False),
        ("os.system", False),
    ],
)
def test_only_what_a_package_defines_lies_inside_it(name: str, inside: bool) -> None:
    assert (locate(name, ("spice_pl.system.",)) is not None) == inside


def test_a_name_that_does_not_exist_is_an_import_error() -> None:
    with pytest.raises(ImportError, match=r"spice_pl\.system\.nothing"):
        locate("spice_pl.system.nothing.x", ("spice_pl.system.",))
    with pytest.raises(ImportError, match=r"building\.nothing"):
        locate("spice_pl.system.building.nothing", ("spice_pl.system.",))
    assert locate("os.path.join", ("spice_pl.",), ("os.path.join",)) is not None
