"""From composed settings to values and objects; the only place that calls what `_target_` names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from spice_pl.errors import UsageError

# Where what settings may make is defined: networks, views, data sets, stages, loggers, trainers.
# Whole packages would be too much: torch.hub.load and torch.utils.cpp_extension.load run any code.
ALLOWED_TARGETS = (
    *("spice_pl.callbacks.", "spice_pl.data.", "spice_pl.functional.", "spice_pl.nn."),
    *("spice_pl.stages.", "spice_pl.tasks.", "torch.nn.", "torch.optim."),
    *("torchvision.models.", "torchvision.transforms.", "pytorch_lightning.callbacks."),
    *("pytorch_lightning.loggers.", "pytorch_lightning.plugins.", "pytorch_lightning.profilers."),
    *("pytorch_lightning.strategies.", "pytorch_lightning.trainer."),
)
# What a class or function says of values that do not fit it.
REFUSALS = (TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError)
# Allowed by this name alone: timm's other functions can be asked to load pickles.
ALLOWED_NAMES = (
    *("timm.create_model", "pytorch_lightning.Trainer"),
    "spice_pl.models.interop.load_encoder",  # reads weights only
)
SECRET = re.compile(
    r"(^|[._])(token|secret|password|passwd|credentials?|api_?key|private_?key)$", re.IGNORECASE
)


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
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    for target in _targets(value):
        if not _is_within(target, allowed):
            raise UsageError(
                f"_target_ {target} lies outside {', '.join(allowed)}; if you trust it, add "
                f"allow_targets=[{target.partition('.')[0]}]"
            )
    try:
        return hydra.utils.instantiate(value, **more, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):  # said by the callable itself: clear enough
            raise UsageError(str(cause)) from error
        if isinstance(cause, REFUSALS):
            what = next(_targets(value), "it")
            raise UsageError(
                f"{what} cannot be made from its settings: {cause}; `--cfg job` shows them"
            ) from error
        raise


def _targets(value: Any) -> Iterator[str]:
    """Every `_target_` in nested settings, those inside lists too."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_":
                yield str(item)
            else:
                yield from _targets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _targets(item)


def masked(name: str, value: Any) -> Any:
    """Return a setting as it may be written down: no value of a key that names a secret."""
    if isinstance(value, Mapping):
        return {key: masked(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(name, item) for item in value]
    return "***" if isinstance(value, str) and SECRET.search(name) else value


def masked_override(text: str) -> str:
    """Return a `key=value` of the command line as it may be written down.

    >>> masked_override("logger.wandb.api_key=abc"), masked_override("seed=3")
    ('logger.wandb.api_key=***', 'seed=3')
    """
    key, equals, value = text.partition("=")
    return f"{key}=***" if equals and value and SECRET.search(key) else text


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
    """Whether a target is named, and defined, in one of these places (torch.nn.os is not torch.nn).

    A public class or function of a module only: a method could belong to anything, and an instance
    can claim any home.
    """
    if target in ALLOWED_NAMES:
        return True
    if not target.startswith(allowed) or target.rpartition(".")[2].startswith("_"):
        return False
    try:
        found = hydra.utils.get_object(target)
    except Exception:  # a module that cannot be imported, in any way; instantiate says so
        return True
    if not isinstance(found, type | FunctionType) or "." in found.__qualname__:
        return False
    return f"{found.__module__}.".startswith(allowed)
