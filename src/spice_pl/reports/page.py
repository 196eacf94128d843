"""One clustering run as one HTML file that opens offline.

Shapes: N images, K clusters, C classes.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spice_pl.reports.charts import Logs, charts, head_choice
from spice_pl.reports.html import content_hash, template_environment, write_page
from spice_pl.reports.map import Map
from spice_pl.reports.published import published_results
from spice_pl.reports.shading import Attention, shade, where
from spice_pl.reports.tables import NO_LABELS, ResultRow, duration_text, footnotes, score_text
from spice_pl.reports.wall import (
    PIXEL_ART,
    ClusterWall,
    Index,
    Wall,
    atlas,
    choose_wall,
    resized,
    sprite,
)

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]

SHEETS_BYTES = 6_500_000  # of pictures in the walls; with map and list below 15 MB, a mail
ATLAS_PIXELS = 40  # side of a picture of the map; 5,000 photographs are 3 to 4 MB
LISTED_BYTES = 2_500_000  # of file names that the search knows; else only the shown images
MAX_PICTURES = 2_400  # aimed at; every wall of every cluster still shows one
MAX_SKIPPED = 200  # lines; the rest is counted
MAX_CONFUSION_CELLS = 10_000  # 100 clusters by 100 classes; beyond it nobody reads a table
BINS = 10  # of a cluster's confidence
WALLS = {
    "Prototypes": "highest confidence",
    "Typical": "around the median",
    "Borderline": "lowest confidence",
    "Not sure": "most neighbours are in other clusters",
}


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows; N images, K clusters.

    Attributes:
        title: heading of the page.
        dataset: name of the data set.
        num_images: N.
        num_clusters: K; clusters without an image are shown too.
        protocol: which images were trained on and which were clustered.
        seed: of the run.
        rows: results; the first row that is no oracle is the headline.
        images: from an index (n,) to pictures, uint8 (n, 3, S, S); called for shown pictures only.
        keys: (N,), path or index of each image.
        clusters: (N,), in [0, K).
        confidence: (N,), in [0, 1].
        agreement: (N,), in [0, 1], share of an image's neighbours in the same cluster.
        reliable: (N,), bool.
        labels: (N,), truth, or None; a negative label means that this image has none.
        class_names: name of each label, or None.
        logs: by stage and metric, what was logged as (epoch, value).
        map: where images lie on a plane, or None.
        attention: maps of the prototypes; without an image where the backbone keeps none, None
            where nobody looked.
        names: what a person called a cluster.
        cost: what the run took, in words.
        review: what editing needs besides: the command that goes on from edits; for a page that
            is served, also where to save them and where whole images are.
        skipped: files left out and why, (file, reason).
        settings: what the run was told.
        versions: what the run was made with.
        notes: sentences a reader has to know, shown near the top.

    Raises:
        ValueError: an array does not describe num_images images.
    """

    title: str
    dataset: str
    num_images: int
    num_clusters: int
    protocol: str
    seed: int
    rows: Sequence[ResultRow]
    images: Callable[[NDArray[np.intp]], NDArray[np.uint8]]
    keys: Sequence[str | int]
    clusters: IntArray
    confidence: FloatArray
    agreement: FloatArray
    reliable: NDArray[np.bool_]
    labels: IntArray | None = None
    class_names: Sequence[str] | None = None
    logs: Logs = field(default_factory=dict)
    map: Map | None = None
    attention: Attention | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    cost: Mapping[str, str] = field(default_factory=dict)
    review: Mapping[str, Any] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("keys", "clusters", "confidence", "agreement", "reliable", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_images:
                raise ValueError(
                    f"{name} has {len(values)} entries for num_images {self.num_images}; "
                    "give one entry an image"
                )


@dataclass(frozen=True)
class Picture:
    """One shown image: where it is in its sheet, and what is known about it."""

    image: int
    sheet: int
    offset: float  # percent, as CSS background-position counts it
    key: str
    confidence: str
    agreement: str
    truth: str | None
    shade: float | None = None  # percent, in the sheet of shades; None without a map
    looks_at: str = ""


@dataclass(frozen=True)
class ClusterView:
    """One cluster as the page shows it; None where an empty cluster has nothing to say."""

    id: int
    name: str
    size: int
    num_not_sure: int
    not_sure_percent: float  # of the largest cluster
    bins: Sequence[int]  # height in percent of the fullest, by confidence from 0 to 1
    size_percent: float  # of the largest cluster
    reliable_percent: float  # of the largest cluster
    confidence: str | None
    reliable: str | None
    truth: str | None
    truth_share: str | None
    walls: Mapping[str, Sequence[Picture]]


@dataclass(frozen=True)
class Sheet:
    """Pictures of one section, side by side."""

    number: int
    uri: str
    num_pictures: int
    shades: str = ""
    num_shades: int = 0


@dataclass(frozen=True)
class Confusion:
    """Clusters by classes; each cell a count and its share of the row. No rows: too large."""

    classes: Sequence[str]
    rows: Sequence[Sequence[tuple[int, float]]]
    num_clusters: int
    num_classes: int


@dataclass(frozen=True)
class Subset:
    """One line of the comparison of reliable with all images (SPICE, Figure 7)."""

    name: str
    size: int
    confidence: str
    agreement: str
    acc: str | None


def render_report(data: ReportData) -> str:
    """Return the page as HTML; nothing is loaded from outside and no other script can run."""
    wall = shown_wall(data.confidence, data.agreement, data.clusters, data.num_clusters)
    groups = [chosen.shown for chosen in wall.clusters]
    sheets, side = _sheets(data.images, groups, data.attention)
    pictures = [_pictures(data, index, sheet) for sheet, index in enumerate(groups)]
    headline = next((row for row in data.rows if not row.oracle), None)
    environment = template_environment()
    script = environment.loader.get_source(environment, "report.js")[0]  # type: ignore[union-attr]
    return environment.get_template("report.html.j2").render(
        data=data,
        headline=headline,
        facts=_facts(data, headline, wall.num_not_sure),
        notes=[*data.notes, *_warnings(data)],
        sheets=sheets,
        tile_pixels=84 // side * side if side < PIXEL_ART else 80,
        pixel_art=side < PIXEL_ART,
        explained=WALLS,
        clusters=_cluster_views(data, wall, pictures),
        equal=_equal_share(data),
        num_not_sure=wall.num_not_sure,
        threshold=f"{wall.agreement_threshold:.0%}",
        has_scores=any(row.has_scores for row in data.rows),
        published=published_results(data.dataset),
        footnotes=footnotes(data.rows) if data.rows else [NO_LABELS] * (data.labels is None),
        confusion=_confusion(data),
        charts=charts(data.logs),
        heads=head_choice(data.logs),
        subsets=_subsets(data),
        skipped=data.skipped[:MAX_SKIPPED],
        served="save" in data.review,
        script=Markup(script),  # noqa: S704 - our own file
        script_hash=content_hash(script),
        payload=Markup(_payload(data, wall)),  # noqa: S704 - JSON without <, > and &
    )


def shown_wall(
    confidence: FloatArray, agreement: FloatArray, clusters: IntArray, num_clusters: int
) -> Wall:
    """Choose the pictures of the page; arguments as in `choose_wall`."""
    per_row = max(1, min(12, MAX_PICTURES // (4 * num_clusters)))
    return choose_wall(confidence, agreement, clusters, num_clusters, per_row=per_row)


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page to path; the old page stays until the new one is whole on disk."""
    return write_page(render_report(data), path)


def _sheets(
    images: Callable[[NDArray[np.intp]], NDArray[np.uint8]],
    groups: Sequence[Index],
    attention: Attention | None,
) -> tuple[list[Sheet], int]:
    """One sheet a group, with the largest pictures that fit into SHEETS_BYTES, and their side."""
    limit = 128 if sum(map(len, groups)) <= MAX_PICTURES else 64  # bounds the memory
    tiles = [_fitted(images(index), limit) if len(index) else None for index in groups]
    first = next((group.shape[-1] for group in tiles if group is not None), limit)
    for side in [first, *(smaller for smaller in (96, 64, 48, 32) if smaller < first)]:
        uris = ["" if group is None else sprite(group, side) for group in tiles]
        if sum(map(len, uris)) <= SHEETS_BYTES:
            break
    sheets = []
    for number, (uri, index) in enumerate(zip(uris, groups, strict=True)):
        maps = None if attention is None else attention.of(index.tolist())
        if maps is None or not len(maps):
            sheets.append(Sheet(number, uri, len(index)))
        else:
            sheets.append(Sheet(number, uri, len(index), shade(maps), len(maps)))
    return sheets, side


def _fitted(images: NDArray[np.uint8], limit: int) -> NDArray[np.uint8]:
    """Pixel art untouched, anything else at 96 pixels or more: sharp on a dense screen."""
    side = images.shape[-1]
    return images if side < PIXEL_ART else resized(images, min(max(side, 96), limit))


def _pictures(data: ReportData, index: Index, sheet: int) -> list[Picture]:
    maps = () if data.attention is None else data.attention.of(index.tolist())
    return [
        Picture(
            image=int(i),
            sheet=sheet,
            offset=_percent(position, len(index)),
            key=str(data.keys[i]),
            confidence=f"{data.confidence[i]:.2f}",
            agreement=f"{data.agreement[i]:.2f}",
            truth=None if data.labels is None else _class_name(data, int(data.labels[i])),
            shade=_percent(position, len(maps)) if position < len(maps) else None,
            looks_at=where(maps[position]) if position < len(maps) else "",
        )
        for position, i in enumerate(index)
    ]


def _percent(position: int, num_tiles: int) -> float:
    """Where CSS puts a tile of a sheet."""
    return round(100 * position / max(num_tiles - 1, 1), 4)


def _cluster_views(
    data: ReportData, wall: Wall, pictures: Sequence[list[Picture]]
) -> list[ClusterView]:
    sizes = np.bincount(data.clusters, minlength=data.num_clusters)
    reliable = np.bincount(data.clusters[data.reliable], minlength=data.num_clusters)
    largest = max(sizes.max(), 1)
    views = []
    for cluster, (chosen, shown) in enumerate(zip(wall.clusters, pictures, strict=True)):
        members = data.clusters == cluster
        truth = np.empty(0, np.intp) if data.labels is None else data.labels[members]
        truth = truth[truth >= 0]
        majority = int(np.bincount(truth).argmax()) if len(truth) else None
        size = int(sizes[cluster])
        bins = np.histogram(data.confidence[members], BINS, (0, 1))[0]
        views.append(
            ClusterView(
                id=cluster,
                name=data.names.get(cluster, ""),
                size=size,
                num_not_sure=chosen.num_not_sure,
                not_sure_percent=round(100 * chosen.num_not_sure / largest, 2),
                bins=(100 * bins / max(bins.max(), 1)).round().astype(int).tolist(),
                size_percent=round(100 * size / largest, 2),
                reliable_percent=round(100 * int(reliable[cluster]) / largest, 2),
                confidence=f"{data.confidence[members].mean():.2f}" if size else None,
                reliable=f"{reliable[cluster] / size:.0%}" if size else None,
                truth=None if majority is None else _class_name(data, majority),
                truth_share=None if majority is None else f"{(truth == majority).mean():.0%}",
                walls=_by_wall(chosen, shown),
            )
        )
    return views


def _by_wall(chosen: ClusterWall, shown: Sequence[Picture]) -> dict[str, Sequence[Picture]]:
    groups = (chosen.prototypes, chosen.typical, chosen.borderline, chosen.not_sure)
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return {
        name: shown[end - len(group) : end]
        for name, group, end in zip(WALLS, groups, ends, strict=True)
    }


def _class_name(data: ReportData, label: int) -> str | None:
    if label < 0:
        return None
    names = data.class_names or ()
    return names[label] if label < len(names) else str(label)


def _facts(
    data: ReportData, headline: ResultRow | None, num_not_sure: int
) -> list[tuple[str, str, bool]]:
    """The numbers of the headline: (name, value, whether truth was needed)."""
    facts: list[tuple[str, str, bool]] = []
    if headline is not None and headline.has_scores:
        scores = {"ACC": headline.acc, "NMI": headline.nmi, "ARI": headline.ari}
        facts += [(name, score_text(score), True) for name, score in scores.items()]
    if data.num_images:
        facts.append(("Reliable", f"{np.mean(data.reliable):.0%}", False))
        facts.append(("Mean confidence", f"{np.mean(data.confidence):.2f}", False))
        facts.append(("Not sure", f"{num_not_sure / data.num_images:.1%}", False))
    if headline is not None:
        facts.append(("Time", duration_text(headline.seconds), False))
    return [*facts, ("Seed", str(data.seed), False)]


def _warnings(data: ReportData) -> list[str]:
    """What is wrong with the clusters as a whole, as far as it shows without labels."""
    sizes = np.bincount(data.clusters, minlength=data.num_clusters)
    empty = np.flatnonzero(sizes == 0)
    warnings = []
    if len(empty):
        named = ", ".join(map(str, empty[:20])) + (", …" if len(empty) > 20 else "")
        warnings.append(
            f"Without an image: {len(empty)} of {data.num_clusters} clusters ({named}). "
            "Fewer clusters may do."
        )
    if data.num_clusters > 2 and 2 * sizes.max() > data.num_images > 0:
        warnings.append(
            f"Cluster {sizes.argmax()} holds {sizes.max() / data.num_images:.0%} of all images: "
            "either the data are like that, or the clustering has collapsed."
        )
    return warnings


def _equal_share(data: ReportData) -> tuple[str, float]:
    """Images a cluster if all were of one size: as text, and in percent of the largest."""
    largest = int(np.bincount(data.clusters, minlength=data.num_clusters).max())
    share = data.num_images / data.num_clusters
    return f"{share:,.0f}", round(100 * share / max(largest, 1), 2)


def _confusion(data: ReportData) -> Confusion | None:
    """Count clusters by classes; None without labels."""
    if data.labels is None or not (data.labels >= 0).any():
        return None
    known = data.labels >= 0
    num_classes = max(int(data.labels.max()) + 1, len(data.class_names or ()))
    if data.num_clusters * num_classes > MAX_CONFUSION_CELLS:
        return Confusion((), (), data.num_clusters, num_classes)
    counts = np.zeros((data.num_clusters, num_classes), np.int64)
    np.add.at(counts, (data.clusters[known], data.labels[known]), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return Confusion(
        classes=[str(_class_name(data, label)) for label in range(num_classes)],
        rows=[
            [(int(n), round(float(part), 3)) for n, part in zip(line, parts, strict=True)]
            for line, parts in zip(counts, share, strict=True)
        ],
        num_clusters=data.num_clusters,
        num_classes=num_classes,
    )


def _subsets(data: ReportData) -> list[Subset]:
    """All images, the reliable ones and the others; ACC by the match of all images."""
    right = None
    if data.labels is not None and (data.labels >= 0).any():
        known = data.labels >= 0
        counts = np.zeros((data.num_clusters, int(data.labels.max()) + 1), np.int64)
        np.add.at(counts, (data.clusters[known], data.labels[known]), 1)
        match = np.full(data.num_clusters, -2)
        rows, columns = linear_sum_assignment(counts, maximize=True)
        match[rows] = columns
        right = match[data.clusters] == data.labels  # (N,)
    subsets = []
    for name, chosen in (
        ("all", np.ones(data.num_images, bool)),
        ("reliable", data.reliable),
        ("not reliable", ~data.reliable),
    ):
        size, scored = int(chosen.sum()), chosen
        if right is not None and data.labels is not None:
            scored = chosen & (data.labels >= 0)
        subsets.append(
            Subset(
                name=name,
                size=size,
                confidence=f"{data.confidence[chosen].mean():.2f}" if size else "–",
                agreement=f"{data.agreement[chosen].mean():.2f}" if size else "–",
                acc=None
                if right is None
                else (f"{right[scored].mean():.3f}" if scored.any() else "–"),
            )
        )
    return subsets


def _payload(data: ReportData, wall: Wall) -> str:
    """What the script reads, as JSON that cannot end its own element."""
    names = sum(len(str(key)) + 3 for key in data.keys)
    everything = names <= LISTED_BYTES
    if everything:
        listed = np.arange(data.num_images)
    else:
        drawn = data.map.index if data.map is not None else np.empty(0, np.intp)
        listed = np.unique(np.concatenate([drawn, *(chosen.shown for chosen in wall.clusters)]))
    doubtful = data.agreement[listed] < wall.agreement_threshold
    payload: dict[str, Any] = {
        "numImages": data.num_images,
        "numClusters": data.num_clusters,
        "listed": None if everything else _packed(listed, "<u4"),
        "keys": [str(data.keys[i]) for i in listed.tolist()],
        "cluster": _packed(data.clusters[listed], "<u2"),
        "confidence": _packed(255 * data.confidence[listed], "<u1"),
        "agreement": _packed(255 * data.agreement[listed], "<u1"),
        "flags": _packed(data.reliable[listed] + 2 * doubtful, "<u1"),
        "names": {str(cluster): name for cluster, name in data.names.items()},
        "review": dict(data.review),
    }
    if data.labels is not None and (data.labels >= 0).any():
        highest = int(data.labels.max())
        payload["label"] = _packed(data.labels[listed], "<i2")
        payload["classes"] = [_class_name(data, label) for label in range(highest + 1)]
    if data.map is not None and len(data.map.index):
        shown = data.images(data.map.index)
        tile = shown.shape[-1] if shown.shape[-1] < PIXEL_ART else ATLAS_PIXELS
        uri, per_row = atlas(shown, tile)
        payload["map"] = {
            "row": _packed(np.searchsorted(listed, data.map.index), "<u4"),
            "x": _packed(65535 * data.map.places[:, 0], "<u2"),
            "y": _packed(65535 * data.map.places[:, 1], "<u2"),
            "tile": tile,
            "perRow": per_row,
            "atlas": uri,
        }
    text = json.dumps(payload, separators=(",", ":"))  # pure ASCII: surrogates are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _packed(values: NDArray[Any], kind: str) -> str:
    """Numbers as base64 of little-endian bytes, a quarter of their JSON."""
    kept = np.rint(np.asarray(values, dtype=np.float64)).astype(kind)
    return base64.b64encode(kept.tobytes()).decode("ascii")
