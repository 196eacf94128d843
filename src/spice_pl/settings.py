"""From composed settings to values and objects; the only place that calls what `_target_` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from spice_pl.errors import UsageError

ALLOWED_TARGETS = ("spice_pl.", "torch.", "torchvision.", "timm.", "pytorch_lightning.")


def build(cfg: DictConfig, value: Any, **more: Any) -> Any:
    """Instantiate what `_target_` names, if it lies in a package that may be called.

    Args:
        cfg: the whole config, for `allow_targets`.
        value: settings with a `_target_`, or plain ones, which come back as they are.
        more: arguments that only the run knows.

    Raises:
        UsageError: the target lies outside these packages, or it refused a value.
    """
    allowed = (*ALLOWED_TARGETS, *(f"{name}." for name in cfg.allow_targets))
    for key, target in flat(value).items():
        if key.rpartition(".")[2] == "_target_" and not _is_within(str(target), allowed):
            raise UsageError(
                f"_target_ {target} lies outside {', '.join(allowed)}; if you trust it, add "
                f"allow_targets=[{str(target).partition('.')[0]}]"
            )
    try:
        return hydra.utils.instantiate(value, **more, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # said by the callable itself: clear enough
            raise UsageError(str(error.__cause__)) from error
        raise


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted keys."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if not isinstance(value, Mapping):
        return {prefix: value}
    level: dict[str, Any] = {}
    for key, item in value.items():
        level |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return level


def missing(value: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys that must be given and were not."""
    if not isinstance(value, DictConfig):
        return []
    found = []
    for key in map(str, value):
        name = prefix + key
        if OmegaConf.is_missing(value, key):
            found.append(name)
        elif not OmegaConf.is_interpolation(value, key):
            found += missing(value[key], f"{name}.")
    return found


def _is_within(target: str, allowed: tuple[str, ...]) -> bool:
    """Whether a target is named, and defined, in one of these packages (torch.os is not torch)."""
    if not target.startswith(allowed):
        return False
    try:
        home = getattr(hydra.utils.get_object(target), "__module__", None)
    except (ImportError, AttributeError, ValueError):
        return True  # there is no such thing; instantiate says so
    return f"{home}.".startswith(allowed)
