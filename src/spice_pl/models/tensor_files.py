"""Read tensors out of checkpoint files without running code that is stored in them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.system.output import printable

# Keys that a state dict may be stored under. FixMatch, DINO and others keep the trained model and
# its average; the average is what is evaluated, and comes first.
WRAPPERS = (
    *(
        "eval_model",
        "ema_model",
        "model_ema",
        "ema_state_dict",
        "teacher",
        "train_model",
        "student",
    ),
    *("state_dict", "model_state_dict", "model", "network", "net", "encoder", "backbone"),
)

# How files begin that people take for weights; one of tar has its mark at byte 257.
BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of Git LFS; fetch the file itself: git lfs pull"),
    (b"<", "is a web page, so its download failed; fetch it again"),
    (b"\x1f\x8b", "is compressed; unpack it with gunzip"),
    (b"ustar", "is a tar archive; unpack it, or save its state dict where it was made"),
    (b"\x89HDF", "is a file of HDF5, as Keras writes; give weights of PyTorch"),
)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the content of a checkpoint: tensors, containers, numbers and text.

    Objects of other kinds (settings, schedulers) become empty placeholders, where torch allows it.

    Args:
        path: safetensors file, or any file that `torch.save` wrote.

    Raises:
        UsageError: the file does not exist, or is not a checkpoint that can be read this way.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(
            f"{file} is not a file; give the path of a .pth, .ckpt or .safetensors file"
        )
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except ValueError:  # written before torch 1.6: not a zip file
            unknown = []
        stand_ins = [
            (_empty_dict if name == "collections.defaultdict" else _Placeholder, name)
            for name in unknown
        ]
        # torch warns of forms of files, which the user cannot change.
        with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise many types on damaged files
        raise UsageError(f"{file} {_what(file, error)}") from error
    if not isinstance(content, Mapping):
        kind = "an object, such as a whole network"
        kind = kind if isinstance(content, _Placeholder) else f"a {type(content).__name__}"
        raise UsageError(
            f"{file} holds {kind}; a state dict is needed: names to tensors, as in "
            "torch.save(network.state_dict(), FILE)"
        )
    return {str(key): value for key, value in content.items()}


def find_state_dict(content: Mapping[str, Any], path: str) -> tuple[dict[str, Tensor], str]:
    """Find the state dict in the content of a checkpoint.

    Args:
        content: what `read_file` returned.
        path: path of the file, for the error message.

    Returns:
        Tensors by name, without the prefixes of wrappers (`module.` of data parallel training,
        `_orig_mod.` of torch.compile); and the key that they were stored under, "" if they were at
        the top.

    Raises:
        UsageError: there are no tensors with names.
    """
    for wrapper in WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and any(
            isinstance(value, Tensor) for value in inner.values()
        ):
            break
    else:
        wrapper, inner = "", content
    state = {
        re.sub(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.", "", str(key)): value
        for key, value in inner.items()
        if isinstance(value, Tensor)
    }
    for name, value in state.items():
        _check_kind(name, value, path)
    if not state:
        raise UsageError(f"{path} holds no tensors by name, only {_listed(content)}")
    return state, wrapper


def _listed(content: Mapping[str, Any], shown: int = 20) -> str:
    names = [printable(str(name)[:60]) for name in list(content)[:shown]]
    more = [f"and {len(content) - shown} more"] if len(content) > shown else []
    return ", ".join(names + more) or "nothing"


def check_numbers(state: Mapping[str, Tensor], path: str) -> None:
    """Refuse weights that are not finite, before a network takes them.

    Raises:
        UsageError: names the first one.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UsageError(
                f"{path}: {printable(name)} holds NaN or infinite values, as of a training that "
                "diverged; give an earlier checkpoint"
            )


def _check_kind(name: str, value: Tensor, path: str) -> None:
    """Refuse a tensor whose numbers are not all in the file, or not real.

    Raises:
        UsageError: names it.
    """
    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        kind = "without content" if value.is_meta else "quantized or sparse"
    elif value.is_complex():
        kind = "complex"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        kind = "larger than its content in the file"
    elif value.dim() > 1 and not value.numel():
        kind = "empty"
    else:
        return
    raise UsageError(
        f"{path}: {printable(name)} is {kind}; give a checkpoint of plain real tensors"
    )


def _what(file: Path, error: Exception) -> str:
    """Return what a file is instead of weights, as far as its first bytes tell, and what to do."""
    with file.open("rb") as opened:
        head = opened.read(300)
    if not head:
        return "is empty; copy it again"
    for begins, text in BEGINNINGS:
        if head.lstrip().startswith(begins) or head[257:].startswith(begins):
            return text
    reason = re.split(r"\. |\n|: please", f"{type(error).__name__}: {error}")[0].rstrip(": .")
    return (
        f"cannot be read as weights alone ({printable(reason[:200])}); it is damaged, or holds "
        "other objects: save its state dict with safetensors where it was made"
    )


class _Placeholder:
    """Replace an object that is neither a tensor nor a container."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}
