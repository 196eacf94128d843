"""Cluster new images with a trained model: write a table and, if asked, sort files into folders.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.models.pixels import fitting_batch
from spice_pl.models.portable import PortableModel, Predictions, load
from spice_pl.system.files import atomic, for_spreadsheet
from spice_pl.system.output import printable
from spice_pl.system.progress import Bar
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)

PLACE: dict[str, Callable[[Path, Path], Any]] = {
    "copy": shutil.copy2,
    "hardlink": os.link,
    "symlink": lambda source, target: target.symlink_to(source),
}


class Predict:
    """Write predictions.csv, and predictions.parquet where pyarrow is installed.

    Args:
        model: path of a `model.spice`, or of the folder of a run that has one.
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
        model = load(self.model, device=self.device, allow_targets=self.allow_targets)
        levels = {}
        if model.levels is not None:
            levels = {"levels": tuple(model.levels)}
            logger.info(
                "levels of more than 8 bits: black %g, white %g, as the model says", *model.levels
            )
        images = context.images(image_size=model.image_size, **levels)
        sorter = self._sorter(context, images, model)
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
                    sorter(part)
                compared(part)
                counts += np.bincount(part.clusters, minlength=model.num_clusters)
                doubtful += int(part.not_sure.sum())
                bar.advance(len(part))
                bar.show()
        if sorter is not None:
            sorter.finish()
        rate = len(images) / (time.monotonic() - started)
        meaning = "fewer than half of the most similar known images are in the same cluster"
        if model.known is None:
            meaning = f"confidence at most {model.threshold:g}"
        for name, count in zip(model.names, counts, strict=True):
            logger.info("%8d  %s", count, name)
        logger.info(
            "%d images, %.0f per second, %d not sure (%s): %s",
            *(len(images), rate, doubtful, meaning),
            context.folder.path / "predictions.csv",
        )
        compared.say()

    def _sorter(self, context: Context, images: ImageSet, model: PortableModel) -> Sorter | None:
        if self.sort == "none":
            return None
        target = (context.folder.path / "sorted").resolve()
        if images.root is None:
            raise UsageError(
                f"predict.sort={self.sort} needs image files and {images.name} has none; use "
                "dataset=folder, or predict.sort=none"
            )
        if target.is_relative_to(images.root):
            raise UsageError(
                f"{target} is inside dataset.root={images.root}, so sorted files would be "
                "clustered the next time; give another runs_dir"
            )
        if target.is_dir() and any(target.iterdir()):
            raise UsageError(
                f"{target} holds sorted files already and nothing is replaced or deleted here; "
                "remove it yourself, or use another run=NAME"
            )
        return Sorter(images.root, target, folder_names(model.names), PLACE[self.sort])


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
            "with the network in 32-true; clusters.csv is the result"
            if self.others
            else "",
        )


class Sorter:
    """Put each file into the folder of its cluster.

    The folder gets its name when it is complete. What an interrupted prediction left is replaced.

    Args:
        root: folder of the data set, which the keys are relative to.
        target: folder to make the clusters' folders in.
        folders: (K,) names of these folders.
        place: function (source, target) that copies or links a file.
    """

    def __init__(
        self, root: Path, target: Path, folders: Sequence[str], place: Callable[[Path, Path], Any]
    ) -> None:
        self.root, self.target, self.folders, self.place = root, target, folders, place
        self.unfinished = target.with_name(f".{target.name}")
        if self.unfinished.is_dir():
            shutil.rmtree(self.unfinished)

    def __call__(self, part: Predictions) -> None:
        """Place the files of a batch; a name that is taken gets a number.

        Raises:
            UsageError: a file cannot be placed.
        """
        for key, cluster, doubtful in zip(part.keys, part.clusters, part.not_sure, strict=True):
            folder = self.unfinished / self.folders[cluster] / ("not sure" if doubtful else "")
            folder.mkdir(parents=True, exist_ok=True)
            source = self.root / key
            try:
                self.place(source, _free(folder, source))
            except OSError as error:
                raise UsageError(
                    f"{source} cannot be placed in {folder} ({error.strerror}); use another "
                    "predict.sort (a hard link needs one file system), or make room"
                ) from error

    def finish(self) -> None:
        """Give the folder its name."""
        if self.target.is_dir():  # it is empty
            self.target.rmdir()
        self.unfinished.rename(self.target)


def _free(folder: Path, source: Path) -> Path:
    """Return a free path in the folder: photo.jpg, photo (2).jpg, ..."""
    target, number = folder / source.name, 1
    while os.path.lexists(target):
        number += 1
        target = folder / f"{source.stem} ({number}){source.suffix}"
    return target


def folder_names(names: Sequence[str]) -> list[str]:
    """Turn names of clusters into distinct names of folders that any system accepts.

    >>> folder_names(["cats", "a/b: c", "Cats", "..", "CON"])
    ['cats', 'a_b_ c', 'Cats (2)', '_', 'CON_']
    """
    reserved = {"con", "prn", "aux", "nul", "not sure"}  # by Windows, and by Sorter
    reserved |= {f"{port}{i}" for port in ("com", "lpt") for i in range(10)}
    taken: set[str] = set()
    folders = []
    for name in names:
        plain = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)
        plain = plain.strip(" .")[:100] or "_"
        if plain.casefold() in reserved:
            plain += "_"
        folder, number = plain, 1
        while folder.casefold() in taken:
            number += 1
            folder = f"{plain} ({number})"
        taken.add(folder.casefold())
        folders.append(folder)
    return folders


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
