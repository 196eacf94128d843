"""The clusters of a run's images: one table, made once, for clusters.csv and all pages.

Shapes: N images, D features, K clusters.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_pl.data.keyed import keyed_generator
from spice_pl.functional.reliability import (
    Balance,
    is_not_sure,
    local_consistency,
    neighbors_for,
    select_reliable,
)
from spice_pl.system.files import atomic, for_spreadsheet, from_spreadsheet

FILE_NAME = "clusters.csv"
DECIMALS = 4  # of confidence and agreement, in the file and in memory
COLUMNS = ("image", "cluster", "confidence", "agreement", "reliable")


@dataclass(frozen=True)
class ReliableRule:
    """Which images count as reliable: Niu et al. 2022 (SPICE), Eqs. 6 and 7.

    Attributes:
        num_neighbors: number of neighbours, with the image itself as one of them.
        agreement: smallest share of neighbours in the same cluster.
        confidence: threshold that the confidence of a reliable image exceeds.
        balance: which number of reliable images each cluster keeps: "min", "cap" or "none".
    """

    num_neighbors: int
    agreement: float
    confidence: float
    balance: Balance


@dataclass(frozen=True)
class ClusterTable:
    """The columns of clusters.csv, each (N,) in the order of the data set.

    Attributes:
        keys: path or number of each image.
        clusters: cluster with the largest probability.
        confidence: that probability, in [0, 1], to four decimals.
        agreement: share of an image's neighbours in its cluster, in [0, 1], to four decimals.
        reliable: whether the image is reliable, by the rule applied to all N images. Stage 3
            applies the same rule to the training images alone.
        num_neighbors: number of neighbours of the agreement; 0 where it is not known.
    """

    keys: Sequence[str]
    clusters: NDArray[np.int64]
    confidence: NDArray[np.float32]
    agreement: NDArray[np.float32]
    reliable: NDArray[np.bool_]
    num_neighbors: int = 0

    @property
    def not_sure(self) -> NDArray[np.bool_]:
        """Mask (N,) of the images with too few neighbours in their cluster."""
        parts = torch.from_numpy(self.agreement), torch.from_numpy(self.clusters)
        return is_not_sure(*parts, self.num_neighbors).numpy()

    def sizes(self, num_clusters: int) -> NDArray[np.int64]:
        """Return the number of images in each cluster (K,)."""
        return np.bincount(self.clusters, minlength=num_clusters)


def cluster_table(
    keys: Sequence[str],
    embeddings: Tensor,
    probs: NDArray[np.float32],
    rule: ReliableRule,
    seed: int,
) -> ClusterTable:
    """Return the clusters of all images, with confidence, agreement and reliability.

    Args:
        keys: (N,) names of the images.
        embeddings: (N, D), which images are alike by their cosine.
        probs: (N, K).
        rule: rule that decides which images are reliable.
        seed: seed of the draw when `balance` keeps only some reliable images of a cluster.
    """
    clusters = torch.from_numpy(probs.argmax(axis=1).astype(np.int64))
    confidence = torch.from_numpy(np.array(probs.max(axis=1)))
    num_neighbors = neighbors_for(rule.num_neighbors, len(keys), probs.shape[1])
    by_size = rule.balance != "min"  # as in `reliable_labels`
    agreement = local_consistency(embeddings, clusters, num_neighbors, by_size=by_size)  # Eq. 6
    reliable = select_reliable(  # Eq. 7
        agreement,
        confidence,
        clusters,
        agreement=rule.agreement,
        confidence=rule.confidence,
        balance=rule.balance,
        generator=keyed_generator(seed),
    )
    return ClusterTable(
        keys,
        clusters.numpy(),
        _rounded(confidence),
        _rounded(agreement),
        reliable.numpy(),
        num_neighbors,
    )


def write_table(
    table: ClusterTable,
    file: Path,
    names: Mapping[int, str] | None = None,
    *,
    spreadsheet: bool = False,
) -> None:
    """Write one line per image, in the order of the data set.

    Args:
        table: its columns.
        file: where to write.
        names: names of clusters, for one more column `name`; None leaves it out.
        spreadsheet: whether a name that a spreadsheet would take for a formula begins with '. All
            cells of such a table are in quotes, which tells it from one with the names as they are.
    """
    more = [] if names is None else ["name"]
    with (
        atomic(file) as temporary,
        # A path may hold bytes that are not UTF-8; they are written as they are on disk.
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines,
    ):
        writer = csv.writer(lines, quoting=csv.QUOTE_ALL if spreadsheet else csv.QUOTE_MINIMAL)
        writer.writerow([*COLUMNS, *more])
        columns = (table.keys, table.clusters, table.confidence, table.agreement, table.reliable)
        for image, cluster, sure, agrees, kept in zip(*columns, strict=True):
            numbers = (f"{value:.{DECIMALS}f}" for value in (sure, agrees))
            name = [] if names is None else [names.get(int(cluster), f"cluster {cluster}")]
            texts = [for_spreadsheet(each) if spreadsheet else each for each in (image, *name)]
            writer.writerow([texts[0], int(cluster), *numbers, int(kept), *texts[1:]])


def read_table(file: Path, num_images: int | None = None, num_neighbors: int = 0) -> ClusterTable:
    """Read what `write_table` wrote.

    Args:
        file: path of the table.
        num_images: N; None where it is not known.
        num_neighbors: number of neighbours of the agreement; 0 where it is not known.

    Raises:
        ValueError, KeyError, TypeError, OverflowError, csv.Error: the file is damaged.
    """
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        in_quotes = lines.read(1) == '"'
        lines.seek(0)
        most = None if num_images is None else num_images + 1  # no more than show that it is wrong
        rows = list(islice(csv.DictReader(lines), most))
    if num_images is not None and len(rows) != num_images:
        raise ValueError(f"it has other rows than those of the {num_images} images")
    table = ClusterTable(
        keys=[from_spreadsheet(row["image"]) if in_quotes else row["image"] for row in rows],
        clusters=np.array([row["cluster"] for row in rows], dtype=np.int64),
        confidence=np.array([row["confidence"] for row in rows], dtype=np.float32),
        agreement=np.array([row["agreement"] for row in rows], dtype=np.float32),
        reliable=np.array([row["reliable"] == "1" for row in rows], dtype=np.bool_),
        num_neighbors=num_neighbors,
    )
    _check_values(table, {row["reliable"] for row in rows})
    return table


def _check_values(table: ClusterTable, reliable: set[str]) -> None:
    wrong = np.flatnonzero(
        (table.clusters < 0)
        | (table.clusters >= len(table.keys))  # there are at most as many clusters as images
        | ~np.isfinite(table.confidence)
        | ~((table.agreement >= 0) & (table.agreement <= 1))
    )
    if len(wrong):
        raise ValueError(f"the row of {table.keys[wrong[0]]!r} holds impossible values")
    if not reliable <= {"0", "1"}:
        raise ValueError("column reliable holds other values than 0 and 1")


def fits_probs(table: ClusterTable, probs: NDArray[np.float32]) -> bool:
    """Return whether row i of a table follows from row i of the probabilities (N, K)."""
    return (
        len(table.keys) == len(probs)
        and bool((table.clusters == probs.argmax(axis=1)).all())
        and bool((np.abs(table.confidence - probs.max(axis=1)) <= 10.0**-DECIMALS).all())
    )


def _rounded(values: torch.Tensor) -> NDArray[np.float32]:
    """Round as in the file, so that a table in memory equals the one that is read back."""
    rounded: NDArray[np.float32] = values.double().numpy().round(DECIMALS).astype(np.float32)
    return rounded
