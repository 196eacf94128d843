"""What a finished stage leaves for people: scores, clusters.csv, the table, the page.

Truth enters here, after all choices are made.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import csv
import logging
import resource
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.functional.reliability import Balance, local_consistency, select_reliable
from spice_pl.reports.map import feature_map
from spice_pl.reports.page import ReportData, write_report
from spice_pl.reports.tables import ResultRow, duration_text, results_markdown
from spice_pl.runs.attention import Places, read_attention, write_attention
from spice_pl.runs.folder import RunFolder
from spice_pl.system.command import command
from spice_pl.system.provenance import machine, versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, with what it takes to repeat it.

    Attributes:
        stage: its name.
        title: its row of the table.
        folder: its artifacts.
        upstream: artifacts of the stages before it, the nearest first.
        num_clusters: K.
        seed: of the run.
        preset: numbers applied for this data set, or "none".
        overrides: what the command line changed.
        settings: of the stage, as one level of dotted keys.
        num_neighbors: of local consistency.
        agreement: at least, of a reliable image.
        confidence: more than, of a reliable image.
        balance: of reliable images over clusters.
        map_method: how the page lays images out, "pca" or "tsne".
        oracle: whether true labels were trained on.
    """

    stage: str
    title: str
    folder: RunFolder
    upstream: Sequence[RunFolder]
    num_clusters: int
    seed: int
    preset: str
    overrides: Sequence[str]
    settings: Mapping[str, str]
    num_neighbors: int
    agreement: float
    confidence: float
    balance: Balance
    map_method: str = "pca"
    oracle: bool = False


def write_results(
    run: StageRun,
    images: ImageSet,
    logged: Mapping[str, float],
    *,
    places: Places,
    seconds: float,
    data_wait_fraction: float,
    devices: int,
    precision: str,
) -> None:
    """Score a stage's predictions and write metrics.json, which marks the folder as finished.

    A stage with clusters also gets clusters.csv, table.md and report.html; one without is scored
    by k-means on its features, beside k-means on the pixels, if K is known.
    """
    before: dict[str, Any] = run.upstream[0].metrics if run.upstream else {}
    cost = seconds + float(before.get("seconds_in_all", 0.0))
    rows = [ResultRow(**row) for row in before.get("rows", [])]
    metrics: dict[str, Any] = {
        "stage": run.stage,
        "title": run.title,
        "dataset": images.name,
        "fingerprint": images.fingerprint,
        "protocol": images.protocol,
        "num_images": len(images),
        "num_skipped": len(images.skipped),
        "num_clusters": run.num_clusters,
        "seed": run.seed,
        "preset": run.preset,
        "overrides": list(run.overrides),
        "settings": dict(run.settings),
        "seconds": seconds,
        "seconds_in_all": cost,
        "data_wait_fraction": data_wait_fraction,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "devices": devices,
        "precision": precision,
        "versions": versions(),
        "machine": machine(),
        "objective": objective(logged),
        "logged": dict(logged),
    }
    if (run.folder.path / "probs.npy").is_file():
        clusters = run.folder.probs.argmax(axis=1).astype(np.int64)  # (N,)
        rows.append(_row(run, images, run.title, clusters, cost))
        metrics |= _write_clusters(run, images, clusters)
    elif run.num_clusters:
        for what, data, spent in (
            ("pixels", images.images, 0.0),
            (f"{run.title} features", run.folder.features, cost),
        ):
            begun = time.monotonic()
            clusters = kmeans_clusters(data, run.num_clusters, run.seed)
            spent += time.monotonic() - begun
            rows.append(_row(run, images, f"k-means on {what}", clusters, spent))
    metrics |= {"digest": run.folder.digest(), "digests": run.folder.digests()}
    metrics["rows"] = [asdict(row) for row in rows]
    if "cluster_sizes" in metrics:
        table = results_markdown(rows)
        (run.folder.path / "table.md").write_text(table, encoding="utf-8")
        write_attention(run.folder, images, run.num_clusters, places)
        shown = report_data(run.folder, run.upstream, images, metrics, run.map_method)
        write_report(shown, run.folder.path / "report.html")
    run.folder.write_json("metrics.json", metrics)


def objective(logged: Mapping[str, float]) -> float | None:
    """What a sweep minimises, made without labels: the kept head's loss or the training loss."""
    keys = ("val/best_selection_loss", "train/loss")
    return next((logged[key] for key in keys if key in logged), None)


def score_row(name: str, clusters: NDArray[np.int64], images: ImageSet, **more: Any) -> ResultRow:
    """Return the row of a table: clusters (N,) scored on the images whose class is known.

    Args:
        name: of the row.
        clusters: of all images, (N,).
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
            del scores["purity"]  # says nothing beside ACC
    return ResultRow(name, **scores, protocol=images.protocol, **more)


def _row(
    run: StageRun, images: ImageSet, name: str, clusters: NDArray[np.int64], seconds: float
) -> ResultRow:
    oracle = run.oracle or any(_is_oracle(folder) for folder in run.upstream)
    return score_row(name, clusters, images, seed=run.seed, seconds=seconds, oracle=oracle)


def _is_oracle(folder: RunFolder) -> bool:
    return any(row.get("oracle", False) for row in folder.metrics.get("rows", []))


def _write_clusters(run: StageRun, images: ImageSet, clusters: NDArray[np.int64]) -> dict[str, Any]:
    """Write clusters.csv; return what it says in numbers."""
    ids, confidence = torch.from_numpy(clusters), np.array(run.folder.probs.max(axis=1))
    embeddings = F.normalize(torch.from_numpy(np.array(run.folder.features)))
    agreement = local_consistency(embeddings, ids, min(run.num_neighbors, len(images)))  # (N,)
    reliable = select_reliable(
        agreement,
        torch.from_numpy(confidence),
        ids,
        agreement=run.agreement,
        confidence=run.confidence,
        balance=run.balance,
        generator=keyed_generator(run.seed),
    ).numpy()  # (N,)
    sizes = np.bincount(clusters, minlength=run.num_clusters)
    empty = np.flatnonzero(sizes == 0).tolist()
    if empty:
        logger.warning("%d of %d clusters are empty, first %s", len(empty), len(sizes), empty[:20])
    run.folder.write_clusters(images.keys, clusters, confidence, agreement.numpy(), reliable)
    return {
        "cluster_sizes": sizes.tolist(),
        "mean_confidence": float(confidence.mean()),
        "mean_agreement": float(agreement.mean()),
        "reliable_fraction": float(reliable.mean()),
    }


def report_data(
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    metrics: Mapping[str, Any],
    map_method: str = "pca",
) -> ReportData:
    """What the page of a run shows, from its artifacts alone.

    Args:
        folder: holds clusters.csv, features and logs.
        upstream: of the stages before it, the nearest first.
        images: the data set.
        metrics: what metrics.json holds or will hold.
        map_method: "pca" or "tsne".

    Raises:
        UsageError: the map's package is missing.
    """
    table, num_clusters = folder.read_clusters(), int(metrics["num_clusters"])
    upstream = [each for each in upstream if each.finished]
    rows = [ResultRow(**row) for row in metrics["rows"]]
    try:
        places = feature_map(folder.features, map_method, int(metrics["seed"]))
    except ValueError as error:
        raise UsageError(str(error)) from error
    overrides = " ".join(metrics["overrides"])
    return ReportData(
        title=f"{images.name}: {len(images):,} images in {num_clusters} clusters",
        dataset=images.name,
        num_images=len(images),
        num_clusters=num_clusters,
        protocol=images.protocol,
        seed=int(metrics["seed"]),
        rows=rows[::-1],  # the page's headline is its first row
        images=lambda index: images.images[index],
        keys=images.keys,
        clusters=table.clusters,
        confidence=table.confidence,
        agreement=table.agreement,
        reliable=table.reliable,
        labels=images.labels,
        class_names=images.class_names,
        logs={
            each.path.parent.name: curves
            for each in [*reversed(upstream), folder]
            if (curves := _curves(each))
        },
        map=places,
        attention=read_attention(folder),
        names=folder.names,
        cost=_cost(metrics, upstream),
        review={
            "reviewed": f"{folder.path.parent.name}/{folder.path.name}",
            "fingerprint": metrics["fingerprint"],
            "digest": metrics["digest"],
            "command": _review_command(metrics["overrides"]),
        },
        skipped=images.skipped,
        settings={"command line": overrides, "preset": metrics["preset"]}
        | dict(metrics.get("settings", {})),
        versions=metrics["versions"],
    )


def _cost(metrics: Mapping[str, Any], upstream: Sequence[RunFolder]) -> dict[str, str]:
    stages = [*(each.metrics for each in reversed(upstream)), metrics]
    return {
        **{f"time of {each['stage']}": duration_text(each["seconds"]) for each in stages},
        "time in all": duration_text(metrics["seconds_in_all"]),
        "largest memory": f"{metrics['peak_memory_mb']:,.0f} MB",
        "devices": str(metrics["devices"]),
        "precision": str(metrics["precision"]),
    }


def _review_command(overrides: Sequence[str]) -> str:
    """The command that trains on from edits; the page fills in the braces."""
    chosen = ("stage=", "edits=", "run=", "overwrite=", "resume=", "dataset.num_clusters=")
    kept = [text for text in overrides if not text.startswith(chosen)]
    line = shlex.join([*command(), "stage=fixmatch", *kept, "run=reviewed"])
    return line + " edits={edits} dataset.num_clusters={num_clusters}"


def last_logged(folder: RunFolder) -> dict[str, float]:
    """Return the last value of every metric in a stage's CSV log."""
    last: dict[str, float] = {}
    try:
        for line in _log_lines(folder):
            last |= {key: float(text) for key, text in line.items() if text}
    except (ValueError, TypeError, csv.Error) as error:
        raise UsageError(
            f"{folder.path / 'metrics.csv'} is damaged ({error}); make its stage anew with "
            "overwrite=true"
        ) from error
    return {key: value for key, value in last.items() if key not in ("epoch", "step")}


def _log_lines(folder: RunFolder) -> Iterator[dict[str, str]]:
    path = folder.path / "metrics.csv"
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _curves(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) of every logged metric, from a stage's CSV logs."""
    curves: dict[str, dict[int, float]] = {}
    for line in _log_lines(folder):
        if not line["epoch"]:  # the learning rate, logged with dashboards, has a step only
            continue
        for name, text in line.items():
            if text and name not in ("epoch", "step"):
                curves.setdefault(name, {})[int(line["epoch"])] = float(text)
    return {name: sorted(points.items()) for name, points in curves.items()}
