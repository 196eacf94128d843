"""Recognise image files by their names and first bytes, and open them with Pillow."""

from __future__ import annotations

import functools
import importlib
import io
import os
import re
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import PIL
from PIL import Image, ImageFile, UnidentifiedImageError, features

from spice_pl.data.levels import name_planes

# Only these decoders are tried, whatever a file is called: others of Pillow run programs (EPS).
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF"),
    *("JPEG2000", "JXL", "QOI", "DIB"),
)
# A file with one of these is expected to be an image; other files are if they begin like one.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp"),
    *(".dib", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".avif"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jxl", ".qoi", ".hif", ".avifs"),
}
RAW_SUFFIXES = {
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf"),
    *(".pef", ".srw", ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mef", ".mos", ".mrw", ".rwl"),
}
# Pictures of formats that are not read: drawings, layers, icons, textures, films of medicine.
OTHER_SUFFIXES = {
    *(
        ".psd",
        ".psb",
        ".xcf",
        ".kra",
        ".tga",
        ".dds",
        ".exr",
        ".hdr",
        ".pcx",
        ".sgi",
        ".ico",
        ".cur",
    ),
    *(".icns", ".svg", ".svgz", ".eps", ".ai", ".pdf", ".wmf", ".emf", ".dcm", ".dicom", ".nii"),
    *(".fits", ".fit", ".jxr", ".wdp", ".hdp", ".pfm", ".xbm", ".xpm", ".ras", ".djvu", ".czi"),
}
ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
HEAD_BYTES = 32  # of a file, enough to tell its format
# The first bytes of the formats above. BMP's two letters may begin a text, so the size of its
# second header counts too; HEIF and AVIF have brands. The last line is JPEG 2000, JPEG XL and QOI.
HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s+[\d#]"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|....ftyp(avi[fs]|he[iv][cfmsx]|mif1|msf1)"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|\0\0\0\x0cJXL \r\n\x87\n|qoif",
    re.DOTALL,
)


PLUGINS = ("pillow_heif", "pillow_jxl")  # packages that add decoders to Pillow


@dataclass(frozen=True)
class Part:
    """A file inside an archive: path of the archive, first byte and number of bytes."""

    path: Path
    start: int
    size: int


def is_image(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is an image of a format above.

    >>> is_image(b"GIF89a, of 8 x 8 pixels"), is_image(b"BMW is a maker of cars")
    (True, False)
    """
    return HEADS.match(head) is not None


@functools.cache
def decoders() -> tuple[str, ...]:
    """Return names and versions of everything that decides which files can be decoded."""
    known = {*features.modules, *features.codecs, *features.features}
    libraries = ("libjpeg_turbo", "jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")
    found = [f"{name} {features.version(name)}" for name in libraries if name in known]
    for plugin in PLUGINS:
        with suppress(ImportError):
            found.append(f"{plugin} {importlib.import_module(plugin).__version__}")
    return (f"Pillow {PIL.__version__}", *found)


def open_bytes(file: Path | bytes | Part) -> BinaryIO:
    """Open a file, a part of one, or bytes, for reading."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    return io.BufferedReader(_PartOfFile(file) if isinstance(file, Part) else _File(file))


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image of a format above, as `Image.open` does."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # another format
            if accepts is None or accepts(head) is True:
                file.seek(0)
                opened = factory(file, "")
                name_planes(opened)
                return opened
    raise UnidentifiedImageError(_unidentified(head))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag


class _File(io.FileIO):
    """A file that is read through Python, so that each error says what the system said.

    libtiff would read the descriptor itself and call a failing disk a damaged image. A pipe that
    has taken the place of a file is empty; opening it would wait for someone who writes to it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, opener=_open_at_once)

    def fileno(self) -> int:
        """Refuse to give the descriptor."""
        raise io.UnsupportedOperation("fileno")


class _PartOfFile(_File):
    """A part of a file, as a file."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.path)
        self._start, self._size, self._place = part.start, part.size, 0
        self.seek(0)

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the part."""
        count = max(0, min(len(buffer), self._size - self._place))
        done = super().readinto(memoryview(buffer)[:count]) or 0
        self._place += done
        return done

    def readall(self) -> bytes:
        """Return everything up to the end of the part."""
        data = bytearray(max(0, self._size - self._place))
        return bytes(data[: self.readinto(data)])

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place of the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = super().seek(self._start + base + offset) - self._start
        return self._place

    def tell(self) -> int:
        """Return the place in the part."""
        return self._place


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 - registers its decoder
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(head: bytes) -> str:
    if not head:
        return "empty file"
    if head[4:8] == b"ftyp" and is_image(head):
        if head[8:11] == b"avi":
            known = "AVIF" in _formats()
            return "damaged AVIF" if known else "AVIF needs Pillow 11.3 or newer"
        if "HEIF" not in _formats():
            return "HEIC needs one more package; pip install 'spice-pl[heic]'"
    if head.startswith((b"\0\0\0\x0cJXL ", b"\xff\x0a")) and "JXL" not in _formats():
        return "JPEG XL needs one more package; pip install pillow-jxl-plugin"
    return "cannot identify image file"
