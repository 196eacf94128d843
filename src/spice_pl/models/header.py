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
| known_vote | whether the clusters of known images count as much as the head's; may be missing |
| digest | digest of the other fields and all tensors; files of before 0.2 have none |

It is JSON of at most 64 MB and 20 levels. Tensors begin with `encoder.`, `head.` or `known.`, are
finite, and have the kind and shape of the module's own. safetensors holds them to the size of the
file.

Shapes: K clusters, n known images, D features.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spice_pl.errors import UsageError
from spice_pl.system.schema import Kind, is_name, is_text, is_whole, parse_object, read_names

FILE_NAME = "model.spice"
FORMAT = 1  # raised when a file can no longer be read by the releases before
MAX_PIXELS = 4096
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
    known_vote: bool = False


def _is_levels(value: Any) -> bool:
    """Whether it is null, or two finite numbers in rising order."""
    if value is None:
        return True
    if not isinstance(value, list) or len(value) != 2:
        return False
    numbers = all(type(each) in (int, float) and math.isfinite(each) for each in value)
    return numbers and value[0] < value[1]


OPTIONAL = ("levels", "known_vote")  # not in the files of before 0.2
RULES: dict[str, Kind] = {
    "format": Kind("a whole number of 1 or more", lambda value: is_whole(value) and value >= 1),
    "settings": Kind("a dictionary", lambda value: isinstance(value, dict)),
    "image_size": Kind(
        f"a whole number of pixels from 1 to {MAX_PIXELS:,}",
        lambda value: type(value) is int and 1 <= value <= MAX_PIXELS,
    ),
    "names": Kind(
        "a list of one text per cluster, without control characters",
        lambda value: isinstance(value, list) and all(map(is_name, value)),
    ),
    "threshold": Kind(
        "a number from 0 to 1",
        lambda value: type(value) in (int, float) and 0 <= value <= 1,
    ),
    "about": Kind("a dictionary", lambda value: isinstance(value, dict)),
    "known": Kind(
        "null or a list of texts",
        lambda value: value is None or (isinstance(value, list) and all(map(is_text, value))),
    ),
    "levels": Kind("null or black and white, two numbers in rising order", _is_levels),
    "known_vote": Kind("true or false", lambda value: isinstance(value, bool)),
}


def read(file: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read the header and the tensors of a `model.spice`.

    Raises:
        UsageError: the file is damaged, a field is missing or not what it must be, or a newer
            release wrote the file.
    """
    try:
        with safe_open(file, "pt") as opened:
            found = parse_object((opened.metadata() or {})["spice_pl"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise unreadable(file, f"{type(error).__name__}: {error}") from error
    for field, kind in RULES.items():
        if field not in found:
            if field in OPTIONAL:
                continue
            raise unreadable(file, f"its header has no {field}")
        value = found[field]
        if not kind.holds(value):
            raise unreadable(file, f"{field} is {value!r:.80}, and it must be {kind.name}")
        if field == "format" and value > FORMAT:
            raise UsageError(
                f"{file} was written by a newer spice-pl (format {value!r:.80}, this release "
                f"reads up to {FORMAT}); install a newer one with pip install -U spice-pl"
            )
    for key in tensors:
        if not key.startswith(("encoder.", "head.", "known.")):
            raise unreadable(file, f"tensor {key!r:.80} belongs to neither encoder, head nor known")
    kept = found.pop("digest", None)
    if kept is not None and kept != digest(found, tensors):
        raise unreadable(file, "its digest does not fit its content")
    known = {field: found[field] for field in RULES if field in found and field != "format"}
    return Header(**known), tensors


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the BLAKE2b digest of a header, without its digest, and of all tensors."""
    made = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=8)
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


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


def names_beside(file: Path) -> dict[int, str]:
    """Return the names that were given to clusters in names.json beside a `model.spice`.

    Raises:
        UsageError: that file does not have its form, see `read_names`.
    """
    beside = file.with_name("names.json")
    if not beside.is_file():
        return {}
    try:
        return read_names(beside)
    except (OSError, ValueError) as error:
        raise UsageError(
            f'{beside} is damaged ({error}); its form is {{"0": "cats", "1": "dogs"}}: '
            "correct it, or remove it to use the names in the model"
        ) from error


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
