"""1,000 flipped bits in what a run hands on: each is refused before use, or changes no result."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Finished, photographs
from tests.fuzz.trap import trapped

from spice_pl.callbacks.checkpoints import read_checkpoint
from spice_pl.errors import UsageError
from spice_pl.models import portable
from spice_pl.runs.attention import read_attention
from spice_pl.runs.folder import RunFolder

FLIPS = 1000
ROWS = np.arange(90)


def network(folder: RunFolder) -> list[Any]:
    """What a model.spice by itself says about images, without the run's digests."""
    model = portable.load(folder.path / "model.spice", device="cpu")
    found = model.predict(photographs())
    about = [model.about, model.image_size, model.threshold, list(model.names), model.settings]
    return [found.clusters, found.confidence, found.similarity, found.nearest, about]


def attention(folder: RunFolder) -> list[Any]:
    found = read_attention(folder)
    assert found is not None
    return [found.index, found.maps]


def weights(name: str) -> Callable[[RunFolder], Any]:
    return lambda folder: sorted(folder.read_weights(name).items())


def stamp(folder: RunFolder) -> list[Any]:
    """What the job compares: it refuses other values than these."""
    folder.check_dataset(str(WHOLE["fingerprint"]), 90)
    folder.check_upstream(WHOLE["upstream"])
    return [folder._stamp()]


WHOLE: dict[str, Any] = {}
# What reads each file, as stages and tasks do.
READERS: dict[str, Callable[[RunFolder], Any]] = {
    "features.npy": lambda folder: np.array(folder.features),
    "probs.npy": lambda folder: np.array(folder.probs),
    "answer.npy": lambda folder: np.array(folder.answer),
    "embeddings.npy": lambda folder: folder.embeddings(ROWS).numpy(),
    "moved.npy": lambda folder: folder.moved(90),
    "encoder.safetensors": weights("encoder.safetensors"),
    "head.safetensors": weights("head.safetensors"),
    "heads.safetensors": weights("heads.safetensors"),
    "clusters.csv": lambda folder: vars(folder.read_clusters()),
    "metrics.json": lambda folder: dict(folder.metrics),
    "dataset.json": stamp,
    "model.spice": network,
    "attention.npz": attention,
    "last.ckpt": lambda folder: read_checkpoint(folder.checkpoint),
}


@pytest.fixture(scope="module")
def handed_on(straight: Finished, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of stage 2 with every file that a run can hand on."""
    path = tmp_path_factory.mktemp("flips") / "run"
    shutil.copytree(straight.folder("proto").path, path)
    folder = RunFolder(path, "smoothed")
    folder.write_embeddings(ROWS, None)
    folder.write_answer(np.array(folder.probs))
    np.save(path / "moved.npy", ROWS % 7 == 0)
    metrics = folder.metrics
    folder.write_json("metrics.json", {**metrics, "digests": folder.digests()})
    WHOLE.update(fingerprint=metrics["fingerprint"], upstream=straight.folder("moco"))
    return folder


def same(one: Any, other: Any) -> bool:
    """Whether results are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_flipped_bits_are_refused_or_change_nothing(handed_on: RunFolder) -> None:
    draw = random.Random(0)  # noqa: S311 - which bit to flip
    expected = {name: read(handed_on) for name, read in READERS.items()}
    refused: Counter[str] = Counter()
    harmless: Counter[str] = Counter()
    names = [*READERS]
    for case in range(FLIPS):
        name = names[case % len(names)]
        file = handed_on.path / name
        whole = file.read_bytes()
        content = bytearray(whole)
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        try:
            with trapped(handed_on.path):
                found = READERS[name](RunFolder(handed_on.path, "smoothed"))
        except UsageError as error:
            message = str(error)
            refused[name] += 1
        else:
            message = name
            assert same(found, expected[name]), f"byte {place} of {name} changed a result silently"
            harmless[name] += 1
        assert name in message or name == "dataset.json", (name, place)
        file.write_bytes(whole)
    print(json.dumps({"refused": refused, "harmless": harmless}))
    digests = ("features.npy", "probs.npy", "answer.npy", "embeddings.npy", "moved.npy")
    assert not any(harmless[name] for name in (*digests, "clusters.csv", "heads.safetensors"))
    assert refused.total() > 900


def test_a_result_that_differs_is_seen(handed_on: RunFolder, tmp_path: Path) -> None:
    """The comparison finds a changed weight in a file that fits its digests."""
    copied = RunFolder(tmp_path / "run", "smoothed")
    shutil.copytree(handed_on.path, copied.path)
    probs = np.array(copied.probs)
    probs[0, 0] = np.nextafter(probs[0, 0], np.float32(2))
    np.save(copied.path / "probs.npy", probs)
    copied.write_json("metrics.json", {**copied.metrics, "digests": copied.digests()})
    assert not same(READERS["probs.npy"](copied), READERS["probs.npy"](handed_on))
