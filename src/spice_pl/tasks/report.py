"""Write the report page of a finished run again, from the files of the run.

Use it after clusters were named, for another layout of the map, or after an update of this package.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from spice_pl.models import portable
from spice_pl.nn.places import fine_feature_map
from spice_pl.reports.page import write_report
from spice_pl.runs.attention import write_attention
from spice_pl.runs.page_data import report_data
from spice_pl.system.desktop import open_page
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)


class Report:
    """Write report.html and attention.npz of the upstream run; metrics.json stays as it is.

    Args:
        map_method: layout of the map, "tsne" or "pca".
        allow_targets: names of your own packages that define the model's network.
        opened: whether the page opens in the browser; "auto" where there is a desktop.
    """

    def __init__(
        self,
        map_method: str = "tsne",
        allow_targets: Sequence[str] = (),
        opened: bool | str = False,
    ) -> None:
        self.map_method, self.allow_targets, self.opened = map_method, allow_targets, opened

    def __call__(self, context: Context) -> None:
        """Compute where the prototypes resemble their cluster, and write the page."""
        folder, images = context.upstream[0], context.images()
        folder.clear_temporary("report.html", "attention.npz")  # of a report that was killed
        metrics, table = folder.metrics, folder.read_clusters()
        if (folder.path / portable.FILE_NAME).is_file():
            model = portable.load(
                folder.checked(portable.FILE_NAME), allow_targets=self.allow_targets
            )

            def feature_map(pixels: torch.Tensor) -> torch.Tensor | None:
                plain = model.network.plain(pixels.to(model.device), torch.empty(0))
                return fine_feature_map(model.network.encoder, plain)

            write_attention(folder, table, images, int(metrics["num_clusters"]), feature_map)
        else:
            logger.info("no %s: the page keeps its attention maps", portable.FILE_NAME)
        data = report_data(folder, context.upstream[1:], images, metrics, table, self.map_method)
        page = write_report(data, folder.path / "report.html")
        logger.info("%s", page)
        open_page(page, self.opened)
