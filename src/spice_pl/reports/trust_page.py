"""One page that says how far to believe a clustering, without labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from scipy.stats import spearmanr

from spice_pl.reports.html import template_environment, write_page

# A difference of silhouettes that a picture of the clusters would not show.
NULL_MARGIN = 0.02

NAMES = {
    "heads": "Agreement of heads",
    "seeds": "Agreement of seeds",
    "consistency": "Local consistency",
    "views": "Stability under views",
    "separation": "Separation",
    "sure": "Sure images",
}
EXPLAINED = {
    "heads": "Two heads that were trained side by side from other starts put this share of the "
    "images into the same cluster.",
    "seeds": "Two runs with other seeds put this share of the images into the same cluster.",
    "consistency": "This share of an image's nearest neighbours lies in its own cluster.",
    "views": "This share of the images stays in its cluster when it is shifted, and mirrored where "
    "mirror images mean the same.",
    "separation": "Images are this much nearer to their own cluster than to the next (silhouette "
    "by cosine, from -1 to 1).",
    "sure": "This share of the images has most of its neighbours in its own cluster.",
}
MISSING = {
    "heads": "Needs the heads of stage 2 on a frozen encoder; this chain has none.",
    "seeds": "Needs runs under other seeds: trust.runs=[FOLDER,...].",
    "views": "Needs a head that this task knows how to build.",
    "separation": "Needs two clusters with images.",
}


@dataclass(frozen=True)
class Check:
    """A measure and what it came to, None where it could not be taken; higher is better."""

    name: str
    value: float | None


@dataclass(frozen=True)
class NullCheck:
    """Mean silhouette of k-means on the features, and on clouds that have no clusters."""

    real: float
    nulls: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Whether the features part better than every cloud without clusters."""
        return self.real > max(self.nulls) + NULL_MARGIN


@dataclass(frozen=True)
class TrustData:
    """Everything the page shows.

    Attributes:
        title: heading.
        run: "<stage>/<run>" that is judged.
        num_images: N.
        num_sampled: images that the slower checks looked at.
        num_clusters: K.
        checks: the measures.
        null: whether there are clusters at all.
        record: by measure, its values and the true ACC of labelled runs.
    """

    title: str
    run: str
    num_images: int
    num_sampled: int
    num_clusters: int
    checks: Sequence[Check]
    null: NullCheck
    record: Mapping[str, tuple[Sequence[float], Sequence[float]]]

    @property
    def verdict(self) -> str:
        """What the null check says, in one sentence."""
        if self.null.clear:
            return "There are groups in these features: they part better than any cloud without."
        return (
            "No real clusters here: k-means parts features without any groups as well as these, so "
            "other borders would do as well."
        )


@dataclass(frozen=True)
class Track:
    """How a measure went together with true ACC."""

    rho: float | None
    num_runs: int
    points: Sequence[tuple[float, float]]  # of a box of 100 x 100
    low: float
    high: float


def record() -> dict[str, tuple[list[float], list[float]]]:
    """How measures and true ACC went together on labelled sets: (values, ACC) by measure.

    Written by benchmarks/trust.py.
    """
    text = files("spice_pl.reports").joinpath("trust_record.csv").read_text(encoding="utf-8")
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        for name in NAMES:
            if row.get(name):
                values, accuracies = found.setdefault(name, ([], []))
                values.append(float(row[name]))
                accuracies.append(float(row["acc"]))
    return found


def track(values: Sequence[float], accuracies: Sequence[float], here: float | None = None) -> Track:
    """Rank correlation (Spearman) and a scatter; no correlation where a side does not vary.

    Args:
        values: a measure of labelled runs.
        accuracies: of the same runs.
        here: the measure of the run that is judged, which the scatter has room for.
    """
    rho = None
    if len(set(values)) > 1 and len(set(accuracies)) > 1:
        rho = float(spearmanr(values, accuracies).statistic)
    placed = [*values, *(() if here is None else (here,))]
    low, high = (min(placed), max(placed)) if values else (0.0, 1.0)
    return Track(
        rho=rho,
        num_runs=len(values),
        points=[
            (round(100 * (value - low) / ((high - low) or 1), 1), round(100 * (1 - acc), 1))
            for value, acc in zip(values, accuracies, strict=True)
        ],
        low=low,
        high=high,
    )


def render_trust(data: TrustData) -> str:
    """Return the page as HTML without a script."""
    own = {check.name: check.value for check in data.checks}
    nulls = (*data.null.nulls, data.null.real)
    low, high = min(*nulls, 0.0), max(nulls)
    span = (high - low) or 1.0
    return (
        template_environment()
        .get_template("trust.html.j2")
        .render(
            data=data,
            names=NAMES,
            explained=EXPLAINED,
            missing=MISSING,
            tracks={name: track(*pair, own.get(name)) for name, pair in data.record.items()},
            null_places=[round(100 * (each - low) / span, 1) for each in data.null.nulls],
            real_place=round(100 * (data.null.real - low) / span, 1),
        )
    )


def write_trust(data: TrustData, path: Path) -> Path:
    """Write the page; the old one stays until the new one is whole."""
    return write_page(render_trust(data), path)
