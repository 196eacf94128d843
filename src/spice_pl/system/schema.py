"""Schemas of the files that we read: typed fields, bounded in size and in depth.

Users and other programs can change these files, so each is checked before it is used.

| file | schema |
|---|---|
| model.spice | `models.header.RULES`, `models.networks.ARGUMENTS` |
| names.json | `read_names` |
| edits.json | `runs.edits.parse_edits` |
| suggested.json | `runs.suggestions.read_suggestions` |
| metrics.json, dataset.json | `runs.small_files` |
| clusters.csv | `runs.clusters.read_table` |
| last.ckpt | `callbacks.checkpoints.STATE` |
"""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 64_000_000  # enough for the largest edits of a browser, indented and escaped
MAX_DEPTH = 20  # levels of nesting
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of text


@dataclass(frozen=True)
class Kind:
    """The type and range of a field.

    Attributes:
        name: name of the kind in messages.
        holds: function that returns whether a value is of this kind.
    """

    name: str
    holds: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number of 64 bits; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_text(value: Any) -> bool:
    """Return whether a value is text that can be encoded; bytes of file names may be escaped."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def is_name(value: Any) -> bool:
    r"""Return whether a value is the name of a cluster: text that a terminal shows as it is.

    Control characters and those that change the direction of text could show other lines than
    those that are there.

    >>> [is_name(each) for each in ("cats", "Käse 🧀", "a\nb", "\x1b[2J", "\u202ex", 3)]
    [True, True, False, False, False, False]
    """
    return is_text(value) and not any(_is_control(letter) for letter in value)


def _is_control(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind in ("Cc", "Cs", "Zl", "Zp") or letter in TURNING


def is_cluster(key: str) -> bool:
    """Return whether a key is the number of a cluster, without signs and leading zeros.

    >>> [is_cluster(key) for key in ("0", "12", "01", "-1", "1.0")]
    [True, True, False, False, False]
    """
    return key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or is_whole(value)


TEXT = Kind("text", is_text)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", is_whole)
COUNT = Kind("a whole number from 0", lambda value: is_whole(value) and value >= 0)
NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a finite number from 0", lambda value: _is_number(value) and 0 <= value < math.inf)


def optional(kind: Kind) -> Kind:
    """Return a kind that also allows null."""
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.holds(value))


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists with values of one kind."""
    return Kind(
        f"a list, each value {kind.name}",
        lambda value: isinstance(value, list) and all(map(kind.holds, value)),
    )


def map_of(kind: Kind) -> Kind:
    """Return the kind of objects with values of one kind."""
    return Kind(
        f"an object, each value {kind.name}",
        lambda value: (
            isinstance(value, dict)
            and all(is_text(name) and kind.holds(each) for name, each in value.items())
        ),
    )


def object_of(fields: Mapping[str, Kind], needed: set[str]) -> Kind:
    """Return the kind of objects with all needed fields and no others than `fields`."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and needed <= value.keys() <= fields.keys()
            and all(fields[name].holds(each) for name, each in value.items())
        )

    return Kind(f"an object of {', '.join(fields)}", holds)


def read_text(file: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        ValueError: it is larger than MAX_BYTES, or not UTF-8.
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1_000_000} MB")
    return content.decode("utf-8-sig")  # some editors write a byte order mark


def parse_object(content: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the text is longer than MAX_BYTES, not JSON, not an object, or nested more than
            MAX_DEPTH levels.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1_000_000} MB")
    too_deep = f"it is nested more than {MAX_DEPTH} levels"
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    if _is_deeper(found, MAX_DEPTH):
        raise ValueError(too_deep)
    if not isinstance(found, dict):
        raise ValueError("it is not an object, {...}")
    return found


def check_fields(content: Mapping[str, Any], fields: Mapping[str, Kind]) -> None:
    """Check the types of the fields that exist.

    Raises:
        ValueError: a field is of another type; the message has its name, its value and its type.
    """
    for name, kind in fields.items():
        if name in content and not kind.holds(content[name]):
            raise ValueError(f"{name!r} is {reprlib.repr(content[name])}, not {kind.name}")


def read_names(file: Path) -> dict[int, str]:
    """Read names.json, the names that the user gave to clusters: {"0": "cats", "1": "dogs"}.

    Raises:
        ValueError: it does not have this form, or is too large.
        OSError: it cannot be read.
    """
    found = parse_object(read_text(file))
    for key, name in found.items():
        if not (is_cluster(key) and is_name(name)):
            pair = reprlib.repr({key: name})
            raise ValueError(
                f"{pair} is not the number of a cluster and its name, without control characters"
            )
    return {int(key): name for key, name in found.items()}


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in value)
