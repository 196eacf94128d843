"""Any folder of images: found, decoded once into a memory-mapped store, and listed.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from spice_pl.data.images import ImageSet, fingerprint
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
LABELS = ("none", "folders")
BAD_IMAGE = ("skip", "raise")
STORE_VERSION = 1


def folder(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "folder",
    labels: str = "none",
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return every image below `root`, in the order of the sorted paths.

    The shorter side is scaled to `image_size` and the middle square kept. Pixels are decoded once
    into `cache_dir` and memory-mapped from then on; a change of any path, size or time of change
    makes a new store.

    Args:
        root: folder; searched with its subfolders.
        image_size: side S in pixels.
        cache_dir: where the store goes, 3·S·S bytes an image.
        name: names the folder of results.
        labels: "folders" takes the first folder below root as the true class, for `truth/*`
            metrics only; "none" has no truth.
        on_bad_image: "skip" counts and names what cannot be decoded, "raise" stops there.
        protocol: "whole"; a folder has no test images of its own.

    Raises:
        UsageError: root is missing, is no folder, or holds no image that can be decoded; a bad
            image with `on_bad_image="raise"`; the disk cannot hold the store.
    """
    if labels not in LABELS:
        raise UsageError(f"dataset.labels {labels!r} is none of {LABELS}")
    if on_bad_image not in BAD_IMAGE:
        raise UsageError(f"on_bad_image {on_bad_image!r} is none of {BAD_IMAGE}")
    directory = Path(root).expanduser()
    if not directory.is_dir():
        state = "is a file, not a folder" if directory.exists() else "does not exist"
        raise UsageError(f"dataset.root={root} {state}; give the folder that holds the images")
    found, other = _scan(directory)
    if not found:
        raise UsageError(
            f"no image below dataset.root={root} ({other} other files); "
            f"looked for {' '.join(sorted(SUFFIXES))}"
        )
    store = _store(directory, found, image_size, Path(cache_dir).expanduser(), on_bad_image)
    index = json.loads((store / "index.json").read_text())
    skipped = [(path, reason) for path, reason in index["skipped"]]
    if skipped:
        _report(root, skipped)
    if other:
        skipped.append((f"{other} files", "not an image by name"))
    keys = index["keys"]
    truth, class_names = _folder_labels(keys) if labels == "folders" else (None, None)
    return ImageSet(
        name=name,
        images=np.load(store / "images.npy", mmap_mode="r"),
        keys=keys,
        fingerprint=index["fingerprint"],
        labels=truth,
        class_names=class_names,
        protocol=protocol,
        skipped=skipped,
        root=directory.resolve(),
    )


def _scan(root: Path) -> tuple[list[tuple[str, int, int]], int]:
    """Path below root, bytes and time of change of every image, sorted; and other files' count."""
    found, other = [], 0
    for parent, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        for file in files:
            path = Path(parent, file)
            if path.suffix.lower() not in SUFFIXES:
                other += 1
                continue
            try:
                stat = path.stat()
                found.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns))
            except OSError:  # a broken link: decoding names it as a bad image
                found.append((path.relative_to(root).as_posix(), -1, 0))
    return sorted(found), other


def _store(
    root: Path,
    found: Sequence[tuple[str, int, int]],
    image_size: int,
    cache_dir: Path,
    on_bad_image: str,
) -> Path:
    """Folder with images.npy and index.json, made unless a whole one is there."""
    identity = json.dumps([STORE_VERSION, str(root.resolve()), image_size, found])
    store = cache_dir / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    if (store / "index.json").is_file():
        index = json.loads((store / "index.json").read_text())
        if index["skipped"] and on_bad_image == "raise":
            path, reason = index["skipped"][0]
            raise UsageError(_bad_image(root / path, reason))
        return store
    need = len(found) * 3 * image_size**2
    cache_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir).free
    if need > free:
        raise UsageError(
            f"the images need {need / 1e9:.2f} GB in {cache_dir} and {free / 1e9:.2f} GB are free; "
            "make room, or set dataset.cache_dir or a smaller dataset.image_size"
        )
    logger.info("decoding %d images once into %s (%.0f MB)", len(found), cache_dir, need / 1e6)
    # Written beside its place and renamed when whole, so that a killed run leaves no half store.
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".decoding-") as temporary:
        _decode_all(root, [path for path, _, _ in found], image_size, Path(temporary), on_bad_image)
        try:
            os.rename(temporary, store)
        except OSError:
            if not (store / "index.json").is_file():  # another run may have been first
                raise
    return store


def _decode_all(
    root: Path, paths: Sequence[str], image_size: int, target: Path, on_bad_image: str
) -> None:
    shape = (len(paths), 3, image_size, image_size)
    raw = np.lib.format.open_memmap(target / "all.npy", mode="w+", dtype=np.uint8, shape=shape)
    keys: list[str] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for path, image in zip(paths, _decoded(pool, root, paths, image_size), strict=True):
            if isinstance(image, str):
                if on_bad_image == "raise":
                    raise UsageError(_bad_image(root / path, image))
                skipped.append((path, image))
                continue
            raw[len(keys)] = image
            keys.append(path)
            if len(keys) % 10_000 == 0:
                logger.info("decoded %d of %d images", len(keys), len(paths))
    if not keys:
        _report(str(root), skipped)
        raise UsageError(
            f"none of the {len(paths)} image files below dataset.root={root} could be decoded; "
            f"first: {skipped[0][0]}: {skipped[0][1]}"
        )
    np.save(target / "images.npy", raw[: len(keys)])
    digest = fingerprint(raw[: len(keys)])
    del raw
    (target / "all.npy").unlink()
    (target / "index.json").write_text(
        json.dumps({"keys": keys, "skipped": skipped, "fingerprint": digest})
    )


def _decoded(
    pool: ThreadPoolExecutor, root: Path, paths: Sequence[str], image_size: int, ahead: int = 1024
) -> Iterator[NDArray[np.uint8] | str]:
    for start in range(0, len(paths), ahead):  # map alone would hold every decoded image
        yield from pool.map(
            lambda path: decode(root / path, image_size), paths[start : start + ahead]
        )


def decode(path: Path, image_size: int) -> NDArray[np.uint8] | str:
    """Return one image as `square` does, or the reason why it cannot be decoded."""
    try:
        with Image.open(path) as opened:
            return square(opened, image_size)
    except FileNotFoundError:
        return "broken link"
    except Image.DecompressionBombError as error:
        return str(error)
    except Exception as error:  # Pillow raises many types on damaged files
        if path.stat().st_size == 0:
            return "empty file"
        return f"{type(error).__name__}: {str(error).replace(str(path), path.name)}"


def square(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """Return an image of any size and mode as (3, S, S) RGB.

    EXIF rotation is applied, transparency is laid on white, the first frame is taken of several.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255
        wide = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((wide / max(65535, wide.max()) * 255).astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def image_files(root: Path) -> list[str]:
    """Return the path below root of every image, sorted."""
    return [path for path, _, _ in _scan(root)[0]]


def _folder_labels(keys: Sequence[str]) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    folders = [key.split("/")[0] if "/" in key else None for key in keys]
    class_names = sorted({name for name in folders if name is not None})
    if not class_names:
        logger.info("dataset.labels=folders: no class folders, so no truth rows")
        return None, None
    number = {name: i for i, name in enumerate(class_names)}
    labels = [-1 if name is None else number[name] for name in folders]
    return np.asarray(labels, dtype=np.int64), class_names


def _bad_image(path: Path, reason: str) -> str:
    return f"bad image {path}: {reason}; mend or remove it, or use on_bad_image=skip"


def _report(root: str, skipped: Sequence[tuple[str, str]], shown: int = 10) -> None:
    logger.warning("skipped %d images below %s that cannot be decoded:", len(skipped), root)
    for path, reason in skipped[:shown]:
        logger.warning("  %s: %s", path, reason)
    if len(skipped) > shown:
        logger.warning("  and %d more, all listed in the report", len(skipped) - shown)
