"""Decode one image file to (3, S, S) RGB, or return the reason why it cannot be decoded.

No other module decodes files.

Shapes: S side in pixels.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features

from spice_pl.data.retry import may_pass

# Only these decoders are tried, whatever a file is called: others of Pillow run programs (EPS).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF")
# A file with one of these is expected to be an image; other files are if they begin like one.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp"),
    *(".dib", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".avif"),
}
RAW_SUFFIXES = {
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf"),
    *(".pef", ".srw", ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mef", ".mos", ".mrw", ".rwl"),
}
HEAD_BYTES = 32  # of a file, enough to tell its format
# The first bytes of the formats above. BMP's two letters may begin a text, so the size of its
# second header counts too; the last kind is HEIF and AVIF, with their brands.
HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|P[1-6]\s+[\d#]"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|....ftyp(avi[fs]|he[iv][cfmsx]|mif1|msf1)",
    re.DOTALL,
)

MAX_PIXELS = 89_478_485  # of one file, Pillow's own: a quarter of a gigabyte in RGB


@dataclass(frozen=True)
class Decoded:
    """A decoded image.

    Attributes:
        pixels: (3, S, S) uint8.
        format: Pillow's name of the file format; "array" for pixels from an array.
        width: width of the file in pixels.
        height: height of the file in pixels.
    """

    pixels: NDArray[np.uint8]
    format: str
    width: int
    height: int


@dataclass(frozen=True)
class Unread:
    """A file that could not be read for now and may be a healthy image.

    Attributes:
        reason: what the system said.
        soon: whether another attempt within seconds may succeed.
    """

    reason: str
    soon: bool = True


def is_image(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is an image of a format above.

    >>> is_image(b"GIF89a, of 8 x 8 pixels"), is_image(b"BMW is a maker of cars")
    (True, False)
    """
    return HEADS.match(head) is not None


def decode(path: Path, image_size: int) -> NDArray[np.uint8] | str:
    """Return one image as `square` does, or the reason why it cannot be decoded."""
    image = read_image(path, image_size)
    if isinstance(image, Unread):
        return image.reason
    return image if isinstance(image, str) else image.pixels


def read_image(file: Path | bytes, image_size: int) -> Decoded | Unread | str:
    """Decode one file as `square` does, or return the reason why it cannot be decoded.

    An error that tells nothing about the image, such as too many open files, gives an `Unread`.

    A JPEG of more than twice the size is decoded at 1/2, 1/4 or 1/8 of its size, which the format
    allows, and scaled from there.
    """
    try:
        data = io.BytesIO(file) if isinstance(file, bytes) else io.BufferedReader(_File(file))
        with data, _open(data) as opened:
            width, height, kind = *opened.size, str(opened.format)
            if width * height > MAX_PIXELS:
                return f"{width} x {height} pixels, could be a decompression bomb"
            opened.draft(None, (2 * image_size, 2 * image_size))
            pixels = square(opened, image_size)
        return Decoded(pixels, "JPEG" if kind == "MPO" else kind, width, height)
    except FileNotFoundError:
        return "vanished after the folder was listed"
    except PermissionError:
        return Unread("permission denied", soon=False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return str(error)
    except Exception as error:  # Pillow raises many types on damaged files
        return unread(error) if may_pass(error) else _reason(error)


def unread(error: BaseException) -> Unread:
    """Return what could not be read because of an error that may pass."""
    said = error.strerror if isinstance(error, OSError) else "not enough memory"
    return Unread(f"cannot be read now: {said}")


@functools.cache
def decoders() -> tuple[str, ...]:
    """Return names and versions of everything that decides which files can be decoded."""
    known = {*features.modules, *features.codecs, *features.features}
    libraries = ("libjpeg_turbo", "jpg", "zlib", "libtiff", "webp", "avif")
    found = [f"{name} {features.version(name)}" for name in libraries if name in known]
    with suppress(ImportError):
        import pillow_heif

        found.append(f"pillow_heif {pillow_heif.__version__}")
    return (f"Pillow {PIL.__version__}", *found)


def square(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """Return an image of any size and mode as (3, S, S) RGB.

    EXIF rotation is applied, transparency is blended with white, the first of several frames is
    used, the shorter side is scaled to `image_size` and the middle square is kept.
    """
    image = _upright(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = _largest_level(levels, floating=image.mode == "F")
        image = Image.fromarray((levels / top * 255).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about damaged files; `read_image` returns a reason for each.

    Warning filters apply to the whole process: enter this in the thread that starts the others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _File(io.FileIO):
    """A file that is read through Python, so that each error says what the system said.

    libtiff would read the descriptor itself and call a failing disk a damaged image.
    """

    def fileno(self) -> int:
        """Refuse to give the descriptor."""
        raise io.UnsupportedOperation("fileno")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # only the EXIF data are damaged
        return image


def _largest_level(levels: NDArray[np.float64], *, floating: bool) -> float:
    """Return the level of white: 1 or 255 if floats stay below, else 65535 or the maximum."""
    brightest = float(levels.max(initial=0))
    if floating and brightest <= 255:
        return 1.0 if brightest <= 1 else 255.0
    return max(65535.0, brightest)


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image of a format above, as `Image.open` does."""
    head = file.read(HEAD_BYTES)
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(head) is True:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # another format
                return factory(file, "")
    raise UnidentifiedImageError(_unidentified(head))


def _unidentified(head: bytes) -> str:
    if not head:
        return "empty file"
    if head[4:8] == b"ftyp" and is_image(head):
        if head[8:11] == b"avi" and "AVIF" not in _formats():
            return "AVIF needs Pillow 11.3 or newer"
        if "HEIF" not in _formats():
            return "HEIC needs one more package; pip install 'spice-pl[heic]'"
    return "cannot identify image file"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return str(error)
    return f"{type(error).__name__}: {error}"
