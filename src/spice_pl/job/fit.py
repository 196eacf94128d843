"""Sizes that a small data set cannot fill, lowered to what it can: queue, batches, slots.

A size that the command line names stays as it is, and the stage refuses it if it does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from spice_pl.data.images import ImageSet


def fitted(
    name: str, own: Mapping[str, Any], images: ImageSet, num_clusters: int, given: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a stage fitted to a data set, and what was lowered in words.

    Args:
        name: name of the stage.
        own: its settings.
        images: the data set.
        num_clusters: K; 0 while it is unknown.
        given: overrides of the command line.
    """
    changes: list[str] = []
    own = copy.deepcopy(dict(own))

    def lower(settings: dict[str, Any], place: str, key: str, most: int) -> None:
        named = any(text.lstrip("+").startswith(f"{name}.{place}{key}=") for text in given)
        if key in settings and settings[key] > most and not named:
            changes.append(f"{name}.{place}{key} {settings[key]} -> {most}")
            settings[key] = most

    for stream, settings in own["streams"].items():
        drawn = len(images.drawn_index(extra=bool(settings.get("extra", False))))
        if stream != "labelled":  # drawn from the images that get a label, as often as needed
            lower(settings, f"streams.{stream}.", "batch_size", drawn)
        if "queue_size" in own["module"]:  # else an image would meet older keys of itself
            lower(own["module"], "module.", "queue_size", drawn)
    module = own["module"]
    if "head_batch_size" in module and num_clusters:
        buffer = min(module["buffer_size"], len(images.train_index))
        slots = int(module["select_ratio"] * (buffer // num_clusters)) * num_clusters
        lower(module, "module.", "head_batch_size", max(slots, 1))
    return dict(own), changes
