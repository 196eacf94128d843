"""3,120 damaged files and settings give a documented error or a result, and do no harm.

No case may hang, write outside its folder or start a program.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import Finished
from torch import nn

from spice_pl.callbacks.checkpoints import CheckpointFile, read_checkpoint
from spice_pl.callbacks.metrics_csv import CurveLogger
from spice_pl.data.sources.folder import folder as image_folder
from spice_pl.errors import UsageError
from spice_pl.job.checks import check_folders
from spice_pl.job.parts import JobImages
from spice_pl.job.plan import plan
from spice_pl.job.settings import build
from spice_pl.models import portable
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.results import last_logged

DOCUMENTED = (UsageError, HydraException, OmegaConfBaseException)
# Without large valid numbers: a huge width would be accepted and fill the memory.
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**63, 10**30, -(2**63), 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), "", " ", "x" * 5000, "../../x", "/etc/passwd", "\0", "\n", "ü日"),
    *("${seed}", "${nothing}", "${oc.env:HOME}", "???", "1e400", "[1, 2", "os.system", "{}", "%s"),
    *([], [[]], [1, [2, [3]]], {}, {"_target_": "os.system", "_args_": ["true"]}, {"a": {}}),
]
writes: list[str] = []
watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            writes.append(path)
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
        writes.append(str(arguments[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        writes.append(f"{event} {arguments[0]}")


sys.addaudithook(_watch)  # a hook cannot be removed again


@contextmanager
def watched(own: Path) -> Iterator[None]:
    """Fail if a case hangs, writes outside a folder or starts a program."""
    global watching

    def hang(*_: Any) -> None:
        raise TimeoutError("a case hangs")

    before = signal.signal(signal.SIGVTALRM, hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, 120)  # seconds of CPU time of this process
    writes.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert not [path for path in writes if not path.startswith((str(own), "/dev/null"))]


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Change the content of a file: bits, bytes, numbers, its end or its order."""
    content = bytearray(whole)
    how = draw.choice(["bits", "bytes", "cut", "double", "move", "text", "zeros", "head"])
    at = draw.randrange(len(content))
    size = draw.randint(1, 64)
    if how == "bits":
        for _ in range(draw.randint(1, 20)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "bytes":
        content[at : at + size] = draw.randbytes(size)
    elif how == "cut":
        del content[at:]
    elif how == "double":
        content[at:at] = content[at : at + size]
    elif how == "move":
        content[at : at + size], content[:size] = content[:size], content[at : at + size]
    elif how == "text":
        texts = ["{", "]", '"', ",", "\\", "null", "-1", "9" * 30, "NaN", "\n", "é", "1e999"]
        content[at : at + draw.randint(0, 4)] = draw.choice(texts).encode()
    elif how == "zeros":
        content[at : at + size] = bytes(size)
    else:
        place = draw.randrange(min(len(content), 200))
        content[place : place + 8] = draw.randbytes(8)
    return bytes(content)


def fuzz(
    file: Path, load: Callable[[], Any], cases: int, own: Path, seed: int = 0
) -> tuple[int, int]:
    """Load damaged copies of a file; count those that are refused and those that are loaded."""
    draw = random.Random(seed)  # noqa: S311 - which byte to change
    whole = file.read_bytes()
    refused = 0
    with watched(own):
        for case in range(cases):
            content = damaged(whole, draw)
            file.write_bytes(content)
            try:
                load()
            except DOCUMENTED:
                refused += 1
            except Exception as error:
                raise AssertionError(f"case {case} of {file.name}: {error!r}") from error
    file.write_bytes(whole)
    return refused, cases - refused


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    module = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    state = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    CheckpointFile().save_checkpoint(state, path)
    refused, _ = fuzz(path, lambda: read_checkpoint(path), 300, tmp_path)
    assert refused > 200


def test_weights(tmp_path: Path) -> None:
    folder, module = RunFolder(tmp_path), nn.Linear(8, 3)
    folder.write_weights("head.safetensors", module)
    file = tmp_path / "head.safetensors"
    refused, passed = fuzz(file, lambda: folder.load_weights(file.name, module), 300, tmp_path)
    assert refused > 100
    assert passed > 10  # changed numbers, which only the digest detects


def test_arrays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("features.npy", (9, 4))
    folder.publish("features.npy")
    refused, _ = fuzz(tmp_path / "features.npy", lambda: folder.features.sum(), 300, tmp_path)
    assert refused > 100


def test_portable_models(straight: Finished, tmp_path: Path) -> None:
    file = tmp_path / "model.spice"
    shutil.copy(straight.folder("proto").path / "model.spice", file)
    refused, _ = fuzz(file, lambda: portable.load(file), 150, tmp_path)
    assert refused > 20


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dictionary or list in nested data, with each of its keys or positions."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def test_headers_of_portable_models(straight: Finished, tmp_path: Path) -> None:
    """Fields, settings and tensors replaced by junk, left out or doubled; then a prediction."""
    draw = random.Random(0)  # noqa: S311 - which field to change
    whole, file = straight.folder("proto").path / "model.spice", tmp_path / "model.spice"
    with safe_open(whole, "pt") as opened:
        text = opened.metadata()["spice_pl"]
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)
    refused = 0
    for case in range(400):
        header, tensors = json.loads(text), load_file(whole)
        del header["digest"]  # who writes a hostile file writes no digest, or one that fits
        for _ in range(draw.randint(1, 2)):
            names = header.get("known")  # 90, of which two are as good as all
            found = [
                (each, key) for each, key in places(header) if each is not names or key in (0, 1)
            ]
            holder, key = draw.choice([*found, *places(tensors)])
            how = draw.choice(["junk", "junk", "junk", "out", "double"])
            if holder is tensors:
                kinds = [torch.float64, torch.int32, torch.complex64, torch.bool]
                holder[key] = holder[key].to(draw.choice(kinds)) * draw.choice([1, 2])
            elif how == "junk":
                holder[key] = draw.choice(JUNK)
            elif how == "out":
                del holder[key]
            else:
                holder[key] = [holder[key]] * 2
        save_file(tensors, file, {"spice_pl": json.dumps(header)})
        with watched(tmp_path):
            try:
                model = portable.load(file, device="cpu")
            except UsageError as error:
                refused += 1
                message = str(error)
            except Exception as error:
                raise AssertionError(f"case {case}: {error!r}") from error
            else:
                message = f"{file} is loaded"
                assert np.isfinite(model.predict(pixels).confidence).all(), case
        assert message.startswith(str(file)), case
    assert 250 < refused < 390


@pytest.mark.parametrize("name", ["metrics.json", "dataset.json", "clusters.csv", "metrics.csv"])
def test_tables_and_stamps(straight: Finished, tmp_path: Path, name: str) -> None:
    shutil.copytree(straight.folder("proto").path, tmp_path / "proto")
    folder = RunFolder(tmp_path / "proto")

    def load() -> None:
        if name == "clusters.csv":
            folder.read_clusters()
        elif name == "metrics.csv":
            _ = CurveLogger(str(folder.path)).rows
            last_logged(folder)
        elif name == "metrics.json":
            folder.check_digests()
            folder.check_upstream(folder)
        else:
            folder.check_dataset("fingerprint", 90)

    refused, _ = fuzz(folder.path / name, load, 150, tmp_path)
    assert refused > 0


def test_names_of_clusters(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text('{"0": "cats", "1": "dogs", "12": "ships"}')
    refused, passed = fuzz(file, lambda: RunFolder(tmp_path).names, 150, tmp_path)
    assert refused > 20
    assert passed > 5


def test_saved_settings(finished: Finished) -> None:
    file = finished.folder("moco").path / ".hydra/config.yaml"
    job = finished.job("stage=moco", "resume=true")
    refused, _ = fuzz(file, lambda: check_folders(job, plan(job), JobImages()), 60, finished.runs)
    assert refused > 10


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp"])
def test_images(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(suffix)  # noqa: S311 - which byte to change
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    root = tmp_path / "photos"
    root.mkdir()
    good = root / f"good{suffix}"
    Image.fromarray(pixels).save(good)
    for case in range(60):
        (root / f"{case:03}{suffix}").write_bytes(damaged(good.read_bytes(), draw))
    with watched(tmp_path):
        images = image_folder(str(root), 8, str(tmp_path / "cache"))
    assert len(images) + len(images.skipped) == 61
    assert f"good{suffix}" in images.keys
    assert images.skipped


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    for key, item in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        yield from leaves(item, name) if isinstance(item, dict) and item else [name]


def test_settings(straight: Finished, tmp_path: Path) -> None:
    """Replace one or two settings by junk and build the parts of the stages from them."""
    draw = random.Random(0)  # noqa: S311 - which setting to change
    cfg = straight.job().cfg
    parts = ("backbone", "augment", "moco", "proto", "fixmatch")
    every: Any = OmegaConf.to_container(cfg, resolve=True)
    whole = {name: every[name] for name in (*parts, "allow_targets")}
    keys = [key for part in parts for key in leaves({part: whole[part]})]
    refused = 0
    with watched(tmp_path):
        for case in range(500):
            changed = OmegaConf.create(whole)
            chosen = {key: draw.choice(JUNK) for key in draw.sample(keys, draw.randint(1, 2))}
            try:
                for key, value in chosen.items():
                    OmegaConf.update(changed, key, value, force_add=True)
                for name in {key.partition(".")[0] for key in chosen}:
                    if name in ("moco", "proto", "fixmatch"):
                        build(changed, changed[name].streams)
                        build(changed, changed[name].module)
                    else:
                        build(changed, changed[name])
            except DOCUMENTED:
                refused += 1
            except Exception as error:
                raise AssertionError(f"case {case}: {chosen}: {error!r}") from error
    assert refused > 100
