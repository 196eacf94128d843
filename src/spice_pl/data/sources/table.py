"""Read paths and labels from a table, and number class names; labels are for `truth/*` only.

Shapes: N images.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)


def read_table(path: Path, *, labelled: bool) -> tuple[list[str], list[str | None] | None]:
    """Return the column `path`, and on request the column `label`, of a CSV or Parquet file.

    An empty label means that the image has none.

    Raises:
        UsageError: the file or a column is missing, a path occurs twice, or there are no rows.
    """
    if not path.is_file():
        raise UsageError(f"dataset.table={path} does not exist")
    wanted = ["path", "label"] if labelled else ["path"]
    parquet = path.suffix.lower() in (".parquet", ".pq")
    columns = _parquet(path, wanted) if parquet else _csv(path, wanted)
    paths = [value or "" for value in columns["path"]]
    if not paths:
        raise UsageError(f"dataset.table={path} has no rows")
    seen: set[str] = set()
    for row, each in enumerate(paths, 1):
        if not each or each in seen:
            what = f"names {each} twice" if each else "names no file"
            raise UsageError(f"row {row} of dataset.table={path} {what}; give each image one row")
        seen.add(each)
    return paths, [value or None for value in columns["label"]] if labelled else None


def _csv(path: Path, wanted: Sequence[str]) -> dict[str, list[str | None]]:
    # Paths may contain bytes that are not UTF-8; spreadsheets may write a byte order mark.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        _check_columns(path, wanted, reader.fieldnames or ())
        rows = list(reader)
    return {name: [row[name] for row in rows] for name in wanted}


def _parquet(path: Path, wanted: Sequence[str]) -> dict[str, list[str | None]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"dataset.table={path} needs the package pyarrow; pip install 'spice-pl[parquet]'"
        ) from error
    _check_columns(path, wanted, parquet.read_schema(path).names)
    read = parquet.read_table(path, columns=list(wanted)).to_pydict()
    return {
        name: [None if value is None else str(value) for value in read[name]] for name in wanted
    }


def _check_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise UsageError(
            f"dataset.table={path} has no column {', '.join(missing)}; it has {', '.join(there)}"
        )


def class_labels(
    names: Iterable[str | None],
) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Number class names in sorted order; numbers are sorted as numbers.

    Returns:
        Labels (N,), -1 for None, and class names; None and None if no image has a class.
    """
    given = list(names)
    known = {name for name in given if name is not None}
    if not known:
        logger.info("no image has a label, so there are no truth rows")
        return None, None
    numeric = all(name.isdecimal() for name in known)
    class_names = sorted(known, key=lambda name: (int(name), name) if numeric else (0, name))
    number = {name: i for i, name in enumerate(class_names)}
    logger.info(
        "%d of %d images have a label, of %d classes",
        *(sum(name is not None for name in given), len(given), len(class_names)),
    )
    labels = [-1 if name is None else number[name] for name in given]
    return np.asarray(labels, dtype=np.int64), class_names
