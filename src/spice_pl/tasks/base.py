"""What a task is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spice_pl.data.augment import View
from spice_pl.data.images import ImageSet
from spice_pl.runs.folder import RunFolder


@dataclass(frozen=True)
class Context:
    """Where a task reads and writes.

    Attributes:
        folder: for what it makes, `runs/<dataset>/<task>/<run>`.
        upstream: artifacts of the stages before it, the nearest first.
        images: opens the data set, once; a task that needs no image does not call it. Keyword
            arguments replace settings of the data set.
        plain: the view that features and clusters are computed on.
        num_clusters: K; 0 for a task that takes it from elsewhere.
        seed: of the run.
    """

    folder: RunFolder
    upstream: Sequence[RunFolder]
    images: Callable[..., ImageSet]
    plain: View
    num_clusters: int
    seed: int


class Task(Protocol):
    """What `conf/<task>.yaml` names under `task:`; its settings are its own."""

    def __call__(self, context: Context) -> Mapping[str, Any] | None:
        """Do it; return what metrics.json shall hold, which marks the folder as finished.

        A task that may be asked again and again (a server, a prediction) returns None.
        """
