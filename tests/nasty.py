"""A folder of everything that people have among their photos, for tests."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "dib", "tif", "tiff"),
    *("gif", "ppm", "pgm", "pbm", "pnm", "avif", "jp2", "j2k", "qoi"),
)
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"]
FOREIGN = (
    *(".hidden", ".Trash-1000/files", ".ipynb_checkpoints", "@eaDir/a.jpg", "#recycle"),
    *("#snapshot/daily", "~snapshot/hourly.0", "@Recently-Snapshot", "$Recycle.Bin/S-1-5"),
    *("System Volume Information", "lost+found", "LOST.DIR", "FOUND.000", "__MACOSX"),
    *("node_modules/x", "lib/site-packages/x", "Catalog Previews.lrdata/0", "@tmp"),
    *("Photos.photoslibrary/resources/derivatives", "Network Trash Folder", "RECYCLED"),
)
NAMES = (
    *("new\nline", "😀", "a=b", "a,b", "#", " lead", "-dash", "--root=x", "tab\t", "it's", 'd"q'),
    *("back\\slash", "$HOME", "%41", "é", "e\u0301", "*", "[a]", "CON", "\u202egnp", "\x1b[31m"),
    *("=cmd|' C'!A0", "@SUM", "+1", "trail ", "a" * 240, "${x}"),
)


def picture(width: int = 24, height: int = 20, *, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> bool:
    """Save an image, with missing folders; return False if Pillow cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(path, **options)  # type: ignore[arg-type]
    except (OSError, KeyError, ValueError):
        path.unlink(missing_ok=True)
        return False
    return True


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def nasty_folder(root: Path) -> None:
    """Make a folder with formats, damage, links, pipes, odd names and foreign folders."""
    for i, suffix in enumerate(FORMATS):
        image = picture(seed=i)
        saved(image.convert({"pgm": "L", "pbm": "1"}.get(suffix, "RGB")), root / f"kind/a.{suffix}")
    for suffix in ("ico", "tga", "pcx", "psd", "svg", "pdf"):
        (root / f"kind/a.{suffix}").write_bytes(b"\0\0\2\0" + bytes(40))
    for mode in MODES:
        for suffix in ("png", "tif", "jpg", "webp", "gif", "jp2"):
            saved(picture().convert(mode), root / f"mode/{mode.replace(';', ' ')}.{suffix}")
    frames = [picture(seed=i) for i in range(3)]
    for suffix in ("gif", "webp", "png", "tif"):
        saved(frames[0], root / f"film/a.{suffix}", save_all=True, append_images=frames[1:])
    jpeg, whole = encoded(picture(200, 100), "JPEG"), encoded(picture(200, 100), "PNG")
    damaged = {f"{n}.jpg": jpeg[:n] for n in (0, 1, 3, 50, len(jpeg) // 2, len(jpeg) - 1)}
    damaged |= {f"{n}.png": whole[:n] for n in (8, 30, len(whole) // 2)}
    damaged |= {"zeros.jpg": bytes(5000), "half.jpg": jpeg[: len(jpeg) // 2] + bytes(9000)}
    damaged |= {"html.jpg": b"<html>404</html>", "big.png": png(60_000, 60_000)}
    damaged |= {"large.png": png(2**31 - 1, 2**31 - 1), "none.png": png(0, 10)}
    lies = {"png.jpg": whole, "jpg.txt": jpeg, "noext": jpeg, "jpg.cr2": jpeg, "a.JPG.part": jpeg}
    for folder, files in (("damaged", damaged), ("lies", lies)):
        (root / folder).mkdir()
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
    for folder in FOREIGN:
        saved(picture(), root / "foreign" / folder / "p.jpg")
    for folder, mark in (("env", "pyvenv.cfg"), ("seed0/.hydra", "x"), ("c", "CACHEDIR.TAG")):
        saved(picture(), root / "marked" / folder / "p.jpg")
        (root / "marked" / folder / mark).touch()
    for name in NAMES:
        saved(picture(), root / "names" / f"{name}.png")
    with open(os.fsencode(root) + b"/names/bad\xff\xfe.png", "wb") as file:
        file.write(whole)
    for name in ("A.jpg", "a.jpg", "a.JPG", "dir.jpg/x.png", "B/x.png", "b/x.png"):
        saved(picture(), root / "case" / name)
    for width, height in ((1, 1), (1, 5000), (5000, 1), (65_000, 2)):
        saved(picture(width, height), root / f"size/{width}x{height}.png")
    for kind in ["uint8", "uint16", "int16", "int32", "uint32", "float32"]:
        levels = np.random.default_rng(0).random((20, 24)) * 200
        saved(Image.fromarray(levels.astype(kind)), root / f"number/{kind}.tif")
    for name in (".DS_Store", "._p.jpg", "Thumbs.db", "desktop.ini", "a.xmp", "~$a.jpg", "v.mp4"):
        (root / name).write_bytes(b"\0\5\x16\7" + bytes(99))
    odd = root / "odd"
    odd.mkdir()
    (odd / "empty").mkdir()
    for name in ("pipe.jpg", "pipe"):
        os.mkfifo(odd / name)
    before = os.getcwd()
    os.chdir(odd)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    os.chdir(before)
    links = {"broken.jpg": "nowhere", "broken": "nowhere", "loop.jpg": "loop.jpg", "up": ".."}
    links |= {"zero.jpg": "/dev/zero", "zero": "/dev/zero", "stdin.png": "/dev/stdin"}
    links |= {"to a pipe.jpg": "pipe.jpg", "good.jpg": "../lies/noext"}
    for name, target in links.items():
        (odd / name).symlink_to(target)
    os.link(root / "lies/noext", odd / "hard.jpg")


def on_disk(root: Path) -> list[str]:
    """Every file below a folder, links too; folders behind links are not entered."""
    found = []
    for folder, below, names in os.walk(root):
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in (*names, *links)]
    return sorted(found)
