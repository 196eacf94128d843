"""Sizes that a small data set cannot fill, changed to what it can: queue, batches, neighbours.

A size that the command line names stays as it is, and the stage refuses it if it does not fit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.reliability import neighbors_for

RELIABLE, ORACLE = "reliable_labels", "OracleLabels"  # selectors of a semi-supervised stage


def fitted(
    name: str, own: Mapping[str, Any], images: ImageSet, num_clusters: int, given: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a stage fitted to a data set, and what was changed in words.

    Args:
        name: name of the stage.
        own: its settings.
        images: the data set.
        num_clusters: K; 0 while it is unknown.
        given: overrides of the command line.

    Raises:
        UsageError: a semi-supervised stage could label no image, whatever the stages before give.
    """
    changes: list[str] = []
    fit = copy.deepcopy(dict(own))
    module, num_train = fit["module"], len(images.train_index)

    def change(settings: dict[str, Any], place: str, key: str, value: Any) -> None:
        if not is_named(f"{place}.{key}", given):
            changes.append(f"{place}.{key} {settings[key]} -> {value}")
            settings[key] = value

    def lower(settings: dict[str, Any], place: str, key: str, most: int) -> None:
        if key in settings and settings[key] > most:
            change(settings, place, key, most)

    for stream, settings in fit["streams"].items():
        drawn = len(images.drawn_index(extra=bool(settings.get("extra", False))))
        groups = int(module.get("bn_groups", 1))  # which a batch is divided into evenly
        if stream != "labelled":  # drawn from the images that get a label, as often as needed
            most = max(drawn - drawn % groups, 1)
            lower(settings, f"{name}.streams.{stream}", "batch_size", most)
        if "queue_size" in module:  # else an image would meet older keys of itself
            lower(module, f"{name}.module", "queue_size", drawn)
    if not num_clusters:
        return fit, changes
    if "head_batch_size" in module:
        buffer = min(module["buffer_size"], num_train)
        slots = int(module["select_ratio"] * (buffer // num_clusters)) * num_clusters
        lower(module, f"{name}.module", "head_batch_size", max(slots, 1))
    if "num_neighbors" in module:  # more than a cluster has would pull clusters together
        most = neighbors_for(module["num_neighbors"], num_train, num_clusters)
        lower(module, f"{name}.module", "num_neighbors", most)
    selector = module.get("selector")
    if isinstance(selector, dict) and 0 < selector.get("fraction", 1) < 1:
        share = num_train // num_clusters
        if share and math.floor(share * selector["fraction"] + 1e-9) < 1:  # not one per cluster
            least = math.ceil(1000 / share) / 1000
            change(selector, f"selectors.{fit['selector']}", "fraction", least)
    check_chance(name, fit, images, num_clusters)
    return fit, changes


def is_named(key: str, given: Sequence[str]) -> bool:
    """Return whether the command line gives a value to a setting."""
    return any(text.lstrip("+").startswith(f"{key}=") for text in given)


def check_chance(name: str, own: Mapping[str, Any], images: ImageSet, num_clusters: int) -> None:
    """Refuse a semi-supervised stage that can label no image, before the stages that it reads.

    Args:
        name: name of the stage.
        own: its settings, fitted.
        images: the data set.
        num_clusters: K.

    Raises:
        UsageError: no image can pass the rules of the selector.
    """
    selector = own["module"].get("selector")
    if not isinstance(selector, Mapping):
        return
    kind = str(selector.get("_target_", "")).rpartition(".")[2]
    if kind == RELIABLE:
        _check_reliable(selector)
    if kind == ORACLE and images.labels is None:
        raise UsageError(
            f"{images.name} has no true labels, which {name}.selector={own['selector']} asks for; "
            "take a selector that needs none (reliable, centroid, variance, confident)"
        )
    fraction, share = selector.get("fraction"), len(images.train_index) // num_clusters
    if fraction is not None and not 1 <= math.floor(share * fraction + 1e-9) <= share:
        raise UsageError(
            f"selectors.{own['selector']}.fraction {fraction} of {share} images per cluster labels "
            f"{math.floor(share * fraction + 1e-9)} of them, so {name} cannot train; give "
            f"{math.ceil(1000 / max(share, 1)) / 1000:g} to 1, fewer clusters or more images"
        )


def _check_reliable(selector: Mapping[str, Any]) -> None:
    """Refuse thresholds that no image can pass, whatever the stages before give (Eqs. 6-7)."""
    for key, rule, possible, example in (
        ("agreement", "is a share of neighbours, at most 1", selector["agreement"] <= 1, 0.95),
        ("confidence", "must be exceeded by a probability", selector["confidence"] < 1, 0.99),
        ("num_neighbors", "counts the image itself", selector["num_neighbors"] >= 1, 100),
    ):
        if not possible:
            raise UsageError(
                f"reliable.{key}={selector[key]} lets no image count as reliable: it {rule}; give "
                f"a value such as {example}"
            )
