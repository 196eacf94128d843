"""What the report page of a run shows, as arrays.

Shapes: N images, K clusters, n requested images, S pixels a side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spice_pl.functional.reliability import is_not_sure
from spice_pl.reports.charts import Logs
from spice_pl.reports.choices import Comparison, KChoice
from spice_pl.reports.map import Map
from spice_pl.reports.oddities import Oddity
from spice_pl.reports.shading import Attention
from spice_pl.reports.tables import ResultRow

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]
Shapes = Callable[[Sequence[int], int], Mapping[int, NDArray[np.uint8]]]


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows.

    Attributes:
        title: heading of the page.
        dataset: name of the data set.
        num_images: N.
        num_clusters: K; empty clusters are shown too.
        protocol: which images were trained on and which were scored.
        seed: seed of the run.
        rows: results, the latest first; the first row that is not an oracle gives the headline.
        images: function from positions (n,) to pictures, uint8 (n, 3, S, S); called for the shown
            images only.
        keys: (N,), path or position of each image.
        clusters: (N,), in [0, K).
        confidence: (N,), in [0, 1].
        agreement: (N,), in [0, 1], share of an image's neighbours in the same cluster.
        reliable: (N,), bool.
        num_neighbors: number of neighbours of the agreement; 0 where it is not known.
        labels: (N,), truth, -1 where unknown; or None.
        class_names: name of each label, or None.
        logs: logged values as (epoch, value), by stage and metric.
        map: coordinates of images on a plane, or None.
        attention: attention maps of the prototypes; empty if the backbone has no feature map, None
            if they were not computed.
        names: names that the user gave to clusters.
        suggested: word that `stage=name` suggests and its score, by cluster.
        cost: time, memory and devices of the run, as text.
        review: what saving edits needs: the command that trains on from them and, on a served page,
            the addresses to save edits at and to load whole images from.
        skipped: files that were left out, as (file, reason).
        num_skipped: number of these files; more than are listed if there are very many.
        oddities: odd images, by kind.
        comparison: these clusters beside others of the same features, or None.
        k_choice: the choice of K, with other numbers of clusters; or None.
        least_alike: cosine of the features that 95 % of all pairs of images exceed; None where it
            was not measured.
        colour_share: share of the variance of the images' mean colours that is between clusters,
            in [0, 1]; None likewise.
        shapes: function from positions and a height to pictures (3, height, w) in their own shape,
            of images that are not square and can be read.
        neighbors: function from positions (m,) to the nearest others among them (m, k).
        originals: address of the folder that keys are relative to, or "" where they are not files.
        csv: address of the table of all images, or "".
        settings: settings of the run.
        versions: versions of the packages that made the run.
        notes: sentences shown near the top.

    Raises:
        ValueError: an array does not have num_images entries.
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
    num_neighbors: int = 0
    labels: IntArray | None = None
    class_names: Sequence[str] | None = None
    logs: Logs = field(default_factory=dict)
    map: Map | None = None
    attention: Attention | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    suggested: Mapping[int, tuple[str, float]] = field(default_factory=dict)
    cost: Mapping[str, str] = field(default_factory=dict)
    review: Mapping[str, Any] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str]] = ()
    num_skipped: int = 0
    oddities: Sequence[Oddity] = ()
    comparison: Comparison | None = None
    k_choice: KChoice | None = None
    least_alike: float | None = None
    colour_share: float | None = None
    shapes: Shapes | None = None
    neighbors: Callable[[NDArray[np.intp]], NDArray[np.int64]] | None = None
    originals: str = ""
    csv: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("keys", "clusters", "confidence", "agreement", "reliable", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_images:
                raise ValueError(
                    f"{name} has {len(values)} entries for num_images {self.num_images}; "
                    "give one entry per image"
                )

    @property
    def not_sure(self) -> NDArray[np.bool_]:
        """Mask (N,) of the images with too few neighbours in their cluster."""
        ids = torch.from_numpy(np.asarray(self.clusters, dtype=np.int64))
        agreement = torch.from_numpy(np.asarray(self.agreement))
        return is_not_sure(agreement, ids, self.num_neighbors).numpy()

    @property
    def known(self) -> NDArray[np.bool_] | None:
        """Mask (N,) of the images whose label is known; None where no label is."""
        if self.labels is None or not (self.labels >= 0).any():
            return None
        return np.asarray(self.labels >= 0)

    def class_name(self, label: int) -> str | None:
        """Return the name of a class, its number if it has none, and None for no label."""
        if label < 0:
            return None
        names = self.class_names or ()
        return names[label] if label < len(names) else str(label)

    def truth(self, image: int) -> str | None:
        """Return the name of an image's class; None if it is unknown."""
        return None if self.labels is None else self.class_name(int(self.labels[image]))
