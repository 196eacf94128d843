"""Decode one image file to (3, S, S) RGB, or return the reason why it cannot be decoded.

No other module decodes files.

Shapes: S side in pixels.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from spice_pl.data.formats import Part, open_bytes, open_image
from spice_pl.data.levels import deep_levels, is_deep, is_wide, scaled, wide_levels
from spice_pl.data.retry import may_pass
from spice_pl.errors import UsageError

MAX_DECODE_MB = 1024  # memory that decoding may take
# Bytes of memory that decoding takes per pixel, by format; what alpha or more than 8 bits, several
# channels of 16 bits and a rotation add; what a progressive JPEG adds for each pixel of the file.
FORMAT_BYTES = {
    "TIFF": 8,
    "WEBP": 17,
    "AVIF": 12,
    "HEIF": 12,
    "JPEG2000": 24,
    "JXL": 24,
}  # the others: 5
MODE_BYTES, DEEP_BYTES, TURN_BYTES, PROGRESSIVE_BYTES = 8, 20, 4, 6
# How a JPEG and a GIF begin and end. In the zeros at the end of a copy that failed, Pillow would
# look for the rest of the image byte by byte, and show what is missing as grey.
ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"GIF8": b";"}
ZEROS = 512  # bytes of zeros at the end of such a file that are looked for
MOST_ZEROS = 1 << 26  # bytes; so many zeros at the end are not looked through
MOST_SCANS = 200  # of a progressive JPEG, usually about ten; each takes the time of a whole image
ORIENTATION = 0x0112  # tag of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """A decoded image.

    Attributes:
        pixels: (3, S, S) uint8.
        format: Pillow's name of the file format; "array" for pixels from an array.
        width: width of the file in pixels.
        height: height of the file in pixels.
        black: level of the file that is 0 here.
        white: level of the file that is 255 here.
    """

    pixels: NDArray[np.uint8]
    format: str
    width: int
    height: int
    black: float = 0.0
    white: float = 255.0


@dataclass(frozen=True)
class Unread:
    """A file that could not be read for now and may be a healthy image.

    Attributes:
        reason: what the system said.
        soon: whether another attempt within seconds may succeed.
    """

    reason: str
    soon: bool = True


# A decoded image, `Unread`, or the reason why an image cannot be decoded.
Loaded = Decoded | Unread | str


@dataclass(frozen=True)
class Decoding:
    """How files are decoded.

    Attributes:
        image_size: side S in pixels.
        levels: black and white of images of more than 8 bits; None chooses them for each image.
        max_decode_mb: megabytes of memory that decoding may take, of all threads together; None
            is 1024. An image that needs more is refused.

    Raises:
        UsageError: a setting is out of range.
    """

    image_size: int
    levels: Sequence[float] | None = None
    max_decode_mb: float | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UsageError(f"dataset.image_size {self.image_size} is not positive")
        levels = self.levels
        if levels is not None and not _are_levels(levels):
            raise UsageError(
                f"dataset.levels={levels} are not black and white; give two numbers, the "
                "smaller one first, such as dataset.levels=[0,4095]"
            )
        if self.max_decode_mb is not None and not self.max_decode_mb > 0:
            raise UsageError(f"dataset.max_decode_mb {self.max_decode_mb} is not positive")

    @property
    def max_bytes(self) -> int:
        """Bytes of memory that decoding may take."""
        return int(1e6 * (MAX_DECODE_MB if self.max_decode_mb is None else self.max_decode_mb))

    @property
    def limits(self) -> list[str]:
        """What decides, beside the decoders, which files can be decoded."""
        return [f"max_decode_mb {self.max_bytes / 1e6:g}"]


def _are_levels(given: Any) -> bool:
    """Whether these are two numbers, the smaller one first."""
    numbers = isinstance(given, Sequence) and all(isinstance(each, int | float) for each in given)
    return numbers and len(given) == 2 and bool(given[0] < given[1])


def decode(
    path: Path, image_size: int, levels: Sequence[float] | None = None
) -> NDArray[np.uint8] | str:
    """Return one image as `square` does, or the reason why it cannot be decoded."""
    image = read_image(path, Decoding(image_size, levels))
    if isinstance(image, Unread):
        return image.reason
    return image if isinstance(image, str) else image.pixels


def read_image(file: Path | bytes | Part, decoding: Decoding) -> Decoded | Unread | str:
    """Decode one file as `square` does, or return the reason why it cannot be decoded.

    A JPEG of more than twice the size is decoded at 1/2, 1/4 or 1/8 of its size, which the format
    allows, and scaled from there. Threads wait for each other if they would take too much memory
    together.

    Returns:
        The image; the reason why it cannot be decoded; or `Unread` after an error that tells
        nothing about the image, such as too many open files.
    """
    try:
        with open_bytes(file) as data:
            head, size = data.read(4), data.seek(0, os.SEEK_END)
            if any(head.startswith(begin) and _is_cut(data, ENDS[begin]) for begin in ENDS):
                return "cut off: the file ends in zeros"
            if size > decoding.max_bytes:  # some decoders read the whole file to open it
                return f"a file of {size / 1e6:,.0f} MB; {_allow(size)}"
            with open_image(data) as opened:
                return _decoded(opened, data, decoding)
    except FileNotFoundError:
        return "vanished after the folder was listed"
    except PermissionError:
        return Unread("permission denied", soon=False)
    except Exception as error:  # Pillow raises many types on damaged files
        return unread(error) if may_pass(error) else _reason(error)


def _decoded(opened: ImageFile.ImageFile, data: BinaryIO, decoding: Decoding) -> Decoded | str:
    """Decode an image that has been opened, unless it takes too much memory or time."""
    (width, height), kind = opened.size, str(opened.format)
    if opened.info.get("progressive") and (scans := _num_scans(data)) > MOST_SCANS:
        return f"{scans} scans in a progressive JPEG, which would take very long; save it again"
    opened.draft(None, (2 * decoding.image_size, 2 * decoding.image_size))
    need = _memory(opened, width * height, data)
    if need > decoding.max_bytes:
        return f"{width} x {height} pixels take {need / 1e6:.0f} MB to decode; {_allow(need)}"
    with _memory_in_use.take(need, decoding.max_bytes):
        made, black, white = _eight_bits(opened, data, decoding.levels)
        pixels = _fit(made, _turn(opened), decoding.image_size)
    return Decoded(pixels, "JPEG" if kind == "MPO" else kind, width, height, black, white)


def _allow(need: int) -> str:
    bomb = "if this is not a decompression bomb"
    return f"{bomb}, set dataset.max_decode_mb={math.ceil(need / 1e6)}"


def _num_scans(data: BinaryIO) -> int:
    """Return the number of scans of a JPEG; those of a preview in its EXIF data count too."""
    place = data.tell()
    data.seek(0)
    count, before = 0, b""
    while part := data.read(1 << 20):
        count += (before + part).count(b"\xff\xda")
        before = part[-1:]
    data.seek(place)
    return count


def _is_cut(data: BinaryIO, end: bytes) -> bool:
    """Return whether the end of a file is missing and was filled with zeros, as failed copies are.

    Zeros after the end of the image do not matter.
    """
    size = data.seek(0, os.SEEK_END)
    if size < ZEROS:
        return False
    data.seek(size - ZEROS)
    if any(data.read(ZEROS)):
        return False
    first = max(-ZEROS, size - MOST_ZEROS)
    for start in range(size - ZEROS, first, -ZEROS):  # back to the last byte that is not zero
        data.seek(max(start, 0))
        if tail := data.read(ZEROS).rstrip(b"\0"):
            data.seek(max(max(start, 0) + len(tail) - len(end), 0))
            return data.read(len(end)) != end
    return True


def unread(error: BaseException) -> Unread:
    """Return what could not be read because of an error that may pass."""
    said = error.strerror if isinstance(error, OSError) else "not enough memory"
    return Unread(f"cannot be read now: {said}")


def square(
    image: Image.Image, image_size: int, levels: Sequence[float] | None = None
) -> NDArray[np.uint8]:
    """Return an image of any size and mode as (3, S, S) RGB.

    EXIF rotation is applied, transparency is blended with white, the first of several frames is
    used, the shorter side is scaled to `image_size` and the middle square is kept. Levels of more
    than 8 bits are scaled, see `spice_pl.data.levels`.

    Args:
        image: an image of Pillow.
        image_size: side S in pixels.
        levels: black and white of images of more than 8 bits; None chooses them for each image.
    """
    image.load()
    made = scaled(wide_levels(image), levels)[0] if is_wide(image) else image
    return _fit(made, _turn(image), image_size)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about damaged files; `read_image` returns a reason for each.

    Warning filters apply to the whole process: enter this in the thread that starts the others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Memory:
    """Memory that threads share while they decode."""

    def __init__(self) -> None:
        self._used, self._changed = 0, threading.Condition()

    @contextmanager
    def take(self, need: int, limit: int) -> Iterator[None]:
        """Wait until so many bytes fit below a limit, and hold them; one thread always may."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + need <= limit)
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


_memory_in_use = _Memory()


def _memory(opened: ImageFile.ImageFile, num_pixels: int, data: BinaryIO) -> int:
    """Return about how many bytes of memory decoding takes; num_pixels are those of the file."""
    kind = str(opened.format)
    each = FORMAT_BYTES.get(kind, 5) + DEEP_BYTES * is_deep(opened)
    if "exif" in opened.info:  # may ask for a rotation; reading it would load a PNG
        each += TURN_BYTES
    if opened.mode not in ("1", "L", "P", "RGB") or "transparency" in opened.info:
        each += MODE_BYTES
    need = opened.width * opened.height * each
    if kind in FORMAT_BYTES:  # their decoders read the whole file
        need += data.seek(0, os.SEEK_END)
    return need + PROGRESSIVE_BYTES * num_pixels * bool(opened.info.get("progressive"))


def _eight_bits(
    opened: ImageFile.ImageFile, data: BinaryIO, levels: Sequence[float] | None
) -> tuple[Image.Image, float, float]:
    """Load an image and bring it to 8 bits; return it with its black and white."""
    deep = is_deep(opened)
    opened.load()
    if is_wide(opened):
        return scaled(wide_levels(opened), levels)
    if deep:
        found = deep_levels(opened, open_image(data), dark=levels is None)
        if found is not None:
            made, black, white = scaled(found, levels)
            if opened.mode == "RGBA":
                made.putalpha(opened.getchannel("A"))
            return made, black, white
    return opened, 0.0, 255.0


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what brings an image upright."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # only the EXIF data are damaged
        return None


def _fit(image: Image.Image, turn: Image.Transpose | None, image_size: int) -> NDArray[np.uint8]:
    """Return an image of 8 bits as (3, S, S) RGB."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, (0, 0), image)
        image = opaque
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError | ValueError) and str(error):  # their messages are sentences
        return str(error)
    return f"{type(error).__name__}: {error}"
