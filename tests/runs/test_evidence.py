from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from spice_pl.errors import UsageError
from spice_pl.runs.evidence import check_features, check_probs, read_array

KEYS = ["a.png", "b.png", "c.png"]
TABLE = np.array([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], dtype=np.float32)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_all_kinds_of_files_give_the_same_table(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", TABLE)
    save_file({"probs": TABLE}, tmp_path / "p.safetensors", {"fingerprint": "f"})
    bare = write(tmp_path / "bare.csv", "0.7,0.3\n0.2,0.8\n0.5,0.5\n")
    header = write(tmp_path / "header.csv", "p0,p1\n0.7,0.3\n0.2,0.8\n0.5,0.5\n")
    named = write(
        tmp_path / "named.csv", "image,p0,p1\nc.png,0.5,0.5\na.png,0.7,0.3\nb.png,0.2,0.8\n"
    )
    files = [str(tmp_path / "p.npy"), str(tmp_path / "p.safetensors"), bare, header, named]
    for file in files:
        found = read_array(file, KEYS, "f")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, TABLE, err_msg=file)


def test_clusters_csv_becomes_one_hot(tmp_path: Path) -> None:
    file = write(tmp_path / "clusters.csv", "image,cluster\nb.png,2\na.png,0\nc.png,1\n")
    expected = np.eye(3, dtype=np.float32)[[0, 2, 1]]
    np.testing.assert_array_equal(read_array(file, KEYS, "f"), expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "image,p0\na.png,1\nb.png,1\nd.png,1\n", "1 are missing, e.g. c.png"),
        ("p.csv", "image,p0\na.png,1\na.png,1\nb.png,1\n", "names an image twice"),
        ("p.csv", "1,0\n1\n0,1\n", "rows of different lengths"),
        ("p.csv", "1,0\n1,x\n0,1\n", "holds a value that is not a number"),
        ("p.csv", "", "is empty"),
        ("p.npy", "no array", "is not an array of numbers"),
        ("p.txt", "1", "is none of .npy, .safetensors, .csv"),
    ],
)
def test_a_bad_file_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_array(write(tmp_path / name, text), KEYS, "f")


def test_files_that_are_not_there_or_of_other_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_array(str(tmp_path / "p.npy"), KEYS, "f")
    save_file({"probs": TABLE}, tmp_path / "p.safetensors", {"fingerprint": "other"})
    with pytest.raises(UsageError, match="made from other images or another order"):
        read_array(str(tmp_path / "p.safetensors"), KEYS, "f")
    save_file({"a": TABLE, "b": TABLE}, tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match="give a file with one"):
        read_array(str(tmp_path / "two.safetensors"), KEYS, "f")
    np.save(tmp_path / "flat.npy", TABLE[0])
    with pytest.raises(UsageError, match="needed is a table of numbers"):
        read_array(str(tmp_path / "flat.npy"), KEYS, "f")


def changed(row: int, column: int, value: float) -> NDArray[np.float32]:
    table = TABLE.copy()
    table[row, column] = value
    return table


@pytest.mark.parametrize(
    ("probs", "num_images", "num_clusters", "message"),
    [
        (TABLE, 4, 2, "has 3 rows and the data set 4 images"),
        (TABLE, 3, 5, "has 2 clusters and dataset.num_clusters is 5; set dataset.num_clusters=2"),
        (changed(1, 0, np.nan), 3, 2, "1 rows hold NaN"),
        (changed(2, 0, 0.9), 3, 2, "1 rows are not probabilities, row 2 sums to 1.4"),
        (changed(0, 0, -0.3), 3, 2, "row 0 sums to 0"),
        (TABLE * 8, 3, 2, "logits need a softmax"),
    ],
)
def test_probabilities_that_are_none(
    probs: NDArray[np.float32], num_images: int, num_clusters: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_probs(probs, num_images, num_clusters, "probs.npy")


def test_good_values_pass() -> None:
    check_probs(TABLE, 3, 2, "probs.npy")
    check_features(TABLE * 100, 3, "features.npy")
