"""Kinds of values: which settings are whole numbers, numbers or true/false, and their ranges.

A setting has the kind of its last name wherever it is: `epochs` of every stage is a whole number
from 0. Settings of classes from other packages are left to those classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spice_pl.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """The values that a setting may have.

    Attributes:
        whole: whether only whole numbers are allowed.
        least: smallest value.
        most: largest value.
        words: other values, such as "auto"; None stands for null.
    """

    whole: bool
    least: float = -math.inf
    most: float = math.inf
    words: Sequence[str | None] = ()

    def allows(self, value: Any) -> bool:
        """Whether a setting may have this value."""
        if value in self.words:
            return True
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return math.isfinite(value) and self.least <= value <= self.most

    def __str__(self) -> str:
        text = "a whole number" if self.whole else "a number"
        if math.isfinite(self.most):
            text += f" from {self.least:,.15g} to {self.most:,.15g}"
        elif math.isfinite(self.least):
            text += f" of at least {self.least:g}"
        return " or ".join([text, *("null" if word is None else word for word in self.words)])


def _kinds(kind: Kind, *names: str) -> dict[str, Kind]:
    return dict.fromkeys(names, kind)


NUMBERS = {
    **_kinds(
        Kind(whole=True, least=0),
        *("epochs", "warmup_epochs", "known_images", "first_head", "padding", "max_cutout"),
        *("num_ops", "num_nearest", "num_nulls", "num_pictures", "num_viewed", "compare_at_most"),
    ),
    **_kinds(
        Kind(whole=True, least=1),
        *("watch_epochs", "batch_size", "head_batch_size", "buffer_size", "queue_size", "repeats"),
        *("steps_per_epoch", "kmeans_steps", "num_heads", "num_neighbors", "num_samples"),
        *("num_splits", "num_components", "max_samples", "projection_dim", "bn_groups"),
        *("image_size", "pixels"),
    ),
    **_kinds(Kind(whole=True, least=1, words=(None,)), "hidden_dim", "view_bank", "num_labels"),
    **_kinds(Kind(whole=True, words=(None,)), "limit"),
    **_kinds(Kind(whole=True, words=(None, "auto")), "num_clusters"),
    **_kinds(Kind(whole=True), "largest", "num_folds", "port"),
    **_kinds(Kind(whole=True, least=0, most=2**32 - 1), "seed"),
    **_kinds(
        Kind(whole=False, least=0),
        *("lr", "weight_decay", "checkpoint_minutes", "unlabeled_weight", "entropy_weight"),
        *("scattering_weight", "noise"),
        *("kmeans", "negative", "fairness", "num_sigmas"),
    ),
    **_kinds(Kind(whole=False, least=0, words=(None,)), "encoder_lr", "max_decode_mb"),
    **_kinds(
        Kind(whole=False, least=0, most=1),
        *("momentum", "sgd_momentum", "ema_decay", "flip", "blur_prob", "gray_prob"),
        *("jitter_prob", "min_scale"),
    ),
    # Their own checks say more about the range.
    **_kinds(
        Kind(whole=False),
        *("agreement", "confidence", "fraction", "temperature", "entropy", "confident_ratio"),
        "cluster_temperature",
        *("select_ratio", "inverse_penalty"),
    ),
    **_kinds(Kind(whole=False, words=(None,)), "imbalance"),
}
SWITCHES = ("resume", "overwrite", "extra", "overlap", "partial", "symmetric", "pretrained")


def check_values(cfg: DictConfig) -> None:
    """Refuse a value that is not of its setting's kind.

    Args:
        cfg: all settings of a job. What an interpolation refers to is checked at its own key.

    Raises:
        UsageError: names the setting, its value and what is allowed.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    for key, value in _leaves(settings):
        name = key.rpartition(".")[2]
        if isinstance(value, str) and "${" in value:
            continue
        if name in SWITCHES and not isinstance(value, bool):
            raise UsageError(f"{key}={value} is not true or false; give one of the two")
        if name in NUMBERS and not NUMBERS[name].allows(value):
            shown = "null" if value is None else value
            raise UsageError(f"{key}={shown} is not {NUMBERS[name]}; give one")


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values, without the settings of classes from other packages."""
    target = settings.get("_target_", "spice_pl.")
    if not str(target).startswith(("spice_pl.", "${")):
        return
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
