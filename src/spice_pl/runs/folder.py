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
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.functional.embeddings import smoothed_embeddings
from spice_pl.nn.weights import load_strictly
from spice_pl.runs.checked_files import (
    ANSWER,
    CHECKSUM,
    EMBEDDINGS,
    CheckedFiles,
    checksum,
    damaged,
)
from spice_pl.runs.clusters import FILE_NAME as CLUSTERS
from spice_pl.runs.clusters import ClusterTable, fits_probs, read_table, write_table
from spice_pl.runs.small_files import STAMP
from spice_pl.system.files import allocate, atomic, size_text, sync_file, sync_folder
from spice_pl.system.locks import hold
from spice_pl.system.schema import read_names


@dataclass(frozen=True)
class RunFolder(CheckedFiles):
    """The artifacts of one stage's run.

    Attributes:
        path: the folder, runs/<dataset>/<stage>/<run>.
        similarity: which images count as alike, "cosine" or "smoothed"; see `embeddings`.
    """

    similarity: str = "cosine"

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
            as_tensor(self.features), fit_index=torch.from_numpy(train_index)
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
    def answer(self) -> NDArray[np.float32]:
        """(N, K) probabilities of the clusters in clusters.csv, memory-mapped.

        Those of the network, unless others were chosen (`runs.answer`).
        """
        name = ANSWER if (self.path / ANSWER).is_file() else "probs.npy"
        return self._array(name, np.dtype(np.float32), 2)

    def write_answer(self, probs: NDArray[np.float32] | None) -> None:
        """Write answer.npy; None removes it, where the network's clusters are kept."""
        (self.path / ANSWER).unlink(missing_ok=True)
        if probs is not None:
            with atomic(self.path / ANSWER) as temporary, temporary.open("wb") as file:
                np.save(file, probs)

    @contextmanager
    def lock(self, *, wait: bool = True) -> Iterator[int]:
        """Lock the folder for one run; a second run waits. Yield a handle for child processes.

        The system releases the lock when the last process with the handle ends, even if it is
        killed (see `system.locks`).

        Args:
            wait: whether to wait for another run.

        Raises:
            UsageError: another run uses the folder, and `wait` is False.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"{self.path} is used by another run; try again when it has ended"
        with hold(self.path, self._waiting, busy=None if wait else busy) as handle:
            yield handle

    @contextmanager
    def used(self, *, alone: bool = False) -> Iterator[None]:
        """Hold off jobs that would remove results of this folder, while this job uses them.

        Args:
            alone: wait until no other job uses the folder, and hold all others off.
        """
        place = self.path / ".hydra"
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            if alone:
                raise
            yield  # nobody can remove anything in a folder that cannot be written to
            return
        with hold(place, self._waiting, shared=not alone):
            yield

    @property
    def _waiting(self) -> str:
        return f"{self.path}: another run uses this folder; waiting until it ends"

    def clear_temporary(self, *names: str) -> None:
        """Remove incomplete files of a run that was killed. Call it only with the lock.

        Args:
            names: files whose incomplete ones are removed; without names, all are.
        """
        begins = tuple(f".{name}." for name in names) or (".",)
        for file in self.path.glob(".*.*"):
            if file.is_file() and file.name.startswith(begins):
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
                f"{self.path} needs about {size_text(num_bytes)} and its disk has "
                f"{size_text(free)} left; free some, or give another runs_dir"
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
            return read_names(file)
        except ValueError as error:
            raise UsageError(
                f"{file} does not name clusters ({error}); its form is "
                '{"0": "cats", "1": "dogs"}, correct it or delete it'
            ) from error

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
            raise damaged(file, ValueError(f"{len(mask)} values for {num_images} images"))
        return mask

    def create(self, name: str, shape: tuple[int, ...]) -> None:
        """Create a float32 array on disk for the ranks to fill; `publish` gives it its name."""
        self.path.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(
            self._part(name), mode="w+", dtype=np.float32, shape=shape
        )
        del array
        # Writing to a memory map on a full disk kills the process; allocating first raises OSError.
        allocate(self._part(name))

    def write_rows(self, name: str, index: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Fill rows of an array that was made by `create`."""
        array = np.lib.format.open_memmap(self._part(name), mode="r+")
        array[index] = rows
        array.flush()

    def publish(self, name: str) -> None:
        """Give an array its name after all rows are filled."""
        sync_file(self._part(name))
        os.replace(self._part(name), self.path / name)
        sync_folder(self.path)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write an indented JSON file; metrics.json with a checksum of its content."""
        written: dict[str, Any] = json.loads(json.dumps(content, default=float))
        if name == "metrics.json":
            written[CHECKSUM] = checksum({k: v for k, v in written.items() if k != CHECKSUM})
        with atomic(self.path / name) as temporary:
            temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

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

    def write_clusters(self, table: ClusterTable, *, spreadsheet: bool = False) -> None:
        """Write clusters.csv, with neutral names for spreadsheets if asked to."""
        write_table(table, self.path / CLUSTERS, spreadsheet=spreadsheet)

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
            found = self.metrics if self.finished else {}
            table = read_table(file, found.get("num_images"), int(found.get("num_neighbors", 0)))
        except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            raise damaged(file, error) from error
        # Runs made before 0.2 have no digest of their table.
        without_digest = self.finished and CLUSTERS not in self._kept_digests()
        if without_digest and not fits_probs(table, self.probs):
            raise self._changed(CLUSTERS, "its rows do not fit those of probs.npy")
        return table

    def stamp(
        self,
        fingerprint: str,
        num_images: int,
        upstream: RunFolder | None,
        more: Sequence[RunFolder] = (),
    ) -> None:
        """Write dataset.json: the data set and the upstream runs behind the artifacts."""
        facts: dict[str, Any] = {
            "fingerprint": fingerprint,
            "num_images": num_images,
            "upstream": upstream.metrics["digest"] if upstream else None,
        }
        if more:
            facts["more"] = [each.metrics["digest"] for each in more]
        self.write_json("dataset.json", facts)

    def fits(self, fingerprint: str) -> bool:
        """Return whether a finished run is of the images with this fingerprint."""
        return bool(self._stamp()["fingerprint"] == fingerprint)

    def take_features(self, earlier: RunFolder) -> None:
        """Copy the features of another run."""
        with atomic(self.path / "features.npy") as temporary:
            shutil.copyfile(earlier.path / "features.npy", temporary)

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
            raise damaged(self.path / name, reason)

    def check_upstream(self, upstream: RunFolder, more: Sequence[RunFolder] = ()) -> None:
        """Compare dataset.json with the upstream runs as they are now.

        Raises:
            UsageError: the upstream run was run again since.
        """
        stamp = self._stamp()
        others = stamp.get("more")
        found = [stamp["upstream"], *(others if isinstance(others, list) else [])]
        found += [None] * (1 + len(more) - len(found))
        for each, digest in zip((upstream, *more), found, strict=False):
            if digest != each.metrics.get("digest"):
                raise UsageError(
                    f"{self.path} was made from an earlier {each.path}, which was run again since; "
                    "run this stage again too with overwrite=true, or use another run=NAME"
                )

    def _stamp(self) -> dict[str, Any]:
        stamp = self._json("dataset.json", STAMP)
        if absent := [name for name in STAMP if name not in stamp]:
            raise damaged(self.path / "dataset.json", ValueError(f"it lacks {absent[0]!r}"))
        return stamp

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.part"


def _same_features(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs have the same features, bit by bit."""
    file = other.path / "features.npy"
    return file.is_file() and np.array_equal(one.features, other.features)


def as_tensor(array: NDArray[np.floating[Any]]) -> Tensor:
    """Return a memory-mapped array as a tensor without a copy; do not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
