"""The numbers in the sections of the report page, computed from the arrays of a run.

Shapes: N images, K clusters, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spice_pl.reports.folders import folder_names
from spice_pl.reports.oddities import num_odd
from spice_pl.reports.pictures import Picture
from spice_pl.reports.report_data import IntArray, ReportData
from spice_pl.reports.tables import ResultRow, duration_text, score_text
from spice_pl.reports.wall import ClusterWall, Wall

MAX_CONFUSION_CELLS = 10_000  # 100 clusters by 100 classes; a larger table cannot be read
# From which share on the page warns: of images not sure, as on the page of trust; of copies; of the
# differences in colour that are between clusters; of the images in the largest cluster.
MANY_NOT_SURE, MANY_COPIES, BY_COLOUR, LARGEST, LARGEST_OF_TWO = 0.1, 0.1, 0.5, 0.5, 0.9
ALL_ALIKE = 0.9  # cosine
BINS = 10  # of the histogram of a cluster's confidence
WALLS = {
    "Prototypes": "highest confidence",
    "Typical": "confidence around the median",
    "Borderline": "lowest confidence",
    "Not sure": "most neighbours are in other clusters",
}
TERMS = {
    "Confidence": "the largest of an image's cluster probabilities, from 0 to 1",
    "Agreement": "the share of an image's nearest neighbours that are in the same cluster",
    "Reliable": "an image of high confidence and agreement; stage 3, if any, trains on these",
    "Not sure": "an image with agreement below 50%: most neighbours are in other clusters",
    "Protocol": "whole: all images are trained on and scored; split: one part is trained on, the "
    "other scored",
    "Seed": "the number that all random choices of the run follow from",
}
SCORE_TERMS = {
    "ACC": "the share of correct images, with clusters and classes matched one to one",
    "NMI": "normalised mutual information of clusters and classes; 1 is perfect",
    "ARI": "adjusted Rand index of clusters and classes; 0 is chance, 1 is perfect",
    "Truth": "a value that is computed with labels, only to score the result",
}


@dataclass(frozen=True)
class ClusterSection:
    """One cluster as the page shows it; None where no image of it has a label."""

    id: int
    name: str
    size: int
    num_not_sure: int
    not_sure_percent: float  # of the largest cluster
    bins: Sequence[int]  # heights in percent of the fullest bin, by confidence from 0 to 1
    size_percent: float  # of the largest cluster
    reliable_percent: float  # of the largest cluster
    confidence: str
    reliable: str
    truth: str | None
    truth_share: str | None
    folder: str | None  # a name to propose; None with labels, which may be these folders
    folder_share: str | None
    word: str | None  # suggested by `stage=name`
    word_score: str | None
    walls: Mapping[str, Sequence[Picture]]


@dataclass(frozen=True)
class Confusion:
    """Clusters by classes; each cell is a count and its share of the row. No rows if too large."""

    classes: Sequence[str]
    rows: Sequence[Sequence[tuple[int, float]]]
    num_clusters: int
    num_classes: int


@dataclass(frozen=True)
class Subset:
    """One line of the comparison of reliable images with all (SPICE, Figure 7)."""

    name: str
    size: int
    confidence: str
    agreement: str
    acc: str | None


def facts(
    data: ReportData, headline: ResultRow | None, num_not_sure: int
) -> list[tuple[str, str, bool]]:
    """Return the numbers of the headline as (name, value, whether labels were needed)."""
    found: list[tuple[str, str, bool]] = []
    if headline is not None and headline.has_scores:
        scores = {"ACC": headline.acc, "NMI": headline.nmi, "ARI": headline.ari}
        found += [(name, score_text(score), True) for name, score in scores.items()]
    sizes = _sizes(data)
    filled = sizes[sizes > 0]
    if len(filled):
        least, most = int(filled.min()), int(filled.max())
        span = f"{least:,}" if least == most else f"{least:,} – {most:,}"
        found.append(("Clusters", f"{len(filled):,}", False))
        found.append(("Images in a cluster", span, False))
        if data.labels is not None:  # a word of the paper
            found.append(("Reliable", f"{np.mean(data.reliable):.0%}", False))
        found.append(("Not sure", f"{num_not_sure / data.num_images:.1%}", False))
    if data.oddities:
        found.append(("Odd", f"{num_odd(data.oddities):,}", False))
    if headline is not None:
        found.append(("Time for features and clusters", duration_text(headline.seconds), False))
    return found


def warnings(data: ReportData) -> list[str]:
    """Return what is wrong with the clusters as a whole, as far as it shows without labels."""
    sizes = _sizes(data)
    empty = np.flatnonzero(sizes == 0)
    found = []
    if data.least_alike is not None and data.least_alike > ALL_ALIKE:
        found.append(
            "The network sees hardly any difference between these images: 95% of all pairs have a "
            f"similarity above {data.least_alike:.2f}, and 1 is the most. The clusters follow "
            "small differences, such as light, noise or compression."
        )
    copies = sum(each.count for each in data.oddities if each.name == "exact copies")
    if copies > MANY_COPIES * data.num_images:
        found.append(
            f"{copies:,} of {data.num_images:,} images are exact copies of others. Copies count "
            "as neighbours that agree, so the numbers on this page look better than they are. "
            "Remove the copies and run again."
        )
    unsure = float(np.mean(data.not_sure)) if data.num_images else 0.0
    if unsure > MANY_NOT_SURE:
        found.append(
            f"{unsure:.0%} of the images are not sure: most of their neighbours are in other "
            "clusters. The borders between clusters are arbitrary for them. Fewer clusters may fit "
            "better, or the images do not form clear groups."
        )
    if data.colour_share is not None and data.colour_share > BY_COLOUR:
        found.append(
            f"The clusters go along with colour and brightness: {data.colour_share:.0%} of the "
            "differences in the mean colour of images are between clusters. Look whether they "
            "follow the background or the light rather than what the images show."
        )
    if len(empty):
        named = ", ".join(map(str, empty[:20])) + (", …" if len(empty) > 20 else "")
        found.append(
            f"Clusters without an image, which are not shown: {len(empty)} of {data.num_clusters} "
            f"({named}). Fewer clusters may be enough."
        )
    choice = data.k_choice
    if choice is not None and choice.estimated == data.num_clusters and not choice.clear:
        found.append(
            "The number of clusters is unclear: the images divide into several numbers of groups "
            f"about equally well. The best guess is {choice.estimated}. The section “How many "
            "clusters” of the report shows others at once."
        )
    most = LARGEST_OF_TWO if data.num_clusters == 2 else LARGEST
    if sizes.max() > most * data.num_images > 0:
        found.append(
            f"Cluster {sizes.argmax()} holds {sizes.max() / data.num_images:.0%} of all images: "
            "either the data are like that, or the clustering has collapsed."
        )
    return found


def equal_share(data: ReportData) -> tuple[str, float]:
    """Return N / K, the size of K equal clusters: as text, and in percent of the largest one."""
    share = data.num_images / data.num_clusters
    return f"{share:,.0f}", round(100 * share / max(int(_sizes(data).max()), 1), 2)


def cluster_sections(
    data: ReportData, wall: Wall, pictures: Sequence[list[Picture]]
) -> list[ClusterSection]:
    """Return one section per cluster that has images, the largest first.

    Args:
        data: what the page shows.
        wall: chosen pictures of each cluster, by number.
        pictures: these pictures, described.
    """
    sizes = _sizes(data)
    reliable = np.bincount(data.clusters[data.reliable], minlength=data.num_clusters)
    largest = max(sizes.max(), 1)
    folders = (
        folder_names([str(key) for key in data.keys], data.clusters) if data.labels is None else {}
    )
    sections = []
    for cluster, (chosen, shown) in enumerate(zip(wall.clusters, pictures, strict=True)):
        members = data.clusters == cluster
        truth = np.empty(0, np.intp) if data.labels is None else data.labels[members]
        truth = truth[truth >= 0]
        majority = int(np.bincount(truth).argmax()) if len(truth) else None
        size = int(sizes[cluster])
        if not size:
            continue
        folder, share = folders.get(cluster, (None, 0.0))
        word, score = data.suggested.get(cluster, (None, 0.0))
        bins = np.histogram(data.confidence[members], BINS, (0, 1))[0]
        sections.append(
            ClusterSection(
                id=cluster,
                name=data.names.get(cluster, ""),
                size=size,
                num_not_sure=chosen.num_not_sure,
                not_sure_percent=round(100 * chosen.num_not_sure / largest, 2),
                bins=(100 * bins / max(bins.max(), 1)).round().astype(int).tolist(),
                size_percent=round(100 * size / largest, 2),
                reliable_percent=round(100 * int(reliable[cluster]) / largest, 2),
                confidence=f"{data.confidence[members].mean():.2f}",
                reliable=f"{reliable[cluster] / size:.0%}",
                truth=None if majority is None else data.class_name(majority),
                truth_share=None if majority is None else f"{(truth == majority).mean():.0%}",
                folder=folder,
                folder_share=None if folder is None else f"{share:.0%}",
                word=word,
                word_score=None if word is None else f"{score:.2f}",
                walls=_by_wall(chosen, shown),
            )
        )
    return sorted(sections, key=lambda section: -section.size)


def confusion(data: ReportData) -> Confusion | None:
    """Count clusters by classes; None without labels."""
    known = data.known
    if data.labels is None or known is None:
        return None
    num_classes = max(int(data.labels.max()) + 1, len(data.class_names or ()))
    if data.num_clusters * num_classes > MAX_CONFUSION_CELLS:
        return Confusion((), (), data.num_clusters, num_classes)
    counts = _counts(data.clusters[known], data.labels[known], data.num_clusters, num_classes)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return Confusion(
        classes=[str(data.class_name(label)) for label in range(num_classes)],
        rows=[
            [(int(n), round(float(part), 3)) for n, part in zip(line, parts, strict=True)]
            for line, parts in zip(counts, share, strict=True)
        ],
        num_clusters=data.num_clusters,
        num_classes=num_classes,
    )


def subsets(data: ReportData) -> list[Subset]:
    """Compare all images, the reliable ones and the others; ACC by the match of all images."""
    right, known = None, data.known
    if data.labels is not None and known is not None:
        num_classes = int(data.labels.max()) + 1
        counts = _counts(data.clusters[known], data.labels[known], data.num_clusters, num_classes)
        match = np.full(data.num_clusters, -2)  # a cluster without a class is never right
        rows, columns = linear_sum_assignment(counts, maximize=True)
        match[rows] = columns
        right = match[data.clusters] == data.labels  # (N,)
    found = []
    for name, chosen in (
        ("all", np.ones(data.num_images, bool)),
        ("reliable", data.reliable),
        ("not reliable", ~data.reliable),
    ):
        acc = None
        if right is not None and known is not None:
            scored = right[chosen & known]
            acc = f"{scored.mean():.3f}" if len(scored) else "–"
        size = int(chosen.sum())
        found.append(
            Subset(
                name=name,
                size=size,
                confidence=f"{data.confidence[chosen].mean():.2f}" if size else "–",
                agreement=f"{data.agreement[chosen].mean():.2f}" if size else "–",
                acc=acc,
            )
        )
    return found


def _sizes(data: ReportData) -> NDArray[np.int64]:
    return np.bincount(data.clusters, minlength=data.num_clusters).astype(np.int64)


def _counts(
    clusters: IntArray, labels: IntArray, num_clusters: int, num_classes: int
) -> NDArray[np.int64]:
    """Count images by cluster and class (K, C)."""
    counts = np.zeros((num_clusters, num_classes), np.int64)
    np.add.at(counts, (clusters, labels), 1)
    return counts


def _by_wall(chosen: ClusterWall, shown: Sequence[Picture]) -> dict[str, Sequence[Picture]]:
    """Split a cluster's pictures into its walls."""
    groups = (chosen.prototypes, chosen.typical, chosen.borderline, chosen.not_sure)
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return {
        name: shown[end - len(group) : end]
        for name, group, end in zip(WALLS, groups, ends, strict=True)
    }
