"""The contents of a `model.spice`, checked before anything is made of them.

| field of the header | what it must be |
|---|---|
| format | whole number, 1 or more; above `FORMAT` a newer release wrote it |
| settings | how to build encoder, head and plain, see `networks` |
| image_size | pixels, 1 to `MAX_PIXELS` |
| names | one text per cluster |
| threshold | number from 0 to 1 |
| about | dictionary |
| known | null, or one key per known image |
| levels | null, or black and white of images of more than 8 bits; may be missing |

Tensors begin with `encoder.`, `head.` or `known.`, are finite, and have the kind and shape of the
module's own. safetensors holds the header to 100 MB, and tensors to the size of the file.

Shapes: K clusters, n known images, D features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spice_pl.errors import UsageError

FILE_NAME = "model.spice"
FORMAT = 1  # raised when a file can no longer be read by the releases before
MAX_PIXELS = 4096
MAX_NAMES_BYTES = 2**24
PARTS = ("encoder", "head", "plain")


@dataclass(frozen=True)
class Header:
    """The header of a `model.spice`; fields as in `PortableModel`."""

    settings: dict[str, Any]
    image_size: int
    names: list[str]
    threshold: float
    about: dict[str, Any]
    known: list[str] | None
    levels: list[float] | None = None


def _is_text(value: Any) -> bool:
    """Whether it is text that UTF-8 can write."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_key(value: Any) -> bool:
    """Whether it is text, or the name of a file that is not UTF-8, as Python reads it."""
    return isinstance(value, str) and _is_text(re.sub("[\udc80-\udcff]", "", value))


def _is_levels(value: Any) -> bool:
    """Whether it is null, or two finite numbers in rising order."""
    if value is None:
        return True
    if not isinstance(value, list) or len(value) != 2:
        return False
    numbers = all(type(each) in (int, float) and math.isfinite(each) for each in value)
    return numbers and value[0] < value[1]


OPTIONAL = ("levels",)  # not in the files of before 0.2
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": ("a whole number of 1 or more", lambda value: type(value) is int and value >= 1),
    "settings": ("a dictionary", lambda value: isinstance(value, dict)),
    "image_size": (
        f"a whole number of pixels from 1 to {MAX_PIXELS:,}",
        lambda value: type(value) is int and 1 <= value <= MAX_PIXELS,
    ),
    "names": (
        "a list of one text per cluster",
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
    ),
    "threshold": (
        "a number from 0 to 1",
        lambda value: type(value) in (int, float) and 0 <= value <= 1,
    ),
    "about": ("a dictionary", lambda value: isinstance(value, dict)),
    "known": (
        "null or a list of texts",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_key, value))),
    ),
    "levels": ("null or black and white, two numbers in rising order", _is_levels),
}


def read(file: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read the header and the tensors of a `model.spice`.

    Raises:
        UsageError: the file is damaged, a field is missing or not what it must be, or a newer
            release wrote the file.
    """
    try:
        with safe_open(file, "pt") as opened:
            found = json.loads((opened.metadata() or {})["spice_pl"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise unreadable(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise unreadable(file, f"its header is a {type(found).__name__}")
    for field, (rule, holds) in RULES.items():
        if field not in found:
            if field in OPTIONAL:
                continue
            raise unreadable(file, f"its header has no {field}")
        value = found[field]
        if not holds(value):
            raise unreadable(file, f"{field} is {value!r:.80}, and it must be {rule}")
        if field == "format" and value > FORMAT:
            raise UsageError(
                f"{file} was written by a newer spice-pl (format {value!r:.80}, this release "
                f"reads up to {FORMAT}); install a newer one with pip install -U spice-pl"
            )
    for key in tensors:
        if not key.startswith(("encoder.", "head.", "known.")):
            raise unreadable(file, f"tensor {key!r:.80} belongs to neither encoder, head nor known")
    return Header(
        **{field: found[field] for field in RULES if field in found and field != "format"}
    ), tensors


def check_state(file: Path, part: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another kind than the module's own, and any that is not finite."""
    for key, own in module.state_dict().items():
        given = state[key]
        if _kind(given) != _kind(own):
            raise unreadable(
                file, f"tensor {part}.{key} is {given.dtype}, and it must be like {own.dtype}"
            )
        _check_finite(file, f"{part}.{key}", given.to(own.dtype))


def check_known(
    file: Path, keys: list[str], tensors: Mapping[str, Tensor], num_clusters: int, width: int | None
) -> tuple[Tensor, Tensor]:
    """Return embeddings (n, D) and clusters (n,) of the n known images.

    Args:
        file: named in messages.
        keys: of the n images.
        tensors: without `known.` in their names.
        num_clusters: K.
        width: D; None where a head of one's own does not say it.

    Raises:
        UsageError: one is missing, there are others, or one does not fit.
    """
    if tensors.keys() != {"embeddings", "clusters"}:
        raise unreadable(
            file, f"known has tensors {sorted(tensors)!r:.80}, and needs embeddings and clusters"
        )
    embeddings, clusters = tensors["embeddings"], tensors["clusters"]
    fits = embeddings.ndim == 2 and len(embeddings) == len(keys)
    if not fits or embeddings.shape[1] != (width or embeddings.shape[1]):
        raise unreadable(
            file,
            f"known.embeddings is {tuple(embeddings.shape)}, and it must be ({len(keys)}, "
            f"{width or 'features'})",
        )
    if _kind(embeddings) != "float" or _kind(clusters) != "int" or clusters.shape != (len(keys),):
        raise unreadable(
            file,
            f"known.embeddings and known.clusters are {embeddings.dtype} and {clusters.dtype} "
            f"{tuple(clusters.shape)}; they must be floating and whole ({len(keys)},) numbers",
        )
    _check_finite(file, "known.embeddings", embeddings)
    if len(keys) and not 0 <= int(clusters.min()) <= int(clusters.max()) < num_clusters:
        raise unreadable(
            file,
            f"known.clusters reach from {int(clusters.min())} to {int(clusters.max())}, and must "
            f"be from 0 to {num_clusters - 1}",
        )
    return embeddings, clusters


def names_beside(file: Path) -> dict[str, str]:
    """Return the names that were given to clusters in names.json beside a `model.spice`.

    Raises:
        UsageError: that file is larger than 16 MB or is not a dictionary of texts.
    """
    beside = file.with_name("names.json")
    if not beside.is_file():
        return {}
    try:
        if beside.stat().st_size > MAX_NAMES_BYTES:
            raise ValueError("it is larger than 16 MB")
        found = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(map(_is_text, found.values())):
            raise ValueError("it is not a dictionary of texts")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f'{beside} is damaged ({error}); its form is {{"0": "cats", "1": "dogs"}}: '
            "correct it, or remove it to use the names in the model"
        ) from error
    return found


def unreadable(file: Path, reason: str) -> UsageError:
    """Return the error that a file is damaged, for this reason."""
    return UsageError(
        f"{file} is damaged or not a {FILE_NAME} ({reason}); copy it again, or make it again by "
        "running its stage with overwrite=true"
    )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "float"
    return "bool" if tensor.dtype == torch.bool else "int"


def _check_finite(file: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise unreadable(file, f"tensor {name} holds numbers that are not finite")
