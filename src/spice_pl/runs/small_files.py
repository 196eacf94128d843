"""Read the small files of a run: bounded in size, and with checked types of JSON fields.

Users and other programs can change these files, so every field is checked before it is used.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 64_000_000  # enough for the largest edits of a browser, indented and escaped
MAX_DEPTH = 20  # levels of nesting


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


_ROW: Mapping[str, Kind] = {  # fields of `ResultRow`
    "name": TEXT,
    **dict.fromkeys(("acc", "nmi", "ari", "purity", "recall"), optional(NUMBER)),
    "protocol": TEXT,
    "seed": WHOLE,
    "seconds": AMOUNT,
    "oracle": FLAG,
}
# Fields of metrics.json that are read later. Stages and tasks write some of them.
METRICS: Mapping[str, Kind] = {
    **dict.fromkeys(("stage", "title", "preset", "dataset", "fingerprint", "protocol"), TEXT),
    **dict.fromkeys(("precision", "digest"), TEXT),
    **dict.fromkeys(("num_clusters", "num_images", "devices"), COUNT),
    **dict.fromkeys(("seconds", "seconds_in_all", "peak_memory_mb"), AMOUNT),
    "seed": WHOLE,
    "overrides": list_of(TEXT),
    **dict.fromkeys(("settings", "versions", "digests"), map_of(TEXT)),
    "objective": optional(NUMBER),
    "cluster_sizes": list_of(COUNT),
    "rows": list_of(object_of(_ROW, needed=_ROW.keys() - {"purity", "recall", "oracle"})),
}
# Fields of dataset.json.
STAMP: Mapping[str, Kind] = {
    "fingerprint": TEXT,
    "num_images": COUNT,
    "upstream": optional(TEXT),
}


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
        ValueError: the text is not JSON, not an object, or nested more than MAX_DEPTH levels.
    """
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


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in value)
