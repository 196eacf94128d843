"""stage=predict: a table of new images, and sorting them into folders without losing any."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import TINY, Finished, make_job, photographs

import spice_pl
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs.sorting import PLACE, Sorter, folder_names
from spice_pl.system.interrupts import Stopped

# TINY without the settings that the model brings.
NO_K = [text for text in TINY if not text.startswith(("dataset.num_clusters", "dataset.image"))]


@pytest.fixture
def new_photos(tmp_path: Path) -> Path:
    """A folder with images of several sizes and modes, equal names, and a file that is no image."""
    root = tmp_path / "new photos"
    (root / "sub").mkdir(parents=True)
    for i, image in enumerate(photographs(seed=1)[:6]):
        Image.fromarray(image).resize((20 + i, 13)).save(root / f"{i}.png")
    Image.fromarray(photographs(seed=1)[0]).convert("L").save(root / "sub" / "0.png")
    Image.fromarray(photographs(seed=1)[0]).save(root / "sub" / "0.bmp")
    (root / "bad.jpg").write_bytes(b"no image")
    return root


def predict(straight: Finished, root: Path, tmp_path: Path, *more: str) -> Path:
    """Run stage=predict; return its folder."""
    job = make_job(
        *("stage=predict", "dataset=folder", f"dataset.root={root}", *NO_K),
        *(f"runs_dir={tmp_path / 'new runs'}", f"cache_dir={tmp_path / 'cache'}"),
        f"predict.model={straight.folder('fixmatch').path}",
        *more,
    )
    run_stages(job)
    return job.folder("predict").path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_gets_a_line(straight: Finished, new_photos: Path, tmp_path: Path) -> None:
    found = rows(predict(straight, new_photos, tmp_path, "predict.task.batch_size=3"))
    model = spice_pl.load(straight.folder("fixmatch").path)
    expected = model.predict(new_photos)
    assert [row["image"] for row in found] == list(expected.keys)
    assert len(found) == 8
    for i, row in enumerate(found):
        assert int(row["cluster"]) == expected.clusters[i]
        assert row["name"] == f"cluster {row['cluster']}"
        assert float(row["confidence"]) == pytest.approx(expected.confidence[i], abs=1e-3)
        assert int(row["not_sure"]) == expected.not_sure[i]
        assert [row[f"nearest_{k}"] for k in (1, 2, 3)] == list(expected.nearest[i])
        assert float(row["similarity_1"]) == pytest.approx(expected.similarity[i, 0], abs=1e-3)


@pytest.mark.parametrize("changed", [0, 2])
def test_images_of_the_run_are_compared_with_its_clusters(
    straight: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: int
) -> None:
    model = spice_pl.load(straight.folder("proto").path)
    assert model.known is not None
    model.known.clusters[:changed] = (model.known.clusters[:changed] + 1) % 3
    model.save(tmp_path / "model.spice")
    root = straight.runs.parent / "my photos"
    with caplog.at_level(logging.INFO):
        predict(straight, root, tmp_path, f"predict.model={tmp_path / 'model.spice'}")
    said = f"these are the images of the run; of 90 compared, {changed} are in another cluster"
    assert said in caplog.text
    assert ("computed in 32-true" in caplog.text) == (changed > 0)


def test_other_images_are_not_compared(
    straight: Finished, new_photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        predict(straight, new_photos, tmp_path)
    assert "images of the run" not in caplog.text


def test_parquet_says_the_same(straight: Finished, new_photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'spice-pl[parquet]'")
    folder = predict(straight, new_photos, tmp_path, "predict.task.batch_size=3")
    found = parquet.read_table(folder / "predictions.parquet").to_pydict()
    table = rows(folder)
    assert list(found) == list(table[0])
    for key in ("image", "name", "nearest_2"):
        assert found[key] == [row[key] for row in table]
    assert found["cluster"] == [int(row["cluster"]) for row in table]
    assert found["not_sure"] == [bool(int(row["not_sure"])) for row in table]


def test_data_sets_without_files_can_be_predicted(straight: Finished, tmp_path: Path) -> None:
    file = straight.folder("fixmatch").path / "model.spice"
    job = make_job("stage=predict", f"runs_dir={tmp_path}", f"predict.model={file}")
    run_stages(job)
    assert len(rows(job.folder("predict").path)) == 1797
    run_stages(job)  # a second prediction is not refused


@pytest.mark.parametrize("sort", ["copy", "hardlink", "symlink"])
def test_files_are_sorted_and_stay_where_they_were(
    straight: Finished, new_photos: Path, tmp_path: Path, sort: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in new_photos.rglob("*") if path.is_file()}
    folder = predict(straight, new_photos, tmp_path, f"predict.sort={sort}")
    placed = [path for path in (folder / "sorted").rglob("*") if not path.is_dir()]
    assert before == {
        path: path.stat().st_mtime_ns for path in new_photos.rglob("*") if path.is_file()
    }
    table = rows(folder)
    assert len(placed) == len(table) == 8
    for row in table:
        source = new_photos / row["image"]
        stem = source.stem
        found = [
            path
            for path in placed
            if path.parts[len(folder.parts) + 1] == row["name"]
            and path.stem.startswith(stem)
            and path.read_bytes() == source.read_bytes()
        ]
        assert found, row
        assert ("not sure" in found[0].parts) == bool(int(row["not_sure"]))
        assert found[0].is_symlink() == (sort == "symlink")
        assert found[0].samefile(source) == (sort != "copy")


def test_files_of_one_name_and_cluster_get_numbers(straight: Finished, tmp_path: Path) -> None:
    root = tmp_path / "same names"
    for sub in ("a", "b", "c"):
        (root / sub).mkdir(parents=True)
        Image.fromarray(photographs()[0]).save(root / sub / "x.png")
    folder = predict(straight, root, tmp_path, "predict.sort=copy")
    names = sorted(path.name for path in (folder / "sorted").rglob("*.png"))
    assert names == ["x (2).png", "x (3).png", "x.png"]


@pytest.mark.parametrize("at", ["copying", "sorted"])
def test_a_stop_while_files_are_sorted_leaves_none_that_look_complete(
    straight: Finished, new_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Stopped in the middle of the third file, or before the folder gets its name."""
    copied: list[Path] = []

    def cut(source: Path, target: Path) -> None:
        copied.append(target)
        target.write_bytes(source.read_bytes()[: 10 if len(copied) == 3 else None])
        if len(copied) == 3:
            raise Stopped

    def stop(sorter: Sorter) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        if at == "copying":
            patched.setitem(PLACE, "copy", cut)
        else:
            patched.setattr(Sorter, "finish", stop)
        with pytest.raises(Stopped):
            predict(straight, new_photos, tmp_path, "predict.sort=copy")
    folder = tmp_path / "new runs" / "new photos" / "predict" / "seed0"
    assert not (folder / "sorted").exists()
    assert (folder / "predictions.csv").exists() == (at == "sorted")
    predict(straight, new_photos, tmp_path, "predict.sort=copy", "resume=true")
    placed = [path for path in (folder / "sorted").rglob("*") if path.is_file()]
    originals = [path for path in new_photos.rglob("*") if path.name != "bad.jpg"]
    contents = [path.read_bytes() for path in originals if path.is_file()]
    assert sorted(path.read_bytes() for path in placed) == sorted(contents)
    assert not (folder / ".sorted").exists()


def test_sorted_folders_are_not_mixed(straight: Finished, new_photos: Path, tmp_path: Path) -> None:
    predict(straight, new_photos, tmp_path, "predict.sort=copy")
    with pytest.raises(UsageError, match="holds sorted files already and nothing is replaced"):
        predict(straight, new_photos, tmp_path, "predict.sort=copy")
    with pytest.raises(UsageError, match=r"is inside dataset\.root"):
        predict(straight, tmp_path, tmp_path, "predict.sort=copy")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["predict.model=null"], r"stage=predict needs a trained model; give predict\.model=FILE"),
        (["predict.sort=move"], r"predict\.sort 'move' must be one of none, copy, hardlink"),
        (["predict.model=/not/there"], r"/not/there does not exist"),
    ],
)
def test_mistakes_are_named(
    straight: Finished, new_photos: Path, tmp_path: Path, more: Sequence[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        predict(straight, new_photos, tmp_path, *more)


def test_sorting_needs_files(straight: Finished, tmp_path: Path) -> None:
    file = straight.folder("fixmatch").path
    job = make_job(
        *("stage=predict", f"runs_dir={tmp_path}", f"predict.model={file}", "predict.sort=copy")
    )
    with pytest.raises(UsageError, match=r"predict\.sort=copy needs image files and digits has"):
        run_stages(job)


def test_a_full_disk_is_named(
    straight: Finished, new_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setitem(spice_pl.runs.sorting.PLACE, "hardlink", refuse)
    with pytest.raises(UsageError, match="a hard link needs one file system"):
        predict(straight, new_photos, tmp_path, "predict.sort=hardlink")


def test_folder_names_differ_whatever_the_names() -> None:
    names = ["", "a" * 300, "a" * 299, "x\ny", "../../etc", "not sure", "com1"]
    folders = folder_names(names)
    assert len({name.casefold() for name in folders}) == len(names)
    assert all(name and "/" not in name and len(name) < 120 for name in folders)
    assert not {"..", ".", "not sure"} & set(folders)
    assert np.all([name.isprintable() for name in folders])
