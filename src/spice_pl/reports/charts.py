"""Draw the charts of the report page: logged values over epochs as polylines."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CURVE_POINTS = 300  # most points of a line, one per CSS pixel

Points = Sequence[tuple[int, float]]
Logs = Mapping[str, Mapping[str, Points]]

# Each chart: its title, the logged names that it shows, whether they needed truth.
CHARTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss", ("train/loss", "train/loss_labelled", "train/loss_unlabelled"), False),
    ("further losses", ("train/loss_kmeans", "train/loss_negative", "train/loss_fairness"), False),
    (
        "agreement and confidence",
        ("val/agreement", "val/confidence", "train/confident_fraction", "train/reliable_fraction"),
        False,
    ),
    ("agreement of features", ("val/kmeans_agreement", "val/neighbor_agreement"), False),
    (
        "share of the largest and smallest cluster",
        ("val/largest_cluster_fraction", "val/smallest_cluster_fraction"),
        False,
    ),
    ("scores", ("truth/acc", "truth/nmi", "truth/ari", "truth/reliable_acc"), True),
)
# What a head was chosen by: name, prefix of the logged names, sign. The lowest value times the sign
# is kept: the lowest loss, or the highest information.
HEADS = (
    ("mutual information", "val/mutual_information_head_", -1),
    ("selection loss", "val/selection_loss_head_", 1),
)
THRESHOLD = "train/threshold_"  # followed by the cluster that has this confidence threshold
SPOKEN_LINES = 4  # of more lines only the kept one is described


@dataclass(frozen=True)
class Line:
    """One curve as SVG points in a box of 300 x 100; `last` is its last value."""

    name: str
    points: str
    last: str
    kept: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis; `key` explains the highlighted one, `unit` names the steps."""

    stage: str
    title: str
    lines: Sequence[Line]
    highest: str
    lowest: str
    first_step: int
    last_step: int
    truth: bool
    num_not_finite: int
    key: str = ""
    unit: str = "epoch"

    @property
    def words(self) -> str:
        """Description of the chart for a screen reader."""
        said = self.lines
        if len(said) > SPOKEN_LINES:
            said = [line for line in said if line.kept]
        ends = "; ".join(f"{line.name} {line.last} at the end" for line in said)
        return (
            f"{self.title} of {self.stage}, {self.unit} {self.first_step} to {self.last_step}, "
            f"between {self.lowest} and {self.highest}: {ends}"
        )


@dataclass(frozen=True)
class HeadChoice:
    """The best value of one head, its epoch, and whether this head was kept."""

    head: int
    best: float
    epoch: int
    kept: bool


def charts(logs: Logs) -> list[Chart]:
    """Return the charts of every stage, in order; those without a point are left out."""
    found = []
    for stage, metrics in logs.items():
        for title, names, truth in CHARTS:
            curves = {_short(name): metrics[name] for name in names if metrics.get(name)}
            if curves:
                found.append(chart(stage, title, curves, truth=truth))
        if levels := _levels(metrics):
            key = "mean over clusters (single clusters in grey)"
            found.append(chart(stage, "confidence threshold", levels, kept="mean", key=key))
    return found


def _levels(metrics: Mapping[str, Points]) -> dict[str, Points]:
    """Return the adaptive threshold of each cluster and their mean; empty if none was logged."""
    levels = {
        f"cluster {name.removeprefix(THRESHOLD)}": points
        for name, points in metrics.items()
        if name.startswith(THRESHOLD) and points
    }
    if not levels:
        return {}
    by_epoch: dict[int, list[float]] = {}
    for points in levels.values():
        for epoch, value in points:
            by_epoch.setdefault(epoch, []).append(value)
    mean = [(epoch, sum(values) / len(values)) for epoch, values in sorted(by_epoch.items())]
    return levels | {"mean": mean}


def chart(
    stage: str,
    title: str,
    curves: Mapping[str, Points],
    *,
    truth: bool = False,
    kept: str = "",
    key: str = "",
    unit: str = "epoch",
) -> Chart:
    """Draw curves on one axis; values that are not finite are left out and counted."""
    finite = {
        name: [(step, value) for step, value in points if math.isfinite(value)]
        for name, points in curves.items()
    }
    values = [value for points in finite.values() for _, value in points] or [math.nan]
    steps = [step for points in curves.values() for step, _ in points]
    low, high, start, end = min(values), max(values), min(steps), max(steps)

    def line(name: str, points: list[tuple[int, float]]) -> Line:
        shown = points[:: -(-len(points) // CURVE_POINTS) or 1]
        if points and shown[-1] != points[-1]:
            shown.append(points[-1])
        return Line(
            name=name,
            points=" ".join(
                f"{300 * (step - start) / max(end - start, 1):.1f},"
                f"{100 * (high - value) / ((high - low) or 1):.1f}"
                for step, value in shown
            ),
            last=f"{points[-1][1]:.3g}" if points else "–",
            kept=name == kept,
        )

    return Chart(
        stage=stage,
        title=title,
        lines=[line(name, points) for name, points in finite.items()],
        highest=f"{high:.3g}",
        lowest=f"{low:.3g}",
        first_step=start,
        last_step=end,
        truth=truth,
        num_not_finite=len(steps) - sum(map(len, finite.values())),
        key=key,
        unit=unit,
    )


def head_choice(logs: Logs) -> tuple[Chart, list[HeadChoice]] | None:
    """Draw the choice of a head (SPICE, Figure 6): the best of all heads and epochs is kept.

    Returns:
        A chart of all heads and their best values; None if no stage logged such values.
    """
    for (stage, metrics), (name, prefix, sign) in itertools.product(logs.items(), HEADS):
        curves = {
            int(each.removeprefix(prefix)): points
            for each, points in metrics.items()
            if each.startswith(prefix) and points
        }
        if not curves:
            continue
        best = {
            head: min((sign * value, epoch) for epoch, value in points)
            for head, points in sorted(curves.items())
        }
        kept = min(best, key=lambda head: (best[head][0], best[head][1], head))
        drawn = {f"head {head}": curves[head] for head in sorted(curves)}
        key = f"head {kept}, kept (the others in grey)"
        return chart(stage, f"{name} of each head", drawn, kept=f"head {kept}", key=key), [
            HeadChoice(head, sign * value, epoch, head == kept)
            for head, (value, epoch) in best.items()
        ]
    return None


def _short(name: str) -> str:
    return name.partition("/")[2].replace("_", " ")
