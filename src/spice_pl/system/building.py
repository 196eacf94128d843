"""Build objects from plain data: nested dictionaries and lists of text and numbers.

Settings and `model.spice` describe objects as dictionaries with a `_target_`. All of it is checked
before anything is called, and nothing in it is interpreted: a text with `${...}` stays that text.

| key | meaning |
|---|---|
| `_target_` | dotted name of a class or function |
| `_args_` | list of its positional arguments |
| `_partial_` | true: `functools.partial` of the target, instead of its result |

Hydra's `_recursive_` and `_convert_` are refused: nested descriptions are always built, and lists
and dictionaries always arrive as such.

It is in `system` because both `models` and `job` use it, and it knows neither Hydra nor torch.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from spice_pl.errors import UsageError

TARGET, ARGS, PARTIAL = KEYS = ("_target_", "_args_", "_partial_")
MAX_DEPTH = 64
# What classes and functions raise for arguments that do not fit them.
REFUSALS = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError)

# Takes the name of a target and its arguments, still plain; returns what to call, and with which
# arguments. It raises for what may not be called.
Rule = Callable[[str, dict[str, Any]], tuple[Callable[..., Any], dict[str, Any]]]


class BuildError(Exception):
    """A target did not accept its arguments; `__cause__` is what it raised.

    Attributes:
        target: its name.
    """

    def __init__(self, target: str) -> None:
        super().__init__(f"{target} cannot be made from its arguments")
        self.target = target


@dataclass(frozen=True)
class _Call:
    name: str
    function: Callable[..., Any]
    args: list[Any]
    arguments: dict[str, Any]
    partial: bool


def build_plain(value: Any, rule: Rule, **more: Any) -> Any:
    """Build what plain data describes, innermost first and in the order of its keys.

    Args:
        value: dictionaries, lists, text, numbers, booleans and None.
        rule: decides what may be called, and with which arguments.
        more: arguments of the outermost target, passed on as they are in place of those in `value`.

    Returns:
        The object, or lists and dictionaries of objects where `value` has no `_target_` at its top.

    Raises:
        UsageError: the data holds anything else, is nested too deeply or has an unknown `_..._`
            key, or `rule` refused a target. Nothing has been called then.
        BuildError: a target did not accept its arguments.
    """
    checked = _checked(value, rule, 0)
    if more and not isinstance(checked, _Call):
        raise UsageError(
            f"settings without {TARGET} make nothing that takes {', '.join(more)}; give a {TARGET}"
        )
    return _made(checked, more)


def locate(
    name: str, prefixes: tuple[str, ...], exact: tuple[str, ...] = ()
) -> Callable[..., Any] | None:
    """Return the public class or function that a dotted name means, if it belongs to some packages.

    It must be named in them and defined in them (torch.nn.os is not part of torch.nn), and be at
    the top of a module: a method could belong to anything, and an instance can claim any home.

    Args:
        name: for example torch.nn.Linear.
        prefixes: for example torch.nn., with its dot.
        exact: names that are allowed as they are.

    Returns:
        The class or function; None where it lies outside.

    Raises:
        ImportError, AttributeError: it lies inside by its name and does not exist.
    """
    if name in exact:
        return _resolved(name)  # type: ignore[no-any-return]
    inside = re.fullmatch(r"\w+(\.\w+)+", name) and name.startswith(prefixes)
    if not inside or name.rpartition(".")[2].startswith("_"):
        return None
    found = _resolved(name)
    if not isinstance(found, type | FunctionType) or "." in found.__qualname__:
        return None
    return found if f"{found.__module__}.".startswith(prefixes) else None


def _resolved(name: str) -> Any:
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(path)
        found = getattr(found, part)
    return found


def _checked(value: Any, rule: Rule, depth: int) -> Any:
    """Return the same data with a `_Call` in place of each description of one."""
    if depth > MAX_DEPTH:
        raise UsageError(f"settings are nested deeper than {MAX_DEPTH} levels; flatten them")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is list:
        return [_checked(item, rule, depth + 1) for item in value]
    if type(value) is not dict:
        raise UsageError(
            f"settings of objects hold a {type(value).__name__}; they are made of dictionaries, "
            "lists, text, numbers, booleans and None"
        )
    for key in value:
        if type(key) not in (str, int, float, bool):
            raise UsageError(f"a key of settings is {key!r}; give text or a number")
        if type(key) is str and re.fullmatch(r"_.+_", key) and key not in KEYS:
            raise UsageError(
                f"{key} is not a key of settings of objects; they are {', '.join(KEYS)}. Nested "
                "settings are always built, and lists and dictionaries arrive as such"
            )
    if TARGET not in value:
        if alone := [key for key in KEYS if key in value]:
            raise UsageError(f"{alone[0]} is given without {TARGET}; add that, or leave it out")
        return {key: _checked(item, rule, depth + 1) for key, item in value.items()}
    return _checked_call(value, rule, depth)


def _checked_call(value: Mapping[Any, Any], rule: Rule, depth: int) -> _Call:
    name = value[TARGET]
    if type(name) is not str:
        raise UsageError(f"{TARGET} is {name!r}; give the dotted name of a class or function")
    if wrong := [key for key in value if type(key) is not str]:
        raise UsageError(f"{name} has an argument named {wrong[0]!r}; give names as text")
    function, given = rule(name, {key: item for key, item in value.items() if key != TARGET})
    args, partial = given.pop(ARGS, []), given.pop(PARTIAL, False)
    if type(args) is not list:
        raise UsageError(f"{name}: {ARGS} is {args!r}; give a list")
    if type(partial) is not bool:
        raise UsageError(f"{name}: {PARTIAL} is {partial!r}; give true or false")
    return _Call(
        name,
        function,
        [_checked(item, rule, depth + 1) for item in args],
        {key: _checked(item, rule, depth + 1) for key, item in given.items()},
        partial,
    )


def _made(checked: Any, more: Mapping[str, Any] | None = None) -> Any:
    if type(checked) is list:
        return [_made(item) for item in checked]
    if type(checked) is dict:
        return {key: _made(item) for key, item in checked.items()}
    if not isinstance(checked, _Call):
        return checked
    args = [_made(item) for item in checked.args]
    arguments = {key: _made(item) for key, item in checked.arguments.items()} | dict(more or {})
    if checked.partial:
        return functools.partial(checked.function, *args, **arguments)
    try:
        return checked.function(*args, **arguments)
    except UsageError:
        raise
    except REFUSALS as error:
        raise BuildError(checked.name) from error
