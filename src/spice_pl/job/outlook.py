"""The plan of a job: what it will do and how long it takes here, said before the work starts."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from spice_pl.data.images import ImageSet
from spice_pl.data.sources.survey import Survey
from spice_pl.job.budget import Budget, Work, recorded
from spice_pl.job.checks import check_folders
from spice_pl.job.costs import measure
from spice_pl.job.fit import fitted
from spice_pl.job.forecast import Part, estimate_part
from spice_pl.job.job import Job
from spice_pl.job.num_clusters import known_num_clusters
from spice_pl.job.parts import JobImages, build_stage, check_distinct
from spice_pl.job.plan import Step, plan
from spice_pl.job.settings import build
from spice_pl.job.trainer import auto_precision, num_ranks, on_gpu
from spice_pl.nn.encoders import pretrained
from spice_pl.system.output import printable

logger = logging.getLogger(__name__)

GUESSED_K = 10  # for the time of stages whose K will be estimated
IMAGES_PER_CLUSTER = 8  # the guess is smaller for fewer images
DECODED_FIRST_S = 5.0  # decoding that takes less is done before the plan is made
LONG_S = 3600.0
CALM = 0.7  # share of the times that an idle machine needs, from which on it counts as idle
BUSY = ("", "other programs use this machine; the longer time is that of now")


def planned(job: Job, budget: Budget, opened: JobImages) -> Job:
    """Say what a job will do and how long it takes; return it with the settings that fit `minutes`.

    A job that trains nothing new is returned as it is.

    Args:
        job: composed settings.
        budget: time that the job may take.
        opened: images of the job.

    Raises:
        UsageError: a setting does not fit the data.
    """
    known = known_num_clusters(job)
    guess = job.with_settings({"dataset.num_clusters": GUESSED_K if known is None else known})
    if budget.minutes is not None and not job.cfg.overwrite:
        earlier = [recorded(step.folder, budget.minutes) for step in plan(guess)]
        for values in earlier:
            job, guess = (each.with_settings(values or {}) for each in (job, guess))
    if not any(step.trains and not step.reused for step in plan(guess)):
        return job
    if known is not None:
        check_folders(guess, plan(guess), opened)
    listed = _to_decode(job, opened)
    images = _stand_in(job, listed) if listed is not None else _opened(job, opened)
    if known is None:
        guessed = min(GUESSED_K, max(2, len(images.train_index) // IMAGES_PER_CLUSTER))
        guess = job.with_settings({"dataset.num_clusters": guessed})
    steps = plan(guess)
    num_clusters = steps[-1].num_clusters
    budget.images = images
    budget.works = {
        step.name: _work(guess, step, images) for step in steps if step.trains and not step.reused
    }
    other = [] if listed is None else [Part("images", "decoding", listed.seconds)]
    if known is None:
        costs = next(iter(budget.works.values())).costs
        other.append(estimate_part(len(images), costs))
    names = list(budget.works)
    seconds = sum(part.seconds or 0.0 for part in other)
    lowered = budget.lowered(job, names, num_clusters, seconds)
    works = [work.part(images, num_clusters, lowered) for work in budget.works.values()]
    parts = _in_order(other, works, steps)
    idle = min(work.costs.idle for work in budget.works.values())
    said = [
        ("images", _images_line(images, listed)),
        *_how_lines(job, steps, known),
        *(_time_in_short(job, parts, idle) if job.plain else _time_lines(parts, idle)),
        *_budget_lines(job, budget, lowered, parts),
        ("results", str(steps[-1].folder.path)),
    ]
    show_plan(f"plan: {images.name}", said)
    return job.with_settings(lowered)


def show_plan(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Show a block of named lines: framed on a terminal, plain lines in a log."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {printable(text)}" for name, text in rows]
    if sys.stderr.isatty():
        body = Text("\n".join(lines))
        Console(stderr=True).print(Panel(body, title=title, title_align="left", expand=False))
        return
    logger.info("%s\n  %s", title, "\n  ".join(lines))


def span(seconds: float | None) -> str:
    """Return a time for people.

    >>> span(0.2), span(90), span(7200), span(20 * 86400)
    ('0.1 min', '1.5 min', '2.0 h', '20 days')
    """
    if seconds is None:
        return "not known"
    if seconds < LONG_S:
        return f"{max(seconds / 60, 0.1):.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


def _to_decode(job: Job, opened: JobImages) -> Survey | None:
    """Return what a folder holds whose images have still to be decoded, if that takes long."""
    found = opened.survey(job)
    return found if found is not None and found.seconds > DECODED_FIRST_S else None


def _stand_in(job: Job, listed: Survey) -> ImageSet:
    """Return a data set of as many images without their pixels, which take no memory."""
    size = int(job.cfg.dataset.image_size)
    shape = (listed.num_images, 3, size, size)
    pixels = np.broadcast_to(np.zeros(1, np.uint8), shape)
    labels = None
    if job.cfg.dataset.labels != "none":
        labels = np.zeros(listed.num_images, np.int64)
    names = range(listed.num_images)
    return ImageSet(str(job.cfg.dataset.name), pixels, names, "", labels=labels)  # type: ignore[arg-type]


def _opened(job: Job, opened: JobImages) -> ImageSet:
    given = job.cfg.dataset.num_clusters
    unknown = given is None or given == "auto"
    images = opened(job.with_settings({"dataset.num_clusters": None}).cfg if unknown else job.cfg)
    check_distinct(images, 2 if unknown else int(given))
    return images


def _work(job: Job, step: Step, images: ImageSet) -> Work:
    """Build a stage and measure it."""
    own, _ = fitted(step.name, step.own, images, step.num_clusters, job.overrides)
    module, streams = build_stage(job, step, images)
    views = {name: view for stream in streams.values() for name, view in stream.views.items()}
    views["plain"] = build(job.cfg, step.settings["augment"]["plain"])
    settings = step.settings["trainer"]
    precision, accelerator = str(settings["precision"]), str(settings["accelerator"])
    if precision == "auto":
        precision = auto_precision(accelerator)
    device = _device(settings)
    costs = measure(module, views, images.images.shape[-1], device=device, precision=precision)
    if device != "cpu":
        ranks = num_ranks(job.cfg)
        shared = {name: cost / ranks for name, cost in costs.views.items()}
        costs = replace(costs, encode=costs.encode / ranks, train=costs.train / ranks, views=shared)
    return Work(step, own, costs)


def _device(settings: Mapping[str, Any]) -> str:
    """Return the device that a trainer with these settings uses on this machine."""
    return "cuda" if on_gpu(settings) else "cpu"


def _in_order(other: Sequence[Part], works: Sequence[Part], steps: Sequence[Step]) -> list[Part]:
    """Return the lines in the order of the work: decoding, first stage, estimate of K, the rest."""
    decoding = [part for part in other if part.name == "images"]
    estimate = [part for part in other if part.name != "images"]
    first = [part for part in works if part.name == steps[0].name]
    return [*decoding, *first, *estimate, *(part for part in works if part not in first)]


def _images_line(images: ImageSet, listed: Survey | None) -> str:
    if listed is not None:
        left_out = f"{len(listed.left_out):,} other files left out{listed.left_out.summary()}"
        return f"{listed.num_images:,} found, to be decoded; {left_out}"
    reasons = Counter(reason for _, reason in images.skipped)
    more = len(reasons) - 3
    said = [f"{count:,} {reason}" for reason, count in reasons.most_common(3)]
    said += [f"{more} other reasons"] if more > 0 else []
    left_out = f"{images.num_skipped:,} left out" + (f" ({'; '.join(said)})" if said else "")
    return f"{len(images):,} used, {left_out}"


def _how_lines(job: Job, steps: Sequence[Step], known: int | None) -> list[tuple[str, str]]:
    """Return where the features come from, and the number of clusters."""
    if not job.plain:
        return [("encoder", _encoder_line(job, steps)), ("clusters", _clusters_line(known, steps))]
    encoder = pretrained(str(job.cfg.encoder))
    lines = [("features", f"those of {encoder.name}, a network trained by {encoder.trained_by}")]
    number = "as many as the images show; dataset.num_clusters=N chooses their number"
    if known != 0:
        lines.append(("clusters", number if known is None else str(known)))
    return lines


def _encoder_line(job: Job, steps: Sequence[Step]) -> str:
    if OmegaConf.is_interpolation(job.cfg, "backbone"):  # recipe=pretrained
        encoder = pretrained(str(job.cfg.encoder))
        return f"{encoder.name}, trained by: {encoder.trained_by}; {encoder.reason}"
    if steps[0].name in ("embed", "import") or steps[0].upstream:
        return "as the settings of the backbone and the stages before give it"
    return "trained here from random weights"


def _clusters_line(known: int | None, steps: Sequence[Step]) -> str:
    if known is None:
        return "their number is estimated from the features (dataset.num_clusters=auto)"
    return str(known) if known else "not needed by these stages"


def span_of(seconds: float, idle: float) -> str:
    """Return a time for people, from that of an idle machine to that of now if they differ much.

    >>> span_of(90, 1.0), span_of(1200, 0.2), span_of(7200, 0.2)
    ('1.5 min', '4.0 to 20.0 min', '24.0 min to 2.0 h')
    """
    if idle > CALM:
        return span(seconds)
    low, high = span(idle * seconds), span(seconds)
    (number, unit), after = low.split(), high.split()[1]
    return f"{number if unit == after else low} to {high}"


def _time_in_short(job: Job, parts: Sequence[Part], idle: float) -> list[tuple[str, str]]:
    """Return the sum of all parts, and the parts, in one line."""
    known = [part for part in parts if part.seconds is not None]
    each = ", ".join(f"{job.part_name(part.name)} {span(part.seconds)}" for part in known)
    more = " and more" if len(known) < len(parts) else ""
    total = span_of(sum(part.seconds or 0.0 for part in known), idle)
    lines = [("time", f"{total}{more}" + (f" ({each})" if len(known) > 1 else ""))]
    return lines if idle > CALM else [*lines, BUSY]


def _time_lines(parts: Sequence[Part], idle: float) -> list[tuple[str, str]]:
    """Return one line per part, and their sum."""
    sums = [part.seconds for part in parts if part.seconds is not None]
    rows = [(part.name, part.what, span(part.seconds)) for part in parts]
    more = ", and more" if len(sums) < len(rows) else ""
    rows.append(("in all", "", span_of(sum(sums), idle) + more))
    names, whats = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [
        ("time here" if i == 0 else "", f"{name:{names}}  {what:{whats}}  {time:>9}")
        for i, (name, what, time) in enumerate(rows)
    ]
    return lines if idle > CALM else [*lines, BUSY]


def _budget_lines(
    job: Job, budget: Budget, values: Mapping[str, int], parts: Sequence[Part]
) -> list[tuple[str, str]]:
    """Return what `minutes` lowers, or how a long job gets shorter."""
    seconds = sum(part.seconds or 0.0 for part in parts)
    lines = []
    if budget.minutes is not None:
        changes = [
            f"{key} {before} -> {value}"
            for key, value in values.items()
            if (before := OmegaConf.select(job.cfg, key)) != value
        ]
        said = ", ".join(changes) or "nothing has to be lowered"
        lines.append((f"minutes={budget.minutes:g}", f"{said}; settled when the stage starts"))
        if seconds > 72 * budget.minutes:  # more than 20 % over
            lines.append(("", f"even the smallest run takes {span(seconds)}; it continues"))
    elif seconds > LONG_S and not OmegaConf.is_interpolation(job.cfg, "backbone"):
        epochs = " ".join(f"{part.name}.epochs=10" for part in parts if "epochs" in part.what)
        short = "recipe=pretrained takes the features of a pretrained network and needs minutes"
        lines.append(("shorter", f"{short}; or minutes=N, or fewer epochs: {epochs}"))
    return lines
