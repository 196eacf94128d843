"""SECURITY.md and the threat model: each row of their tables names a test, and the tests exist."""

from __future__ import annotations

import re

import pytest
from tests.process import ROOT

PAGES = ("SECURITY.md", "docs/explanation/threats.md")


@pytest.mark.parametrize("page", PAGES)
def test_each_row_names_a_test_that_exists(page: str) -> None:
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for row in rows[1:]:  # without the header
        file, found = "", re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", row.rsplit(" | ", 1)[-1])
        assert [each for each in found if any(each)], row[:60]
        for path, name in found:
            file = path or file
            assert (ROOT / file).is_file(), file
            if name:
                assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
