"""Load parts of ImageNet: ImageNet-10 and -Dogs from an ILSVRC-2012 tree, and Tiny-ImageNet.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import functools
import logging
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spice_pl.data.decode import Decoding, Loaded, read_image
from spice_pl.data.images import ImageSet
from spice_pl.data.listing import Search, leaves, look
from spice_pl.data.sources.folder import add_left_out, open_files
from spice_pl.data.sources.table import class_labels
from spice_pl.data.store import open_store
from spice_pl.data.store_writer import Source
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

TRAIN_FOLDERS = ("train", "ILSVRC/Data/CLS-LOC/train", "ILSVRC2012_img_train", ".")
TINY = "tiny-imagenet-200"
MAX_BYTES = 1 << 24  # largest unpacked member of the archive; images have 2 KB


def imagenet(
    root: str,
    wnids: Mapping[str, str],
    image_size: int,
    cache_dir: str,
    num_images: int,
    name: str = "imagenet",
    scan: str = "auto",
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return the training images of some classes of ILSVRC-2012, one folder per class.

    Args:
        root: folder of the tree; classes are searched in `train/`, `ILSVRC/Data/CLS-LOC/train/`,
            `ILSVRC2012_img_train/` and root itself.
        wnids: name of each class, by its folder.
        image_size: side S in pixels; the shorter side is scaled, the middle square kept.
        cache_dir: folder of the image stores.
        num_images: published number of images of these classes; a difference is logged.
        name: name of the data set and of its folder of results.
        scan: "auto", "files" or "folders", see `spice_pl.data.listing`.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        protocol: "whole"; the papers use no test images of these sets.

    Raises:
        UsageError: a class is missing, or its images cannot be used.
    """
    top = Path(root).expanduser()
    places = [top / folder for folder in TRAIN_FOLDERS]
    place = max(places, key=lambda each: sum((each / wnid).is_dir() for wnid in wnids))
    if missing := [wnid for wnid in wnids if not (place / wnid).is_dir()]:
        raise UsageError(
            f"dataset.root={top.resolve()} is not an ILSVRC-2012 tree: {len(missing)} of "
            f"{len(wnids)} classes are missing ({', '.join(missing)}); looked in "
            f"{', '.join(TRAIN_FOLDERS)}"
        )
    order = sorted(wnids)
    search = Search(place, order, cache_dir=Path(cache_dir).expanduser())
    found = look(search, scan)
    stored = open_files(
        search, found, Decoding(image_size), cache_dir, on_bad_image, verify=scan == "files"
    )
    if len(stored.images) != num_images:
        logger.warning(
            "%s: %d images, %d are published; scores cannot be compared with published ones",
            *(name, len(stored.images), num_images),
        )
    number = {wnid: i for i, wnid in enumerate(order)}
    labels = [number[key.partition("/")[0]] for key in stored.keys]
    return add_left_out(
        ImageSet(
            name=name,
            images=stored.images,
            keys=stored.keys,
            fingerprint=stored.fingerprint,
            labels=np.asarray(labels, dtype=np.int64),
            class_names=[wnids[wnid] for wnid in order],
            protocol=protocol,
            skipped=stored.skipped,
            root=place.resolve(),
            files=stored.files,
        ),
        found.left_out,
    )


def tiny_imagenet(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "tiny_imagenet",
    protocol: str = "whole",
    download: bool = True,
    url: str = "",
    md5: str | None = None,
    on_bad_image: str = "skip",
) -> ImageSet:
    """Return Tiny-ImageNet (200 classes, 64×64) from its folder or directly from its archive.

    Protocol "whole" is the 100,000 training images, as in the paper; "split" trains on them and
    scores the 10,000 validation images, whose classes are in val_annotations.txt. The test images
    have no labels and are not used.

    Args:
        root: folder of `tiny-imagenet-200/` or `tiny-imagenet-200.zip`.
        image_size: side S in pixels.
        cache_dir: folder of the image stores.
        name: name of the data set and of its folder of results.
        protocol: "whole" or "split".
        download: whether to download the archive if neither exists.
        url: address of the archive.
        md5: MD5 of the archive; None does not check it.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.

    Raises:
        UsageError: it is not at `root` and cannot be downloaded, or it is another file.
    """
    top = Path(root).expanduser()
    tree = _Folder(top) if (top / TINY).is_dir() else _archive(top, download, url, md5)
    wnids = tree.text("wnids.txt").split()
    words = dict(
        line.split("\t", 1) for line in tree.text("words.txt").splitlines() if "\t" in line
    )
    paths = [path for wnid in sorted(wnids) for path in tree.images(f"train/{wnid}/images")]
    truth = [path.split("/")[1] for path in paths]
    num_train = len(paths)
    if protocol == "split":
        lines = [line.split("\t") for line in tree.text("val/val_annotations.txt").splitlines()]
        annotated = {f"val/images/{line[0]}": line[1] for line in lines if len(line) > 1}
        paths += sorted(annotated)
        truth += [annotated[path] for path in sorted(annotated)]

    def load(i: int) -> Loaded:
        try:
            data = tree.read(paths[i])
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            return f"{type(error).__name__}: {error}"
        return read_image(data, Decoding(image_size))

    stored = open_store(
        [tree.identity, protocol == "split"],
        image_size,
        cache_dir,
        lambda: Source(f"dataset.root={root}", paths, load),
        on_bad_image,
    )
    source = stored.files["source"]
    labels, class_names = class_labels(truth[i] for i in source)
    return ImageSet(
        name=name,
        images=stored.images,
        keys=stored.keys,
        fingerprint=stored.fingerprint,
        labels=labels,
        class_names=[words.get(each, each).split(",")[0] for each in class_names or ()],
        is_test=np.asarray(source >= num_train),
        protocol=protocol,
        skipped=stored.skipped,
        files=stored.files,
    )


class _Folder:
    """Files of the unpacked archive."""

    def __init__(self, top: Path) -> None:
        self.top = top / TINY
        changed = [path.stat().st_mtime_ns for path in sorted(self.top.glob("train/*/images"))]
        self.identity: object = [str(self.top.resolve()), changed]

    def images(self, folder: str) -> list[str]:
        """Return the files of a folder, sorted."""
        if leaves(folder):  # a line of wnids.txt may be hostile
            return []
        return sorted(f"{folder}/{path.name}" for path in (self.top / folder).glob("*.JPEG"))

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""
        if leaves(path):  # a line of val_annotations.txt may be hostile
            raise PermissionError(f"{path} is outside {self.top}")
        return (self.top / path).read_bytes()

    def text(self, path: str) -> str:
        """Return the text of a file."""
        try:
            return self.read(path).decode()
        except OSError as error:
            raise UsageError(f"{self.top} is not complete: {path} cannot be read") from error


class _Zip(_Folder):
    """Members of the published archive, read in place by several threads."""

    def __init__(self, file: Path) -> None:
        self.top = file
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise UsageError(f"{file} is not a zip archive that can be read: {error}") from error
        self._names = sorted(self._zip.namelist())
        stat = file.stat()
        self.identity = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]

    def images(self, folder: str) -> list[str]:
        """Return the members of a folder, sorted."""
        return self._by_folder.get(folder, [])

    @functools.cached_property
    def _by_folder(self) -> dict[str, list[str]]:
        folders: dict[str, list[str]] = {}
        for name in self._names:
            path = name.removeprefix(f"{TINY}/")
            if path.endswith(".JPEG"):
                folders.setdefault(path.rpartition("/")[0], []).append(path)
        return folders

    def read(self, path: str) -> bytes:
        """Return the bytes of a member."""
        member = self._zip.getinfo(f"{TINY}/{path}")
        if member.file_size > MAX_BYTES:
            raise zipfile.BadZipFile(f"{path} would take {member.file_size / 1e6:.0f} MB")
        return self._zip.read(member)

    def text(self, path: str) -> str:
        """Return the text of a member."""
        try:
            return self.read(path).decode()
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise UsageError(f"{self.top} is not complete: {path} cannot be read") from error


def _archive(top: Path, download: bool, url: str, md5: str | None) -> _Zip:
    from torchvision.datasets.utils import check_integrity, download_url

    file = top / f"{TINY}.zip"
    if not file.is_file():
        if not download:
            raise UsageError(
                f"neither {TINY} nor {TINY}.zip is in dataset.root={top.resolve()}; put one there, "
                "or use dataset.download=true"
            )
        try:
            download_url(url, str(top), file.name, md5)
        except (RuntimeError, OSError) as error:
            raise UsageError(
                f"{url} could not be downloaded ({error}); put {file} there"
            ) from error
    if md5 is not None and not check_integrity(str(file), md5):
        raise UsageError(
            f"{file} is not the published archive (MD5 {md5}); download it again, or set "
            "dataset.md5=null if you trust it"
        )
    return _Zip(file)
