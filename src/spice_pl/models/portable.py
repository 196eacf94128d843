"""One file that clusters new images: `model.spice`.

Safetensors with JSON in its header: weights of encoder and head, how to build them, how an image
is prepared, names of the clusters, and some known images to show beside a new one. Nothing in it is
executed: what it asks to build must lie in a few packages of networks.

Shapes: N images, B images of a batch, D features, K clusters, S pixels a side, n known images,
k of them shown.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.data.decode import decode, square
from spice_pl.data.listing import image_files
from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import similarities
from spice_pl.nn.frozen import in_parts
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.weights import load_strictly
from spice_pl.system.files import atomic

FILE_NAME = "model.spice"
FORMAT = 1  # raised when a file can no longer be read by the releases before
ALLOWED = ("spice_pl.nn.", "spice_pl.data.augment.", "torchvision.models.", "timm.create_model")
# Weights come from the file, never from a hub or another file.
NO_DOWNLOAD = {"pretrained": False, "weights": None, "checkpoint_path": ""}


class ClusterNetwork(nn.Module):
    """Pixels to cluster probabilities and embeddings.

    Args:
        plain: how pixels are prepared.
        encoder: (B, 3, S, S) -> (B, D).
        head: (B, D) -> (B, K), probabilities.
    """

    def __init__(self, plain: View, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.plain, self.encoder, self.head = plain, encoder, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities (B, K) and embeddings (B, D) of images (B, 3, S, S) uint8."""
        features = self.encoder(self.plain(images, images.new_empty(0))).float()
        return self.head(features), F.normalize(features)


@dataclass(frozen=True)
class Known:
    """Images of the training set that a new image may be shown beside.

    Attributes:
        keys: (n,) path or index of each.
        embeddings: (n, D) of length one, float16.
        clusters: (n,) their clusters.
    """

    keys: Sequence[str]
    embeddings: Tensor
    clusters: Tensor


@dataclass(frozen=True)
class Predictions:
    """What the model says of N images.

    Attributes:
        keys: (N,) path or position of each image.
        clusters: (N,) int64 ids.
        names: (N,) of these clusters.
        confidence: (N,) largest probability.
        not_sure: (N,) whether the confidence is at or below the model's threshold.
        nearest: (N, k) keys of the known images that look most alike, nearest first.
        similarity: (N, k) their cosines.
        skipped: file and reason of what could not be decoded; not among the N.
    """

    keys: Sequence[str]
    clusters: NDArray[np.int64]
    names: Sequence[str]
    confidence: NDArray[np.float32]
    not_sure: NDArray[np.bool_]
    nearest: Sequence[Sequence[str]]
    similarity: NDArray[np.float32]
    skipped: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class PortableModel:
    """A trained clustering that stands on its own.

    An image is "not sure" where its confidence is not above the threshold, the one that reliable
    images passed when the model was made (`reliable.confidence`).

    Attributes:
        network: encoder and head, in eval mode.
        settings: how to build encoder, head and plain view, by name.
        image_size: S, to which images are scaled and cut.
        names: (K,) of the clusters.
        threshold: confidence above which the model counts as sure.
        about: data set, fingerprint, stage, seed, versions, for people.
        known: images to show beside a new one, if any were kept.
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
        """K."""
        return len(self.names)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.head.parameters()).device

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one file, whole or not at all."""
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
            images: a folder, searched with its subfolders; one image or many: paths, PIL images,
                uint8 arrays (H, W), (H, W, 3) or (3, H, W); or one array of N of these.
            batch_size: images at a time; memory does not grow with their number.
            num_nearest: known images to name beside each, fewer if the model holds fewer.

        Returns:
            One entry an image, in the order given, files that cannot be decoded left out.

        Raises:
            UsageError: there is no image, or something is none.
        """
        skipped: list[tuple[str, str]] = []
        batches = self._batches(images, batch_size, skipped)
        parts = list(self.stream(batches, num_nearest=num_nearest))
        if not parts:
            first = f"; first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise UsageError(f"no image to predict, {len(skipped)} could not be decoded{first}")
        return Predictions(
            keys=[key for part in parts for key in part.keys],
            clusters=np.concatenate([part.clusters for part in parts]),
            names=[name for part in parts for name in part.names],
            confidence=np.concatenate([part.confidence for part in parts]),
            not_sure=np.concatenate([part.not_sure for part in parts]),
            nearest=[row for part in parts for row in part.nearest],
            similarity=np.concatenate([part.similarity for part in parts]),
            skipped=skipped,
        )

    @torch.inference_mode()
    def stream(
        self,
        batches: Iterable[tuple[Sequence[str], NDArray[np.uint8]]],
        *,
        num_nearest: int = 3,
    ) -> Iterator[Predictions]:
        """Cluster batch by batch: keys (B,) and pixels (B, 3, S, S) uint8 of the model's size."""
        for keys, pixels in batches:
            pieces = in_parts(torch.from_numpy(pixels).to(self.device))
            made = [self.network(part) for part in pieces]
            probs, embeddings = (torch.cat(each) for each in zip(*made, strict=True))
            confidence, clusters = probs.max(dim=1)  # (B,)
            nearest, similarity = self._nearest(embeddings, num_nearest)
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

    def _nearest(
        self, embeddings: Tensor, num_nearest: int
    ) -> tuple[list[list[str]], NDArray[np.float32]]:
        known = self.known
        if known is None or num_nearest == 0:
            return [[] for _ in embeddings], np.empty((len(embeddings), 0), np.float32)
        alike = similarities(embeddings, known.embeddings.to(embeddings))  # (B, n)
        similarity, index = alike.topk(min(num_nearest, len(known.keys)), dim=1)  # (B, k)
        nearest = [[known.keys[i] for i in row] for row in index.tolist()]
        return nearest, similarity.cpu().numpy()

    def _batches(
        self, images: Any, batch_size: int, skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        """Prepare a batch while the one before it is predicted."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            waiting: list[tuple[str, Future[NDArray[np.uint8] | str]]] = []
            each = _each(images)
            chunks = iter(lambda: list(islice(each, batch_size)), [])
            for chunk in chain(chunks, [[]]):
                ahead = [
                    (key, pool.submit(_pixels, image, self.image_size)) for key, image in chunk
                ]
                made = [(key, future.result()) for key, future in waiting]
                waiting = ahead
                skipped += [(key, pixels) for key, pixels in made if isinstance(pixels, str)]
                good = [(key, pixels) for key, pixels in made if not isinstance(pixels, str)]
                if good:
                    yield [key for key, _ in good], np.stack([pixels for _, pixels in good])


def load(
    path: str | os.PathLike[str], *, device: str = "auto", allow_targets: Sequence[str] = ()
) -> PortableModel:
    """Read a `model.spice`, or the one inside the folder of a run.

    Args:
        path: of the file or of the folder.
        device: "cpu", "cuda", ...; "auto" is a GPU if there is one.
        allow_targets: packages of your own that hold the network, if you trust the file.

    Raises:
        UsageError: there is no such file, it is damaged, a newer release wrote it, or it asks for
            a network outside the packages that may be called.
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
            load_strictly(parts[name], _below(tensors, name), f"{file} ({name})")
        known = None
        if header["known"] is not None:
            known = Known(header["known"], **_below(tensors, "known"))
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
    """Describe how to build the parts of a model again; None for a head that is not ours.

    Args:
        encoder: its settings, with a `_target_`.
        head: the module.
        plain: settings of the plain view, with a `_target_`.
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


def choose_known(
    keys: Sequence[str], features: NDArray[np.float32], clusters: NDArray[np.int64], most: int
) -> Known | None:
    """Keep at most `most` of N images, evenly spaced; features (N, D), clusters (N,)."""
    if most <= 0:
        return None
    index = np.arange(0, len(keys), -(-len(keys) // most))  # (n,)
    return Known(
        keys=[keys[i] for i in index.tolist()],
        embeddings=F.normalize(torch.from_numpy(features[index])).half(),
        clusters=torch.from_numpy(clusters[index]),
    )


def _names(file: Path, names: Sequence[Any]) -> list[str]:
    """Names in the file; a person may have given others in names.json beside it since."""
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
        f"{file} is damaged or no {FILE_NAME} ({reason}); copy it again, or make it anew by "
        "running its stage with overwrite=true"
    )


def _below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"{part}."
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


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


def _each(images: Any) -> Iterator[tuple[str, Any]]:
    """Name and image of each of what `predict` may be given."""
    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        if path.is_dir():
            yield from ((name, path / name) for name in image_files(path))
        else:
            yield str(path), path
    elif isinstance(images, Image.Image):
        yield "0", images
    elif isinstance(images, np.ndarray | Tensor):
        array = images.numpy(force=True) if isinstance(images, Tensor) else images
        one = array.ndim == 2 or (array.ndim == 3 and 3 in (array.shape[0], array.shape[-1]))
        yield from ((str(i), image) for i, image in enumerate(array[None] if one else array))
    else:
        for i, image in enumerate(images):
            is_path = isinstance(image, str | os.PathLike)
            yield (str(image), Path(image)) if is_path else (str(i), image)


def _pixels(image: Any, image_size: int) -> NDArray[np.uint8] | str:
    """Pixels (3, S, S) of one image, or why there are none."""
    if isinstance(image, Path):
        return decode(image, image_size) if image.is_file() else "there is no such file"
    if isinstance(image, Image.Image):
        return square(image, image_size)
    array = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)  # (H, W, 3)
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise UsageError(
            f"an image is {array.dtype} {array.shape}; give uint8 levels 0 to 255 as (H, W), "
            "(H, W, 3) or (3, H, W)"
        )
    return square(Image.fromarray(np.ascontiguousarray(array)), image_size)
