"""Compare a run's clusters with others of the same features, and preview other numbers of them.

Nothing here reads a label.

Shapes: N images, n sampled, D features, d components, K clusters, k neighbours.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import count_table, match_clusters
from spice_pl.functional.candidates import COMPONENTS as SCORED_COMPONENTS
from spice_pl.functional.candidates import (
    assortativity,
    connect,
    evenness,
    silhouettes,
    spectral_clusters,
)
from spice_pl.functional.embeddings import coordinates, fit_projection, neighbor_graph, project
from spice_pl.functional.neighbors import nearest_neighbors, unit_rows
from spice_pl.functional.reliability import least_agreement
from spice_pl.reports.choices import Compared, Comparison, KChoice, Preview
from spice_pl.reports.map import Map
from spice_pl.runs.answer import NETWORK, NUM_NEIGHBORS, neighbors_for
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder
from spice_pl.system.command import command
from spice_pl.system.schema import parse_object, read_text

QUERIES = 1_000  # images whose neighbours are compared
KEYS = 10_000  # images among which neighbours are searched
FITTED = 10_000  # images that a k-means or a projection is fitted on
SPECTRAL = 500_000  # largest N·K for which spectral clustering is made, in some seconds
COMPONENTS = 64
RESTARTS = 3  # of k-means; 1 for many clusters, which vary less
ITERATIONS = 50
ROWS = 16_384  # images per step, which bounds the memory
MAX_PREVIEWS = 8
MAX_GROUPS = 400  # clusters of all previews that are shown
PICTURES = 6  # of a cluster of a preview
NEAR = (-2, -1, 1, 2, 3)  # numbers of clusters beside K
FACTORS = (0.5, 0.75, 1.25, 1.5)  # and where K is large, where one more makes no difference
LARGE = 30  # K from which on these are used


def compare_clusters(
    folder: RunFolder, metrics: Mapping[str, Any], table: ClusterTable, title: str
) -> Comparison:
    """Compare the clusters with the network's and with plain k-means on the same features.

    k-means sees 64 principal components of the l2-normalised features. Spectral clustering is
    compared too where images times clusters are at most 500,000.

    Args:
        folder: artifacts of the run, of which features and probabilities are read.
        metrics: content of metrics.json.
        table: clusters of the run.
        title: what made the network's clusters.
    """
    num_clusters, seed = int(metrics["num_clusters"]), int(metrics["seed"])
    answer = metrics.get("answer") or {"name": NETWORK, "scores": {}}
    scores: dict[str, float] = dict(answer["scores"])
    chosen = str(answer["name"])
    features = folder.features
    located = components(features, seed)
    rows = unit_rows(located).numpy()
    kept = title if chosen == NETWORK else chosen
    clusterings = {kept: table.clusters}
    if chosen != NETWORK:
        clusterings[title] = np.asarray(folder.probs.argmax(axis=1), dtype=np.int64)
    clusterings["k-means"] = kmeans(rows, num_clusters, seed)[0]
    if len(rows) * num_clusters <= SPECTRAL and len(rows) > num_clusters:
        starts = project(torch.from_numpy(np.array(features)), _fitted(features, seed))
        graph = connect(neighbor_graph(starts, NUM_NEIGHBORS), starts)
        made = spectral_clusters(starts, graph, num_clusters, seed=seed)
        clusterings["spectral clustering"] = made.numpy()
    queries, near = sampled_neighbors(features, num_clusters, seed)  # (n,), (n, k)
    every = torch.stack([torch.from_numpy(np.asarray(each)) for each in clusterings.values()])
    every = every.long()  # (R, N)
    apart = silhouettes(located[:, :SCORED_COMPONENTS], every)
    compared = [
        measured(
            clusters,
            num_clusters,
            queries,
            near,
            silhouette,
            name=name,
            kept=name == kept,
            alike=alike(clusters, torch.from_numpy(table.clusters), num_clusters),
        )
        for name, clusters, silhouette in zip(clusterings, every, apart.tolist(), strict=True)
    ]
    return Comparison(compared, len(queries), scores, chosen if scores else "")


def measure_edited(folder: RunFolder, table: ClusterTable, seed: int, title: str) -> Compared:
    """Measure the clusters of an edited run without labels; those without images do not count."""
    used, clusters = np.unique(table.clusters, return_inverse=True)
    queries, near = sampled_neighbors(folder.features, len(used), seed)
    ids = torch.from_numpy(clusters.astype(np.int64))
    located = components(folder.features, seed)[:, :SCORED_COMPONENTS]
    silhouette = float(silhouettes(located, ids[None]))
    return measured(ids, len(used), queries, near, silhouette, name=title, kept=True, alike=1.0)


def measured(
    clusters: Tensor,
    num_clusters: int,
    queries: Tensor,
    near: Tensor,
    silhouette: float,
    *,
    name: str,
    kept: bool,
    alike: float,
) -> Compared:
    """Measure one clustering without labels.

    Args:
        clusters: int64 (N,), from 0 to K - 1.
        num_clusters: K.
        queries: (n,) images whose neighbours are looked at.
        near: (n, k) their nearest others.
        silhouette: of `functional.candidates.silhouettes`.
        name: how it was made.
        kept: whether it is the one of the run.
        alike: share of images in the matching cluster of the run.
    """
    sizes = torch.bincount(clusters, minlength=num_clusters)
    own = torch.ones(len(queries), dtype=torch.float64)
    if near.numel():
        own = (clusters[near] == clusters[queries].unsqueeze(1)).double().mean(dim=1)  # (n,)
    agreement = own.mean()
    least = least_agreement(sizes, near.shape[1])[clusters[queries]]
    return Compared(
        name=name,
        kept=kept,
        agreement=float(agreement),
        evenness=evenness(clusters, num_clusters),
        alike=alike,
        smallest=int(sizes[sizes > 0].min()),
        largest=int(sizes.max()),
        sure=float((own >= least).double().mean()),
        score=silhouette + float(assortativity(agreement, clusters[None])),
    )


def alike(clusters: Tensor, reference: Tensor, num_clusters: int) -> float:
    """Return the share of images in the same cluster, after the numbers are matched one to one."""
    number = match_clusters(count_table(clusters, reference, num_clusters, num_clusters))
    return float((number[clusters] == reference).double().mean())


def sampled_neighbors(
    features: NDArray[np.float32], num_clusters: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return at most 1,000 images (n,) and their nearest others (n, k), among at most 10,000.

    k is that of the choice of the clusters, so that both scores are the same.
    """
    generator = np.random.default_rng(seed)
    count = len(features)
    keys = np.arange(count)
    if count > KEYS:
        keys = np.sort(generator.choice(count, KEYS, replace=False))
    places = np.arange(len(keys))
    if len(keys) > QUERIES:
        places = np.sort(generator.choice(len(keys), QUERIES, replace=False))
    searched = torch.from_numpy(np.array(features[keys]))
    k = min(neighbors_for(count, num_clusters) + 1, len(keys))
    found = nearest_neighbors(searched[places], searched, k)[1]  # (n, k + 1)
    own = found == torch.from_numpy(places).unsqueeze(1)
    own[~own.any(dim=1), -1] = True  # copies can push the image itself out
    near = torch.from_numpy(keys)[found[~own].view(len(places), k - 1)]
    return torch.from_numpy(keys[places]), near


def components(features: NDArray[np.float32], seed: int) -> Tensor:
    """Return principal components (N, d) of l2-normalised features."""
    projection = _fitted(features, seed)
    parts = [
        coordinates(torch.from_numpy(np.array(features[start : start + ROWS])), projection)
        for start in range(0, len(features), ROWS)
    ]
    return torch.cat(parts)


def _fitted(features: NDArray[np.float32], seed: int) -> Any:
    index = _sample(len(features), seed)
    return fit_projection(torch.from_numpy(np.array(features[index])), COMPONENTS, "none")


def kmeans(
    rows: NDArray[np.float32], num_clusters: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return clusters (N,) and centres (K, d) of k-means, fitted on at most 10,000 rows."""
    sample = rows[_sample(len(rows), seed)]
    restarts = RESTARTS
    starts: str | NDArray[np.float32] = "k-means++"
    if num_clusters >= LARGE:  # one trial per centre; several take longer than all the rest
        restarts = 1
        starts = kmeans_plusplus(sample, num_clusters, random_state=seed, n_local_trials=1)[0]
    model = KMeans(
        num_clusters, init=starts, n_init=restarts, max_iter=ITERATIONS, random_state=seed
    )
    model.fit(sample)
    parts = [model.predict(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
    centres: NDArray[np.float32] = model.cluster_centers_
    return np.concatenate(parts).astype(np.int64), centres


def _sample(count: int, seed: int) -> NDArray[np.intp]:
    if count <= FITTED:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, FITTED, replace=False))


def choose_k(
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    metrics: Mapping[str, Any],
    drawn: Map | None,
) -> KChoice | None:
    """Return the curve over K, and previews of other K by k-means on the run's embeddings.

    None where another K would need more than this stage: after edits, and for a stage that follows
    one with clusters.
    """
    if not upstream or any("cluster_sizes" in each.metrics for each in upstream):
        return None
    num_clusters, seed = int(metrics["num_clusters"]), int(metrics["seed"])
    held = metrics.get("k_estimate") or estimate_of(upstream[0], folder.path.name)
    estimated, clear, curve = read_estimate(held)
    said = held.get("sentence", "") if isinstance(held, Mapping) else ""
    previews: list[Preview] = []
    if drawn is not None and len(drawn.index):
        rows = folder.embeddings(images.train_index).numpy()
        numbers = beside(num_clusters, len(rows), estimated, curve)
        largest = max(1, MAX_GROUPS // max(len(numbers), 1))
        for number in numbers:
            groups = preview(rows, number, seed, drawn.index, largest)
            previews.append(Preview(number, groups, _command(metrics, number, upstream[0])))
    return KChoice(num_clusters, estimated, clear, curve, previews, str(said))


def beside(
    num_clusters: int, num_images: int, estimated: int | None, curve: Sequence[tuple[int, float]]
) -> list[int]:
    """Return other numbers of clusters: near K, the estimate, and the best of the curve."""
    near = [num_clusters + step for step in NEAR]
    if num_clusters >= LARGE:
        near = [round(num_clusters * factor) for factor in FACTORS]
    best = [k for k, _ in sorted(curve, key=lambda point: -point[1])[:3]]
    wanted = [*([] if estimated is None else [estimated]), *near, *best]
    kept = [k for k in dict.fromkeys(wanted) if 2 <= k <= num_images // 2 and k != num_clusters]
    return sorted(kept[:MAX_PREVIEWS])


def preview(
    rows: NDArray[np.float32],
    num_clusters: int,
    seed: int,
    drawn: NDArray[np.intp],
    largest: int,
) -> list[tuple[int, list[int]]]:
    """Return size and shown points of the largest clusters of k-means, the largest cluster first.

    Args:
        rows: (N, d), embeddings.
        num_clusters: K.
        seed: seed of k-means.
        drawn: (n,) images that can be shown; those nearest to the centre are.
        largest: number of clusters that are returned.
    """
    clusters, centres = kmeans(rows, num_clusters, seed)
    sizes = np.bincount(clusters, minlength=num_clusters)
    groups = []
    for cluster in np.argsort(-sizes, kind="stable")[:largest].tolist():
        points = np.flatnonzero(clusters[drawn] == cluster)
        far = np.linalg.norm(rows[drawn[points]] - centres[cluster], axis=1)
        shown = points[np.argsort(far, kind="stable")[:PICTURES]]
        groups.append((int(sizes[cluster]), shown.tolist()))
    return groups


def _command(metrics: Mapping[str, Any], num_clusters: int, upstream: RunFolder) -> str:
    """Return the command that makes another K a result, by k-means on the stored features."""
    replaced = ("stage=", "stages=", "dataset.num_clusters=", "overwrite=", "resume=", "edits=")
    kept = [text for text in metrics["overrides"] if not text.lstrip("+").startswith(replaced)]
    root = metrics["settings"].get("dataset.root", "-")
    if "dataset=folder" in kept and not root.startswith("-"):  # a folder is its own first word
        named = ("dataset=", "dataset.root=")
        kept = [root, *(text for text in kept if not text.startswith(named))]
    stage = upstream.path.parent.name
    more = ["stage=kmeans", f"dataset.num_clusters={num_clusters}", "overwrite=true"]
    if stage not in ("embed", "moco"):  # which the recipes give
        more.append(f"kmeans.upstream={stage}")
    return shlex.join([*command(), *kept, *more])


def estimate_of(features: RunFolder, run: str) -> dict[str, Any] | None:
    """Return what an estimate of K says about the features of a stage; None where there is none.

    Runs of stage=estimate_k on the same data set are tried, and that counts which read these
    features, whatever its name: a run with a name of its own copies features.

    Args:
        features: artifacts of the stage, finished.
        run: name of the run that is tried first.

    Returns:
        Keys `num_clusters` (the estimate), `clear`, `sentence`, and, along the curve, `candidates`
        (each K) and `scores` (high is good).
    """
    place = features.path.parents[1] / "estimate_k"
    for path in (place / run, *sorted(place.glob("*"))):
        task, stamp = RunFolder(path), path / "dataset.json"
        if not task.finished or not stamp.is_file():
            continue
        found = task.metrics
        with suppress(KeyError, TypeError, ValueError):  # written by another release
            if parse_object(read_text(stamp))["upstream"] == features.metrics["digest"]:
                return {**found["k_estimate"], "sentence": str(found["sentence"])}
    return None


def read_estimate(held: Any) -> tuple[int | None, bool, list[tuple[int, float]]]:
    """Return the estimate of K, whether it is clear, and the curve, from `k_estimate`.

    An entry of another form gives no estimate: other releases write it too.
    """
    try:
        found = (int(held["num_clusters"]), bool(held["clear"]))
        points = zip(held["candidates"], held["scores"], strict=True)
        curve = sorted((int(k), float(score)) for k, score in points)
    except (TypeError, KeyError, ValueError):
        return None, True, []
    return *found, [(k, score) for k, score in curve if math.isfinite(score)]
