"""Read features and probabilities from files, put them into the order of the data set, check them.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from spice_pl.errors import UsageError

MISTAKE = 1e-2  # largest error of the sum of a row; files hold few digits


def read_array(file: str, keys: Sequence[str], fingerprint: str) -> NDArray[np.float32]:
    """Read an array with one row per image.

    A .safetensors file holds one tensor; a `fingerprint` in its metadata must equal that of the
    data set. A .csv file may have a header. If its first column is `image`, rows are put into the
    order of the data set, and columns `image, cluster` (our clusters.csv) become one-hot rows.

    Args:
        file: path of a .npy, .safetensors or .csv file.
        keys: (N,) names of the images, as in clusters.csv.
        fingerprint: fingerprint of the data set.

    Raises:
        UsageError: the file is missing, of another kind, or of another data set.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a .npy, .safetensors or .csv file")
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UsageError(f"{path} is not an array of numbers: {error}") from error
    elif path.suffix == ".safetensors":
        array = _safetensors(path, fingerprint)
    elif path.suffix == ".csv":
        array = _csv(path, keys)
    else:
        raise UsageError(f"{path} is none of .npy, .safetensors, .csv")
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise UsageError(
            f"{path} holds {array.dtype} of shape {array.shape}; needed is a table of numbers with "
            "one row per image"
        )
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
    wrong = (np.abs(sums - 1) > MISTAKE) | (probs < -MISTAKE).any(axis=1)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise UsageError(
            f"{where}: {int(wrong.sum())} rows are not probabilities, row {first} sums to "
            f"{sums[first]:.4g}; give values from 0 to 1 that sum to 1 (logits need a softmax)"
        )


def _safetensors(path: Path, fingerprint: str) -> NDArray[np.float32]:
    try:
        with safe_open(path, framework="np") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if len(names) != 1:
                raise UsageError(f"{path} holds tensors {names}; give a file with one")
            array: NDArray[np.float32] = file.get_tensor(names[0])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    made_from = metadata.get("fingerprint", fingerprint)
    if made_from != fingerprint:
        raise UsageError(
            f"{path} was made from other images or another order of them (fingerprint {made_from}, "
            f"now {fingerprint}); give the file of this data set"
        )
    return array


def _csv(path: Path, keys: Sequence[str]) -> NDArray[np.float32]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        raise UsageError(f"{path} is empty; give one row per image")
    header = None if _is_number(lines[0][0]) and _is_number(lines[0][-1]) else lines.pop(0)
    if header and header[0] == "image":
        rows = {line[0]: line[1:] for line in lines}
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
    if len({len(line) for line in lines}) > 1:
        raise UsageError(f"{path} has rows of different lengths; give a full table")
    try:
        if header and header[:2] == ["image", "cluster"]:
            clusters = np.array([int(line[0]) for line in lines])
            one_hot: NDArray[np.float32] = np.eye(int(clusters.max()) + 1, dtype=np.float32)
            return np.asarray(one_hot[clusters])
        return np.array(lines, dtype=np.float32)
    except ValueError as error:
        raise UsageError(f"{path} holds a value that is not a number: {error}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
