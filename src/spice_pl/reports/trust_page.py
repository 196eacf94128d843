"""Render the page of stage=trust: checks, without labels, of how far clusters can be trusted."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from scipy.stats import spearmanr

from spice_pl.reports.html import template_environment, write_page

# Smallest difference of silhouettes that counts; a smaller one is not visible in a plot.
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
    "heads": "The share of images that two heads put into the same cluster. Heads are trained side "
    "by side from different random weights.",
    "seeds": "The share of images that two runs with different seeds put into the same cluster.",
    "consistency": "The share of an image's nearest neighbours that are in its own cluster.",
    "views": "The share of images that stay in their cluster when they are shifted, and mirrored "
    "where mirror images mean the same.",
    "separation": "How much nearer images are to their own cluster than to the next one "
    "(silhouette by cosine, from -1 to 1).",
    "sure": "The share of images with at least half of their neighbours, or of as many as a small "
    "cluster has, in their own cluster.",
}
MISSING = {
    "heads": "Needs the heads of stage 2 on a frozen encoder, and there are none before this run.",
    "seeds": "Needs runs with other seeds: give trust.runs=[FOLDER,...].",
    "views": "Needs a head of a kind that this check can load.",
    "separation": "Needs at least two clusters with images.",
}


@dataclass(frozen=True)
class Check:
    """A measure and its value, None if it could not be taken; higher is better."""

    name: str
    value: float | None


@dataclass(frozen=True)
class NullCheck:
    """Mean silhouettes of k-means on the features, and on clouds of points without groups.

    `own` is that of the run's clusters on the same features; None if it could not be taken.
    """

    real: float
    nulls: tuple[float, ...]
    own: float | None = None

    @property
    def clear(self) -> bool:
        """Whether k-means separates the features better than every cloud without groups."""
        return self.real > max(self.nulls) + NULL_MARGIN


@dataclass(frozen=True)
class TrustData:
    """Everything that the page shows.

    Attributes:
        title: heading of the page.
        run: the checked run, "<stage>/<run>".
        num_images: N.
        num_sampled: number of images that the slower checks used.
        num_clusters: K.
        checks: the measures.
        null: the check for clusters at all.
        record: values of each measure and true ACC of labelled runs, by measure.
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
        """Result of the null check: about the features, then about the clusters of this run."""
        if self.null.clear:
            said = (
                "There are groups in these features: k-means separates them better than any cloud "
                "of points without groups."
            )
        else:
            said = (
                "No real clusters here: k-means separates points without any groups as well as "
                "these features, so other borders between clusters would be as good."
            )
        if self.null.own is None:
            return said
        most = max(self.null.nulls)
        better = "better" if self.null.own > most + NULL_MARGIN else "no better"
        return (
            f"{said} The clusters of this run are separated {better} than those of such clouds "
            f"(silhouette {self.null.own:.2f}; clouds reach {most:.2f}, k-means on these features "
            f"{self.null.real:.2f})."
        )


@dataclass(frozen=True)
class Track:
    """How a measure and true ACC vary together over labelled runs."""

    rho: float | None
    num_runs: int
    points: Sequence[tuple[float, float]]  # in a box of 100 x 100
    low: float
    high: float


def record() -> dict[str, tuple[list[float], list[float]]]:
    """Return (values, true ACC) of labelled runs, by measure; benchmarks/trust.py wrote them."""
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
    """Return the rank correlation (Spearman) and a scatter plot of a measure and true ACC.

    Args:
        values: the measure of each labelled run.
        accuracies: true ACC of the same runs.
        here: the measure of the checked run, which the plot leaves room for.

    Returns:
        The track; its rho is None if the values or the accuracies are all the same.
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
    """Return the page as HTML; it has no script."""
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
            null_positions=[round(100 * (each - low) / span, 1) for each in data.null.nulls],
            real_position=round(100 * (data.null.real - low) / span, 1),
        )
    )


def write_trust(data: TrustData, path: Path) -> Path:
    """Write the page to path; the old page stays until the new one is complete on disk."""
    return write_page(render_trust(data), path)
