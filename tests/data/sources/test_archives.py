from __future__ import annotations

import errno
import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spice_pl.data.images import ImageSet
from spice_pl.data.sources import archives
from spice_pl.data.sources.archives import read_index, shards
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
    with pytest.raises(UsageError, match=r"no image in .* 4 that are left out \(2 its name leads"):
        load(tmp_path)
    write_tar(tmp_path / "shards/1.tar", {"./a.png": encoded(30)})
    images = load(tmp_path)
    assert list(images.keys) == ["1.tar/./a.png"]
    outside, not_file = "its name leads out of the archive", "not a file"
    assert list(images.skipped) == [
        ("0.tar/../../evil.png", outside),
        ("0.tar//root.png", outside),
        ("0.tar/device.png", not_file),
        ("0.tar/link.png", "a symbolic link"),
    ]
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


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a header with any bytes as its size."""
    raw = bytearray(tarfile.TarInfo(name).tobuf())
    raw[124:136] = size.ljust(12, b"\0")
    raw[156:157] = kind
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def large(number: int) -> bytes:
    """Return a size as GNU tar writes it, in base 256."""
    return number.to_bytes(12, "big", signed=True) if number < 0 else b"\x80" + number.to_bytes(11)


HOSTILE = {
    "negative": header("b.png", large(-1024)),
    "negative in digits": header("b.png", b"-1024"),
    "negative and small": header("b.png", large(-1)),
    "a negative name": header("x", large(-512), b"L"),
    "a name of 17 GB": header("x", large(1 << 34), b"L"),
    "a negative fact": header("x", b"00000000013", b"x") + b"12 size=-51\n".ljust(512, b"\0"),
    "negative facts": header("x", b"00000000015", b"x")
    + b"13 size=-1024".ljust(512, b"\0")
    + header("b.png", b"0"),
    "damaged facts": header("x", b"00000000015", b"x") + b"999 size".ljust(512, b"\0"),
    "facts without end": header("x", b"0", b"x") * 3000,
    "sparse": header("b.png", b"\xff" * 12, b"S"),
    "sparse without end": header("b.png", b"0", b"S")[:482] + b"\1" * 30,
    "no header": b"b.png".ljust(512, b"x"),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_an_error_and_no_endless_loop(tmp_path: Path, raw: bytes) -> None:
    write_tar(tmp_path / "shards/0.tar", {"a.png": encoded(10)})
    whole = (tmp_path / "shards/0.tar").read_bytes()
    (tmp_path / "shards/0.tar").write_bytes(whole[:1024] + raw + bytes(1024))
    with pytest.raises(UsageError, match=r"0\.tar cannot be read as a plain tar file"):
        load(tmp_path)


@pytest.mark.parametrize("size", [large(-1024), b"-1024", large(-(1 << 60)), large(-512)])
def test_the_first_header_may_be_the_hostile_one(tmp_path: Path, size: bytes) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(header("a.png", size) + bytes(1024))
    with pytest.raises(UsageError, match=r"0\.tar cannot be read as a plain tar file"):
        load(tmp_path)


def test_hard_links_are_followed(tmp_path: Path) -> None:
    link, gone = tarfile.TarInfo("x/b.png"), tarfile.TarInfo("c.png")
    link.type, link.linkname = tarfile.LNKTYPE, "./a.png"
    gone.type, gone.linkname = tarfile.LNKTYPE, "nowhere.png"
    path = tmp_path / "shards/0.tar"
    write_tar(path, {"a.png": encoded(10), "a.cls": b"cat", "x/b.cls": b"dog"})
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
        archive.addfile(gone)
    images = load(tmp_path, labels="cls")
    assert list(images.keys) == ["0.tar/a.png", "0.tar/x/b.png"]
    assert images.images[:, 0, 0, 0].tolist() == [10, 10]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1]
    assert list(images.skipped) == [("0.tar/c.png", "a hard link to a member that is not there")]


def test_the_last_member_of_a_name_is_meant(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards/0.tar", {"a.png": encoded(10), "b.png": encoded(20)})
    with tarfile.open(tmp_path / "shards/0.tar", "a") as archive:
        member = tarfile.TarInfo("./a.png")
        member.size = len(encoded(30))
        archive.addfile(member, io.BytesIO(encoded(30)))
    images = load(tmp_path)
    assert list(images.keys) == ["0.tar/b.png", "0.tar/./a.png"]
    assert images.images[:, 0, 0, 0].tolist() == [20, 30]
    assert list(images.skipped) == [("0.tar/a.png", "replaced by a later member")]
    again = load(tmp_path)  # from the store
    assert list(again.skipped) == list(images.skipped)


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("22.00.jpg", {"22.00.cls": b"a", "22.01.cls": b"b"}, "a"),  # up to the last dot
        ("22.00.jpg", {"22.cls": b"a"}, "a"),  # up to the first dot, as WebDataset does
        ("22.left.seg.png", {"22.left.cls": b"a", "22.cls": b"b"}, "a"),
        ("x/22.00.jpg", {"22.00.cls": b"a"}, None),
        ("22.jpg", {"22.00.cls": b"a"}, None),
    ],
)
def test_labels_belong_to_names_with_dots(
    tmp_path: Path, name: str, labels: dict[str, bytes], expected: str | None
) -> None:
    data = {name: encoded(10), "z.jpg": encoded(20), "z.cls": b"z"}
    write_tar(tmp_path / "shards/0.tar", data | labels)
    images = load(tmp_path, labels="cls")
    assert images.labels is not None
    assert images.class_names is not None
    label = int(images.labels[0])
    assert (images.class_names[label] if label >= 0 else None) == expected


def test_it_is_said_how_many_images_have_a_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{i}.jpg": encoded(i) for i in range(9)} | {f"{i}.cls": b"%d" % i for i in range(3)}
    write_tar(tmp_path / "shards/0.tar", files)
    with caplog.at_level(logging.INFO):
        load(tmp_path, labels="cls")
    assert "3 of 9 images have a label, of 3 classes" in caplog.text


def test_content_decides_in_archives_too(tmp_path: Path) -> None:
    files = {"a": encoded(10), "b.bin": encoded(20), "c.txt": b"text", "._a.png": b"x"}
    write_tar(tmp_path / "shards/0.tar", files | {"__MACOSX/a.png": encoded(30)})
    images = load(tmp_path)
    assert list(images.keys) == ["0.tar/a", "0.tar/b.bin"]
    assert list(images.skipped) == [
        ("0.tar/._a.png", "hidden"),
        ("0.tar/__MACOSX/a.png", "in __MACOSX, a folder of macOS"),
    ]


def test_a_shard_that_fails_is_not_blamed_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "shards/0.tar", {"a.png": encoded(10)})

    def failing(file: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(archives, "read_index", failing)
    with pytest.raises(UsageError, match=r"0\.tar cannot be read: Input/output error"):
        load(tmp_path)


def test_what_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \*\.tar file"):
        load(tmp_path)
    write_tar(tmp_path / "shards/0.tar", {"a.txt": b"x"})
    with pytest.raises(UsageError, match=r"no image in the 1 tar files .* hold 1 other files"):
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
    for member in read_index(tmp_path / "0.tar").images:
        assert raw[member.start : member.start + member.size] == data[member.key[6:]]


def test_a_compressed_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match=r"no \*\.tar file; 0\.tar\.gz is compressed: unpack it"):
        load(tmp_path)
