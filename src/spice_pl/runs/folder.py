"""The folder of one stage's run: its files, how they are written, and how they are checked.

`runs/<dataset>/<stage>/<run>/` holds encoder.safetensors, head.safetensors, features.npy,
probs.npy, dataset.json, clusters.csv, last.ckpt, .hydra/ and metrics.json. metrics.json is written
last, so a folder that has it is finished. A file gets its name once it is complete and on the disk.
metrics.json holds digests of the files that are read later, and each file is compared with its
digest where it is read.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import logging
import math
import os
import reprlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.functional.embeddings import smoothed_embeddings
from spice_pl.nn.weights import load_strictly
from spice_pl.runs.clusters import FILE_NAME as CLUSTERS
from spice_pl.runs.clusters import ClusterTable, fits_probs, read_table, write_table
from spice_pl.runs.small_files import (
    METRICS,
    STAMP,
    Kind,
    check_fields,
    is_cluster,
    is_text,
    parse_object,
    read_text,
)
from spice_pl.system.files import atomic, sync_folder

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings.npy"
# Files that the next stage reads. Their digests together identify a run.
HANDED_ON = ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy")
# Files whose digests are in metrics.json. attention.npz has none, since stage=report writes it
# again, and names.json has none, since the user may edit it.
WITH_DIGEST = (*HANDED_ON, "heads.safetensors", CLUSTERS, "model.spice", "moved.npy")


class Metrics(dict[str, Any]):
    """The fields of a metrics.json.

    Raises:
        UsageError: a field is read that is missing, or there are more clusters than images.
    """

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._file = file
        if self.get("num_clusters", 0) > self.get("num_images", math.inf):
            raise _damaged(file, ValueError("it has more clusters than images"))

    def __missing__(self, name: str) -> Any:
        raise _damaged(self._file, ValueError(f"it lacks {name!r}"))


@dataclass(frozen=True)
class RunFolder:
    """The artifacts of one stage's run.

    Attributes:
        path: the folder, runs/<dataset>/<stage>/<run>.
        similarity: which images count as alike, "cosine" or "smoothed"; see `embeddings`.
    """

    path: Path
    similarity: str = "cosine"
    _compared: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        """Whether all artifacts have been written."""
        return (self.path / "metrics.json").is_file()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of training."""
        return self.path / "last.ckpt"

    @property
    def features(self) -> NDArray[np.float32]:
        """(N, D) raw features of the plain images, memory-mapped."""
        return self._array("features.npy", np.dtype(np.float32), 2)

    def embeddings(self, train_index: NDArray[np.int64]) -> Tensor:
        """Return embeddings (N, d), l2-normalised: which images are alike, by their cosine.

        With similarity "cosine" they are the l2-normalised features, as in the paper (D = d). With
        "smoothed" they are those of `functional.embeddings.smoothed_embeddings`, read from
        embeddings.npy if it was written.

        Args:
            train_index: images to fit the smoothed embeddings on; the others join them.
        """
        if self.similarity == "cosine":
            return F.normalize(torch.from_numpy(np.array(self.features)))
        if (self.path / EMBEDDINGS).is_file():
            return as_tensor(self._array(EMBEDDINGS, np.dtype(np.float32), 2))
        return smoothed_embeddings(
            as_tensor(self.features), fit_index=_fit_index(train_index, self)
        )

    def write_embeddings(self, train_index: NDArray[np.int64], upstream: RunFolder | None) -> None:
        """Write embeddings.npy, or remove it where similarity is "cosine".

        A stage that hands its upstream's features on unchanged takes its embeddings too.
        """
        (self.path / EMBEDDINGS).unlink(missing_ok=True)
        if self.similarity == "cosine":
            return
        source = self
        if upstream is not None and _same_features(self, upstream):
            source = upstream
        embeddings = source.embeddings(train_index)
        with atomic(self.path / EMBEDDINGS) as temporary, temporary.open("wb") as file:
            np.save(file, embeddings.numpy())

    @property
    def probs(self) -> NDArray[np.float32]:
        """(N, K) cluster probabilities of the plain images, memory-mapped."""
        return self._array("probs.npy", np.dtype(np.float32), 2)

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json.

        Raises:
            UsageError: the file is missing or damaged, or later, a field that is read is missing.
        """
        return Metrics(self.path / "metrics.json", self._json("metrics.json", METRICS))

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Lock the folder for one run; a second run waits. Yield a handle for child processes.

        The system releases the lock when the last process with the handle ends, even if it is
        killed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: another run uses this folder; waiting until it ends", self.path)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s); start one run at a time in it", self.path, error
                )
            yield handle
        finally:
            os.close(handle)

    def clear_temporary(self) -> None:
        """Remove incomplete files of a run that was killed. Call it only with the lock."""
        for file in self.path.glob(".*.*"):
            if file.is_file():
                file.unlink()

    def forget(self) -> None:
        """Remove the files that mark the run as finished or let it continue."""
        for name in ("metrics.json", "metrics.csv", self.checkpoint.name):
            (self.path / name).unlink(missing_ok=True)

    def check_space(self, num_bytes: int) -> None:
        """Check that the disk has room for a run's files.

        Raises:
            UsageError: it has not.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise UsageError(
                f"{self.path} needs about {num_bytes / 1e6:,.0f} MB and its disk has "
                f"{free / 1e6:,.0f} MB left; free some, or give another runs_dir"
            )

    @property
    def names(self) -> dict[int, str]:
        """Names that the user gave to clusters, from names.json; empty without that file.

        Raises:
            UsageError: the file does not have this form.
        """
        file = self.path / "names.json"
        if not file.is_file():
            return {}
        try:
            found = parse_object(read_text(file))
            for key, name in found.items():
                if not (is_cluster(key) and is_text(name)):
                    pair = reprlib.repr({key: name})
                    raise ValueError(f"{pair} is not the number of a cluster and its name")
        except ValueError as error:
            raise UsageError(
                f"{file} does not name clusters ({error}); its form is "
                '{"0": "cats", "1": "dogs"}, correct it or delete it'
            ) from error
        return {int(key): name for key, name in found.items()}

    def moved(self, num_images: int) -> NDArray[np.bool_]:
        """Return a mask (N,) of the images that the user moved; all false in a run without edits.

        Raises:
            UsageError: moved.npy is damaged, has changed, or has another length.
        """
        file = self.checked("moved.npy")
        if not file.is_file():
            return np.zeros(num_images, dtype=np.bool_)
        mask = np.array(self._array(file.name, np.dtype(np.bool_), 1))
        if len(mask) != num_images:
            raise _damaged(file, ValueError(f"{len(mask)} values for {num_images} images"))
        return mask

    def create(self, name: str, shape: tuple[int, ...]) -> None:
        """Create a float32 array on disk for the ranks to fill; `publish` gives it its name."""
        self.path.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(
            self._part(name), mode="w+", dtype=np.float32, shape=shape
        )
        size = self._part(name).stat().st_size
        del array
        # Writing to a memory map on a full disk kills the process; allocating first raises OSError.
        with self._part(name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def write_rows(self, name: str, index: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Fill rows of an array that was made by `create`."""
        array = np.lib.format.open_memmap(self._part(name), mode="r+")
        array[index] = rows
        array.flush()

    def publish(self, name: str) -> None:
        """Give an array its name after all rows are filled."""
        with self._part(name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._part(name), self.path / name)
        sync_folder(self.path)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write an indented JSON file."""
        with atomic(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, default=float) + "\n")

    def write_weights(self, name: str, module: nn.Module) -> None:
        """Write a module's state without pickle."""
        state = {
            key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()
        }
        with atomic(self.path / name) as temporary:
            temporary.write_bytes(save(state))

    def load_weights(self, name: str, module: nn.Module) -> None:
        """Load weights that `write_weights` wrote.

        Raises:
            UsageError: the file is missing, damaged or has changed; or the weights belong to
                another architecture, with a list of every key that differs.
        """
        load_strictly(module, self.read_weights(name), str(self.path / name))

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
            raise _damaged(file, error) from error

    def write_clusters(self, table: ClusterTable) -> None:
        """Write clusters.csv."""
        write_table(table, self.path / CLUSTERS)

    def read_clusters(self) -> ClusterTable:
        """Read clusters.csv.

        Rows must be in the order of the other arrays, so a sorted or edited table is refused.

        Raises:
            UsageError: the file is missing, damaged or has changed.
        """
        self.check_digests(CLUSTERS)
        file = self.path / CLUSTERS
        if not file.is_file():
            raise UsageError(f"{file} is missing; run its stage again with overwrite=true")
        try:
            table = read_table(file)
        except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            raise _damaged(file, error) from error
        # Runs made before 0.2 have no digest of their table.
        without_digest = self.finished and CLUSTERS not in self._kept_digests()
        if without_digest and not fits_probs(table, self.probs):
            raise self._changed(CLUSTERS, "its rows do not fit those of probs.npy")
        return table

    def digests(self, names: Sequence[str] = WITH_DIGEST) -> dict[str, str]:
        """Return the BLAKE2b digests of the files that exist, 16 hexadecimal digits each."""
        return {name: _digest(self.path / name) for name in names if (self.path / name).is_file()}

    def digest(self) -> str:
        """Return the digest that identifies the run, 16 hexadecimal digits; see `identity`."""
        return identity(self.digests(HANDED_ON))

    def checked(self, name: str) -> Path:
        """Return the path of a file after comparing it with its digest in metrics.json.

        Each file is compared once per `RunFolder` object, since it can be large.

        Raises:
            UsageError: the file is missing or not what the stage wrote.
        """
        if name not in self._compared:
            self.check_digests(name)
        return self.path / name

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

    def _kept_digests(self) -> dict[str, str]:
        return dict(self.metrics.get("digests", {})) if self.finished else {}

    def _changed(self, name: str, difference: str) -> UsageError:
        file = self.path / name
        changed = f"has changed since it was written ({difference})"
        return UsageError(
            f"{file} {changed if file.is_file() else 'is missing'}; put the original back and keep "
            f"a sorted or edited copy under another name, or {_written_again(self.path)}"
        )

    def stamp(self, fingerprint: str, num_images: int, upstream: RunFolder | None) -> None:
        """Write dataset.json: the data set and the upstream run behind the artifacts."""
        self.write_json(
            "dataset.json",
            {
                "fingerprint": fingerprint,
                "num_images": num_images,
                "upstream": upstream.metrics["digest"] if upstream else None,
            },
        )

    def check_dataset(self, fingerprint: str, num_images: int) -> None:
        """Compare dataset.json with the data set of this job.

        Raises:
            UsageError: the artifacts were made from other images or another order.
        """
        stamp = self._stamp()
        if stamp["fingerprint"] != fingerprint:
            raise UsageError(
                f"{self.path} was made from other images or another order of them "
                f"(fingerprint {stamp['fingerprint']}, {stamp['num_images']} images; now "
                f"{fingerprint}, {num_images} images); give the same data set, or run the stage "
                "again with overwrite=true or under another run=NAME"
            )
        held = self.metrics.get("num_images", num_images) if self.finished else num_images
        if not stamp["num_images"] == held == num_images:
            name = "metrics.json" if held != num_images else "dataset.json"
            reason = ValueError(f"the number of images is not the data set's, {num_images}")
            raise _damaged(self.path / name, reason)

    def check_upstream(self, upstream: RunFolder) -> None:
        """Compare dataset.json with the upstream run as it is now.

        Raises:
            UsageError: the upstream run was run again since.
        """
        stamp = self._stamp()
        if stamp["upstream"] != upstream.metrics.get("digest"):
            raise UsageError(
                f"{self.path} was made from an earlier {upstream.path}, which was run again since; "
                "run this stage again too with overwrite=true, or use another run=NAME"
            )

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
            raise _damaged(file, error) from error
        return array

    def _json(self, name: str, fields: Mapping[str, Kind]) -> dict[str, Any]:
        file = self.path / name
        try:
            content = parse_object(read_text(file))
            check_fields(content, fields)
        except FileNotFoundError:
            raise UsageError(f"{file} is missing; run its stage again") from None
        except ValueError as error:
            raise _damaged(file, error) from error
        return content

    def _stamp(self) -> dict[str, Any]:
        stamp = self._json("dataset.json", STAMP)
        if absent := [name for name in STAMP if name not in stamp]:
            raise _damaged(self.path / "dataset.json", ValueError(f"it lacks {absent[0]!r}"))
        return stamp

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.part"


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


def _damaged(file: Path, error: Exception) -> UsageError:
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


def _same_features(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs have the same features, bit by bit."""
    file = other.path / "features.npy"
    return file.is_file() and np.array_equal(one.features, other.features)


def _fit_index(train_index: NDArray[np.int64], folder: RunFolder) -> Tensor | None:
    """Return the images to fit on, None for all of them."""
    return None if len(train_index) == len(folder.features) else torch.from_numpy(train_index)


def as_tensor(array: NDArray[np.float32]) -> Tensor:
    """Return a memory-mapped array as a tensor without a copy; do not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
