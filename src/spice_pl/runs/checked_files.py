"""Files of a run that are read against their digests in metrics.json.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.runs.clusters import FILE_NAME as CLUSTERS
from spice_pl.runs.small_files import METRICS, Kind, check_fields, parse_object, read_text

EMBEDDINGS = "embeddings.npy"
ANSWER = "answer.npy"
# Files that the next stage reads. Their digests together identify a run.
HANDED_ON = ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy")
# Files whose digests are in metrics.json. attention.npz has none, since stage=report writes it
# again, and names.json has none, since the user may edit it.
WITH_DIGEST = (
    *HANDED_ON,
    EMBEDDINGS,
    ANSWER,
    "heads.safetensors",
    CLUSTERS,
    "model.spice",
    "moved.npy",
)


CHECKSUM = "checksum"  # field of metrics.json


class Metrics(dict[str, Any]):
    """The fields of a metrics.json.

    Raises:
        UsageError: a field is read that is missing, or there are more clusters than images.
    """

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._file = file
        if self.get("num_clusters", 0) > self.get("num_images", math.inf):
            raise damaged(file, ValueError("it has more clusters than images"))

    def __missing__(self, name: str) -> Any:
        raise damaged(self._file, ValueError(f"it lacks {name!r}"))


@dataclass(frozen=True)
class CheckedFiles:
    """A folder whose files are compared with their digests before they are used.

    Attributes:
        path: the folder, runs/<dataset>/<stage>/<run>.
    """

    path: Path
    _compared: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        """Whether all artifacts have been written."""
        return (self.path / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json.

        Raises:
            UsageError: the file is missing or damaged, or later, a field that is read is missing.
        """
        file, content = self.path / "metrics.json", self._json("metrics.json", METRICS)
        kept = content.pop(CHECKSUM, None)
        found = Metrics(file, content)
        if kept is not None and kept != checksum(content):  # runs before 0.2 have none
            raise damaged(file, ValueError("its checksum does not fit its content"))
        return found

    def checked(self, name: str) -> Path:
        """Return the path of a file after comparing it with its digest in metrics.json.

        Each file is compared once per `RunFolder` object, since it can be large.

        Raises:
            UsageError: the file is missing or not what the stage wrote.
        """
        if name not in self._compared:
            self.check_digests(name)
        return self.path / name

    def digests(self, names: Sequence[str] = WITH_DIGEST) -> dict[str, str]:
        """Return the BLAKE2b digests of the files that exist, 16 hexadecimal digits each."""
        return {name: _digest(self.path / name) for name in names if (self.path / name).is_file()}

    def digest(self) -> str:
        """Return the digest that identifies the run, 16 hexadecimal digits; see `identity`."""
        return identity(self.digests(HANDED_ON))

    def check_digests(self, *names: str) -> None:
        """Compare files with their digests in metrics.json; by default those of `HANDED_ON`.

        Files without a digest pass: those of a run that is not finished, and some of older runs.

        Raises:
            UsageError: a file is missing or not what the stage wrote.
        """
        kept = self._kept_digests()
        for name in names or HANDED_ON:
            if name not in kept:
                continue
            found = self.digests([name]).get(name)
            if found != kept[name]:
                raise self._changed(name, f"digest {found}, {kept[name]} in metrics.json")
            self._compared.add(name)

    def read_weights(self, name: str) -> dict[str, Tensor]:
        """Read weights that `write_weights` wrote.

        Raises:
            UsageError: the file is missing, damaged or has changed.
        """
        file = self.checked(name)
        if not file.is_file():
            raise UsageError(f"{file} is missing; run its stage again with overwrite=true")
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise damaged(file, error) from error

    def _array(self, name: str, dtype: np.dtype[Any], num_dimensions: int) -> NDArray[Any]:
        file = self.checked(name)
        if not file.is_file():
            raise UsageError(f"{file} is missing; run its stage again with overwrite=true")
        try:
            array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
            if array.dtype != dtype or array.ndim != num_dimensions:
                raise ValueError(
                    f"{array.dtype} of {array.ndim} dimensions, not {dtype} of {num_dimensions}"
                )
        # A damaged header can cause any exception in numpy's reader.
        except Exception as error:
            raise damaged(file, error) from error
        return array

    def _json(self, name: str, fields: Mapping[str, Kind]) -> dict[str, Any]:
        file = self.path / name
        try:
            content = parse_object(read_text(file))
            check_fields(content, fields)
        except FileNotFoundError:
            raise UsageError(f"{file} is missing; run its stage again") from None
        except ValueError as error:
            raise damaged(file, error) from error
        return content

    def _kept_digests(self) -> dict[str, str]:
        return dict(self.metrics.get("digests", {})) if self.finished else {}

    def _changed(self, name: str, difference: str) -> UsageError:
        file = self.path / name
        changed = f"has changed since it was written ({difference})"
        return UsageError(
            f"{file} {changed if file.is_file() else 'is missing'}; put the original back and keep "
            f"a sorted or edited copy under another name, or {_written_again(self.path)}"
        )


def checksum(content: Mapping[str, Any]) -> str:
    """Return the BLAKE2b digest of JSON, in any order and indentation: 16 hexadecimal digits."""
    whole = json.dumps(content, sort_keys=True, default=float)
    return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()


def identity(digests: Mapping[str, str]) -> str:
    """Return the digest that identifies a run: the digest of its digests of `HANDED_ON`."""
    handed_on = {name: digests[name] for name in HANDED_ON if name in digests}
    return hashlib.blake2b(repr(handed_on).encode(), digest_size=8).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def damaged(file: Path, error: Exception) -> UsageError:
    """Return the error of a file that cannot be read, with the way out that costs least."""
    reason = str(error).partition("\n")[0]
    way = _written_again(file.parent)
    if file.name == "dataset.json":  # read before a stage resumes
        way = "run its stage again with overwrite=true"
    return UsageError(f"{file} is damaged ({reason}); {way}")


def _written_again(folder: Path) -> str:
    """Return the cheapest way to restore a file, for messages."""
    return (
        f"delete {folder / 'metrics.json'} and run its stage with resume=true: it writes its files "
        "again, without training if last.ckpt is there"
    )
