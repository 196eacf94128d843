"""Checkpoint files are read as tensors, and no code in them is run."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from spice_pl.errors import UsageError
from spice_pl.models.interop import load_backbone_weights, read_reference
from spice_pl.models.tensor_files import find_state_dict, read_file
from spice_pl.nn.resnet import ResNet


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "hook": Evil()}, path)
    with pytest.raises(UsageError, match="cannot be read as weights alone"):
        read_file(path)
    assert not (tmp_path / "was_run").exists()


def test_objects_of_other_kinds_do_not_hinder_the_tensors(tmp_path: Path) -> None:
    weight = torch.arange(3.0)
    content = {"state_dict": {"module.fc.weight": weight}, "counts": defaultdict(list)}
    torch.save(content, tmp_path / "x.pth")
    state, wrapper = find_state_dict(read_file(tmp_path / "x.pth"), "x.pth")
    assert wrapper == "state_dict"
    assert list(state) == ["fc.weight"]
    assert torch.equal(state["fc.weight"], weight)


def test_the_average_is_preferred_to_the_trained_model() -> None:
    models = {name: {"weight": torch.tensor([i])} for i, name in enumerate(["model", "ema_model"])}
    state, wrapper = find_state_dict(models, "x.pth")
    assert (wrapper, int(state["weight"])) == ("ema_model", 1)


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        read_file(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UsageError, match=r"cannot be read as weights alone \("):
        read_file(tmp_path / "text.pth")


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("weights"))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy it again"),
        (b"\n<!DOCTYPE html><html>404", "is a web page, so its download failed"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid x",
            "is a pointer of Git LFS; .*: git lfs pull",
        ),
        (gzip.compress(b"weights", mtime=0), "is compressed; unpack it with gunzip"),
        (tar(), "is a tar archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n", "is a file of HDF5, as Keras writes; give weights of PyTorch"),
    ],
)
def test_a_file_that_is_not_weights_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, message: str, suffix: str
) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(UsageError, match=f"x{suffix} {message}"):
        read_file(tmp_path / f"x{suffix}")


def test_a_whole_network_is_not_a_state_dict(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UsageError, match="holds an object, such as a whole network; a state dict"):
        read_file(tmp_path / "x.pth")


KINDS = {
    "NaN": lambda value: value * float("nan"),
    "infinite": lambda value: value / 0,
    "complex": lambda value: value.to(torch.complex64),
    "quantized or sparse": lambda value: value.to_sparse(),
    "without content": lambda value: value.to("meta"),
    "larger than its content": lambda value: value[:, :1].expand(value.shape[0], 10**6, 3, 3),
    "has 0 dimensions, not 4": lambda value: value.sum(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, kind: str) -> None:
    state = ResNet(blocks=[1], widths=[4]).state_dict()
    state["conv1.weight"] = KINDS[kind](state["conv1.weight"])
    file = tmp_path / "x.pth"
    torch.save({f"module.encoder_q.{key}": value for key, value in state.items()}, file)
    with pytest.raises(UsageError, match=rf"x\.pth: .*conv1\.weight .*{kind}"):
        read_reference(file, 8)
    message = "does not fit ResNet whole" if kind.startswith("has 0") else kind
    with pytest.raises(UsageError, match=message):
        load_backbone_weights(ResNet(blocks=[1], widths=[4]), file)


@pytest.mark.parametrize("name", ["layer999999999.0", "layer1.999999999"])
def test_layers_without_end_are_refused(tmp_path: Path, name: str) -> None:
    """The number of layers is read off the names; a network of so many would fill the memory."""
    state = ResNet(blocks=[1], widths=[4]).state_dict()
    state[f"{name}.conv1.weight"] = torch.zeros(4, 4, 3, 3)
    file = tmp_path / "x.pth"
    torch.save({f"module.encoder_q.{key}": value for key, value in state.items()}, file)
    with pytest.raises(UsageError, match=r"conv1\.weight has the number of a layer that cannot be"):
        read_reference(file, 8)
