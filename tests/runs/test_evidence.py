from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from spice_pl.errors import UsageError
from spice_pl.runs.clusters import ClusterTable, write_table
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
        ("p.csv", "image,cluster\na.png\nb.png\nc.png\n", "has no columns beside the names"),
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


def test_a_byte_order_mark_does_not_hide_the_header(tmp_path: Path) -> None:
    text = "image,p0,p1\nc.png,0.5,0.5\na.png,0.7,0.3\nb.png,0.2,0.8\n"
    (tmp_path / "p.csv").write_text(text, encoding="utf-8-sig")
    np.testing.assert_array_equal(read_array(str(tmp_path / "p.csv"), KEYS, "f"), TABLE)
    # Numbers for names: with the mark in the header, they would be a column of features.
    (tmp_path / "n.csv").write_text("image,p0,p1\n2,5,5\n1,2,8\n0,7,3\n", encoding="utf-8-sig")
    found = read_array(str(tmp_path / "n.csv"), ["0", "1", "2"], "f")
    assert found.tolist() == [[7, 3], [2, 8], [5, 5]]


PANDAS = [
    ("commas", ",p0,p1\nc.png,0.5,0.5\na.png,0.7,0.3\nb.png,0.2,0.8\n"),
    ("semicolons", "image;p0;p1\nc.png;0.5;0.5\na.png;0.7;0.3\nb.png;0.2;0.8\n"),
    ("tabs", "file\tp0\tp1\nc.png\t0.5\t0.5\na.png\t0.7\t0.3\nb.png\t0.2\t0.8\n"),
    ("bare", "0.7;0.3\n0.2;0.8\n0.5;0.5\n"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "text"), PANDAS, ids=[name for name, _ in PANDAS])
def test_tables_of_other_programs_are_read(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    (tmp_path / "p.csv").write_text(text, encoding=encoding)
    np.testing.assert_array_equal(read_array(str(tmp_path / "p.csv"), KEYS, "f"), TABLE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",x\n0,5\n1,6\n2,7\n", "begins with a column that numbers the rows .without a name"),
        ("Unnamed: 0,x\n2,5\n1,6\n3,7\n", "a column that numbers the rows .Unnamed: 0.*index=F"),
        ("x;y\n0,5;1,5\n0,5;1,5\n0,5;2,5\n", "not a number.*decimal point, and commas, semic"),
        ("Image,x\na,1\nb,2\nc,3\n", "not a number.*a column of names is called image"),
        ("x y\n1,2,3\n1,2,3\n1,2,3\n", "has a header of 1 columns and a row of 3"),
    ],
)
def test_tables_that_could_be_read_wrong_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_array(write(tmp_path / "p.csv", text), KEYS, "f")
    (tmp_path / "p.csv").write_text(text, encoding="utf-16-le")  # without a byte order mark
    with pytest.raises(UsageError, match="is not text in UTF-8 or UTF-16; save it in one"):
        read_array(str(tmp_path / "p.csv"), KEYS, "f")


@pytest.mark.parametrize("name", ["p.parquet", "p.npz", "p.pt", "p.tsv", "p", "p.csv.gz"])
def test_other_forms_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(zipped())
    with pytest.raises(UsageError, match=r"none of \.npy, \.safetensors, \.csv; save the table in"):
        read_array(str(tmp_path / name), KEYS, "f")


@pytest.mark.parametrize("cluster", ["-1", "-3", "3", "60000", "1000000000", "1" + "0" * 100])
@pytest.mark.parametrize("num_clusters", [None, 3])
def test_clusters_are_those_that_there_are(
    tmp_path: Path, cluster: str, num_clusters: int | None
) -> None:
    file = write(tmp_path / "c.csv", f"image,cluster\nb.png,2\na.png,{cluster}\nc.png,1\n")
    with pytest.raises(UsageError, match=f"^{file} names cluster {cluster}(;| and there are)"):
        read_array(file, KEYS, "f", num_clusters)


@pytest.mark.parametrize("keys", [["=a", "'=a", "b"], ["'a", "-b", "c"], ["a", "b", "'"]])
@pytest.mark.parametrize("spreadsheet", [False, True])
def test_our_own_table_is_read_with_any_names(
    tmp_path: Path, keys: list[str], spreadsheet: bool
) -> None:
    """As written by a run of four clusters whose last one is empty."""
    numbers = np.array([1, 1, 1], np.float32)
    table = ClusterTable(keys, np.array([2, 0, 1]), numbers, numbers, np.ones(3, bool))
    write_table(table, tmp_path / "clusters.csv", spreadsheet=spreadsheet)
    expected = np.eye(4, dtype=np.float32)[[2, 0, 1]]
    found = read_array(str(tmp_path / "clusters.csv"), keys, "f", 4)
    np.testing.assert_array_equal(found, expected)
    check_probs(found, 3, 4, "clusters.csv")


def test_an_empty_last_cluster_is_one(tmp_path: Path) -> None:
    file = write(tmp_path / "clusters.csv", "image,cluster\nb.png,1\na.png,0\nc.png,1\n")
    expected = np.eye(4, dtype=np.float32)[[0, 1, 1]]
    np.testing.assert_array_equal(read_array(file, KEYS, "f", 4), expected)


def npy(header: bytes, data: bytes = b"") -> bytes:
    """Return a .npy file of any header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def tensors(header: str, data: bytes = b"") -> bytes:
    """Return a .safetensors file of any header."""
    return len(header).to_bytes(8, "little") + header.encode() + data


def whole_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, TABLE)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, probs=TABLE)
    return buffer.getvalue()


DAMAGED = {
    "empty.npy": b"",
    "short.npy": whole_npy()[:-5],
    "head.npy": whole_npy()[:20],
    "zipped.npy": zipped(),
    "nested.npy": npy(b"(" * 5000 + b"\n"),
    "no header.npy": npy(b"{}\n"),
    "huge.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9)}\n"),
    "negative.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 2)}\n"),
    "object.npy": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 2)}\n", b"x" * 99),
    "complex.npy": npy(b"{'descr': '<c8', 'fortran_order': False, 'shape': (3, 2)}\n", bytes(48)),
    "empty.safetensors": b"",
    "short.safetensors": tensors(
        '{"p": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}'
    ),
    "junk.safetensors": b"junk" * 9,
    "huge.safetensors": (1 << 62).to_bytes(8, "little"),
    "nested.safetensors": tensors("[" * 5000),
    "unknown.safetensors": tensors(
        '{"p": {"dtype": "F3", "shape": [3, 2], "data_offsets": [0, 24]}}', bytes(24)
    ),
    "bool.safetensors": tensors(
        '{"p": {"dtype": "BOOL", "shape": [3, 2], "data_offsets": [0, 6]}}', bytes(6)
    ),
    "field.csv": b"1," + b"1" * 140_000 + b"\n",
    "digits.csv": b"image,cluster\na.png," + b"1" * 5000 + b"\nb.png,1\nc.png,1\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        read_array(str(tmp_path / name), KEYS, "f")


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float8_e4m3fn", "float64", "int32"])
def test_tensors_of_every_kind_of_number_are_read(tmp_path: Path, kind: str) -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 4.0], [0.0, 8.0]])
    file = tmp_path / "p.safetensors"
    save_tensors({"features": values.to(getattr(torch, kind))}, file)
    assert read_array(str(file), KEYS, "f").tolist() == values.tolist()


def test_numbers_too_large_are_infinite_and_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.full((3, 2), 1e300))
    found = read_array(str(tmp_path / "p.npy"), KEYS, "f")
    with pytest.raises(UsageError, match="3 rows hold NaN or infinite values"):
        check_features(found, 3, "p.npy")


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
        (
            TABLE + np.array([0.309, -0.309], np.float32),
            3,
            2,
            "sums to 1 and its smallest value is -0.009",
        ),
        (TABLE[:, :0], 3, 2, "has no columns"),
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
