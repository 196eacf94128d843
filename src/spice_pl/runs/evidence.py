"""Read features and probabilities from files, put them into the order of the data set, check them.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from spice_pl.errors import UsageError
from spice_pl.system.files import from_spreadsheet

MISTAKE = 1e-2  # largest error of the sum of a row; files hold few digits
ROUNDING = 1e-6  # by which a probability may be below 0


def read_array(
    file: str, keys: Sequence[str], fingerprint: str, num_clusters: int | None = None
) -> NDArray[np.float32]:
    """Read an array with one row per image.

    A .safetensors file holds one tensor; a `fingerprint` in its metadata must equal that of the
    data set. A .csv file is UTF-8 or UTF-16 with commas, semicolons or tabs between the columns,
    and may have a header. If its first column is `image`, rows are put into the order of the data
    set, and columns `image, cluster` (our clusters.csv) become one-hot rows.

    Args:
        file: path of a .npy, .safetensors or .csv file.
        keys: (N,) names of the images, as in clusters.csv.
        fingerprint: fingerprint of the data set.
        num_clusters: columns of one-hot rows; None takes the largest cluster, and then at most N.

    Raises:
        UsageError: the file is missing, damaged, of another kind, or of another data set.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a .npy, .safetensors or .csv file")
    readers: dict[str, Callable[[], NDArray[Any]]] = {
        ".npy": lambda: _npy(path),
        ".safetensors": lambda: _safetensors(path, fingerprint),
        ".csv": lambda: _csv(path, keys, num_clusters),
    }
    if path.suffix not in readers:
        raise UsageError(
            f"{path} is none of .npy, .safetensors, .csv; save the table in one of these forms"
        )
    try:
        array = readers[path.suffix]()
    except UsageError:
        raise
    except Exception as error:  # numpy, safetensors and csv raise many types on damaged files
        raise UsageError(f"{path} is not an array of numbers that can be read: {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise UsageError(
            f"{path} holds {array.dtype} of shape {array.shape}; needed is a table of numbers with "
            "one row per image"
        )
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused later
        return np.asarray(array, dtype=np.float32)


def check_features(features: NDArray[np.float32], num_images: int, where: str) -> None:
    """Refuse features that are not one finite row per image.

    Raises:
        UsageError: rows or values do not fit.
    """
    if len(features) != num_images:
        raise UsageError(
            f"{where} has {len(features)} rows and the data set {num_images} images; give one row "
            "per image, in the order of clusters.csv"
        )
    if not features.shape[1]:
        raise UsageError(f"{where} has no columns; make the file again")
    if bad := int((~np.isfinite(features).all(axis=1)).sum()):
        raise UsageError(f"{where}: {bad} rows hold NaN or infinite values; make the file again")


def check_probs(probs: NDArray[np.float32], num_images: int, num_clusters: int, where: str) -> None:
    """Refuse probabilities that are not one distribution over K clusters per image.

    Raises:
        UsageError: rows, columns or values do not fit.
    """
    check_features(probs, num_images, where)
    if probs.shape[1] != num_clusters:
        raise UsageError(
            f"{where} has {probs.shape[1]} clusters and dataset.num_clusters is {num_clusters}; "
            f"set dataset.num_clusters={probs.shape[1]} or give another file"
        )
    sums = probs.sum(axis=1, dtype=np.float64)
    lowest = probs.min(axis=1)
    wrong: NDArray[np.bool_] = (np.abs(sums - 1) > MISTAKE) | (lowest < -ROUNDING)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise UsageError(
            f"{where}: {int(wrong.sum())} rows are not probabilities, row {first} sums to "
            f"{sums[first]:.4g} and its smallest value is {lowest[first]:.4g}; give values from 0 "
            "to 1 that sum to 1 (logits need a softmax)"
        )


def _npy(path: Path) -> NDArray[Any]:
    array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):  # a .npz archive by another name
        raise UsageError(f"{path} is an archive of arrays; save one array with numpy.save")
    return array


def _safetensors(path: Path, fingerprint: str) -> NDArray[Any]:
    with safe_open(path, framework="pt") as file:  # numpy has no bfloat16 and no float8
        names, metadata = list(file.keys()), file.metadata() or {}
        if len(names) != 1:
            raise UsageError(f"{path} holds tensors {names}; give a file with one")
        tensor = file.get_tensor(names[0])
    made_from = metadata.get("fingerprint", fingerprint)
    if made_from != fingerprint:
        raise UsageError(
            f"{path} was made from other images or another order of them (fingerprint {made_from}, "
            f"now {fingerprint}); give the file of this data set"
        )
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _csv(path: Path, keys: Sequence[str], num_clusters: int | None) -> NDArray[Any]:
    lines = _lines(path)
    if not lines:
        raise UsageError(f"{path} is empty; give one row per image")
    header = None if _is_number(lines[0][0]) and _is_number(lines[0][-1]) else lines.pop(0)
    if header and lines and len(header) < len(lines[0]):
        raise UsageError(
            f"{path} has a header of {len(header)} columns and a row of {len(lines[0])}; give each "
            "column a name"
        )
    if header and (header[0] == "image" or {line[0] for line in lines} == set(keys)):
        rows = {line[0]: line[1:] for line in lines}
        if rows.keys() != set(keys):  # names that spreadsheet=true wrote differently
            plain = {from_spreadsheet(name): row for name, row in rows.items()}
            rows = plain if plain.keys() == set(keys) else rows
        if len(rows) != len(lines):
            raise UsageError(f"{path} names an image twice; give one row per image")
        absent = [key for key in keys if key not in rows]
        if absent or len(rows) != len(keys):
            raise UsageError(
                f"{path} names {len(rows)} images, and of the data set's {len(keys)} images "
                f"{len(absent)} are missing, e.g. {(absent or ['none'])[0]}; give the file of this "
                "data set"
            )
        lines = [rows[key] for key in keys]
    elif header and _counts([line[0] for line in lines]):
        raise UsageError(
            f"{path} begins with a column that numbers the rows ({header[0] or 'without a name'}); "
            "leave it out (pandas: index=False), or name it image if these are names of images"
        )
    if lines and not lines[0]:
        raise UsageError(f"{path} has no columns beside the names; give the values")
    if len({len(line) for line in lines}) > 1:
        raise UsageError(f"{path} has rows of different lengths; give a full table")
    try:
        if header and header[1:2] == ["cluster"] and len(header) > len(lines[0]):
            return _one_hot(path, [int(line[0]) for line in lines], num_clusters)
        return np.array(lines, dtype=np.float32)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"{path} holds a value that is not a number: {error}; give numbers with a decimal "
            "point, and commas, semicolons or tabs between them; a column of names is called image"
        ) from error


def _lines(path: Path) -> list[list[str]]:
    """Return the cells of a CSV file; lines without any are left out."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16")
    else:  # a spreadsheet may begin the file with a byte order mark; names may be of any bytes
        text = content.decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        raise UsageError(f"{path} is not text in UTF-8 or UTF-16; save it in one of them")
    first = text.partition("\n")[0]
    separator = "," if "," in first else next((each for each in ";\t" if each in first), ",")
    return [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if line]


def _counts(texts: Sequence[str]) -> bool:
    """Whether texts number the rows from 0 or 1, in any order, as the index of a table does.

    >>> _counts(["0", "2", "1"]), _counts(["1", "0"]), _counts(["1.5", "2", "3"])
    (True, False, False)
    """
    if len(texts) < 3 or not all(text.isascii() and text.isdigit() for text in texts):
        return False  # two rows may be probabilities
    numbers = {int(text) if len(text) < 10 else -1 for text in texts}
    return (
        len(numbers) == len(texts)
        and max(numbers) - min(numbers) == len(texts) - 1
        and (min(numbers) in (0, 1))
    )


def _one_hot(path: Path, clusters: Sequence[int], num_clusters: int | None) -> NDArray[np.float32]:
    """Return (N, K) rows with a 1 at the cluster of each image."""
    lowest, highest = min(clusters), max(clusters)
    if lowest < 0:
        raise UsageError(f"{path} names cluster {lowest}; clusters are numbered from 0")
    if highest >= (len(clusters) if num_clusters is None else num_clusters):
        raise UsageError(
            f"{path} names cluster {highest} and there are "
            + (
                f"{len(clusters)} images; number the clusters from 0 without gaps"
                if num_clusters is None
                else f"{num_clusters} clusters; set dataset.num_clusters={highest + 1}, or give "
                "another file"
            )
        )
    one_hot = np.zeros((len(clusters), num_clusters or highest + 1), dtype=np.float32)
    one_hot[np.arange(len(clusters)), clusters] = 1
    return one_hot


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
