"""How long each step of a job takes on this machine, by its settings and by what parts cost here.

Shapes: N images, n of them for training, M images of a cycle, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spice_pl.data.images import ImageSet
from spice_pl.job.costs import ROWS, Costs
from spice_pl.job.plan import Step
from spice_pl.runs.results import log_lines

START_S = 2.5  # of a stage: trainer, files
WATCHED = 2000  # images of a validation
ESTIMATED_FROM = 2000  # images that K is estimated from
# How often a step does the work that `Costs.rows` measures, found by timing both.
ESTIMATE_K = (70.0, 85.0)  # k-means: at all, and per 1,000 images
CHOICE = (36.0, 20.0)  # of the clusters to keep, with smoothing: likewise
SEARCHES = 3  # for neighbours
SHOWN = 12  # images per cluster whose attention is computed
ATTENTION = 5.5  # as many times the cost of the encoder
PAGE_S = 5.0  # most of it is the t-SNE of the map


@dataclass(frozen=True)
class Part:
    """A line of the plan.

    Attributes:
        name: stage or task.
        what: what it does.
        seconds: time that it takes; None where it is not known.
    """

    name: str
    what: str
    seconds: float | None


def stage_part(
    step: Step, own: Mapping[str, Any], images: ImageSet, num_clusters: int, costs: Costs
) -> Part:
    """Return the line of a stage that trains or makes features.

    Args:
        step: the stage.
        own: its settings, fitted to the data.
        images: the data set; its pixels are not read.
        num_clusters: K, or a guess of it.
        costs: what its parts cost.
    """
    kind = str(own["module"]["_target_"]).rpartition(".")[2]
    passes = len(images) * (costs.encode + costs.views["plain"])
    end = START_S + passes
    if kind in ("EmbedModule", "ImportModule"):
        searched = (
            _search_seconds(len(images), costs) if step.settings["embeddings"] != "cosine" else 0.0
        )
        return Part(step.name, "features of the encoder", end + searched)
    epochs = step.epochs - epochs_done(step)
    if kind == "ProtoHeadModule":
        views, heads = _proto_seconds(own, images, num_clusters, costs, epochs)
        page = START_S + _page_seconds(len(images), num_clusters, costs)
        return Part(step.name, "views, cluster heads, report", views + heads + page)
    if kind == "KMeansModule":
        seconds = START_S + len(images) * costs.views["plain"]
        seconds += _page_seconds(len(images), num_clusters, costs)
        return Part(step.name, "k-means, a head, report", seconds)
    epoch = _epoch_seconds(kind, own, images, costs)
    if epoch is None:
        what = "a stage of your own" if own["streams"] else "heads on stored features"
        return Part(step.name, what, None)
    watched = min(WATCHED, len(images)) * costs.encode / step.watch_epochs
    clusters = step.name not in ("moco", "simclr", "empssl", "vicreg", "fastsiam")
    page = _page_seconds(len(images), num_clusters, costs) if clusters else 0.0
    what = f"{epochs} epochs of training" + (", report" if clusters else "")
    return Part(step.name, what, epochs * (epoch + watched) + end + page)


def estimate_part(num_images: int, costs: Costs) -> Part:
    """Return the line of the estimate of K."""
    count = min(num_images, ESTIMATED_FROM)
    return Part("estimate_k", "number of clusters", 1.0 + _times(ESTIMATE_K, count, costs.rows[0]))


def epochs_done(step: Step) -> int:
    """Return how many epochs an unfinished run has logged that this one continues."""
    if not step.continues:
        return 0
    done = [epoch + 1 for epoch, _ in log_lines(step.folder) if epoch is not None]
    return min(max(done, default=0), step.epochs)


def _proto_seconds(
    own: Mapping[str, Any], images: ImageSet, num_clusters: int, costs: Costs, epochs: int
) -> tuple[float, float]:
    """Return the seconds of views and of heads in stage 2."""
    module, num_train = own["module"], len(images.train_index)
    size = min(module["buffer_size"], num_train)
    slots = int(module["select_ratio"] * (size // num_clusters)) * num_clusters
    steps = module["repeats"] * (slots // module["head_batch_size"])
    cycle = steps * costs.head_step + size * costs.head_row
    heads = num_train // size * cycle + num_train * costs.head_row  # and the choice of a head
    pair = costs.views["weak"] + costs.views["strong"] + 2 * costs.encode
    if module["joint"] != "none":
        cycle_views = steps * module["head_batch_size"] * costs.train
        return epochs * (num_train * pair + num_train // size * cycle_views), epochs * heads
    if not module["view_bank"]:
        return epochs * num_train * pair, epochs * heads
    named = own["streams"]["images"]["views"]
    banked = sum(  # a plain view takes the stored features
        costs.views[name] + costs.encode
        for name in ("weak", "strong")
        if not str(named[name]["_target_"]).endswith(".PlainView")
    )
    return module["view_bank"] * num_train * banked, epochs * heads


def _epoch_seconds(
    kind: str, own: Mapping[str, Any], images: ImageSet, costs: Costs
) -> float | None:
    """Return the seconds of an epoch of a stage that trains the encoder; None if unknown."""
    module, streams = own["module"], own["streams"]
    if "labelled" in streams:
        labelled, unlabelled = streams["labelled"], streams["unlabelled"]
        few = labelled["batch_size"] * (costs.train + costs.views["weak"])
        many = costs.views["weak"] + costs.views["strong"] + 2 * costs.train
        step = few + unlabelled["batch_size"] * many
        return float(module["steps_per_epoch"] * step)
    if "images" not in streams:
        return None
    stream = streams["images"]
    drawn = len(images.drawn_index(extra=bool(stream.get("extra", False))))
    drawn = drawn // stream["batch_size"] * stream["batch_size"]
    views = sum(costs.views[name] for name in stream["views"])
    patches = sum(int(view.get("num_patches", 1)) for view in stream["views"].values())
    pixels = images.images.shape[-1]
    sizes = module.get("sizes") or [pixels]
    smaller = float(np.mean([(size / pixels) ** 2 for size in sizes]))
    by_kind = {
        "MoCoModule": (1 + bool(module.get("symmetric"))) * (costs.train + costs.encode),
        "SimCLRModule": 2 * costs.train,
        "EmpSSLModule": patches * costs.train,
        "VICRegModule": 2 * costs.train,
        "FastSiamModule": len(stream["views"]) * costs.train,
        "ContrastiveClusteringModule": 2 * costs.train,
        "ProPosModule": 2 * (costs.train + costs.encode) + costs.encode,  # and the E-step
        "DCBoostModule": 2 * (costs.train + costs.encode) + costs.encode,  # likewise
        "CdcModule": 2 * costs.train,
        "ScanModule": 2 * costs.train + views,  # an image and its partner
        "SelfLabelModule": 2 * costs.train,
    }
    if kind == "EmpSSLModule":  # its patches are made at their size, not scaled to it
        views *= smaller
    return drawn * (by_kind[kind] * smaller + views) if kind in by_kind else None


def _page_seconds(num_images: int, num_clusters: int, costs: Costs) -> float:
    """Return the seconds of the choice of clusters, attention and report."""
    choice = _times(CHOICE, num_images, costs.rows[0]) + _search_seconds(num_images, costs)
    shown = min(SHOWN * num_clusters, num_images)
    return choice + shown * ATTENTION * costs.encode + PAGE_S


def _search_seconds(num_images: int, costs: Costs) -> float:
    return SEARCHES * costs.rows[1] * (num_images / ROWS) ** 2


def _times(work: tuple[float, float], num_images: int, unit: float) -> float:
    return (work[0] + work[1] * num_images / 1000) * unit
