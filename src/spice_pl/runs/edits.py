"""The user's changes to a clustering, and the probabilities after them.

Edits refer to the clusters as they were reviewed. They are applied in this order: images are moved,
clusters are merged, clusters are split. The remaining clusters keep their order and are numbered
from 0. The first part of a split cluster has its place, the other parts come last.
docs/how-to/review.md describes the file.

Shapes: N images, K clusters before and L after, D features.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.runs.small_files import is_cluster, is_text, is_whole, parse_object, read_text

FORMAT = "spice-pl edits 1"
MAX_PARTS = 20
MAX_NAME = 200  # characters


@dataclass(frozen=True)
class Edits:
    """Changes to a clustering of K clusters.

    Attributes:
        reviewed: "<stage>/<run>" of the clustering.
        fingerprint: fingerprint of its data set.
        digest: digest that identifies the run.
        num_clusters: K.
        names: name of each named cluster.
        merge: groups of clusters; each group becomes one cluster.
        split: number of parts of each cluster to split.
        move: cluster of each moved image, by the image's key.

    Raises:
        UsageError: the edits contradict each other or name clusters that do not exist.
    """

    reviewed: str
    fingerprint: str
    digest: str
    num_clusters: int
    names: Mapping[int, str] = field(default_factory=dict)
    merge: Sequence[Sequence[int]] = ()
    split: Mapping[int, int] = field(default_factory=dict)
    move: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        merged = [cluster for group in self.merge for cluster in group]
        named = [*self.names, *merged, *self.split, *self.move.values()]
        for cluster in named:
            if not 0 <= cluster < self.num_clusters:
                raise UsageError(
                    f"edits name cluster {cluster}, and there are 0 to {self.num_clusters - 1}"
                )
        if len(set(merged)) != len(merged) or any(len(group) < 2 for group in self.merge):
            raise UsageError(
                f"edits merge {reprlib.repr(self.merge)}; a group has two clusters or more, and "
                "each cluster is in one group"
            )
        for cluster, parts in self.split.items():
            if not 2 <= parts <= MAX_PARTS:
                raise UsageError(
                    f"edits split cluster {cluster} into {parts} parts; give 2 to {MAX_PARTS}"
                )
            if any(cluster in group and cluster != min(group) for group in self.merge):
                raise UsageError(
                    f"edits split cluster {cluster}, which is merged into another; split that one"
                )
        if any(not name.strip() or len(name) > MAX_NAME for name in self.names.values()):
            raise UsageError(f"edits give an empty name, or one above {MAX_NAME} characters")

    @property
    def origins(self) -> list[list[int]]:
        """For each of the L clusters after the edits, the clusters that it comes from."""
        groups = {min(group): sorted(group) for group in self.merge}
        gone = {cluster for group in groups.values() for cluster in group[1:]}
        kept = [c for c in range(self.num_clusters) if c not in gone]
        more = [c for c in kept for _ in range(self.split.get(c, 1) - 1)]
        return [groups.get(c, [c]) for c in [*kept, *more]]

    @property
    def num_clusters_after(self) -> int:
        """L."""
        return len(self.origins)

    @property
    def names_after(self) -> dict[int, str]:
        """Names by new number; the other parts of a split cluster are called "name 2" and so on."""
        names: dict[int, str] = {}
        parts: dict[int, int] = {}
        for number, sources in enumerate(self.origins):
            first = sources[0]
            parts[first] = parts.get(first, 0) + 1
            name = next((self.names[c] for c in sources if c in self.names), None)
            if name is not None:
                names[number] = name if parts[first] == 1 else f"{name} {parts[first]}"
        return names

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {
            "format": FORMAT,
            "reviewed": self.reviewed,
            "fingerprint": self.fingerprint,
            "digest": self.digest,
            "num_clusters": self.num_clusters,
            "names": {str(cluster): name for cluster, name in self.names.items()},
            "merge": [list(group) for group in self.merge],
            "split": {str(cluster): parts for cluster, parts in self.split.items()},
            "move": dict(self.move),
        }


def parse_edits(content: Any, source: str) -> Edits:
    """Check edits that come from a file or a browser.

    Args:
        content: parsed JSON.
        source: name of the file or of the sender, for messages.

    Raises:
        UsageError: the content is not edits, or contradicts itself.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{source} is not what the report saves, an object of format {FORMAT!r}")
    try:
        return Edits(
            reviewed=_text(content["reviewed"]),
            fingerprint=_text(content["fingerprint"]),
            digest=_text(content["digest"]),
            num_clusters=_number(content["num_clusters"]),
            names={_cluster(key): _text(name) for key, name in content["names"].items()},
            merge=[[_number(cluster) for cluster in group] for group in content["merge"]],
            split={_cluster(key): _number(parts) for key, parts in content["split"].items()},
            move={_text(key): _number(cluster) for key, cluster in content["move"].items()},
        )
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{source} is incomplete or of another type: {error!r}") from error


def read_edits(path: str | Path) -> Edits:
    """Read a file that the report saved.

    Raises:
        UsageError: the file cannot be read, or does not hold edits.
    """
    try:
        content = parse_object(read_text(Path(path).expanduser()))
    except (OSError, ValueError) as error:
        raise UsageError(f"edits={path} cannot be read: {error}") from error
    return parse_edits(content, f"edits={path}")


def edited_probs(
    edits: Edits, probs: Tensor, features: Tensor, keys: Sequence[str], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the clusters after the edits.

    A moved image has probability one for its new cluster. The probabilities of merged clusters are
    added. The probability of a split cluster goes to the part with the nearest centre; the centres
    are those of k-means on the embeddings of the images in the cluster.

    Args:
        edits: changes to a clustering of these images.
        probs: (N, K).
        features: (N, D).
        keys: (N,), keys of the images.
        seed: seed of k-means.

    Returns:
        Probabilities (N, L), and a mask (N,) of the images that the user moved.

    Raises:
        UsageError: K differs, or a split cluster has fewer images than parts.
    """
    if probs.shape[1] != edits.num_clusters:
        raise UsageError(
            f"edits are of {edits.num_clusters} clusters and the run has {probs.shape[1]}"
        )
    row = {key: i for i, key in enumerate(keys)}
    probs, moved = probs.clone(), torch.zeros(len(probs), dtype=torch.bool)
    for key, cluster in edits.move.items():
        probs[row[key]] = F.one_hot(torch.tensor(cluster), edits.num_clusters).to(probs.dtype)
        moved[row[key]] = True
    after = torch.stack([probs[:, each].sum(dim=1) for each in edits.origins], dim=1)  # (N, L)
    _split_(after, edits, features, seed)
    return after, moved


def _split_(after: Tensor, edits: Edits, features: Tensor, seed: int) -> None:
    """Divide the probabilities (N, L) of split clusters among their parts, in place.

    On entry, each column of a split cluster holds the whole probability of that cluster.
    """
    first = [sources[0] for sources in edits.origins]
    embeddings = F.normalize(features).numpy()
    before_split = after[:, : len(set(first))].argmax(dim=1)
    for cluster, parts in edits.split.items():
        columns = [number for number, source in enumerate(first) if source == cluster]
        members = (before_split == columns[0]).numpy()
        if members.sum() < parts:
            raise UsageError(
                f"edits split cluster {cluster} into {parts}, and it has {members.sum()} images"
            )
        nearest = _nearest_part(embeddings, members, parts, seed)
        mass = after[:, columns[0]].clone()
        for part, column in enumerate(columns):
            after[:, column] = torch.where(nearest == part, mass, 0.0)


def edited_rows(edits: Edits, probs: Tensor) -> list[int]:
    """Return, for each cluster after the edits, the largest of the clusters it comes from."""
    sizes = torch.bincount(probs.argmax(dim=1), minlength=edits.num_clusters)
    return [max(sources, key=lambda cluster: int(sizes[cluster])) for sources in edits.origins]


def check_reviewed(
    edits: Edits, fingerprint: str, digest: str, num_clusters: int, keys: Sequence[str]
) -> None:
    """Check that edits are of this clustering and of its images.

    Args:
        edits: the edits.
        fingerprint: fingerprint of the data set.
        digest: digest that identifies the run.
        num_clusters: K of the run.
        keys: (N,), keys of the images.

    Raises:
        UsageError: they are of another clustering, or move an image that it does not have.
    """
    if (edits.digest, edits.fingerprint) != (digest, fingerprint):
        raise UsageError(
            f"the edits belong to another clustering: {edits.reviewed} was run again since; "
            "review it again"
        )
    if edits.num_clusters != num_clusters:
        raise UsageError(f"the edits are of {edits.num_clusters} clusters, not of {num_clusters}")
    known = set(keys)
    unknown = next((key for key in edits.move if key not in known), None)
    if unknown is not None:
        raise UsageError(f"the edits move {unknown!r}, which is not among the images")


def _nearest_part(
    embeddings: NDArray[np.float32], members: NDArray[np.bool_], parts: int, seed: int
) -> Tensor:
    """Return the nearest part (N,) of each image; part 0 is the largest."""
    model = KMeans(parts, n_init=10, random_state=seed).fit(embeddings[members])
    order = np.bincount(model.labels_, minlength=parts).argsort()[::-1]
    rank = np.empty(parts, dtype=np.int64)
    rank[order] = np.arange(parts)
    return torch.from_numpy(rank[model.predict(embeddings)])


def _text(value: Any) -> str:
    if not is_text(value):
        raise TypeError(f"{reprlib.repr(value)} is not text")
    return str(value)


def _number(value: Any) -> int:
    if not is_whole(value):
        raise TypeError(f"{reprlib.repr(value)} is not a whole number")
    return int(value)


def _cluster(key: str) -> int:
    if not is_cluster(key):
        raise TypeError(f"{reprlib.repr(key)} is not the number of a cluster")
    return int(key)
