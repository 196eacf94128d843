"""Propose names for clusters from the folders that their images are in.

They are proposals for the user, read from the paths of the images when a page is written. No stage
reads them.

Shapes: N images, K clusters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_NAME = 80  # characters; the longest name that the page takes


def folder_names(
    keys: Sequence[str], clusters: NDArray[np.integer[Any]]
) -> Mapping[int, tuple[str, float]]:
    """Return, by cluster, the folder of most of its images, and their share.

    A cluster has one if more than half of its images are in folders of that name, and if that is a
    larger share than among all images: the only folder says nothing about a cluster.

    Args:
        keys: (N,) paths below the root of the data set, or positions.
        clusters: (N,).

    Examples:
        >>> keys = ["cats/1.png", "cats/2.png", "x.png", "dogs/1.png"]
        >>> folder_names(keys, np.array([0, 0, 0, 1]))
        {0: ('cats', 0.6666666666666666), 1: ('dogs', 1.0)}
    """
    folders = [key.replace("\\", "/").rpartition("/")[0].rpartition("/")[2] for key in keys]
    overall = Counter(folders)
    counts: dict[int, Counter[str]] = {}
    for folder, cluster in zip(folders, clusters.tolist(), strict=True):
        counts.setdefault(cluster, Counter())[folder] += 1
    found = {}
    for cluster, count in sorted(counts.items()):
        (folder, most), size = count.most_common(1)[0], count.total()
        if folder and 2 * most > size and most * len(keys) > overall[folder] * size:
            found[cluster] = (folder[:MAX_NAME], most / size)
    return found
