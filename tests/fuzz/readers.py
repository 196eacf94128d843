"""What reads each kind of file that others give us: for the fuzzer, and for the cases kept."""

from __future__ import annotations

import importlib
import io
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tests.conftest import Finished
from tests.stages.small import image_set

from spice_pl.callbacks.checkpoints import read_checkpoint
from spice_pl.callbacks.metrics_csv import CurveLogger
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.archives import read_index
from spice_pl.errors import UsageError
from spice_pl.job.checks import saved_settings
from spice_pl.job.job import literal
from spice_pl.job.settings import build
from spice_pl.models import portable
from spice_pl.models.interop import read_reference
from spice_pl.runs.attention import read_attention
from spice_pl.runs.edits import read_edits
from spice_pl.runs.evidence import check_probs, read_array
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.results import log_lines
from spice_pl.system.schema import read_names
from spice_pl.tasks.review import make_server

DOCUMENTED = (UsageError, HydraException, OmegaConfBaseException)
PIXELS = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)


@dataclass
class Wire:
    """Stands for the socket of one connection: what is received, and what was answered."""

    received: bytes
    answered: bytes = b""

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self.received)

    def sendall(self, content: bytes) -> None:
        self.answered += bytes(content)

    def settimeout(self, seconds: float) -> None:
        pass


class Readers:
    """Readers of one run of stage 2, copied to a folder; each takes the path of a file.

    They return what was read, and raise one of DOCUMENTED for a file that they refuse.
    """

    def __init__(self, straight: Finished, root: Path) -> None:
        with suppress(ImportError):
            importlib.import_module("wandb")  # makes a folder of its own when it is imported
        self.root, self.folder = root, RunFolder(root / "proto" / "seed0")
        shutil.copytree(straight.folder("proto").path, self.folder.path)
        self.metrics = self.folder.metrics
        small = image_set()
        keys = [f"{i:03}.png" for i in range(len(small))]
        self.images = ImageSet(small.name, small.images, keys, self.metrics["fingerprint"])
        self.server, self.token = make_server(self.folder, [], self.images)
        self.port = self.server.server_port
        self.handler = cast(type[BaseHTTPRequestHandler], self.server.RequestHandlerClass)

    def of(self, kind: str) -> Callable[[Path], Any]:
        """Return the reader of a kind, the name of a folder in tests/corpus."""
        found: Callable[[Path], Any] = getattr(self, kind.replace(".", "_"))
        return found

    def model_spice(self, file: Path) -> Any:
        return portable.load(file, device="cpu").predict(PIXELS).confidence

    def names_json(self, file: Path) -> Any:
        if file.parent != self.folder.path:
            shutil.copy(file, self.folder.path / "names.json")
        return self.folder.names, read_names(self.folder.path / "names.json")

    def edits_json(self, file: Path) -> Any:
        return read_edits(file)

    def metrics_json(self, file: Path) -> Any:
        return RunFolder(self._alone(file, "metrics.json")).metrics

    def dataset_json(self, file: Path) -> Any:
        folder = RunFolder(self._alone(file, "dataset.json"))
        folder.check_dataset(self.metrics["fingerprint"], 90)
        return folder._stamp()

    def clusters_csv(self, file: Path) -> Any:
        return RunFolder(self._alone(file, "clusters.csv")).read_clusters()

    def metrics_csv(self, file: Path) -> Any:
        folder = RunFolder(self._alone(file, "metrics.csv"))
        return log_lines(folder), CurveLogger(str(folder.path)).rows

    def attention_npz(self, file: Path) -> Any:
        if file.parent != self.folder.path:
            shutil.copy(file, self.folder.path / "attention.npz")
        return read_attention(self.folder)

    def last_ckpt(self, file: Path) -> Any:
        return read_checkpoint(file)

    def weights(self, file: Path) -> Any:
        return read_reference(file, 8).summary

    def probs(self, file: Path) -> Any:
        found = read_array(str(file), self.images.keys, self.images.fingerprint, 3)
        check_probs(found, 90, 3, str(file))
        return found

    def shard_tar(self, file: Path) -> Any:
        whole = file.stat().st_size
        for image in read_index(file).images:
            assert 0 <= image.start <= image.start + image.size <= whole
        return None

    def settings(self, file: Path) -> Any:
        cfg = OmegaConf.create(yaml.safe_load(file.read_text()))
        return build(OmegaConf.create({"allow_targets": []}), cfg)

    def config_yaml(self, file: Path) -> Any:
        """Read the saved settings of a run, as a task on it does, and build them."""
        saved = saved_settings(file)
        cfg = OmegaConf.create({"allow_targets": [], "taken": literal(saved)})
        found = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(found, dict)
        assert repr(found["taken"]) == repr(saved)
        return build(cfg, cfg.taken)

    def request(self, file: Path) -> Any:
        """Answer one request; a text TOKEN or PORT in the file stands for the server's."""
        sent = file.read_bytes().replace(b"TOKEN", self.token.encode())
        wire = Wire(sent.replace(b"PORT", str(self.port).encode()))
        self.handler(cast(Any, wire), ("127.0.0.1", 1), self.server)
        return wire.answered

    def _alone(self, file: Path, name: str) -> Path:
        """Copy a file into a folder that holds nothing else."""
        target = self.root / f"alone {name}" / name
        if file != target:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)
        return target.parent
