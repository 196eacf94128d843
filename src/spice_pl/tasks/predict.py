"""Cluster new images with a trained model: write a table and, if asked, sort files into folders.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.models.hub import is_on_hub, pull
from spice_pl.models.pixels import fitting_batch
from spice_pl.models.portable import PortableModel, Predictions, load
from spice_pl.runs.sorting import PLACE, Sorter
from spice_pl.system.files import atomic, for_spreadsheet
from spice_pl.system.output import printable
from spice_pl.system.progress import Bar
from spice_pl.tasks.base import Context, size_lines

logger = logging.getLogger(__name__)


class Predict:
    """Write predictions.csv, and predictions.parquet where pyarrow is installed.

    Args:
        model: path of a `model.spice`, of the folder of a run that has one, or hf://owner/name to
            fetch it from the Hugging Face Hub.
        sort: "copy", "hardlink" or "symlink" also puts every file into a folder of its cluster;
            files that are not sure go one folder deeper. "none" does not. Nothing is ever moved,
            replaced or deleted.
        num_nearest: number of most similar known images to list per image.
        batch_size: images that pass the network at once.
        device: name of a torch device; "auto" takes a GPU if there is one.
        allow_targets: names of your own packages that define the model's network.
        spreadsheet: whether names in predictions.csv that a spreadsheet would take for a formula
            begin with '.
    """

    def __init__(
        self,
        model: str | None,
        sort: str = "none",
        num_nearest: int = 3,
        batch_size: int = 256,
        device: str = "auto",
        allow_targets: Sequence[str] = (),
        spreadsheet: bool = False,
    ) -> None:
        if sort not in ("none", *PLACE):
            raise UsageError(f"predict.sort {sort!r} must be one of none, {', '.join(PLACE)}")
        self.model, self.sort, self.num_nearest = model, sort, num_nearest
        self.batch_size, self.device, self.allow_targets = batch_size, device, allow_targets
        self.spreadsheet = spreadsheet

    def __call__(self, context: Context) -> None:
        """Predict every image of the data set.

        Raises:
            UsageError: there is no model, or files cannot be sorted as asked.
        """
        if self.model is None:
            raise UsageError(
                "stage=predict needs a trained model; give predict.model=FILE, a model.spice or "
                "the folder of a run that has one"
            )
        file = pull(self.model) if is_on_hub(self.model) else self.model
        model = load(file, device=self.device, allow_targets=self.allow_targets)
        levels = {}
        if model.levels is not None:
            levels = {"levels": tuple(model.levels)}
            logger.info(
                "levels of more than 8 bits: black %g, white %g, as the model says", *model.levels
            )
        images = context.images(image_size=model.image_size, **levels)
        sorter = None
        if self.sort != "none":
            target = context.folder.path / "sorted"
            sorter = Sorter(images, target, model.names, self.sort, "predict.sort")
        counts, doubtful = np.zeros(model.num_clusters, dtype=np.int64), 0
        compared = Compared(model, images)
        started = time.monotonic()
        batches = pixel_batches(images, self.batch_size)
        with ExitStack() as stack:
            write = stack.enter_context(
                table(context.folder.path, model, self.num_nearest, spreadsheet=self.spreadsheet)
            )
            bar = stack.enter_context(Bar("predict", len(images)))
            for part in model.stream(batches, num_nearest=self.num_nearest):
                write(part)
                if sorter is not None:
                    sorter.place(part.keys, part.clusters, part.not_sure)
                compared(part)
                counts += np.bincount(part.clusters, minlength=model.num_clusters)
                doubtful += int(part.not_sure.sum())
                bar.advance(len(part))
                bar.show()
        if sorter is not None:
            sorter.finish()
        rate = len(images) / (time.monotonic() - started)
        meaning = "too few of the most similar known images are in the same cluster"
        if model.known is None:
            meaning = f"confidence at most {model.threshold:g}"
        for line in size_lines(model.names, counts.tolist()):
            logger.info("%s", line)
        logger.info(
            "%d images, %.0f per second, %d not sure (%s): %s",
            *(len(images), rate, doubtful, meaning),
            context.folder.path / "predictions.csv",
        )
        if sorter is not None:
            logger.info("%s  one folder per cluster", sorter.target)
        compared.say()


class Compared:
    """Compare predictions of the images that a model was made from with the clusters of its run.

    Args:
        model: its known images have the clusters of the run.
        images: images to predict; others than those of the run are not compared.
    """

    def __init__(self, model: PortableModel, images: ImageSet) -> None:
        self.same = self.others = 0
        self.precision = printable(str(model.about.get("precision", "another precision"))[:40])
        self.clusters: dict[str, int] = {}
        if model.known is not None and model.about.get("fingerprint") == images.fingerprint:
            pairs = zip(model.known.keys, model.known.clusters.tolist(), strict=True)
            self.clusters = dict(pairs)

    def __call__(self, part: Predictions) -> None:
        """Count the images of a batch that are in the cluster of the run, and the others."""
        for key, cluster in zip(part.keys, part.clusters.tolist(), strict=True):
            if key in self.clusters:
                equal = self.clusters[key] == cluster
                self.same, self.others = self.same + equal, self.others + (not equal)

    def say(self) -> None:
        """Log both numbers, if these are the images of the run."""
        if not self.clusters:
            return
        logger.info(
            "these are the images of the run; of %d compared, %d are in another cluster than in "
            "its clusters.csv%s",
            *(self.same + self.others, self.others),
            f", which was computed in {self.precision} and with answer= as set there, and this "
            "with the network in 32-true; clusters.csv is the result, and the verb sort copies "
            "files by it"
            if self.others
            else "",
        )


def pixel_batches(
    images: ImageSet, batch_size: int
) -> Iterator[tuple[Sequence[str], NDArray[np.uint8]]]:
    """Yield keys and pixels (B, 3, S, S) batch by batch, read from the memory map."""
    batch_size = fitting_batch(batch_size, images.images.shape[-1])
    for start in range(0, len(images), batch_size):
        end = min(start + batch_size, len(images))
        yield images.keys[start:end], np.array(images.images[start:end])


@contextmanager
def table(
    folder: Path, model: PortableModel, num_nearest: int, *, spreadsheet: bool = False
) -> Iterator[Callable[[Predictions], None]]:
    """Yield a function that adds rows to predictions.csv and, with pyarrow, predictions.parquet."""
    num_known = 0 if model.known is None else len(model.known.keys)
    shown = range(min(num_nearest, num_known))
    columns = ["image", "cluster", "name", "confidence", "not_sure"]
    columns += [f"{what}_{i + 1}" for what in ("nearest", "similarity") for i in shown]
    try:
        from pyarrow import Table
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        Table = None  # noqa: N806
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic(folder / "predictions.csv"))
        file = stack.enter_context(
            # A path may hold bytes that are not UTF-8; they are written as they are on disk.
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        )
        rows = csv.writer(file)
        rows.writerow(columns)
        parquet: list[Any] = []  # opened with the first batch, which has the types

        def write(part: Predictions) -> None:
            nearest = list(zip(*part.nearest, strict=True)) if shown else []
            values = [part.keys, part.clusters, part.names, part.confidence, part.not_sure]
            values += [*nearest, *part.similarity.T]
            shown_keys, names, *alike = (
                [for_spreadsheet(each) if spreadsheet else each for each in column]
                for column in (part.keys, part.names, *nearest)
            )
            text = [
                *(shown_keys, part.clusters.tolist(), names),
                *([f"{sure:.4f}" for sure in part.confidence], part.not_sure.astype(int).tolist()),
                *alike,
                *([f"{value:.4f}" for value in column] for column in part.similarity.T),
            ]
            rows.writerows(zip(*text, strict=True))
            if Table is not None:
                keys = [[_utf8(key) for key in each] for each in (part.keys, *nearest)]
                values[0], values[5 : 5 + len(nearest)] = keys[0], keys[1:]
                made = Table.from_arrays([_arrow(each) for each in values], names=columns)
                if not parquet:
                    path = stack.enter_context(atomic(folder / "predictions.parquet"))
                    parquet.append(stack.enter_context(ParquetWriter(path, made.schema)))
                parquet[0].write_table(made)

        yield write


def _arrow(values: Any) -> Any:
    import pyarrow

    return pyarrow.array(values)


def _utf8(key: str) -> str:
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
