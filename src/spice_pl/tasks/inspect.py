"""Write a page about a data set before training: files, copies, and the views of its images.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spice_pl.data.augment import PlainView
from spice_pl.data.datamodule import Stream
from spice_pl.data.duplicates import copies, near_copies, num_copies, row_digests
from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_uniform
from spice_pl.errors import UsageError
from spice_pl.reports.inspection import Inspection, write_inspection
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)

MEASURED = 10_000  # images that means and deviations are computed on
CHANNELS = ("red", "green", "blue")
FLAT = 0.01  # deviation of a channel of which nothing can be seen; levels in [0, 1]
SHOWN_GROUPS = 40  # groups of copies and pairs of near-copies on the page


class Inspect:
    """Write inspect.html: counts, sizes, skipped files, copies, a sample, and the views.

    Shown are the plain view and those that the stages use. All are shown if the streams of one of
    the stages are not given.

    Args:
        views: views by name, in the order in which they are shown.
        stages: names of the stages that images would pass.
        streams: streams of stages, by stage and name.
        num_pictures: number of images in the sample.
        num_viewed: number of images whose views are shown.
        compare_at_most: largest number of images that near-copies are searched in.
        draws: how often each random view is drawn.
    """

    def __init__(
        self,
        views: Mapping[str, PlainView],
        num_pictures: int = 96,
        num_viewed: int = 10,
        compare_at_most: int = 50_000,
        draws: int = 2,
        stages: Sequence[str] = (),
        streams: Mapping[str, Mapping[str, Stream]] | None = None,
    ) -> None:
        for name, value in (("num_pictures", num_pictures), ("num_viewed", num_viewed)):
            if value < 1:
                raise UsageError(f"inspect.task.{name} {value} is not positive")
        self.views, self.draws = used_views(views, stages, streams or {}), draws
        self.stages = tuple(stages)
        self.num_pictures, self.num_viewed = num_pictures, num_viewed
        self.compare_at_most = compare_at_most

    def __call__(self, context: Context) -> None:
        """Measure the images and write the page."""
        images = context.images()
        digests = row_digests(images.images)
        compared = _evenly(len(images), self.compare_at_most)
        near = compared[near_copies(images.images[compared])]  # (n, 2)
        mean, std = measure(images)
        data = Inspection(
            name=images.name,
            facts=self._facts(images, digests, len(near)),
            notes=[
                *notes(images, digests, pretrained=self.pretrained),
                *_scale_notes(context, mean, std, pretrained=self.pretrained),
            ],
            tables=tables(images, context, mean, std),
            skipped=images.skipped,
            keys=images.keys,
            images=images.images,
            copies=copies(digests)[:SHOWN_GROUPS],
            num_copies=num_copies(digests),
            near=near[:SHOWN_GROUPS],
            num_near=len(near),
            num_compared=len(compared),
            wall=_evenly(len(images), self.num_pictures),
            viewed=_evenly(len(images), self.num_viewed),
            views=self._views(images, context.seed),
            stages=self.stages,
        )
        path = write_inspection(data, context.folder.path / "inspect.html")
        context.folder.write_json(
            "inspect.json",
            {
                "dataset": images.name,
                "fingerprint": images.fingerprint,
                "protocol": images.protocol,
                "num_images": len(images),
                "num_skipped": images.num_skipped,
                "num_unused": images.num_unused,
                "num_files": images.num_files,
                "num_copies": data.num_copies,
                "num_near_copies": data.num_near,
                "num_compared": data.num_compared,
                "mean": mean.tolist(),
                "std": std.tolist(),
                "skipped": [list(each) for each in images.skipped],
            },
        )
        logger.info("%s  look at the data", path)

    @property
    def pretrained(self) -> bool:
        """Whether the job takes a pretrained network, which has its own size, mean and std."""
        return "embed" in self.stages

    def _facts(
        self, images: ImageSet, digests: NDArray[np.uint64], num_near: int
    ) -> list[tuple[str, str]]:
        side = images.images.shape[-1]
        facts = [("Images", f"{len(images):,}"), ("Pixels", f"{side} × {side}")]
        if images.num_files > len(images):
            facts.insert(0, ("Files found", f"{images.num_files:,}"))
        if images.extra is not None:
            facts.append(("Extra images, for stage 1", f"{len(images.extra):,}"))
        if images.is_test is not None:
            facts.append(("Test images among them", f"{int(images.is_test.sum()):,}"))
        return [
            *facts,
            ("Skipped files", f"{images.num_skipped:,}"),
            ("Exact copies", f"{num_copies(digests):,}"),
            ("Pairs of near-copies", f"{num_near:,}"),
        ]

    def _views(self, images: ImageSet, seed: int) -> dict[str, NDArray[np.uint8]]:
        """Return the pictures (n, 3, S, S) of each view and draw, by title."""
        index = torch.from_numpy(_evenly(len(images), self.num_viewed))
        pixels = torch.from_numpy(images.images[index.numpy()])
        made = {}
        for name, view in self.views.items():
            for draw in range(self.draws if view.num_uniforms else 1):
                key = zlib.crc32(f"inspect/{name}".encode())
                uniforms = keyed_uniform(seed, draw, index, key, view.num_uniforms)
                title = f"{name} {draw + 1}" if view.num_uniforms else name
                shown = view(pixels.clone(), uniforms)
                shown = shown if shown.ndim == 4 else shown[:, 0]  # the first of many patches
                made[title] = as_picture(shown, view)
        return made


def used_views(
    views: Mapping[str, PlainView],
    stages: Sequence[str],
    streams: Mapping[str, Mapping[str, Stream]],
) -> dict[str, PlainView]:
    """Return the plain view and those that a stream of the stages has; arguments as above."""
    if not set(stages) <= set(streams):
        return dict(views)
    used = [
        view for stage in stages for each in streams[stage].values() for view in each.views.values()
    ]
    return {name: view for name, view in views.items() if name == "plain" or view in used}


def as_picture(views: torch.Tensor, view: PlainView) -> NDArray[np.uint8]:
    """Undo the normalisation of views (n, 3, S, S); return uint8."""
    mean, std = (torch.tensor(tuple(x)).view(3, 1, 1) for x in (view.mean, view.std))
    levels = ((views.float() * std + mean) * 255).round().clamp(0, 255)
    return levels.to(torch.uint8).numpy()


def measure(images: ImageSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the means (3,) and standard deviations (3,) of the channels, levels in [0, 1]."""
    sample = images.images[_evenly(len(images), MEASURED)]
    levels = np.asarray(sample).transpose(1, 0, 2, 3).reshape(3, -1)
    return np.array([row.mean() / 255 for row in levels]), np.array(
        [row.std() / 255 for row in levels]
    )


def notes(images: ImageSet, digests: NDArray[np.uint64], *, pretrained: bool = False) -> list[str]:
    """Return sentences about what may be wrong with the data."""
    said = []
    side = images.images.shape[-1]
    if images.files is not None:
        shorter = np.minimum(images.files["width"], images.files["height"])
        longer = np.maximum(images.files["width"], images.files["height"])
        if small := int((shorter < side).sum()):
            way = "" if pretrained else " A smaller dataset.image_size costs less."
            said.append(
                f"Magnified, because their shorter side has fewer than {side} pixels: {small:,} of "
                f"{len(images):,} images.{way}"
            )
        if long := int((longer > 2 * shorter).sum()):
            said.append(
                f"More than twice as long as wide: {long:,} of {len(images):,} images. Only the "
                "square in the middle is used, which is less than half of each."
            )
    if images.is_test is not None:
        known = set(digests[~images.is_test].tolist())
        if both := sum(digest in known for digest in digests[images.is_test].tolist()):
            said.append(f"Exact copies of training images among the test images: {both:,}.")
    if images.num_skipped > len(images) // 20:
        said.append(f"Skipped files: {images.num_skipped:,}; the reasons are below.")
    return said


def _scale_notes(
    context: Context, mean: NDArray[np.float64], std: NDArray[np.float64], *, pretrained: bool
) -> list[str]:
    plain = context.plain
    if not isinstance(plain, PlainView):
        return []
    flat = std < FLAT
    std = np.where(flat, plain.std, std)  # a deviation of 0 could not be divided by
    said = []
    if flat.any():
        channels = [name for name, is_flat in zip(CHANNELS, flat, strict=True) if is_flat]
        said.append(
            f"All images have nearly one level in {', '.join(channels)}: there is nothing to tell "
            "them apart by."
        )
    far = max(np.abs(mean - plain.mean).max(), np.abs(std - plain.std).max())
    if far < 0.1 or pretrained:
        return said
    measured = [f"[{', '.join(f'{value:.3f}' for value in each)}]" for each in (mean, std)]
    return [
        *said,
        "The mean and deviation of the images differ from dataset.mean and dataset.std, which the "
        f"views are normalised with. Measured here: dataset.mean={measured[0]} "
        f"dataset.std={measured[1]}.",
    ]


def tables(
    images: ImageSet, context: Context, mean: NDArray[np.float64], std: NDArray[np.float64]
) -> dict[str, list[tuple[str, str]]]:
    """Return the tables of the page, by title, as rows of name and value."""
    made: dict[str, list[tuple[str, str]]] = {}
    if images.files is not None:
        files = np.asarray(images.files)
        kinds = Counter(files["format"].tolist()).most_common()
        made["Formats"] = [(kind, f"{count:,}") for kind, count in kinds]
        sizes = Counter(zip(files["width"].tolist(), files["height"].tolist(), strict=True))
        made["Sizes of the files"] = [
            (f"{width} × {height}", f"{count:,}") for (width, height), count in sizes.most_common(8)
        ]
        rest = len(files) - sum(count for _, count in sizes.most_common(8))
        if rest:
            made["Sizes of the files"].append((f"{len(sizes) - 8:,} other sizes", f"{rest:,}"))
        shorter = np.minimum(files["width"], files["height"])
        made["Shorter side, pixels"] = [
            (name, f"{value:,.0f}")
            for name, value in zip(
                ("smallest", "median", "largest"),
                np.quantile(shorter, [0, 0.5, 1], method="nearest"),
                strict=True,
            )
        ]
    plain = context.plain
    if isinstance(plain, PlainView):
        rows = (("measured", mean, std), ("settings", plain.mean, plain.std))
        made["Pixel values from 0 to 1, mean ± deviation"] = [
            (f"{channel}, {what}", f"{m:.3f} ± {s:.3f}")
            for what, means, stds in rows
            for channel, m, s in zip(CHANNELS, means, stds, strict=True)
        ]
    if images.skipped:
        reasons = Counter(reason.split(":")[0] for _, reason in images.skipped).most_common(12)
        made["Skipped, by reason"] = [(reason, f"{count:,}") for reason, count in reasons]
    if images.labels is not None:
        counts = Counter(images.labels.tolist())
        names = images.class_names or []
        made["Classes (truth)"] = [
            (str(names[label]) if 0 <= label < len(names) else "no label", f"{count:,}")
            for label, count in sorted(counts.items())
        ]
    return made


def _evenly(count: int, at_most: int) -> NDArray[np.int64]:
    """Return at most so many positions below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))
