"""Collect what the page of a run shows from the run's artifacts.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.data.thumbnails import own_shapes
from spice_pl.errors import UsageError
from spice_pl.functional.embeddings import nearest_others
from spice_pl.functional.neighbors import unit_rows
from spice_pl.functional.oddities import step
from spice_pl.reports.choices import Comparison, KChoice
from spice_pl.reports.map import Map, feature_map
from spice_pl.reports.oddities import Oddity
from spice_pl.reports.page import ReportData
from spice_pl.reports.tables import ResultRow, duration_text
from spice_pl.runs.attention import read_attention
from spice_pl.runs.choices import choose_k, compare_clusters
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.oddities import find_oddities
from spice_pl.runs.results import log_lines
from spice_pl.runs.suggestions import read_suggestions
from spice_pl.system.command import command

SAMPLED = 1000  # images whose similarities and colours are looked at
NEIGHBORS = 8  # nearest images shown beside a large picture


def report_data(
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    metrics: Mapping[str, Any],
    table: ClusterTable,
    map_method: str = "tsne",
) -> ReportData:
    """Return what the page of a run shows.

    Args:
        folder: artifacts of the run, of which features and logs are read.
        upstream: artifacts of the stages before it, the nearest first.
        images: the data set.
        metrics: content of metrics.json, which may not be written yet.
        table: clusters of the run.
        map_method: "tsne" or "pca".

    Raises:
        UsageError: there is no such map, or an artifact is damaged.
    """
    num_clusters = int(metrics["num_clusters"])
    upstream = [each for each in upstream if each.finished]
    rows = [ResultRow(**row) for row in metrics["rows"]]
    derived = _derived(folder, upstream, images, metrics, table, map_method)
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
        num_neighbors=table.num_neighbors,
        labels=images.labels,
        class_names=images.class_names,
        logs=_logs([*reversed(upstream), folder]),
        map=derived.map,
        attention=read_attention(folder),
        names=folder.names,
        suggested=read_suggestions(folder),
        cost=_cost(metrics, upstream),
        review=_review(folder, metrics),
        skipped=images.skipped,
        num_skipped=images.num_skipped,
        oddities=derived.oddities,
        comparison=derived.comparison,
        k_choice=derived.k_choice,
        least_alike=derived.least_alike,
        colour_share=colour_share(images.images, table.clusters, int(metrics["seed"])),
        shapes=derived.shapes,
        neighbors=lambda index: _neighbors(folder, images, index),
        originals="" if images.root is None else images.root.as_uri() + "/",
        csv="clusters.csv",
        settings=_settings(metrics),
        versions=metrics["versions"],
    )


@dataclass(frozen=True)
class _Derived:
    """What takes seconds to compute from a run's artifacts, see `ReportData`."""

    map: Map
    oddities: Sequence[Oddity]
    comparison: Comparison
    k_choice: KChoice | None
    least_alike: float
    shapes: Callable[[Sequence[int], int], Mapping[int, NDArray[np.uint8]]]


# That of the page made last: a review makes the same page at every visit.
_last: dict[tuple[str, ...], _Derived] = {}
_last_map: dict[tuple[str | None, str, int], Map] = {}


def _derived(
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    metrics: Mapping[str, Any],
    table: ClusterTable,
    map_method: str,
) -> _Derived:
    digests = metrics.get("digests", {})
    key = (str(folder.path), images.fingerprint, map_method, *map(str, digests.items()))
    if key not in _last or not digests:
        drawn = _map(folder, map_method, int(metrics["seed"]), digests.get("features.npy"))
        title = str(metrics.get("title", folder.path.parent.name))
        made = _Derived(
            map=drawn,
            oddities=find_oddities(folder, images, metrics),
            comparison=compare_clusters(folder, metrics, table, title),
            k_choice=choose_k(folder, upstream, images, metrics, drawn),
            least_alike=least_alike(folder.features, int(metrics["seed"])),
            shapes=_shapes(images),
        )
        _last.clear()
        _last[key] = made
    return _last[key]


def least_alike(features: NDArray[np.float32], seed: int) -> float:
    """Return the cosine that 95 % of the pairs of images exceed, among at most 1,000 of them.

    Args:
        features: (N, D).
        seed: seed of the sample.
    """
    chosen = _sample(len(features), seed)
    rows = unit_rows(torch.from_numpy(np.array(features[chosen])))
    cosines = (rows @ rows.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))]
    return float(torch.quantile(cosines, 0.05)) if len(cosines) else 0.0


def colour_share(images: Any, clusters: NDArray[np.int64], seed: int) -> float:
    """Return the share of the variance of mean colours that is between clusters (ε², Kelley 1935).

    That is η² without what as many random clusters would have; 0 at the least.

    Args:
        images: (N, 3, S, S) pixels; at most 1,000 are read.
        clusters: (N,).
        seed: seed of the sample.
    """
    chosen = _sample(len(clusters), seed)
    ids = np.unique(clusters[chosen], return_inverse=True)[1]
    every = step(images.shape[-1])  # a mean needs no more pixels
    colours = np.stack([np.asarray(images[i])[:, ::every, ::every].mean((1, 2)) for i in chosen])
    sums = np.zeros((ids.max(initial=-1) + 1, 3))
    np.add.at(sums, ids, colours)
    within = colours - (sums / np.bincount(ids)[:, None])[ids]
    whole = ((colours - colours.mean(0)) ** 2).sum()
    if len(colours) <= len(sums) or not whole:
        return 0.0
    lost = (within**2).sum() / whole * (len(colours) - 1) / (len(colours) - len(sums))
    return float(max(0.0, 1 - lost))


def _sample(count: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).permutation(count)[:SAMPLED])


def _shapes(images: ImageSet) -> Callable[[Sequence[int], int], Mapping[int, NDArray[np.uint8]]]:
    """Return `own_shapes` of a data set, which reads the files of a page once."""
    made: dict[tuple[tuple[int, ...], int], Mapping[int, NDArray[np.uint8]]] = {}

    def shapes(index: Sequence[int], height: int) -> Mapping[int, NDArray[np.uint8]]:
        asked = (tuple(index), height)
        if asked not in made:
            made[asked] = own_shapes(images, index, height)
        return made[asked]

    return shapes


def _neighbors(folder: RunFolder, images: ImageSet, index: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return the nearest others (m, k) among the images `index` (m,), as positions in it."""
    rows = folder.embeddings(images.train_index)[torch.from_numpy(index)]
    if len(rows) < 2:
        return np.zeros((len(rows), 0), np.int64)
    return nearest_others(rows, NEIGHBORS).numpy()


def _map(folder: RunFolder, method: str, seed: int, digest: str | None) -> Map:
    """Return the map of a run; edits and other heads on the same features get the same one."""
    key = (digest, method, seed)
    if key not in _last_map or digest is None:
        try:
            made = feature_map(folder.features, method, seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        _last_map.clear()
        _last_map[key] = made
    return _last_map[key]


def _cost(metrics: Mapping[str, Any], upstream: Sequence[RunFolder]) -> dict[str, str]:
    stages = [*(each.metrics for each in reversed(upstream)), metrics]
    return {
        **{f"time of {each['stage']}": duration_text(each["seconds"]) for each in stages},
        "time of all stages": duration_text(metrics["seconds_in_all"]),
        "largest memory": f"{metrics['peak_memory_mb']:,.0f} MB",
        "devices": str(metrics["devices"]),
        "precision": str(metrics["precision"]),
    }


def _settings(metrics: Mapping[str, Any]) -> dict[str, str]:
    given = {"command line": " ".join(metrics["overrides"]), "preset": metrics["preset"]}
    return given | dict(metrics.get("settings", {}))


def _review(folder: RunFolder, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return what edits of this run hold about it, and the command that uses them."""
    return {
        "reviewed": f"{folder.path.parent.name}/{folder.path.name}",
        "fingerprint": metrics["fingerprint"],
        "digest": metrics["digest"],
        "command": _review_command(metrics["overrides"]),
    }


def _review_command(overrides: Sequence[str]) -> str:
    """Return the command that trains on edits; the page fills in the braces."""
    chosen = ("stage=", "edits=", "run=", "overwrite=", "resume=", "dataset.num_clusters=")
    kept = [_typed(text) for text in overrides if not text.startswith(chosen)]
    line = shlex.join([*command(), "stage=fixmatch", *kept, "run=reviewed"])
    return line + " edits={edits} dataset.num_clusters={num_clusters}"


def _typed(text: str) -> str:
    """Return a setting whose value is a plain path without its quotes, as it may be typed.

    >>> _typed("dataset.root='/data/photos'"), _typed("run='7'")
    ('dataset.root=/data/photos', "run='7'")
    """
    found = re.fullmatch(r"([\w.]+=)'(~?[./\w-]*/[./\w-]*)'", text, re.ASCII)
    return found[1] + found[2] if found else text


def _logs(folders: Sequence[RunFolder]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the curves of each stage that logged any, by name of the stage."""
    return {each.path.parent.name: found for each in folders if (found := _curves(each))}


def _curves(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return (epoch, value) of every metric in a stage's log."""
    curves: dict[str, dict[int, float]] = {}
    for epoch, values in log_lines(folder):
        if epoch is not None:
            for name, value in values.items():
                curves.setdefault(name, {})[epoch] = value
    return {name: sorted(points.items()) for name, points in curves.items()}
