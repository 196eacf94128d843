"""Load images of a Hugging Face data set: of the Hub by its name, or of a folder.

Only rows are read. No code of a data set runs: release 4 of `datasets` has no loading scripts.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spice_pl.data.decode import Decoding, Loaded, read_image
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.table import stored_images
from spice_pl.data.store import open_store
from spice_pl.data.store_writer import Source
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

SCHEME = "hf://"
AUTO = "auto"  # the only column of its kind
NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes
LEAST = 4  # release of datasets: the first without loading scripts
SHOWN = 20  # names in a message


def hugging_face(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "hugging_face",
    subset: str | None = None,
    split: str | None = None,
    image_column: str = AUTO,
    labels: str | None = None,
    levels: Sequence[float] | None = None,
    max_decode_mb: float | None = None,
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return the images of a Hugging Face data set, in the order of its rows.

    Args:
        root: hf://owner/name of the Hub, or hf://owner/name@revision; or a folder that
            `save_to_disk` wrote, or one of files that `datasets.load_dataset` reads.
        image_size: side S in pixels; the shorter side is scaled, the middle square kept.
        cache_dir: folder of the image stores. What is fetched is in the cache of `datasets`.
        name: name of the data set and of its folder of results.
        subset: one of its configurations, which the Hub calls subsets; None where it has one.
        split: for example "train", or "train+test"; None where it has one.
        image_column: name of the column of images; "auto" takes the only one.
        labels: name of the column of true classes, for `truth/*` metrics only; "auto" takes the
            only column of classes, None has no truth.
        levels: black and white of images of more than 8 bits; None chooses them for each image.
        max_decode_mb: megabytes of memory that decoding may take; None is 1024.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        protocol: "whole".

    Raises:
        UsageError: the package is missing; the data set cannot be fetched or read; it has no such
            subset, split or column, or several and none was named.
    """
    datasets = _library()
    parts = _splits(datasets, root, subset, split)
    rows = datasets.concatenate_datasets(list(parts.values()))
    column = _image_column(datasets, root, rows.features, image_column)
    truth = None if labels is None else _label_column(datasets, root, rows.features, labels)
    decoding = Decoding(image_size, levels, max_decode_mb)
    encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    places = _places(datasets, root)
    # Stores of one split that were made before splits could be named keep their keys.
    named = [f"{part}/" if len(parts) > 1 else "" for part in parts]
    sizes = [len(each) for each in parts.values()]

    def load(i: int) -> Loaded:
        image = encoded[i][column]
        if image is None:
            return "no image"
        if image["bytes"] is not None:
            return read_image(image["bytes"], decoding)
        file = places(str(image["path"]))
        if file is None:
            return f"{image['path']} is outside the data set"
        return read_image(file, decoding)

    local = not root.startswith(SCHEME)
    stored = open_store(
        [
            str(Path(root).expanduser().resolve()) if local else root,
            "+".join(each._fingerprint for each in parts.values()),
            *(column, levels),
        ],
        image_size,
        cache_dir,
        lambda: Source(
            f"dataset.root={root}",
            [f"{part}{i}" for part, n in zip(named, sizes, strict=True) for i in range(n)],
            load,
        ),
        on_bad_image,
        limits=decoding.limits,
    )
    given: Sequence[str | None] | None = None
    if truth is not None:
        feature, values = rows.features[truth], rows.select_columns([truth])[truth]
        to_name = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
        given = [None if value is None or value == -1 else to_name(value) for value in values]
    return stored_images(stored, name, protocol, given)


def _library() -> Any:
    """Return the package datasets.

    Raises:
        UsageError: it is missing, or so old that it would run code of a data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "dataset=hugging_face needs the package datasets; pip install 'spice-pl[hf]'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < LEAST:
        raise UsageError(
            f"datasets {datasets.__version__} can run code of a data set; "
            "pip install -U 'spice-pl[hf]'"
        )
    return datasets


def _splits(datasets: Any, root: str, subset: str | None, split: str | None) -> dict[str, Any]:
    """Return the rows of each split that is asked for, by its name.

    Raises:
        UsageError: the data set cannot be read, or has other splits.
    """
    found = _fetched(datasets, root, subset)
    if not isinstance(found, Mapping):  # save_to_disk of one split
        found = {str(found.split or "rows"): found}
    there = ", ".join(found)
    if split is None and len(found) > 1:
        both = "+".join(list(found)[:2])
        raise UsageError(
            f"dataset.root={root} has the splits {there}; give dataset.split={next(iter(found))}, "
            f"or dataset.split={both} for both"
        )
    wanted = list(found) if split is None else split.split("+")
    for each in wanted:
        if each not in found:
            raise UsageError(f"dataset.split={split}: {root} has no split {each!r}; it has {there}")
    parts = {each: found[each] for each in wanted}
    first = next(iter(parts.values())).features
    for each, rows in parts.items():
        if rows.features != first:
            raise UsageError(
                f"dataset.split={split}: the columns of {each} are not those of {wanted[0]}; give "
                "one split"
            )
    return parts


def _fetched(datasets: Any, root: str, subset: str | None) -> Any:
    """Return the rows of a data set, or those of its splits by name.

    Raises:
        UsageError: it is not there, cannot be fetched or read, or has several subsets.
    """
    if not root.startswith(SCHEME):
        place = Path(root).expanduser()
        if not place.is_dir():
            state = "is not a folder" if place.exists() else "does not exist"
            raise UsageError(
                f"dataset.root={root} {state}; give a folder, or hf://owner/name of a data set of "
                "the Hub"
            )
        path, revision = str(place), None
    else:
        name = root.removeprefix(SCHEME)
        if not NAME.fullmatch(name):
            raise UsageError(
                f"dataset.root={root} does not name a data set of the Hugging Face Hub; give "
                "hf://owner/name or hf://owner/name@revision"
            )
        path, _, revision = name.partition("@")
    try:
        if any((Path(path) / file).is_file() for file in SAVED) and revision is None:
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, subset, revision=revision or None)
    except Exception as error:  # of datasets, pyarrow, the Hub and the network, of many types
        _check_subset(datasets, root, path, revision or None, subset, error)
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        way = "check the files"
        if root.startswith(SCHEME):
            way = (
                "check the name and the connection, and log in with hf auth login (or HF_TOKEN) if "
                "it is private"
            )
            if "script" in reason:
                way = "code of data sets is never run; give a data set of Parquet or image files"
        raise UsageError(
            f"dataset.root={root} cannot be read: {type(error).__name__}: {reason}; {way}"
        ) from error


def _check_subset(
    datasets: Any, root: str, path: str, revision: str | None, subset: str | None, error: Exception
) -> None:
    """Name the subsets of a data set that could not be read because none of them was meant."""
    if not isinstance(error, ValueError):
        return
    subsets: list[str] = []
    with suppress(Exception):  # the first error is reported then
        subsets = datasets.get_dataset_config_names(path, revision=revision)
    if subsets and subset not in subsets and (subset is not None or len(subsets) > 1):
        wrong = "" if subset is None else f"no subset {subset!r}, but "
        raise UsageError(
            f"dataset.root={root} has {wrong}the subsets {_listed(subsets)}; give "
            f"dataset.subset={subsets[0]}"
        ) from error


def _places(datasets: Any, root: str) -> Callable[[str], Path | None]:
    """Return a function from the path in a row to its file; None where that is not of the data set.

    A row may hold any path. Files of a folder are below it, and files of the Hub in its caches.
    """
    if not root.startswith(SCHEME):
        folder = Path(root).expanduser()
        allowed = [folder.resolve()]
    else:
        import huggingface_hub

        folder = Path()
        caches = (
            *(datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH),
            huggingface_hub.constants.HF_HUB_CACHE,
        )
        allowed = [Path(cache).expanduser().resolve() for cache in caches]

    def place(path: str) -> Path | None:
        file = (folder / path.replace("\0", "")).resolve()
        return file if any(file.is_relative_to(each) for each in allowed) else None

    return place


def _image_column(datasets: Any, root: str, features: Mapping[str, Any], given: str) -> str:
    """Return the name of the column of images.

    Raises:
        UsageError: there is no such column, or it does not hold images; or with "auto" none holds
            images, or several do.
    """
    images = [key for key, each in features.items() if isinstance(each, datasets.Image)]
    # Parquet files that other programs wrote hold the parts of an image without its type.
    raw = [
        key for key, each in features.items() if isinstance(each, Mapping) and "bytes" in each
    ] + [key for key, each in features.items() if "binary" in str(getattr(each, "dtype", ""))]
    if given == AUTO and given not in features:
        found = images or raw
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"dataset.root={root} has {len(found)} columns of images, {_listed(found)}; give "
                f"dataset.image_column={found[0]}"
            )
        raise UsageError(
            f"dataset.root={root} has no column of images; its columns are {_listed(features)}"
        )
    _check_column(root, features, given, "image_column")
    if given not in (*images, *raw):
        raise UsageError(
            f"dataset.image_column={given} of {root} holds no images; "
            + (f"give {_listed(images or raw)}" if images or raw else "no column does")
        )
    return given


def _label_column(datasets: Any, root: str, features: Mapping[str, Any], given: str) -> str:
    """Return the name of the column of classes.

    Raises:
        UsageError: there is no such column, or it does not hold one class per row; or with "auto"
            there is no column of classes, or there are several.
    """
    classes = [key for key, each in features.items() if isinstance(each, datasets.ClassLabel)]
    if given == AUTO and given not in features:
        if len(classes) != 1:
            what = f"{len(classes)} columns" if classes else "no column"
            named = classes or [
                key for key, each in features.items() if isinstance(each, datasets.Value)
            ]
            way = f"COLUMN, one of {_listed(named)}, or null" if named else "null"
            raise UsageError(
                f"dataset.labels=auto: {root} has {what} of classes, and one is needed; give "
                f"dataset.labels={way}"
            )
        logger.info("true classes: column %s", classes[0])
        return classes[0]
    _check_column(root, features, given, "labels")
    is_value = isinstance(features[given], datasets.ClassLabel | datasets.Value)
    if not is_value or "binary" in str(features[given].dtype):
        raise UsageError(
            f"dataset.labels={given} of {root} holds {features[given]}, not one class per row; "
            f"give dataset.labels=null or {_listed(classes) or 'another column'}"
        )
    return given


def _check_column(root: str, features: Mapping[str, Any], given: str, setting: str) -> None:
    if given not in features:
        raise UsageError(
            f"dataset.{setting}={given}: {root} has no such column; it has {_listed(features)}"
        )


def _listed(names: Any) -> str:
    """Return names for a message; of many the first.

    >>> _listed(["a", "b"]), _listed(str(i) for i in range(22))[-14:]
    ('a, b', ' 19 and 2 more')
    """
    given = list(names)
    more = f" and {len(given) - SHOWN} more" if len(given) > SHOWN else ""
    return ", ".join(given[:SHOWN]) + more
