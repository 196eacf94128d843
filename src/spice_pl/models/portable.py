"""One file that clusters new images: `model.spice`.

Safetensors with JSON in its header: weights of encoder and head, how to build them, how an image
is prepared, names of the clusters, and some known images to show beside a new one. Nothing in it is
executed: it may ask for a few networks (`networks`), and all of it is checked (`header`). Loading
opens no connection, and reads no other file than names.json beside it.

Shapes: N images, B images of a batch, D features, K clusters, S pixels a side, n known images,
k of them shown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.data.decode import decode, square
from spice_pl.data.listing import image_files
from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import similarities
from spice_pl.models.header import FILE_NAME as FILE_NAME
from spice_pl.models.header import FORMAT as FORMAT
from spice_pl.models.header import PARTS, check_known, check_state, names_beside, read, unreadable
from spice_pl.models.networks import WITHOUT_MEMORY, rule_for
from spice_pl.nn.frozen import in_parts
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.weights import load_strictly
from spice_pl.system.building import BuildError, build_plain
from spice_pl.system.files import atomic


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
            "threshold": min(max(self.threshold, 0.0), 1.0),  # outside, it says the same
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
        """Cluster batch by batch: keys (B,) and pixels (B, 3, S, S) uint8 of the model's size.

        Raises:
            UsageError: a probability is not finite.
        """
        for keys, pixels in batches:
            pieces = in_parts(torch.from_numpy(pixels).to(self.device))
            made = [self.network(part) for part in pieces]
            probs, embeddings = (torch.cat(each) for each in zip(*made, strict=True))
            confidence, clusters = probs.max(dim=1)  # (B,)
            nearest, similarity = self._nearest(embeddings, num_nearest)
            ids = clusters.cpu().numpy()
            sure = confidence.cpu().numpy()
            if not np.isfinite(sure).all():
                key = keys[int(np.isfinite(sure).argmin())]
                raise UsageError(
                    f"the model's probabilities for {key} are not numbers: its weights, mean or "
                    "std are too large; make it again by running its stage with overwrite=true"
                )
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
            a network or an argument that is not allowed.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist; give the {FILE_NAME} of a finished run that has clusters"
        )
    header, tensors = read(file)
    parts = {
        part: _made(file, part, header.settings[part], allow_targets)
        for part in PARTS
        if part in header.settings
    }
    if absent := [part for part in PARTS if part not in parts]:
        raise unreadable(file, f"its settings describe no {' and no '.join(absent)}")
    for part in ("encoder", "head"):
        _fill(file, part, parts[part], _below(tensors, part))
    width, num_clusters = _sizes(file, parts["encoder"], parts["head"], header.names)
    known = None
    if header.known is not None:
        below = _below(tensors, "known")
        known = Known(header.known, *check_known(file, header.known, below, num_clusters, width))
    given = names_beside(file)
    model = PortableModel(
        network=ClusterNetwork(parts["plain"], parts["encoder"], parts["head"]),
        settings=header.settings,
        image_size=header.image_size,
        names=[given.get(str(k), name) for k, name in enumerate(header.names)],
        threshold=float(header.threshold),
        about=header.about,
        known=known,
    )
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
    keys: Sequence[str], features: NDArray[np.float32], probs: NDArray[np.float32], most: int
) -> Known | None:
    """Keep at most `most` of N images, evenly spaced; features (N, D), probs (N, K)."""
    if most <= 0:
        return None
    index = np.arange(0, len(keys), -(-len(keys) // most))  # (n,)
    return Known(
        keys=[keys[i] for i in index.tolist()],
        embeddings=F.normalize(torch.from_numpy(features[index])).half(),
        clusters=torch.from_numpy(probs[index].argmax(axis=1)),
    )


def _below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"{part}."
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def _made(file: Path, part: str, described: Any, allow_targets: Sequence[str]) -> Any:
    """Return a part that settings describe; our own networks on no device, without memory."""
    ours = isinstance(described, dict) and described.get("_target_") in WITHOUT_MEMORY
    try:
        # The caller's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]), torch.device("meta") if ours else nullcontext():
            made = build_plain(described, rule_for(part, file, allow_targets))
    except BuildError as error:
        raise unreadable(file, f"{error.target}: {error.__cause__}") from error
    except UsageError as error:
        if str(error).startswith(str(file)):
            raise
        raise unreadable(file, f"settings.{part}: {error}") from error
    if not callable(made) or (part != "plain" and not isinstance(made, nn.Module)):
        kind = "view" if part == "plain" else "network"
        raise unreadable(file, f"settings.{part} describe a {type(made).__name__}, not a {kind}")
    return made


def _fill(file: Path, part: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module the weights of the file, once they fit."""
    own = {key: value.shape for key, value in module.state_dict().items()}
    if own == {key: value.shape for key, value in state.items()}:
        check_state(file, part, module, state)
        if any(each.is_meta for each in module.state_dict().values()):
            module.to_empty(device="cpu")
    load_strictly(module, state, f"{file} ({part})")


def _sizes(
    file: Path, encoder: nn.Module, head: nn.Module, names: Sequence[str]
) -> tuple[int | None, int]:
    """Return D, if the head says it, and K; refuse parts that do not fit each other."""
    if isinstance(head, ClusterHead):
        width, num_clusters = head.hidden.in_features, head.output.out_features
    elif isinstance(head, LinearHead):
        width, num_clusters = head.in_features, head.out_features
    else:
        return None, len(names)
    if len(names) != num_clusters:
        raise unreadable(file, f"names has {len(names)} entries for {num_clusters} clusters")
    if getattr(encoder, "num_features", width) != width:
        raise unreadable(
            file, f"its encoder gives {encoder.num_features} features, and its head takes {width}"
        )
    return width, num_clusters


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
