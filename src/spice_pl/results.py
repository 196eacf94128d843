"""What a finished stage leaves for people: scores, clusters.csv, the table, the page.

Truth enters here, after all choices are made.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import csv
import logging
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from spice_pl.artifacts import RunFolder
from spice_pl.baselines import kmeans_clusters
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.reliability import Balance, local_consistency, select_reliable
from spice_pl.reports.page import ReportData, write_report
from spice_pl.reports.tables import ResultRow, results_markdown

logger = logging.getLogger(__name__)

PACKAGES = ("spice-pl", "torch", "torchvision", "pytorch-lightning", "hydra-core")


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


def write_results(
    run: StageRun,
    images: ImageSet,
    logged: Mapping[str, float],
    *,
    seconds: float,
    data_wait_fraction: float,
    devices: int,
    precision: str,
) -> None:
    """Score a stage's predictions and write metrics.json, which marks the folder as finished.

    A stage with clusters also gets clusters.csv, table.md and report.html; one without is scored
    by k-means on its features, beside k-means on the pixels.
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
        "objective": objective(logged),
        "logged": dict(logged),
    }
    if (run.folder.path / "probs.npy").is_file():
        clusters = run.folder.probs.argmax(axis=1).astype(np.int64)  # (N,)
        rows.append(_row(run, images, run.title, clusters, cost))
        metrics |= _write_clusters(run, images, rows, clusters)
    else:
        for what, data, spent in (
            ("pixels", images.images, 0.0),
            (f"{run.title} features", run.folder.features, cost),
        ):
            begun = time.monotonic()
            clusters = kmeans_clusters(data, run.num_clusters, run.seed)
            spent += time.monotonic() - begun
            rows.append(_row(run, images, f"k-means on {what}", clusters, spent))
    metrics |= {"digest": run.folder.digest(), "rows": [asdict(row) for row in rows]}
    run.folder.write_json("metrics.json", metrics)


def objective(logged: Mapping[str, float]) -> float | None:
    """What a sweep minimises, made without labels: the kept head's loss or the training loss."""
    keys = ("val/best_selection_loss", "train/loss")
    return next((logged[key] for key in keys if key in logged), None)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _row(
    run: StageRun, images: ImageSet, name: str, clusters: NDArray[np.int64], seconds: float
) -> ResultRow:
    scores: dict[str, Any] = {"acc": None, "nmi": None, "ari": None}
    if images.labels is not None:
        index = images.score_index[images.labels[images.score_index] >= 0]
        scores = clustering_scores(
            torch.from_numpy(clusters[index]), torch.from_numpy(images.labels[index])
        )
    return ResultRow(name, **scores, protocol=images.protocol, seed=run.seed, seconds=seconds)


def _write_clusters(
    run: StageRun, images: ImageSet, rows: Sequence[ResultRow], clusters: NDArray[np.int64]
) -> dict[str, Any]:
    """Write clusters.csv, table.md and report.html; return what they show in numbers."""
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
        logger.warning("clusters %s are empty", empty)
    run.folder.write_clusters(images.keys, clusters, confidence, agreement.numpy(), reliable)
    (run.folder.path / "table.md").write_text(results_markdown(rows), encoding="utf-8")
    write_report(
        ReportData(
            title=f"{images.name}: {len(images):,} images in {run.num_clusters} clusters",
            dataset=images.name,
            num_images=len(images),
            num_clusters=run.num_clusters,
            protocol=images.protocol,
            seed=run.seed,
            rows=rows[::-1],  # the page's headline is its first row
            images=lambda index: images.images[index],
            keys=images.keys,
            clusters=clusters,
            confidence=confidence,
            agreement=agreement.numpy(),
            reliable=reliable,
            labels=images.labels,
            class_names=images.class_names,
            curves={
                folder.path.parent.name: curve
                for folder in [*reversed(run.upstream), run.folder]
                if (curve := _loss_curve(folder))
            },
            skipped=images.skipped,
            settings={"command line": " ".join(run.overrides), "preset": run.preset}
            | dict(run.settings),
            versions=versions(),
        ),
        run.folder.path / "report.html",
    )
    return {
        "cluster_sizes": sizes.tolist(),
        "mean_confidence": float(confidence.mean()),
        "mean_agreement": float(agreement.mean()),
        "reliable_fraction": float(reliable.mean()),
    }


def last_logged(folder: RunFolder) -> dict[str, float]:
    """Return the last value of every metric in a stage's CSV logs, those before a resume too."""
    last: dict[str, float] = {}
    for line in _log_lines(folder):
        last |= {key: float(text) for key, text in line.items() if text}
    return {key: value for key, value in last.items() if key not in ("epoch", "step")}


def _log_lines(folder: RunFolder) -> Iterator[dict[str, str]]:
    # A run that was resumed has a log for each part: metrics.1.csv, ..., metrics.csv.
    for path in sorted(folder.path.glob("metrics*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def _loss_curve(folder: RunFolder) -> list[tuple[int, float]]:
    """(epoch, loss) from a stage's CSV log."""
    curve = {
        int(line["epoch"]): float(line["train/loss"])
        for line in _log_lines(folder)
        if line.get("train/loss")
    }
    return sorted(curve.items())
