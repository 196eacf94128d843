from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spice_pl.data.images import ImageSet
from spice_pl.data.sources.archives import hugging_face, read_index, shards
from spice_pl.errors import UsageError

S = 4


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (S, S), level).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in more:
            archive.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def load(tmp_path: Path, **more: Any) -> ImageSet:
    return shards(str(tmp_path / "shards"), S, str(tmp_path / "cache"), **more)


def test_shards_are_read_in_order_where_they_are(tmp_path: Path) -> None:
    first = {"b.png": encoded(10), "b.cls": b"7", "a.jpg": encoded(20), "a.json": b"{}"}
    second = {"x/b.png": encoded(30), "x/b.cls": b"10\n", "c.png": b"", "c.cls": b"7"}
    write_tar(tmp_path / "shards/1.tar", second)
    write_tar(tmp_path / "shards/0.tar", first)
    images = load(tmp_path, labels="cls")
    assert list(images.keys) == ["0.tar/b.png", "0.tar/a.jpg", "1.tar/x/b.png"]
    assert images.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert images.labels is not None
    assert images.labels.tolist() == [0, -1, 1]
    assert images.class_names == ["7", "10"]
    assert list(images.skipped) == [("1.tar/c.png", "empty file")]
    assert load(tmp_path).labels is None
    before = images.fingerprint
    write_tar(tmp_path / "shards/1.tar", second | {"d.png": encoded(40)})
    assert load(tmp_path).fingerprint != before


def test_no_path_of_a_shard_leaves_it(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    write_tar(
        tmp_path / "shards/0.tar",
        {"../../evil.png": encoded(10), "/root.png": encoded(20)},
        link,
        device,
    )
    images = load(tmp_path)
    assert list(images.keys) == ["0.tar/../../evil.png", "0.tar//root.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "shards"]
    assert not Path("/root.png").exists()


def test_a_member_that_claims_more_than_there_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/0.tar", {"a.png": encoded(10), "b.png": encoded(20)})
    raw = bytearray((tmp_path / "shards/0.tar").read_bytes())
    header = tarfile.TarInfo("b.png")
    header.size = 1 << 40
    place = raw.index(b"b.png")
    raw[place : place + 512] = header.tobuf()
    (tmp_path / "shards/0.tar").write_bytes(raw)
    with pytest.raises(UsageError, match="cannot be read as a plain tar file"):
        load(tmp_path)


def test_what_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \*\.tar file"):
        load(tmp_path)
    write_tar(tmp_path / "shards/0.tar", {"a.txt": b"x"})
    with pytest.raises(UsageError, match="no image in the 1 tar files"):
        load(tmp_path)
    write_tar(tmp_path / "shards/0.tar", {"a.png": encoded(1)}, mode="w:gz")
    with pytest.raises(UsageError, match="cannot be read as a plain tar file"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"dataset\.labels 'csv' is none of"):
        load(tmp_path, labels="csv")


def test_the_index_says_where_each_image_begins(tmp_path: Path) -> None:
    data = {"a.png": encoded(10), "b.png": encoded(20)}
    write_tar(tmp_path / "0.tar", data)
    raw = (tmp_path / "0.tar").read_bytes()
    for member in read_index(tmp_path / "0.tar"):
        assert raw[member.start : member.start + member.size] == data[member.key[6:]]


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["dog", "cat"])
    )
    rows = {
        "image": [{"bytes": data, "path": None} for data in (encoded(10), b"", encoded(30))],
        "label": [1, 0, 0],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    cache = str(tmp_path / "cache")
    images = hugging_face(str(tmp_path / "saved"), S, cache, labels="label")
    assert images.images[:, 0, 0, 0].tolist() == [10, 30]
    assert list(images.keys) == ["0", "2"]
    assert images.labels is not None
    assert [images.class_names[i] for i in images.labels] == ["cat", "dog"]  # type: ignore[index]
    assert list(images.skipped) == [("1", "empty file")]
    assert hugging_face(str(tmp_path / "saved"), S, cache).labels is None
    with pytest.raises(UsageError, match=r"has no column 'pixels'; it has image, label"):
        hugging_face(str(tmp_path / "saved"), S, cache, image_column="pixels")
    with pytest.raises(UsageError, match="is not a data set on disk"):
        hugging_face(str(tmp_path / "nowhere"), S, cache)
