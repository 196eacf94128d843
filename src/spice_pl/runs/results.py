"""Scores and cost of a finished stage, for metrics.json.

Labels are read only here, after all choices are made.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.reports.tables import ResultRow
from spice_pl.runs.answer import Answer
from spice_pl.runs.checked_files import identity
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.small_files import read_text
from spice_pl.system.provenance import machine, peak_memory_mb, versions

logger = logging.getLogger(__name__)

UNEQUAL = 2  # largest class over smallest, from which the mean recall is shown beside ACC


@dataclass(frozen=True)
class Record:
    """The settings of a run in metrics.json: enough to repeat it.

    Attributes:
        stage: name of the stage.
        title: name of its row in the table of results.
        num_clusters: K; 0 while it is unknown.
        seed: seed of the run.
        preset: name of the preset that was applied, or "none".
        overrides: settings that the command line changed, without secrets.
        settings: settings of the stage as one level of dotted keys, without secrets.
        k_estimate: what stage=estimate_k found in the features that the clusters are made of; None
            where it has not run.
    """

    stage: str
    title: str
    num_clusters: int
    seed: int
    preset: str
    overrides: Sequence[str]
    settings: Mapping[str, str]
    k_estimate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of a stage.

    Attributes:
        seconds: wall time of training and prediction, over all parts of a resumed run.
        data_wait_fraction: share of the training time in which a step waited for its views.
        devices: number of processes.
        precision: precision of the trainer.
    """

    seconds: float
    data_wait_fraction: float
    devices: int
    precision: str


def stage_metrics(
    record: Record,
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    table: ClusterTable | None,
    answer: Answer | None,
    cost: Cost,
    *,
    oracle: bool,
) -> dict[str, Any]:
    """Return the content of metrics.json: settings, cost, scores, digests.

    Args:
        record: settings of the run.
        folder: artifacts of the run.
        upstream: artifacts of the stages before it, the nearest first.
        images: the data set.
        table: clusters of the run; None for a stage without clusters.
        answer: how they were chosen; None if they are those of the network.
        cost: cost of the stage.
        oracle: whether the stage was trained on true labels.
    """
    before: dict[str, Any] = upstream[0].metrics if upstream else {}
    seconds_in_all = cost.seconds + float(before.get("seconds_in_all", 0.0))
    digests = folder.digests()
    logged = last_logged(folder)  # callback_metrics is empty when resumed after the last epoch
    found = _clusterings(record, folder, images, table, answer, seconds_in_all)
    earlier = before.get("rows", [])
    if upstream and before.get("num_clusters") != record.num_clusters:
        earlier, found = [], chain(_kmeans_again(record, upstream[0], images), found)
    more = {"seed": record.seed, "oracle": oracle or any(map(_is_oracle, upstream))}
    rows = [score_row(name, ids, images, seconds=spent, **more) for name, ids, spent in found]
    return {
        **asdict(record),
        **_data_metrics(images),
        **asdict(cost),
        "seconds_in_all": seconds_in_all,
        "peak_memory_mb": peak_memory_mb(),
        "versions": versions(),
        "machine": machine(),
        "objective": objective(logged),
        "logged": logged,
        **_table_metrics(table, record.num_clusters),
        "answer": None if answer is None else {"name": answer.name, "scores": answer.scores},
        "digest": identity(digests),
        "digests": digests,
        "rows": [*earlier, *map(asdict, rows)],
    }


def _clusterings(
    record: Record,
    folder: RunFolder,
    images: ImageSet,
    table: ClusterTable | None,
    answer: Answer | None,
    seconds: float,
) -> Iterator[tuple[str, NDArray[np.int64], float]]:
    """Yield name, clusters (N,) and seconds of each clustering of a stage to score.

    A stage without clusters is scored by k-means, if K is known. Without labels there is nothing to
    score, and k-means on the pixels of photographs takes longer than all the rest.
    """
    if table is not None:
        if answer is not None:
            yield record.title, folder.probs.argmax(axis=1).astype(np.int64), seconds
        name = record.title if answer is None else f"{record.title}, chosen clusters"
        yield name, table.clusters, seconds
    elif record.num_clusters and images.labels is not None:
        yield from _kmeans_rows(record, record.title, folder, images, seconds)


def _kmeans_again(
    record: Record, upstream: RunFolder, images: ImageSet
) -> Iterator[tuple[str, NDArray[np.int64], float]]:
    """Yield k-means with this K on the features of a stage that had another K, or none.

    Features are the same for any K. Without labels there is nothing to score.
    """
    if images.labels is not None:
        before = upstream.metrics
        spent = float(before["seconds_in_all"])
        yield from _kmeans_rows(record, before["title"], upstream, images, spent)


def _kmeans_rows(
    record: Record, title: str, folder: RunFolder, images: ImageSet, seconds: float
) -> Iterator[tuple[str, NDArray[np.int64], float]]:
    """Yield name, clusters (N,) and seconds of k-means on pixels and on the features of a run."""
    sources: list[tuple[str, NDArray[Any], float]] = [("pixels", images.images, 0.0)]
    sources.append((f"{title} features", folder.features, seconds))
    if folder.similarity == "smoothed":
        embeddings = folder.embeddings(images.train_index).numpy()
        sources.append((f"smoothed {title} features", embeddings, seconds))
    for what, data, spent in sources:
        begun = time.monotonic()
        clusters = kmeans_clusters(data, record.num_clusters, record.seed)
        yield f"k-means on {what}", clusters, spent + time.monotonic() - begun


def _data_metrics(images: ImageSet) -> dict[str, Any]:
    return {
        "dataset": images.name,
        "fingerprint": images.fingerprint,
        "protocol": images.protocol,
        "num_images": len(images),
        "num_skipped": images.num_skipped,
        "num_unused": images.num_unused,
        "num_files": images.num_files,
    }


def _table_metrics(table: ClusterTable | None, num_clusters: int) -> dict[str, Any]:
    """Return sizes and means of the clusters; warn if some are empty."""
    if table is None:
        return {}
    sizes = table.sizes(num_clusters)
    empty = np.flatnonzero(sizes == 0).tolist()
    if empty:
        logger.warning("%d of %d clusters are empty, first %s", len(empty), len(sizes), empty[:20])
    return {
        "cluster_sizes": sizes.tolist(),
        "mean_confidence": float(table.confidence.mean()),
        "mean_agreement": float(table.agreement.mean()),
        "num_neighbors": table.num_neighbors,
        "reliable_fraction": float(table.reliable.mean()),
    }


def objective(logged: Mapping[str, float]) -> float | None:
    """Return what a sweep minimises, without labels: the kept head's loss or the training loss."""
    keys = ("val/best_selection_loss", "train/loss")
    return next((logged[key] for key in keys if key in logged), None)


def score_row(name: str, clusters: NDArray[np.int64], images: ImageSet, **more: Any) -> ResultRow:
    """Return a row of results: clusters scored on the images whose class is known.

    Args:
        name: name of the row.
        clusters: (N,), clusters of all images.
        images: the data set; without labels the scores are None.
        more: seed, seconds, oracle.
    """
    scores: dict[str, Any] = {"acc": None, "nmi": None, "ari": None}
    if images.labels is not None:
        index = images.score_index[images.labels[images.score_index] >= 0]
        scores = clustering_scores(
            torch.from_numpy(clusters[index]), torch.from_numpy(images.labels[index])
        )
        if len(np.unique(clusters[index])) <= len(np.unique(images.labels[index])):
            del scores["purity"]  # adds nothing to ACC
        sizes = np.unique(images.labels[index], return_counts=True)[1]
        if sizes.max() < UNEQUAL * sizes.min():
            del scores["recall"]  # about ACC
    return ResultRow(name, **scores, protocol=images.protocol, **more)


def _is_oracle(folder: RunFolder) -> bool:
    return any(row.get("oracle", False) for row in folder.metrics.get("rows", []))


def last_logged(folder: RunFolder) -> dict[str, float]:
    """Return the last value of every metric in a stage's log, metrics.csv."""
    last: dict[str, float] = {}
    for _, values in log_lines(folder):
        last |= values
    return last


def log_lines(folder: RunFolder) -> list[tuple[int | None, dict[str, float]]]:
    """Return epoch and values of each line of metrics.csv; an empty list without that file.

    The epoch is None in lines that belong to a step, such as those of the learning rate.

    Raises:
        UsageError: the log is damaged.
    """
    file = folder.path / "metrics.csv"
    if not file.is_file():
        return []
    try:
        return [_log_line(line) for line in csv.DictReader(io.StringIO(read_text(file)))]
    except (ValueError, TypeError, OverflowError, csv.Error) as error:
        raise UsageError(
            f"{file} is damaged ({error}); run its stage again with overwrite=true"
        ) from error


def _log_line(line: Mapping[str, str]) -> tuple[int | None, dict[str, float]]:
    epoch = int(line["epoch"]) if line.get("epoch") else None
    if epoch is not None and not 0 <= epoch < 2**31:
        raise ValueError(f"epoch {epoch} is out of range")
    return epoch, {
        key: float(text) for key, text in line.items() if text and key not in ("epoch", "step")
    }
