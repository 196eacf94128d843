"""Files that once did harm, kept in tests/corpus/KIND/: each is refused, or read as expected.

Put a new case there: KIND is a method of `readers.Readers`. A file whose name begins with `read`
must be read; every other one must be refused. Requests must get the code that their name ends in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import Finished
from tests.fuzz.readers import DOCUMENTED, Readers
from tests.fuzz.trap import trapped

CORPUS = Path(__file__).parents[1] / "corpus"
CASES = sorted(file for file in CORPUS.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def readers(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Readers]:
    made = Readers(straight, tmp_path_factory.mktemp("corpus"))
    yield made
    made.server.server_close()


@pytest.mark.parametrize("file", CASES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_case_that_did_harm_does_none(readers: Readers, file: Path) -> None:
    kind = file.parent.name
    with trapped(readers.root):
        if kind == "request":
            assert readers.of(kind)(file)[9:12].decode() == file.stem[-3:]
        elif file.name.startswith("read"):
            readers.of(kind)(file)
        else:
            with pytest.raises(DOCUMENTED):
                readers.of(kind)(file)
