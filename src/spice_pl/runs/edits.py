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
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.runs.small_files import (
    is_cluster,
    is_name,
    is_text,
    is_whole,
    parse_object,
    read_text,
)

FORMAT = "spice-pl edits 1"
# What a file holds beside its format, and where the value of a missing one is found.
FIELDS = {
    "reviewed": 'give "<stage>/<run>", the last two folders of the run',
    **dict.fromkeys(
        ("fingerprint", "digest", "num_clusters"),
        "copy `fingerprint`, `digest` and `num_clusters` from the metrics.json of the run",
    ),
    "names": "without names give {}",
    "merge": "without merges give []",
    "split": "without splits give {}",
    "move": "without moved images give {}",
}
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
        if wrong := [name for name in self.names.values() if not is_name(name)]:
            raise UsageError(f"edits give a name with control characters: {reprlib.repr(wrong[0])}")

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
    if absent := [field for field in FIELDS if field not in content]:
        raise UsageError(f"{source} lacks `{absent[0]}`; {FIELDS[absent[0]]}")
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
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{source} has a value of another type: {error}") from error


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
    after, moved = _before_split(edits, probs, keys)
    _split_(after, edits, features, seed)
    return after, moved


@dataclass(frozen=True)
class AppliedEdits:
    """A clustering after edits, under numbers that stay.

    A merged cluster has the smallest number of its group, and the other numbers of the group are
    empty. The first part of a split cluster keeps its number, the others follow after K - 1. So
    there are L' = K + further parts numbers. Merging takes no image from a third cluster, as adding
    probabilities alone could.

    Attributes:
        probs: (N, L').
        moved: (N,) mask of the images that the user moved.
        names: names by number.
        merge: (K, L') zeros and ones, see `nn.edited_head.EditedHead`.
        centres: (P, D) centres of all parts.
        part_of: (P,) the split cluster of each part.
        part_is: (P,) the cluster that each part becomes.
    """

    probs: Tensor
    moved: Tensor
    names: Mapping[int, str]
    merge: Tensor
    centres: Tensor
    part_of: Tensor
    part_is: Tensor


def apply_edits(
    edits: Edits, probs: Tensor, features: Tensor, keys: Sequence[str], seed: int = 0
) -> AppliedEdits:
    """Return the clustering after the edits, and what a head needs to follow them.

    Arguments and errors are those of `edited_probs`.
    """
    probs = _without_sums_of_others(edits, probs)
    compact, moved = edited_probs(edits, probs, features, keys, seed)
    first = [sources[0] for sources in edits.origins]
    num_kept = len(set(first))
    numbers = [*first[:num_kept], *range(edits.num_clusters, edits.num_clusters + len(first))]
    numbers = numbers[: len(first)]  # of each column of `compact`
    num_after = edits.num_clusters + len(first) - num_kept
    after = torch.zeros(len(probs), num_after)
    after[:, numbers] = compact.float()
    merge = torch.zeros(edits.num_clusters, num_after)
    for column, sources in zip(numbers[:num_kept], edits.origins, strict=False):
        merge[sources, column] = 1.0
    parts = _all_centres(edits, probs, features, keys, seed)
    part_of = [cluster for cluster, centres in parts.items() for _ in range(len(centres))]
    part_is = [
        number
        for cluster in parts
        for number, c in zip(numbers, first, strict=True)
        if c == cluster
    ]
    return AppliedEdits(
        probs=after,
        moved=moved,
        names={numbers[n]: name for n, name in edits.names_after.items()},
        merge=merge,
        centres=torch.cat([*parts.values(), torch.empty(0, features.shape[1])]),
        part_of=torch.tensor(part_of, dtype=torch.int64),
        part_is=torch.tensor(part_is, dtype=torch.int64),
    )


def _without_sums_of_others(edits: Edits, probs: Tensor) -> Tensor:
    """Return probabilities (N, K) whose sums over a merged group take no image from other clusters.

    For an image outside the group only the largest of the group's probabilities is kept.
    """
    probs, clusters = probs.clone(), probs.argmax(dim=1)
    for group in edits.merge:
        columns = torch.tensor(list(group))
        outside = ~torch.isin(clusters, columns)
        part = probs[outside][:, columns]
        largest = part.argmax(dim=1, keepdim=True)
        kept = torch.zeros_like(part).scatter_(1, largest, part.gather(1, largest))
        probs[outside] = probs[outside].index_copy(1, columns, kept)
    return probs


def _before_split(edits: Edits, probs: Tensor, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return probabilities (N, L) with all mass of a split cluster in each part, and moved (N,)."""
    row = {key: i for i, key in enumerate(keys)}
    probs, moved = probs.clone(), torch.zeros(len(probs), dtype=torch.bool)
    for key, cluster in edits.move.items():
        probs[row[key]] = F.one_hot(torch.tensor(cluster), edits.num_clusters).to(probs.dtype)
        moved[row[key]] = True
    after = torch.stack([probs[:, each].sum(dim=1) for each in edits.origins], dim=1)  # (N, L)
    return after, moved


def _all_centres(
    edits: Edits, probs: Tensor, features: Tensor, keys: Sequence[str], seed: int
) -> dict[int, Tensor]:
    after, _ = _before_split(edits, probs, keys)
    return _centres(after, edits, features, seed)


def _centres(after: Tensor, edits: Edits, features: Tensor, seed: int) -> dict[int, Tensor]:
    """Return the centres of the parts (parts, D) of each split cluster; the first is the largest.

    Args:
        after: (N, L), each column of a split cluster with the whole probability of that cluster.
        edits: which clusters are split.
        features: (N, D).
        seed: seed of k-means.
    """
    first = [sources[0] for sources in edits.origins]
    embeddings = F.normalize(features).numpy()
    before_split = after[:, : len(set(first))].argmax(dim=1)
    found: dict[int, Tensor] = {}
    for cluster, parts in edits.split.items():
        members = (before_split == first.index(cluster)).numpy()
        if members.sum() < parts:
            raise UsageError(
                f"edits split cluster {cluster} into {parts}, and it has {members.sum()} images"
            )
        model = KMeans(parts, n_init=10, random_state=seed).fit(embeddings[members])
        order = np.bincount(model.labels_, minlength=parts).argsort()[::-1].copy()
        found[cluster] = torch.from_numpy(model.cluster_centers_[order])
    return found


def _split_(after: Tensor, edits: Edits, features: Tensor, seed: int) -> None:
    """Divide the probabilities (N, L) of split clusters among their parts, in place.

    On entry, each column of a split cluster holds the whole probability of that cluster.
    """
    first = [sources[0] for sources in edits.origins]
    embeddings = F.normalize(features)
    for cluster, centres in _centres(after, edits, features, seed).items():
        columns = [number for number, source in enumerate(first) if source == cluster]
        nearest = torch.cdist(embeddings, centres).argmin(dim=1)
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
