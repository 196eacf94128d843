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
    "consistency": "Agreement with neighbours",
    "views": "Stability under views",
    "separation": "Separation",
    "sure": "Sure images",
}
EXPLAINED = {
    "heads": "The share of images that two heads put into the same cluster. Heads are trained side "
    "by side from different random weights. Those of your own images (recipe=pretrained) begin at "
    "the same clusters, so they agree much, and that says little.",
    "seeds": "The share of images that two runs with different seeds put into the same cluster.",
    "consistency": "The share of an image's nearest neighbours that are in its own cluster. It is "
    "the mean of what the report calls agreement.",
    "views": "The share of images that stay in their cluster when they are shifted, and mirrored "
    "where mirror images mean the same.",
    "separation": "How much nearer images are to their own cluster than to the next one "
    "(silhouette by cosine, from -1 to 1).",
    "sure": "The share of images that the report does not call “not sure”: at least half of their "
    "neighbours, or of as many as a small cluster has, are in their own cluster.",
}
MISSING = {
    "heads": "Needs the heads of stage 2 on a frozen encoder, and there are none before this run.",
    "seeds": "Needs runs with other seeds: give trust.runs=[FOLDER,...].",
    "views": "Needs a head of a kind that this check can load.",
    "separation": "Needs at least two clusters with images.",
}
GOOD, MIDDLING, POOR = "good", "middling", "poor"
# From which value on a measure is good, and from which middling. Agreements count from that of
# clusters drawn at random, after the bounds of Hennig 2007 for clusters under resampling (0.85 and
# 0.6). Where a share of images should be kept, one in twenty and one in ten may fail.
BOUNDS = {
    "heads": (0.85, 0.6),
    "seeds": (0.85, 0.6),
    "consistency": (0.85, 0.6),
    "views": (0.95, 0.9),
    "sure": (0.95, 0.9),
}
ABOVE_CHANCE = ("heads", "seeds", "consistency")
CLEARLY = 0.1  # more than the best cloud without groups, a twentieth of the scale of silhouettes
ADVICE = {
    "heads": (
        "Some clusters depend on the random start. In the report, order the clusters by “most not "
        "sure first”, and merge or split the first ones in a review.",
        "The clusters depend on the random start. Try another number of clusters, or another "
        "encoder (encoder=NAME).",
    ),
    "seeds": (
        "Some clusters depend on the seed. Keep those that both runs have.",
        "The clusters depend on the seed. Try another number of clusters, or another encoder "
        "(encoder=NAME).",
    ),
    "consistency": (
        "Some borders run through groups of similar images. In the report, order the clusters by "
        "“most not sure first”; merge two that share a border in a review.",
        "Most borders run through groups of similar images. Try fewer clusters.",
    ),
    "views": (
        "A shift of a few pixels moves some images to another cluster. These lie at borders.",
        "A shift of a few pixels changes the cluster of many images. The clusters may follow the "
        "framing: cut the images alike, or try another encoder (encoder=NAME).",
    ),
    "separation": (
        "The clusters overlap. Expect mistakes at their borders, and look at the “borderline” "
        "images of the report.",
        "The clusters overlap as much as parts of a cloud without groups. Use them to browse the "
        "images, not to count them; try another number of clusters, or another encoder.",
    ),
    "sure": (
        "Some images are between clusters. Look at the walls “not sure” of the report, and move "
        "images in a review.",
        "Many images are between clusters. Try fewer clusters, or leave out the images that fit "
        "nowhere.",
    ),
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
class Judged:
    """What a measure means.

    Attributes:
        level: "good", "middling" or "poor".
        rule: what decides.
        advice: what to do.
    """

    level: str
    rule: str
    advice: str


def _judged(name: str, value: float, good: float, middling: float, rule: str) -> Judged:
    if value >= good:
        return Judged(GOOD, rule, "Nothing to do.")
    poor = value < middling
    return Judged(POOR if poor else MIDDLING, rule, ADVICE[name][poor])


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
        chance: agreement of two clusterings of these sizes that were drawn at random.
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
    chance: float = 0.0

    @property
    def summary(self) -> str:
        """How many measures are good, middling and poor."""
        levels = [found.level for found in map(self.judged, self.checks) if found is not None]
        if not levels:
            return "No measure could be taken."
        counts = [(levels.count(level), level) for level in (GOOD, MIDDLING, POOR)]
        said = [f"{count} {level}" for count, level in counts if count]
        return f"{len(levels)} measures: {', '.join(said)}."

    def judged(self, check: Check) -> Judged | None:
        """Return what a measure means; None if it was not taken."""
        if check.value is None:
            return None
        if check.name == "separation":
            return self._judged_separation()
        good, middling = BOUNDS[check.name]
        if check.name in ABOVE_CHANCE:
            good, middling = (self.chance + (1 - self.chance) * each for each in (good, middling))
        rule = f"Good from {good:.2f}, middling from {middling:.2f}"
        if check.name in ABOVE_CHANCE:
            rule += f"; clusters drawn at random have about {self.chance:.2f}"
        return _judged(check.name, check.value, good, middling, f"{rule}.")

    def _judged_separation(self) -> Judged | None:
        if self.null.own is None:
            return None
        most = max(self.null.nulls)
        rule = (
            f"Measured as in “Are there clusters at all?” it is {self.null.own:.2f}. Clouds "
            f"without groups reach {most:.2f}: good is more than {most + CLEARLY:.2f}, poor less "
            f"than {most + NULL_MARGIN:.2f}."
        )
        own, good, least = self.null.own, most + CLEARLY, most + NULL_MARGIN
        return _judged("separation", own, good, least, rule)

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
            judged={check.name: data.judged(check) for check in data.checks},
            tracks={name: track(*pair, own.get(name)) for name, pair in data.record.items()},
            null_positions=[round(100 * (each - low) / span, 1) for each in data.null.nulls],
            real_position=round(100 * (data.null.real - low) / span, 1),
        )
    )


def write_trust(data: TrustData, path: Path) -> Path:
    """Write the page to path; the old page stays until the new one is complete on disk."""
    return write_page(render_trust(data), path)
