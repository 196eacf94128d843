"""SECURITY.md and the threat model: each promise names a test, and the tests exist.

In SECURITY.md each sentence ends with the numbers of its tests, or says why it has none. Each row
of the threat model names tests.
"""

from __future__ import annotations

import itertools
import re

from tests.process import ROOT

TEST = re.compile(r"`(tests/[\w/]+(?:\.py|/))?(?:::(\w+))?`")


def promises() -> str:
    """The part of SECURITY.md with promises; names of files and code are left out."""
    page = (ROOT / "SECURITY.md").read_text()
    part = page.split("## What is trusted, and what is not")[1].split("## Tests")[0]
    return re.sub(r"`[^`]*`", "CODE", part.split("|:--|:--|:--|")[1])


def named_tests(text: str) -> list[tuple[str, str]]:
    """Files and names of tests; a name alone belongs to the file before it."""
    file, found = "", []
    for path, name in TEST.findall(text):
        if path or name:
            file = path or file
            found.append((file, name))
    return found


def check(named: list[tuple[str, str]]) -> None:
    assert named
    for file, name in named:
        assert (ROOT / file).exists(), file
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def without_test(text: str) -> list[str]:
    """The sentences that neither numbers of tests nor a reason follow."""
    parts = re.split(r"\.(?=\s)", text)
    pairs = itertools.pairwise(parts)
    return [one for one, more in pairs if not re.match(r"\s+(\[\d|\(no test: )", more)]


def test_each_sentence_of_the_promise_names_its_test() -> None:
    text = promises()
    assert text.count(". [") > 30
    assert without_test(text) == []


def test_a_sentence_without_a_test_is_found() -> None:
    text = "One. [1] Two, and 2.5. Three. (no test: advice) Four. [2]"
    assert without_test(text) == [" [1] Two, and 2.5"]


def test_each_number_is_a_test_that_exists() -> None:
    page = (ROOT / "SECURITY.md").read_text().split("## Tests")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE))
    used = {n for mark in re.findall(r"\[(\d+(?:, \d+)*)\]", promises()) for n in mark.split(", ")}
    assert used == rows.keys()
    assert [*rows] == [str(i + 1) for i in range(len(rows))]
    for row in rows.values():
        check(named_tests(row))


def test_each_row_of_the_threat_model_names_a_test_that_exists() -> None:
    page = (ROOT / "docs/explanation/threats.md").read_text()
    lines = itertools.pairwise([*page.splitlines(), ""])
    rows = [row for row, more in lines if row.startswith("| ") and not more.startswith("|:")]
    assert len(rows) > 30
    for row in rows:
        check(named_tests(row.rsplit(" | ", 1)[-1]))
