"""Read paths and labels from a table, and number class names; labels are for `truth/*` only.

Shapes: N images.
"""

from __future__ import annotations

import codecs
import csv
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.data.store_files import Stored
from spice_pl.errors import UsageError
from spice_pl.system.output import printable

logger = logging.getLogger(__name__)


DELIMITERS = (",", "\t", ";", "|")
NO_LABEL = ("", "nan", "<na>")  # what pandas writes for an image without a label


def read_table(
    path: Path, root: Path, *, labelled: bool
) -> tuple[list[str], list[str | None] | None]:
    """Return the column `path`, and on request the column `label`, of a CSV or Parquet file.

    Columns of a CSV file are separated by commas, tabs, semicolons or |, as its header is.

    An empty label, nan and <NA> mean that the image has none.

    Args:
        path: the table.
        root: folder that its paths are relative to.
        labelled: whether to read labels.

    Raises:
        UsageError: the file or a column is missing, a row has too many fields, a file occurs
            twice, or there are no rows.
    """
    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UsageError(
            f"dataset.table={path} {state}; give a CSV or Parquet file with a column path, whose "
            "files are relative to dataset.root"
        )
    wanted = ["path", "label"] if labelled else ["path"]
    parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        columns = _parquet(path, wanted) if parquet else _csv(path, wanted)
    except UsageError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are some of these
        raise UsageError(f"dataset.table={path} cannot be read: {error}") from error
    paths = [value or "" for value in columns["path"]]
    if not paths:
        raise UsageError(f"dataset.table={path} has no rows")
    rows: dict[str, int] = {}
    for row, each in enumerate(paths, 1):
        file = os.path.normpath(root / each)
        first = rows.setdefault(file, row)
        if each and first == row and "\0" not in each:
            continue
        if not each:
            what = "names no file"
        elif "\0" in each:
            what = f"names {printable(each)}, which no file can be called"
        elif paths[first - 1] == each:
            what = f"names {printable(each)} twice, first in row {first}"
        else:
            other = printable(paths[first - 1])
            what = f"names {printable(each)}, which row {first} names as {other}"
        raise UsageError(f"row {row} of dataset.table={path} {what}; give each image one row")
    return paths, _labels(columns["label"]) if labelled else None


def _labels(values: Sequence[str | None]) -> list[str | None]:
    labels = [None if (value or "").lower() in NO_LABEL else value for value in values]
    if count := sum(
        label is None and bool(value) for label, value in zip(labels, values, strict=True)
    ):
        logger.info("%d labels are nan and count as no label", count)
    return labels


def _csv(path: Path, wanted: Sequence[str]) -> dict[str, list[str | None]]:
    columns: dict[str, list[str | None]] = {name: [] for name in wanted}
    with path.open("rb") as raw:
        wide = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # Paths may contain bytes that are not UTF-8; spreadsheets may write a byte order mark.
    encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
    with path.open(newline="", encoding=encoding, errors=errors) as file:
        delimiter = _delimiter(file.readline(), wanted)
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)  # no quote stays open
        header = reader.fieldnames or ()
        _check_columns(path, wanted, header)
        for row in _rows(reader, path):
            if None in row:
                raise UsageError(
                    f"line {reader.line_num} of dataset.table={path} has "
                    f"{len(header) + len(row[None])} fields and the header {len(header)}; put a "
                    'path with a comma into quotes: "a,b.jpg"'
                )
            for name in wanted:
                columns[name].append(row[name])
    return columns


def _rows(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str | Any, str | Any]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UsageError(
            f"dataset.table={path} cannot be read: {error}, in or before line {reader.line_num}; "
            "is each quote closed?"
        ) from error


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    r"""Return what separates the columns of a table: a comma unless the header says otherwise.

    >>> _delimiter("path;label", ["path"]), _delimiter("path", ["path"])
    (';', ',')
    """
    split = {each: header.strip().replace('"', "").split(each) for each in DELIMITERS}
    return next((each for each in DELIMITERS if set(wanted) <= set(split[each])), ",")


def _parquet(path: Path, wanted: Sequence[str]) -> dict[str, list[str | None]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"dataset.table={path} needs the package pyarrow; pip install 'spice-pl[parquet]'"
        ) from error
    _check_columns(path, wanted, parquet.read_schema(path).names)
    read = parquet.read_table(path, columns=list(wanted)).to_pydict()
    return {name: [_text(value) for value in read[name]] for name in wanted}


def _text(value: Any) -> str | None:
    """Return a value of a table as text; whole numbers that became floats are written as such.

    >>> _text(2.0), _text(2.5), _text(float("nan")), _text(None), _text("cat")
    ('2', '2.5', None, None, 'cat')
    """
    if value is None or value != value:  # NaN
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        raise UsageError(
            f"dataset.table={path} has no column {', '.join(missing)}; it has "
            f"{printable(', '.join(there))}"
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


def stored_images(
    stored: Stored, name: str, protocol: str, given: Sequence[str | None] | None
) -> ImageSet:
    """Return the images of a store, with the classes of the rows that they were read from.

    Args:
        stored: the store.
        name: name of the data set.
        protocol: "whole".
        given: class of each row of the source, or None; None without truth.
    """
    labels, class_names = None, None
    if given is not None:
        labels, class_names = class_labels(given[i] for i in stored.files["source"])
    return ImageSet(
        name=name,
        images=stored.images,
        keys=stored.keys,
        fingerprint=stored.fingerprint,
        labels=labels,
        class_names=class_names,
        protocol=protocol,
        skipped=stored.skipped,
        files=stored.files,
    )
