"""Write and read `model.spice`, one file that clusters new images.

A safetensors file with JSON in its header: weights of encoder and head, how to build both, how to
prepare an image, the names of the clusters, and known images to show beside a new one. Loading
executes no code from the file: it can only name networks of a few allowed packages.

Shapes: N images, B images of a batch, D features, K clusters, S pixels a side, k known images shown
beside a new one.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.errors import UsageError
from spice_pl.models.known import Known, choose_known
from spice_pl.models.pixels import pixel_batches
from spice_pl.models.predictions import Predictions, join
from spice_pl.nn.frozen import in_parts
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.weights import below_prefix, load_strictly
from spice_pl.system.files import atomic

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "ClusterNetwork",
    "Known",
    "PortableModel",
    "Predictions",
    "choose_known",
    "load",
    "portable_settings",
]

FILE_NAME = "model.spice"
FORMAT = 1  # raised when earlier releases can no longer read a new file
ALLOWED = ("spice_pl.nn.", "spice_pl.data.augment.", "torchvision.models.", "timm.create_model")
# Weights come from the file, never from a hub or another file.
NO_DOWNLOAD = {"pretrained": False, "weights": None, "checkpoint_path": ""}


class ClusterNetwork(nn.Module):
    """Map pixels to cluster probabilities and embeddings.

    Args:
        plain: plain view, which prepares the pixels for the encoder.
        encoder: backbone, (B, 3, S, S) -> (B, D).
        head: cluster head, (B, D) -> (B, K) probabilities.
    """

    def __init__(self, plain: View, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.plain, self.encoder, self.head = plain, encoder, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities (B, K) and embeddings (B, D) of images (B, 3, S, S) uint8."""
        features = self.encoder(self.plain(images, images.new_empty(0))).float()
        return self.head(features), F.normalize(features)


@dataclass
class PortableModel:
    """A trained clustering that needs neither its run folder nor its data set.

    An image is marked "not sure" if its confidence is not above the threshold: the confidence that
    reliable images had to exceed in the run that wrote the model (`reliable.confidence`).

    Attributes:
        network: plain view, encoder and head, in eval mode.
        settings: for each of "encoder", "head" and "plain", how to build it: `_target_` and its
            arguments.
        image_size: S; images are scaled and cut to it.
        names: (K,) name of each cluster.
        threshold: confidence above which a prediction is sure.
        about: data set, fingerprint, stage, seed and versions, as information for the user.
        known: training images to show beside a new one, or None.
    """

    network: ClusterNetwork
    settings: Mapping[str, Any]
    image_size: int
    names: Sequence[str]
    threshold: float
    about: Mapping[str, Any] = field(default_factory=dict)
    known: Known | None = None

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def num_clusters(self) -> int:
        """Number of clusters K."""
        return len(self.names)

    @property
    def device(self) -> torch.device:
        """Device that the network is on."""
        return next(self.network.head.parameters()).device

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file; an interrupted write leaves an earlier file unchanged."""
        parts = {"encoder": self.network.encoder, "head": self.network.head}
        tensors = {
            f"{part}.{key}": value.detach().cpu().contiguous()
            for part, module in parts.items()
            for key, value in module.state_dict().items()
        }
        if self.known is not None:
            tensors["known.embeddings"] = self.known.embeddings.cpu().half().contiguous()
            tensors["known.clusters"] = self.known.clusters.cpu().int().contiguous()
        header = {
            "format": FORMAT,
            "settings": self.settings,
            "image_size": self.image_size,
            "names": list(self.names),
            "threshold": self.threshold,
            "about": self.about,
            "known": None if self.known is None else list(self.known.keys),
        }
        with atomic(Path(path)) as temporary:
            save_file(tensors, temporary, {"spice_pl": json.dumps(header)})

    def predict(self, images: Any, *, batch_size: int = 256, num_nearest: int = 3) -> Predictions:
        """Cluster images of any size and mode.

        Args:
            images: a folder, which is searched with its subfolders; one image or several: paths,
                PIL images, uint8 arrays (H, W), (H, W, 3) or (3, H, W); or one array of N images.
            batch_size: images per forward pass; memory does not grow with N.
            num_nearest: k, fewer if the model has fewer known images.

        Returns:
            One entry per image, in the order given, without the files that cannot be decoded.

        Raises:
            UsageError: no image is left to predict, or an input is not an image.
        """
        skipped: list[tuple[str, str]] = []
        batches = pixel_batches(images, self.image_size, batch_size, skipped)
        parts = list(self.stream(batches, num_nearest=num_nearest))
        if not parts:
            first = f"; first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise UsageError(f"no image to predict, {len(skipped)} could not be decoded{first}")
        return join(parts, skipped)

    @torch.inference_mode()
    def stream(
        self,
        batches: Iterable[tuple[Sequence[str], NDArray[np.uint8]]],
        *,
        num_nearest: int = 3,
    ) -> Iterator[Predictions]:
        """Cluster one batch after another.

        Args:
            batches: keys (B,) and pixels (B, 3, S, S) uint8 of each batch, S the model's size.
            num_nearest: k, fewer if the model has fewer known images.

        Yields:
            Predictions of each batch; nothing is skipped.
        """
        for keys, pixels in batches:
            pieces = in_parts(torch.from_numpy(pixels).to(self.device))
            made = [self.network(part) for part in pieces]
            probs, embeddings = (torch.cat(each) for each in zip(*made, strict=True))
            confidence, clusters = probs.max(dim=1)  # (B,)
            nearest: list[list[str]] = [[] for _ in keys]
            similarity = np.empty((len(keys), 0), np.float32)
            if self.known is not None and num_nearest:
                nearest, similarity = self.known.nearest(embeddings, num_nearest)
            ids = clusters.cpu().numpy()
            sure = confidence.cpu().numpy()
            yield Predictions(
                keys=keys,
                clusters=ids,
                names=[self.names[cluster] for cluster in ids],
                confidence=sure,
                not_sure=sure <= self.threshold,
                nearest=nearest,
                similarity=similarity,
            )


def load(
    path: str | os.PathLike[str], *, device: str = "auto", allow_targets: Sequence[str] = ()
) -> PortableModel:
    """Read a `model.spice`.

    Args:
        path: path of the file, or of the run folder that contains it.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        allow_targets: your own packages that define the network, if you trust the file.

    Returns:
        The model, in eval mode on the device. Clusters that were named in `names.json` beside the
        file have these names.

    Raises:
        UsageError: the file does not exist or is damaged, a newer release wrote it, or it asks for
            a network outside the allowed packages.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist; give the {FILE_NAME} of a finished run that has clusters"
        )
    header, tensors = _read(file)
    try:
        if int(header["format"]) > FORMAT:
            raise UsageError(
                f"{file} was written by a newer spice-pl (format {header['format']}, this release "
                f"reads up to {FORMAT}); install a newer one with pip install -U spice-pl"
            )
        settings = header["settings"]
        allowed = (*ALLOWED, *(f"{name}." for name in allow_targets))
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            parts = {name: _build(value, allowed, file) for name, value in settings.items()}
        for name in ("encoder", "head"):
            load_strictly(parts[name], below_prefix(tensors, f"{name}."), f"{file} ({name})")
        known = None
        if header["known"] is not None:
            known = Known(header["known"], **below_prefix(tensors, "known."))
        model = PortableModel(
            network=ClusterNetwork(parts["plain"], parts["encoder"], parts["head"]),
            settings=settings,
            image_size=int(header["image_size"]),
            names=_names(file, header["names"]),
            threshold=float(header["threshold"]),
            about=header["about"],
            known=known,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(_unreadable(file, f"{type(error).__name__}: {error}")) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.network.to(device).to(memory_format=torch.channels_last)  # faster on a processor
    return model


def portable_settings(encoder: Any, head: nn.Module, plain: Any) -> dict[str, Any] | None:
    """Describe how to build encoder, head and plain view from a `model.spice`.

    Args:
        encoder: settings of the encoder, with a `_target_`.
        head: the head itself.
        plain: settings of the plain view, with a `_target_`.

    Returns:
        Settings by name, as in `PortableModel.settings`; None if the head is neither a
        `ClusterHead` nor a `LinearHead`.
    """
    described: dict[str, Any]
    if isinstance(head, ClusterHead):
        described = {
            "feature_dim": head.hidden.in_features,
            "hidden_dim": head.hidden.out_features,
            "num_clusters": head.output.out_features,
        }
    elif isinstance(head, LinearHead):
        described = {"in_features": head.in_features, "out_features": head.out_features}
    else:
        return None
    target = f"{type(head).__module__}.{type(head).__qualname__}"
    return {"encoder": encoder, "head": {"_target_": target, **described}, "plain": plain}


def _names(file: Path, names: Sequence[Any]) -> list[str]:
    """Names of the clusters: those in names.json beside the file, else those in the file."""
    beside = file.with_name("names.json")
    given = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return [str(given.get(str(k), name)) for k, name in enumerate(names)]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {})["spice_pl"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UsageError(_unreadable(file, f"{type(error).__name__}: {error}")) from error
    return header, tensors


def _unreadable(file: Path, reason: str) -> str:
    return (
        f"{file} is damaged or not a {FILE_NAME} ({reason}); copy it again, or write it again by "
        "running its stage with overwrite=true"
    )


def _build(value: Any, allowed: tuple[str, ...], file: Path) -> Any:
    """Make what settings describe, nested ones first; a file can name networks and no more."""
    if isinstance(value, list):
        return [_build(each, allowed, file) for each in value]
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _build(each, allowed, file) for key, each in value.items()}
    target = arguments.pop("_target_", None)
    if target is None:
        return arguments
    module, _, name = str(target).rpartition(".")
    try:
        if not str(target).startswith(allowed):
            raise AttributeError
        made = getattr(importlib.import_module(module), name)
        if not f"{made.__module__}.".startswith(tuple(each.split(".")[0] for each in allowed)):
            raise AttributeError
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{file} asks for {target}, which is none of {', '.join(allowed)} or not installed; "
            "if you trust the file, load it with allow_targets=[PACKAGE]"
        ) from error
    arguments = {key: NO_DOWNLOAD.get(key, each) for key, each in arguments.items()}
    return made(**arguments)
