"""Put the images of a finished run into one folder per cluster."""

from __future__ import annotations

import logging

import numpy as np

from spice_pl.errors import UsageError
from spice_pl.runs.sorting import PLACE, Sorter
from spice_pl.tasks.base import Context, size_lines

logger = logging.getLogger(__name__)


class Sort:
    """Copy or link the files of the upstream run as clusters.csv says.

    Images that are not sure, by their neighbours, go one folder deeper.

    Args:
        how: "copy", "hardlink" or "symlink".
    """

    def __init__(self, how: str = "copy") -> None:
        if how not in PLACE:
            raise UsageError(f"sort.how {how!r} must be one of {', '.join(PLACE)}")
        self.how = how

    def __call__(self, context: Context) -> None:
        """Place every image.

        Raises:
            UsageError: the run has no clusters, its images are not files, or one cannot be placed.
        """
        run, images = context.upstream[0], context.images()
        run.check_dataset(images.fingerprint, len(images))
        table, num_clusters = run.read_clusters(), int(run.metrics["num_clusters"])
        names = [run.names.get(cluster, f"cluster {cluster}") for cluster in range(num_clusters)]
        target = context.folder.path / "sorted"
        sorter = Sorter(images, target, names, self.how, "sort.how")
        sorter.place(table.keys, table.clusters, table.not_sure)
        sorter.finish()
        for line in size_lines(names, table.sizes(num_clusters).tolist()):
            logger.info("%s", line)
        logger.info(
            "%d images, %d not sure (most of their neighbours are in other clusters): %s",
            *(len(table.keys), int(np.count_nonzero(table.not_sure)), target),
        )
