"""Where files live and what is in them: one folder a stage and run.

`runs/<dataset>/<stage>/<run>/` holds encoder.safetensors, head.safetensors, features.npy,
probs.npy, dataset.json, clusters.csv, last.ckpt, .hydra/ and, written last of all, metrics.json:
a folder is finished when it is there.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spice_pl.errors import UsageError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ClusterTable:
    """What clusters.csv holds; every array is (N,), in the order of the data set."""

    keys: Sequence[str]
    clusters: NDArray[np.int64]
    confidence: NDArray[np.float32]
    agreement: NDArray[np.float32]
    reliable: NDArray[np.bool_]


@dataclass(frozen=True)
class RunFolder:
    """The artifacts of one stage's run."""

    path: Path

    @property
    def finished(self) -> bool:
        """True when every artifact was written."""
        return (self.path / "metrics.json").is_file()

    @property
    def checkpoint(self) -> Path:
        """Where training is saved at the end of an epoch."""
        return self.path / "last.ckpt"

    @property
    def features(self) -> NDArray[np.float32]:
        """(N, D) raw features of the plain images, memory-mapped."""
        return self._array("features.npy")

    @property
    def probs(self) -> NDArray[np.float32]:
        """(N, K) cluster probabilities of the plain images, memory-mapped."""
        return self._array("probs.npy")

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return dict(json.loads((self.path / "metrics.json").read_text()))

    @property
    def names(self) -> dict[int, str]:
        """What a person called clusters, from names.json; empty where nobody did."""
        file = self.path / "names.json"
        if not file.is_file():
            return {}
        return {int(cluster): str(name) for cluster, name in json.loads(file.read_text()).items()}

    def moved(self, num_images: int) -> NDArray[np.bool_]:
        """(N,) images that a person put into their cluster; none in a run without edits."""
        file = self.path / "moved.npy"
        return np.load(file) if file.is_file() else np.zeros(num_images, dtype=np.bool_)

    def create(self, name: str, shape: tuple[int, ...]) -> None:
        """Make an empty float32 array on disk for the ranks to fill; `publish` makes it whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self._part(name), mode="w+", dtype=np.float32, shape=shape)

    def write_rows(self, name: str, index: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Fill rows of an array that `create` made."""
        array = np.lib.format.open_memmap(self._part(name), mode="r+")
        array[index] = rows
        array.flush()

    def publish(self, name: str) -> None:
        """Give a filled array its name."""
        os.replace(self._part(name), self.path / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, readable for people."""
        with atomic(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, default=float) + "\n")

    def write_weights(self, name: str, module: nn.Module) -> None:
        """Write a module's state without pickle."""
        state = {
            key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()
        }
        with atomic(self.path / name) as temporary:
            save_file(state, temporary)

    def load_weights(self, name: str, module: nn.Module) -> None:
        """Load weights that `write_weights` wrote.

        Raises:
            UsageError: the weights belong to another architecture; lists every key that differs.
        """
        load_strictly(module, self.read_weights(name), str(self.path / name))

    def read_weights(self, name: str) -> dict[str, Tensor]:
        """Read weights that `write_weights` wrote.

        Raises:
            UsageError: the file is missing.
        """
        file = self.path / name
        if not file.is_file():
            raise UsageError(f"{file} is missing; run its stage again with overwrite=true")
        return dict(load_file(file))

    def write_clusters(
        self,
        keys: Sequence[str],
        clusters: NDArray[np.int64],
        confidence: NDArray[np.float32],
        agreement: NDArray[np.float32],
        reliable: NDArray[np.bool_],
    ) -> None:
        """Write clusters.csv: one line an image, in the order of the data set."""
        with (
            atomic(self.path / "clusters.csv") as temporary,
            # A path may hold bytes that are no UTF-8; they come out as they are on disk.
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["image", "cluster", "confidence", "agreement", "reliable"])
            for row in zip(keys, clusters, confidence, agreement, reliable, strict=True):
                image, cluster, sure, agrees, kept = row
                writer.writerow([image, int(cluster), f"{sure:.4f}", f"{agrees:.4f}", int(kept)])

    def read_clusters(self) -> ClusterTable:
        """Read what `write_clusters` wrote; confidence and agreement hold four decimals."""
        file = self.path / "clusters.csv"
        if not file.is_file():
            raise UsageError(f"{file} is missing; run its stage again with overwrite=true")
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            rows = list(csv.DictReader(lines))
        return ClusterTable(
            keys=[row["image"] for row in rows],
            clusters=np.array([row["cluster"] for row in rows], dtype=np.int64),
            confidence=np.array([row["confidence"] for row in rows], dtype=np.float32),
            agreement=np.array([row["agreement"] for row in rows], dtype=np.float32),
            reliable=np.array([row["reliable"] == "1" for row in rows], dtype=np.bool_),
        )

    def digest(self) -> str:
        """Digest of what is handed on, 16 hexadecimal digits (BLAKE2b)."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy"):
            if (self.path / name).is_file():
                with (self.path / name).open("rb") as file:
                    while chunk := file.read(1 << 24):
                        digest.update(chunk)
        return digest.hexdigest()

    def stamp(self, fingerprint: str, num_images: int, upstream: RunFolder | None) -> None:
        """Write which data set and which upstream run the artifacts are made from."""
        self.write_json(
            "dataset.json",
            {
                "fingerprint": fingerprint,
                "num_images": num_images,
                "upstream": upstream.metrics["digest"] if upstream else None,
            },
        )

    def check_dataset(self, fingerprint: str, num_images: int) -> None:
        """Compare the stamp with the present data set.

        Raises:
            UsageError: the artifacts were made from other images or another order.
        """
        stamp = json.loads((self.path / "dataset.json").read_text())
        if stamp["fingerprint"] != fingerprint:
            raise UsageError(
                f"{self.path} was made from other images or another order of them "
                f"(fingerprint {stamp['fingerprint']}, {stamp['num_images']} images; now "
                f"{fingerprint}, {num_images} images); give the same data set, or make it anew "
                "with overwrite=true or under another run=NAME"
            )

    def check_upstream(self, upstream: RunFolder) -> None:
        """Compare the stamp with the present upstream run.

        Raises:
            UsageError: the upstream was made anew since.
        """
        stamp = json.loads((self.path / "dataset.json").read_text())
        if stamp["upstream"] != upstream.metrics["digest"]:
            raise UsageError(
                f"{self.path} was made from another {upstream.path}, which was made anew since; "
                "make it anew too with overwrite=true, or use another run=NAME"
            )

    def _array(self, name: str) -> NDArray[np.float32]:
        file = self.path / name
        if not file.is_file():
            raise UsageError(f"{file} is missing; run its stage again with overwrite=true")
        array: NDArray[np.float32] = np.load(file, mmap_mode="r")
        return array

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.part"


def as_tensor(array: NDArray[np.float32]) -> Tensor:
    """Read a memory-mapped array as a tensor without a copy; never write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def load_strictly(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        UsageError: keys are missing, unexpected or of another shape; all are listed.
    """
    own = module.state_dict()
    differences = [f"missing     {key} {tuple(own[key].shape)}" for key in own if key not in state]
    differences += [
        f"unexpected  {key} {tuple(state[key].shape)}" for key in state if key not in own
    ]
    differences += [
        f"shape       {key} is {tuple(state[key].shape)}, needed {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if differences:
        raise UsageError(
            f"{source} holds weights of another architecture; give the backbone and K it was "
            "made with, or make it anew with overwrite=true:\n  " + "\n  ".join(differences)
        )
    module.load_state_dict(dict(state))
