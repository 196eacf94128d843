"""Load images from plain tar files in place, in the layout of WebDataset.

Nothing is unpacked, so no path can leave the archive.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import functools
import logging
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from spice_pl.data.decode import Decoding, Loaded, read_image
from spice_pl.data.formats import FORMATS, HEAD_BYTES, SUFFIXES, Part, is_image
from spice_pl.data.images import ImageSet
from spice_pl.data.left_out import LeftOut, unwanted
from spice_pl.data.listing import leaves
from spice_pl.data.sources.folder import add_left_out
from spice_pl.data.sources.table import stored_images
from spice_pl.data.store import open_store
from spice_pl.data.store_writer import Source
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

MAX_LABEL = 1024  # bytes of a class
MAX_HEADER = 1 << 20  # bytes of a long name or of other facts about one member
FACTS = {
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
}


@dataclass(frozen=True)
class Member:
    """An image in a tar file: key, offset and size of its bytes, and its class."""

    key: str
    shard: Path
    start: int
    size: int
    label: str | None


@dataclass(frozen=True)
class Index:
    """What a tar file holds.

    Attributes:
        images: its images, in order.
        left_out: members that are not used though they may be images.
        num_others: number of other files, such as labels and captions.
    """

    images: list[Member]
    left_out: LeftOut
    num_others: int


def shards(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "shards",
    labels: str = "none",
    levels: Sequence[float] | None = None,
    max_decode_mb: float | None = None,
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return the images of all tar files in a folder, in the order of shards and members.

    Args:
        root: folder with `*.tar`, or one tar file. They must not be compressed, since members are
            read in any order.
        image_size: side S in pixels; the shorter side is scaled, the middle square kept.
        cache_dir: folder of the image stores.
        name: name of the data set and of its folder of results.
        labels: "cls" reads the member `<sample>.cls` beside an image as its true class, for
            `truth/*` metrics only; "none" has no truth.
        levels: black and white of images of more than 8 bits; None chooses them for each image.
        max_decode_mb: megabytes of memory that decoding may take; None is 1024.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        protocol: "whole".

    Raises:
        UsageError: there is no tar file, no image in any, or one is compressed or damaged.
    """
    if labels not in ("none", "cls"):
        raise UsageError(f"dataset.labels {labels!r} is none of ('none', 'cls')")
    place = Path(root).expanduser()
    files = sorted(place.glob("*.tar")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        packed = sorted(place.glob("*.tar.*")) + sorted(place.glob("*.tgz"))
        way = f"; {packed[0].name} is compressed: unpack it to a plain tar file" if packed else ""
        raise UsageError(f"dataset.root={root} holds no *.tar file{way}")
    stats, decoding = [file.stat() for file in files], Decoding(image_size, levels, max_decode_mb)
    indices = functools.cache(lambda: [read_index(file) for file in files])
    members = functools.cache(lambda: [image for index in indices() for image in index.images])

    def source() -> Source:
        left_out, others = LeftOut(), sum(index.num_others for index in indices())
        for index in indices():
            left_out.update(index.left_out)
        if not members():
            raise UsageError(
                f"no image in the {len(files)} tar files of dataset.root={root}, which hold "
                f"{others:,} other files and {len(left_out):,} that are left out"
                f"{left_out.summary()}; looked for {', '.join(FORMATS)}"
            )
        logger.info("%s: %s members that are not images", name, f"{others:,}")
        return Source(f"dataset.root={root}", [each.key for each in members()], load, left_out)

    def load(i: int) -> Loaded:
        member = members()[i]
        return read_image(Part(member.shard, member.start, member.size), decoding)

    stored = open_store(
        [
            levels,
            *(
                [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
                for file, stat in zip(files, stats, strict=True)
            ),
        ],
        image_size,
        cache_dir,
        source,
        on_bad_image,
        limits=decoding.limits,
    )
    given = [member.label for member in members()] if labels == "cls" else None
    return add_left_out(stored_images(stored, name, protocol, given), stored.left_out)


def read_index(file: Path) -> Index:
    """Return the images of a tar file, and what else it holds.

    Hard links are followed. A name that occurs twice means its last member, as it does for a
    program that unpacks the file.

    Raises:
        UsageError: the file is compressed or damaged.
    """
    images: dict[str, tuple[str, int, int]] = {}
    data: dict[str, tuple[int, int]] = {}
    classes: dict[str, str] = {}
    left_out, num_others = LeftOut(), 0
    with file.open("rb") as raw:
        for member in _members(file):
            if member.isdir():
                continue
            key, path = f"{file.name}/{member.name}", posixpath.normpath(member.name)
            place: tuple[int, int] | None = member.offset_data, member.size
            if member.islnk():
                place = data.get(posixpath.normpath(member.linkname))
            reason = _unwanted(member)
            if reason or place is None:
                left_out.add(key, reason or "a hard link to a member that is not there")
                continue
            data[path] = place
            stem, suffix = posixpath.splitext(path)
            raw.seek(place[0])
            head = raw.read(min(place[1], HEAD_BYTES))
            if suffix == ".cls":
                text = head + raw.read(min(place[1] - len(head), MAX_LABEL))
                classes[stem] = text.decode("utf-8", "replace").strip()
            if suffix.lower() not in SUFFIXES and not is_image(head):
                num_others += 1
                continue
            if path in images:
                left_out.add(f"{file.name}/{images.pop(path)[0]}", "replaced by a later member")
            images[path] = (member.name, *place)
    found = [
        Member(f"{file.name}/{name}", file, start, size, _label(path, classes))
        for path, (name, start, size) in images.items()
    ]
    return Index(found, left_out, num_others)


class _Header(tarfile.TarInfo):
    """A header whose sizes are checked before they are used.

    A negative size makes tarfile read the same headers for ever (CVE-2025-8194).
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header.

        Raises:
            tarfile.ReadError: its size is negative, or a name in it is larger than a megabyte.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in FACTS and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header gives a size of {header.size} bytes")
        return header


def _members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file.

    Raises:
        UsageError: it is compressed or damaged.
    """
    size, last = file.stat().st_size, -1
    try:
        with tarfile.open(file, "r:", tarinfo=_Header) as opened:
            while (member := opened.next()) is not None:
                opened.members.clear()  # type: ignore[attr-defined]  # a kilobyte each
                end = member.offset_data + (member.size if member.isreg() else 0)
                if member.size < 0 or member.offset_data <= last or end > size:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                last = member.offset_data
                yield member
            with file.open("rb") as raw:
                raw.seek(opened.offset)
                if any(raw.read(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"no header at byte {opened.offset}")
    except Exception as error:  # tarfile raises many types on damaged headers
        raise UsageError(f"{file} cannot be read as a plain tar file: {error}") from error


def _unwanted(member: tarfile.TarInfo) -> str | None:
    """Return why a member is not looked at, or None."""
    if leaves(member.name):
        return "its name leads out of the archive"
    *folders, name = posixpath.normpath(member.name).split("/")
    inside = zip(["", *folders], folders, strict=False)
    named = [unwanted(folder, is_folder=True, parent=parent) for parent, folder in inside]
    named.append(unwanted(name))
    if reason := next(filter(None, named), None):
        return reason
    if member.issym():
        return "a symbolic link"
    if member.issparse():
        return "a sparse file"
    return None if member.isreg() or member.islnk() else "not a file"


def _label(path: str, classes: Mapping[str, str]) -> str | None:
    """Return the class of an image: of the .cls with the longest name that the image's begins with.

    `22.00.jpg` takes `22.00.cls`, or `22.cls` if that does not exist.
    """
    folder, _, name = path.rpartition("/")
    while "." in name:
        name = name.rpartition(".")[0]
        if label := classes.get(f"{folder}/{name}" if folder else name):
            return label
    return None
