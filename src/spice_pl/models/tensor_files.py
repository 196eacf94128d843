"""Read tensors out of checkpoint files without running code that is stored in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spice_pl.errors import UsageError

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
        with torch.serialization.safe_globals(list(stand_ins)):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise many types on damaged files
        raise UsageError(
            f"{file} cannot be read as weights alone ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); save its state dict with safetensors where it was made"
        ) from error
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{file} holds a {type(content).__name__}; a state dict is needed: names to tensors"
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
    if not state:
        raise UsageError(
            f"{path} holds no tensors by name, only {', '.join(map(str, content)) or 'nothing'}"
        )
    return state, wrapper


class _Placeholder:
    """Replace an object that is neither a tensor nor a container."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}
