"""Quote the values of the command line that Hydra's grammar would misread."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from spice_pl.errors import UsageError
from spice_pl.system.command import quoted

# Settings that name a file or folder.
PATHS = {
    *("dataset.root", "dataset.path", "dataset.table", "runs_dir", "cache_dir", "path", "like"),
    *("edits", "of", "edit.file", "predict.model", "backbone.path", "embed.module.weights"),
    *("name.words", "name.weights"),
}
PLAIN = re.compile(r"[A-Za-z_./-][A-Za-z0-9_./-]*")  # text to every grammar, but for these words
WORDS = {"null", "true", "false", "nan", "inf"}


def with_quotes(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with quotes where a value would be misread.

    The value of a setting in `PATHS` that names something on disk is taken as it is typed. Any
    other value that Hydra cannot read is taken as text.

    >>> with_quotes(["dataset.root=/data/Müller", "seed=1"])
    ["dataset.root='/data/Müller'", 'seed=1']

    Raises:
        UsageError: a list or dictionary cannot be read.
    """
    sweep = bool({"-m", "--multirun"} & set(words))
    return [_with_quotes(word, sweep=sweep) for word in words]


def _with_quotes(word: str, *, sweep: bool) -> str:
    key, equals, value = word.partition("=")
    if not equals or not value or word.startswith("-") or PLAIN.fullmatch(value):
        is_word = key.lstrip("+") in PATHS and value.lower() in WORDS and os.path.exists(value)
        return f"{key}={quoted(value)}" if is_word else word
    if key.lstrip("+") in PATHS and os.path.exists(os.path.expanduser(value)):
        return f"{key}={quoted(value)}"
    if _is_read(word):
        several = (
            key.lstrip("+") in PATHS and "," in value and value[0] not in "'\"[{" and not sweep
        )
        return f"{key}={quoted(value)}" if several and "${" not in value else word
    if value[0] in "[{":
        raise UsageError(
            f"{word} cannot be read; inside a list, put text with other characters than letters of "
            "English, digits and _-./ into quotes, and the whole into quotes of the shell: "
            "\"dataset.exclude=['Müller','a,b']\""
        )
    changed = f"{key}={quoted(value)}"
    return changed if value[0] not in "'\"" and _is_read(changed) else word


def as_typed(word: str, *, sweep: bool = False) -> str:
    """Return a setting without quotes around its value, if it is read the same without them.

    >>> as_typed("of='runs/photos'"), as_typed("run='7'"), as_typed("run='a, b'")
    ('of=runs/photos', "run='7'", "run='a, b'")
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key, _, value = word.partition("=")
    if not value.startswith("'") or not _is_read(word):
        return word
    parser = OverridesParser.create()
    text = parser.parse_override(word).value()
    if not isinstance(text, str) or text[:1] in ("", "[", "{", "'", '"'):
        return word
    typed = f"{key}={text}"
    again = _with_quotes(typed, sweep=sweep)
    same = _is_read(again) and parser.parse_override(again).value() == text
    return typed if same else word


def _is_read(word: str) -> bool:
    """Return whether a word is in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True
