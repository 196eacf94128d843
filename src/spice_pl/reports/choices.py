"""What the report shows about the choice of the clusters and of their number.

Shapes: K clusters, n images on the map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spice_pl.reports.charts import Chart, chart


@dataclass(frozen=True)
class Compared:
    """One clustering, measured without labels.

    Attributes:
        name: how it was made.
        kept: whether it is the one on the page.
        agreement: share of the ten nearest images that are in the image's own cluster.
        evenness: entropy of the sizes over log K; 1 for equal sizes.
        alike: share of images in the matching cluster of the one on the page.
        smallest: images of the smallest cluster that has any.
        largest: images of the largest cluster.
        sure: share of images with enough of these ten in their cluster (`least_agreement`).
        score: score without labels; the largest is the best.
    """

    name: str
    kept: bool
    agreement: float
    evenness: float
    alike: float
    smallest: int = 0
    largest: int = 0
    sure: float = 0.0
    score: float = 0.0

    @property
    def sizes(self) -> str:
        """Number of images of the smallest and the largest cluster."""
        if self.smallest == self.largest:
            return f"{self.largest:,}"
        return f"{self.smallest:,} – {self.largest:,}"


@dataclass(frozen=True)
class Comparison:
    """Clusterings of the same features, beside the one on the page.

    Attributes:
        rows: the one on the page first.
        num_sampled: number of images whose neighbours were looked at.
        scores: label-free score of each candidate; empty if no choice was made.
        chosen: the candidate of the highest score; empty if no choice was made.
    """

    rows: Sequence[Compared]
    num_sampled: int
    scores: Mapping[str, float]
    chosen: str = ""


@dataclass(frozen=True)
class Preview:
    """The clusters for another K.

    Attributes:
        num_clusters: K.
        groups: size of each cluster, largest first, with the points of the map that are shown.
        command: command that makes it the result.
    """

    num_clusters: int
    groups: Sequence[tuple[int, Sequence[int]]]
    command: str


@dataclass(frozen=True)
class KChoice:
    """The number of clusters, and others.

    Attributes:
        num_clusters: K of the page.
        estimated: the estimate; None where there is none.
        clear: whether the estimate is clear.
        curve: score by K; empty without an estimate.
        previews: other numbers, rising.
        sentence: what the estimate says; empty without one.
    """

    num_clusters: int
    estimated: int | None
    clear: bool
    curve: Sequence[tuple[int, float]]
    previews: Sequence[Preview]
    sentence: str = ""

    @property
    def chart(self) -> Chart | None:
        """The curve as a chart; None without one."""
        if len(self.curve) < 2:
            return None
        return chart("Score", "by number of clusters", {"score": self.curve}, unit="K =")

    @property
    def marks(self) -> Sequence[tuple[str, float]]:
        """Name and place in percent of the shown K and of the estimate, on the chart."""
        low, high = self.curve[0][0], self.curve[-1][0]
        places = {f"K = {self.num_clusters}, shown": self.num_clusters}
        if self.estimated is not None and self.estimated != self.num_clusters:
            places[f"K = {self.estimated}, estimated"] = self.estimated
        return [
            (name, 100 * (k - low) / (high - low)) for name, k in places.items() if low <= k <= high
        ]
