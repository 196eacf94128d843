"""Data sets of Hugging Face: real files of `datasets` where it is installed; the Hub is not asked.

The library itself is a fake where it would ask the Hub.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from spice_pl.data.images import ImageSet
from spice_pl.data.sources.hugging_face import hugging_face
from spice_pl.errors import UsageError

S = 4


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (S, S), level).save(buffer, "PNG")
    return buffer.getvalue()


def load(root: Path | str, tmp_path: Path, **more: Any) -> ImageSet:
    return hugging_face(str(root), S, str(tmp_path / "cache"), **more)


def levels(images: ImageSet) -> list[int]:
    found: list[int] = images.images[:, 0, 0, 0].tolist()
    return found


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    library.disable_progress_bars()
    return library


def rows(datasets: Any, *given: bytes | None) -> Any:
    """A data set with the columns image and label."""
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    values = {
        "image": [None if data is None else {"bytes": data, "path": None} for data in given],
        "label": [i % 2 for i in range(len(given))],
    }
    return datasets.Dataset.from_dict(values, datasets.Features(kinds))


def test_the_package_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets; pip install 'spice-pl\[hf"):
        load("hf://ann/birds", tmp_path)


def test_what_save_to_disk_wrote(datasets: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    rows(datasets, encoded(10), b"", None, encoded(30)).save_to_disk(str(saved))
    images = load(saved, tmp_path, labels="label")
    assert levels(images) == [10, 30]
    assert list(images.keys) == ["0", "3"]
    assert images.labels is not None
    assert [images.class_names[i] for i in images.labels] == ["dog", "cat"]  # type: ignore[index]
    assert list(images.skipped) == [("1", "empty file"), ("2", "no image")]
    assert load(saved, tmp_path).labels is None
    found = load(saved, tmp_path, labels="auto").labels
    assert found is not None
    assert found.tolist() == images.labels.tolist()
    for settings, message in (
        (
            {"image_column": "pixels"},
            r"=pixels: .* no such column; it has image, label",
        ),
        ({"image_column": "label"}, r"image_column=label of .* holds no images; give image"),
        ({"labels": "image"}, r"labels=image of .* not one class per row; give .*=null or label"),
        ({"labels": "kind"}, r"labels=kind: .* no such column; it has image, label"),
        ({"split": "test"}, r"split=test: .* has no split 'test'; it has"),
    ):
        with pytest.raises(UsageError, match=message):
            load(saved, tmp_path, **settings)
    with pytest.raises(UsageError, match=r"nowhere does not exist; give a folder, or hf://owner"):
        load(tmp_path / "nowhere", tmp_path)


def test_splits_are_named_and_joined(datasets: Any, tmp_path: Path) -> None:
    parts = {"train": rows(datasets, encoded(10), encoded(20)), "test": rows(datasets, encoded(30))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for name, part in parts.items():
        (tmp_path / "parquet/data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(tmp_path / f"parquet/data/{name}-00000-of-00001.parquet"))
    for root in (tmp_path / "saved", tmp_path / "parquet"):
        with pytest.raises(UsageError, match=r"has the splits train, test; give .*=train, or "):
            load(root, tmp_path)
        assert levels(load(root, tmp_path, split="test")) == [30]
        both = load(root, tmp_path, split="train+test", labels="label")
        assert levels(both) == [10, 20, 30]
        assert list(both.keys) == ["train/0", "train/1", "test/0"]
        assert both.labels is not None
        assert both.labels.tolist() == [1, 0, 1]  # numbered by the sorted names cat, dog
        with pytest.raises(UsageError, match=r"no split 'valid'; it has train, test"):
            load(root, tmp_path, split="train+valid")


def test_a_folder_of_files_and_one_of_them_changes(datasets: Any, tmp_path: Path) -> None:
    for i, kind in enumerate(("cat", "cat", "dog")):
        (tmp_path / "files" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"files/{kind}/{i}.png").write_bytes(encoded(10 * i + 10))
    images = load(tmp_path / "files", tmp_path, labels="label")
    assert levels(images) == [10, 20, 30]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    (tmp_path / "files/dog/3.png").write_bytes(encoded(90))
    assert levels(load(tmp_path / "files", tmp_path)) == [10, 20, 30, 90]


def test_no_path_of_a_row_leaves_the_data_set(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "other.png").write_bytes(encoded(90))
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet/inside.png").write_bytes(encoded(10))
    (tmp_path / "parquet/link.png").symlink_to(tmp_path / "other.png")
    paths = ["inside.png", str(tmp_path / "other.png"), "../other.png", "link.png", "a\0b"]
    parts = [{"bytes": None, "path": path} for path in paths]
    datasets.Dataset.from_dict({"image": parts}).to_parquet(str(tmp_path / "parquet/0.parquet"))
    (tmp_path / "parquet/inside.png").touch()
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "parquet/0.parquet"))
    loaded["train"].save_to_disk(str(tmp_path / "saved"))
    for name in ("inside.png", "link.png"):
        (tmp_path / "parquet" / name).rename(tmp_path / "saved" / name)
    images = load(tmp_path / "saved", tmp_path)
    assert levels(images) == [10]
    assert [key for key, _ in images.skipped] == ["1", "2", "3", "4"]
    assert all(reason.endswith("outside the data set") for _, reason in images.skipped[:3])


def test_columns_are_found_or_named(datasets: Any, tmp_path: Path) -> None:
    two = rows(datasets, encoded(10), encoded(20))
    two = two.add_column("label2", [0, 1]).cast_column("label2", two.features["label"])
    mask = [{"bytes": encoded(i), "path": None} for i in (1, 2)]
    two = two.add_column("mask", mask).cast_column("mask", datasets.Image())
    two.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UsageError, match=r"2 columns of images, image, mask; give .*=image"):
        load(tmp_path / "two", tmp_path)
    with pytest.raises(UsageError, match=r"has 2 columns of classes, .* one of label, label2"):
        load(tmp_path / "two", tmp_path, image_column="mask", labels="auto")
    assert len(load(tmp_path / "two", tmp_path, image_column="mask")) == 2
    text = datasets.Dataset.from_dict({"text": ["a"], "number": [1.5]})
    text.save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match=r"no column of images; its columns are text, number"):
        load(tmp_path / "text", tmp_path)
    with pytest.raises(UsageError, match=r"image_column=text .* holds no images; no column does"):
        load(tmp_path / "text", tmp_path, image_column="text")
    # Files of other programs: bytes, or a pair of bytes and path, without the type of an image.
    plain = datasets.Dataset.from_dict({"png": [encoded(40)], "kind": ["a"]})
    plain.save_to_disk(str(tmp_path / "plain"))
    images = load(tmp_path / "plain", tmp_path, labels="kind")
    assert (levels(images), images.class_names) == ([40], ["a"])
    with pytest.raises(
        UsageError, match=r"labels=auto: .* no column of classes, .* one of png, kind"
    ):
        load(tmp_path / "plain", tmp_path, labels="auto")
    pairs = datasets.Dataset.from_dict({"photo": [{"bytes": encoded(50), "path": "a.png"}]})
    pairs.save_to_disk(str(tmp_path / "pairs"))
    assert levels(load(tmp_path / "pairs", tmp_path)) == [50]


def test_a_name_of_the_hub(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, subset: str | None, *, revision: str | None) -> Any:
        asked.append((path, subset, revision))
        if path == "ann/scripted":
            raise RuntimeError("Dataset scripts are no longer supported, but found scripted.py")
        if path == "ann/none":
            raise ConnectionError("Couldn't reach 'ann/none' on the Hub")
        if subset is None:
            raise ValueError("Config name is missing.")
        if subset not in ("small", "large"):
            raise ValueError(f"BuilderConfig {subset!r} not found.")
        return datasets.DatasetDict({"train": rows(datasets, encoded(10), encoded(20))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = {"ann/birds": ["small", "large"]}
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: names[name])
    assert levels(load("hf://ann/birds@v1", tmp_path, subset="small")) == [10, 20]
    assert asked[-1] == ("ann/birds", "small", "v1")
    for root, settings, message in (
        ("hf://ann/birds", {}, r"has the subsets small, large; give dataset\.subset=small"),
        ("hf://ann/birds", {"subset": "x"}, r"no subset 'x', but the subsets small, large"),
        ("hf://ann/none", {}, r"ann/none cannot be read: ConnectionError: .* check the name and"),
        ("hf://ann/scripted", {}, r"code of data sets is never run; give a data set of Parquet"),
        ("hf://../none", {}, r"does not name a data set .*; give hf://owner/name or"),
        ("hf://a/b/c", {}, "does not name a data set"),
    ):
        with pytest.raises(UsageError, match=message):
            load(root, tmp_path, **settings)


def test_a_damaged_data_set_is_one_message(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet/train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UsageError, match=r"parquet cannot be read: .*; check the files"):
        load(tmp_path / "parquet", tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(UsageError, match=r"saved cannot be read: .*; check the files"):
        load(tmp_path / "saved", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty cannot be read: .*; check the files"):
        load(tmp_path / "empty", tmp_path)


def test_without_the_library_messages_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not need the library itself is tested where it is not installed too."""

    def load_dataset(path: str, subset: str | None, *, revision: str | None) -> Any:
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    library = SimpleNamespace(load_dataset=load_dataset, __version__="5.0.0")
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(UsageError, match=r"hf://ann/birds cannot be read: .*log in with hf auth"):
        load("hf://ann/birds", tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"file is not a folder; give a folder, or hf://owner"):
        load(tmp_path / "file", tmp_path)
    library.__version__ = "3.6.0"
    with pytest.raises(UsageError, match=r"datasets 3\.6\.0 can run code .* pip install -U"):
        load("hf://ann/birds", tmp_path)
