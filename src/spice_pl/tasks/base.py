"""The interface of a task, and the sample that several tasks take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.augment import View
from spice_pl.data.images import ImageSet
from spice_pl.runs.folder import RunFolder

LISTED = 20  # clusters whose sizes are said


@dataclass(frozen=True)
class Context:
    """What a task reads, and where it writes.

    Attributes:
        folder: folder for its results, `runs/<dataset>/<task>/<run>`.
        upstream: folders of the stages before it, the nearest first.
        images: function that opens the data set; called only by tasks that need images. Keyword
            arguments replace settings of the data set.
        plain: the view that features and clusters are computed on.
        num_clusters: K, or 0 where the settings do not give it.
        seed: seed of the run.
    """

    folder: RunFolder
    upstream: Sequence[RunFolder]
    images: Callable[..., ImageSet]
    plain: View
    num_clusters: int
    seed: int


class Task(Protocol):
    """A callable that `conf/stage/<task>.yaml` names under `task:`, beside its settings."""

    def __call__(self, context: Context) -> Mapping[str, Any] | None:
        """Run the task; return the content of metrics.json, which marks the folder as finished.

        A task that may run several times in one folder (a server, a prediction) returns None.
        """


def sample(num_images: int, limit: int, seed: int) -> NDArray[np.intp]:
    """Return the positions of at most `limit` images, drawn at random, in their order."""
    if num_images <= limit:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(seed).choice(num_images, limit, replace=False))


def size_lines(names: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Return one line per cluster that has images; of more than 20, the largest and a count.

    >>> size_lines(["cats", "dogs", "ships"], [3, 0, 12])
    ['       3  cats', '      12  ships']
    """
    filled = [k for k, size in enumerate(sizes) if size]
    largest = set(sorted(filled, key=lambda k: -sizes[k])[:LISTED])
    lines = [f"{sizes[k]:8d}  {names[k]}" for k in filled if k in largest]
    if rest := [sizes[k] for k in filled if k not in largest]:
        lines.append(f"{sum(rest):8d}  in {len(rest):,} smaller clusters")
    return lines
