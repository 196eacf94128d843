"""Write and read `model.spice`, one file that clusters new images.

A safetensors file with JSON in its header: weights of encoder and head, how to build both, how to
prepare an image, the names of the clusters, and known images to show beside a new one. Nothing in
the file is executed: it can name a few networks (`networks`), and all of it is checked (`header`).
Loading opens no connection, and reads no other file than names.json beside it.

Shapes: N images, B images of a batch, D features, K clusters, S pixels a side, k known images shown
beside a new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.augment import View
from spice_pl.errors import UsageError
from spice_pl.models.header import (
    FILE_NAME,
    FORMAT,
    PARTS,
    check_known,
    check_state,
    digest,
    names_beside,
    read,
    unreadable,
)
from spice_pl.models.known import Known, choose_known
from spice_pl.models.networks import ARGUMENTS, WITHOUT_MEMORY, rule_for
from spice_pl.models.pixels import pixel_batches
from spice_pl.models.predictions import Predictions, join
from spice_pl.nn.edited_head import EditedHead
from spice_pl.nn.frozen import in_parts
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.weights import below_prefix, load_strictly
from spice_pl.system.building import BuildError, build_plain
from spice_pl.system.files import atomic
from spice_pl.system.schema import is_name

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

    An image is marked "not sure" if fewer than half of its nearest known images are in its cluster,
    or of as many as a small cluster has, as on the report page with the neighbours in the data set.
    Without known images it is "not sure"
    if its confidence is not above the threshold.

    Attributes:
        network: plain view, encoder and head, in eval mode.
        settings: for each of "encoder", "head" and "plain", how to build it: `_target_` and its
            arguments.
        image_size: S; images are scaled and cut to it.
        names: (K,) name of each cluster.
        threshold: confidence that reliable images had to exceed in the run that wrote the model
            (`reliable.confidence`).
        about: data set, fingerprint, stage, seed and versions, as information for the user.
        known: training images to show beside a new one, or None.
        levels: black and white of images of more than 8 bits; None chooses them for each image.
        known_vote: whether the clusters of known images count as much as the head's, see `outputs`.
    """

    network: ClusterNetwork
    settings: Mapping[str, Any]
    image_size: int
    names: Sequence[str]
    threshold: float
    about: Mapping[str, Any] = field(default_factory=dict)
    known: Known | None = None
    levels: Sequence[float] | None = None
    known_vote: bool = False

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
        """Write the model to one file; an interrupted write leaves an earlier file unchanged.

        Raises:
            UsageError: `names` does not hold one name per cluster, and no file is written.
        """
        self._check_names()
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
            "levels": None if self.levels is None else [float(each) for each in self.levels],
            "known_vote": self.known_vote,
        }
        header = json.loads(json.dumps(header))
        header["digest"] = digest(header, tensors)
        with atomic(Path(path)) as temporary:
            save_file(tensors, temporary, {"spice_pl": json.dumps(header)})

    def outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities (B, K) and embeddings (B, D) of pixels (B, 3, S, S) uint8.

        With `known_vote` the probabilities are the mean of the head's and of the shares of the
        clusters among the most similar known images (k-nearest-neighbour rule, Cover and Hart
        1967). These have the clusters that the run kept, which may not be the head's.
        """
        probs, embeddings = self.network(pixels)
        if self.known_vote and self.known is not None and len(self.known.keys):
            probs = (probs + self.known.shares(embeddings, self.num_clusters)) / 2
        return probs, embeddings

    def _check_names(self) -> None:
        """Refuse names that `load` would refuse too."""
        if isinstance(self.names, str) or not all(map(is_name, self.names)):
            raise UsageError(
                f"names is {self.names!r:.80}; give a list of one text per cluster, without "
                "control characters"
            )
        sizes = _sizes_of_head(self.network.head)
        if sizes is not None and len(self.names) != sizes[1]:
            raise UsageError(
                f"{sizes[1]} names are needed, one per cluster, and {len(self.names)} are "
                f"given: {list(self.names)!r:.80}"
            )

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
        batches = pixel_batches(images, self.image_size, batch_size, skipped, self.levels)
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

        Raises:
            UsageError: a probability is not finite, or `names` are not one name per cluster.
        """
        self._check_names()
        for keys, pixels in batches:
            pieces = in_parts(torch.from_numpy(pixels).to(self.device))
            made = [self.outputs(part) for part in pieces]
            probs, embeddings = (torch.cat(each) for each in zip(*made, strict=True))
            confidence, clusters = probs.max(dim=1)  # (B,)
            nearest: list[list[str]] = [[] for _ in keys]
            similarity = np.empty((len(keys), 0), np.float32)
            if self.known is not None and num_nearest:
                nearest, similarity = self.known.nearest(embeddings, num_nearest)
            not_sure = confidence <= self.threshold
            if self.known is not None and len(self.known.keys):
                not_sure = self.known.not_sure(embeddings, clusters, self.num_clusters)
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
                not_sure=not_sure.cpu().numpy(),
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
            a network or an argument that is not allowed.
    """
    if str(path).startswith("hf://"):
        raise UsageError(
            f"load opens no connection; fetch the file first: load(spice_pl.pull({str(path)!r}))"
        )
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist; give the {FILE_NAME} of a finished run that has clusters"
        )
    header, tensors = read(file)
    _check_size(file, header.settings.get("encoder"), below_prefix(tensors, "encoder."))
    parts = {
        part: _made(file, part, header.settings[part], allow_targets)
        for part in PARTS
        if part in header.settings
    }
    if absent := [part for part in PARTS if part not in parts]:
        raise unreadable(file, f"its settings describe no {' and no '.join(absent)}")
    for part in ("encoder", "head"):
        _fill(file, part, parts[part], below_prefix(tensors, f"{part}."))
    width, num_clusters = _sizes(file, parts["encoder"], parts["head"], header.names)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    known = None
    if header.known is not None:
        below = below_prefix(tensors, "known.")
        embeddings, clusters = check_known(file, header.known, below, num_clusters, width)
        known = Known(header.known, embeddings.to(device), clusters)  # once, not for every batch
    given = names_beside(file)
    model = PortableModel(
        network=ClusterNetwork(parts["plain"], parts["encoder"], parts["head"]),
        settings=header.settings,
        image_size=header.image_size,
        names=[given.get(k, name) for k, name in enumerate(header.names)],
        threshold=float(header.threshold),
        about=header.about,
        known=known,
        levels=header.levels,
        known_vote=header.known_vote,
    )
    model.network.to(device).to(memory_format=torch.channels_last)  # faster on a processor
    return model


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UsageError: names it.
    """
    try:
        torch.empty(1, device=device)
    # CUDA that is not in this torch is an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"device={device} cannot be used ({reason}); give cpu, cuda or auto"
        ) from error


def portable_settings(encoder: Any, head: nn.Module, plain: Any) -> dict[str, Any] | None:
    """Describe how to build encoder, head and plain view from a `model.spice`.

    Args:
        encoder: settings of the encoder, with a `_target_`.
        head: the head itself.
        plain: settings of the plain view, with a `_target_`.

    Returns:
        Settings by name, as in `PortableModel.settings`; None if the head is none of
        `ClusterHead`, `LinearHead` and `EditedHead`.
    """
    described: dict[str, Any]
    if isinstance(head, ClusterHead):
        described = {
            "feature_dim": head.hidden.in_features,
            "hidden_dim": head.hidden.out_features,
            "num_clusters": head.output.out_features,
        }
    elif isinstance(head, EditedHead):
        described = {
            "feature_dim": head.feature_dim,
            "hidden_dim": head.hidden_dim,
            "num_clusters": head.num_clusters,
            "rounds": head.rounds,
        }
    elif isinstance(head, LinearHead):
        described = {"in_features": head.in_features, "out_features": head.out_features}
    else:
        return None
    target = f"{type(head).__module__}.{type(head).__qualname__}"
    return {"encoder": encoder, "head": {"_target_": target, **described}, "plain": plain}


def _check_size(file: Path, described: Any, state: Mapping[str, Tensor]) -> None:
    """Refuse an encoder of timm or torchvision with other shapes than the file, before it is made.

    Otherwise a small file could take the memory of the largest of them. It is made without memory
    first. A few cannot be, and are as large as they are.
    """
    target = described.get("_target_") if isinstance(described, dict) else None
    if not isinstance(target, str) or target in WITHOUT_MEMORY:
        return
    if target not in ARGUMENTS["encoder"]:
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            sketch = build_plain(described, rule_for("encoder", file, ()))
    except Exception:  # said again, or not, where it is made with memory
        return
    own = {key: value.shape for key, value in sketch.state_dict().items()}
    if own != {key: value.shape for key, value in state.items()}:
        load_strictly(sketch, state, f"{file} (encoder)")


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
    sizes = _sizes_of_head(head)
    if sizes is None:
        return None, len(names)
    width, num_clusters = sizes
    if isinstance(head, EditedHead):
        try:
            head.check()
        except ValueError as error:
            raise unreadable(file, f"head: {error}") from error
    if len(names) != num_clusters:
        raise unreadable(file, f"names has {len(names)} entries for {num_clusters} clusters")
    if getattr(encoder, "num_features", width) != width:
        raise unreadable(
            file, f"its encoder gives {encoder.num_features} features, and its head takes {width}"
        )
    return width, num_clusters


def _sizes_of_head(head: nn.Module) -> tuple[int, int] | None:
    """Return D and K of a head; None for one of the user's own, which does not say them."""
    if isinstance(head, ClusterHead):
        return head.hidden.in_features, head.output.out_features
    if isinstance(head, LinearHead):
        return head.in_features, head.out_features
    if isinstance(head, EditedHead):
        return head.feature_dim, head.num_clusters_after
    return None
