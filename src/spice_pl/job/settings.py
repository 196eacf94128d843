"""From composed settings to values and objects; the only place that calls what `_target_` names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spice_pl.errors import UsageError
from spice_pl.system.building import ARGS, BuildError, build_plain, locate

# Where what settings may make is defined: networks, views, data sets, stages, loggers, trainers.
# Whole packages would be too much: torch.hub.load and torch.utils.cpp_extension.load run any code.
ALLOWED_TARGETS = (
    *("spice_pl.callbacks.", "spice_pl.data.", "spice_pl.functional.", "spice_pl.nn."),
    *("spice_pl.stages.", "spice_pl.tasks.", "torch.nn.", "torch.optim."),
    *("torchvision.models.", "torchvision.transforms.", "pytorch_lightning.callbacks."),
    *("pytorch_lightning.loggers.", "pytorch_lightning.plugins.", "pytorch_lightning.profilers."),
    *("pytorch_lightning.strategies.", "pytorch_lightning.trainer."),
)
# Allowed by this name alone: timm's other functions can be asked to load pickles.
ALLOWED_NAMES = (
    *("timm.create_model", "pytorch_lightning.Trainer"),
    "spice_pl.models.interop.load_encoder",  # reads weights only
)
# Arguments of timm.create_model that may name files, which older releases of timm unpickle.
TIMM_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", ARGS)
# Modules that moved: saved settings and the conf files of users still name the old ones.
MOVED = {
    "spice_pl.callbacks.curves.": "spice_pl.callbacks.metrics_csv.",
    "spice_pl.data.archives.hugging_": "spice_pl.data.sources.hugging_face.hugging_",
    "spice_pl.data.archives.": "spice_pl.data.sources.archives.",
    "spice_pl.data.arrays.": "spice_pl.data.sources.arrays.",
    "spice_pl.data.sources.archives.hugging_": "spice_pl.data.sources.hugging_face.hugging_",
    "spice_pl.data.augment.MoCoView": "spice_pl.data.crop_views.MoCoView",
    "spice_pl.data.datasets.": "spice_pl.data.sources.torchvision.",
    "spice_pl.data.folder.": "spice_pl.data.sources.folder.",
    "spice_pl.data.imagenet.": "spice_pl.data.sources.imagenet.",
    "spice_pl.interop.": "spice_pl.models.interop.",
    "spice_pl.sweep.": "spice_pl.job.sweep.",
}
# Ends of names whose values are written down as ***.
SECRET = re.compile(
    r"((token|secret|password|passwd|passphrase|pwd|credential)s?"
    r"|(access|api|auth|private|secret|signing)[-_ ]?keys?|(^|[._-])(pass|auth))$",
    re.IGNORECASE,
)
# A password in a URL, scheme://user:password@host; a port is none, scheme://host:80/name@2.
URL_PASSWORD = re.compile(r"(\w://[^\s/:@]*:)(?!\d{1,5}([/?#]|$))\S+@")


def build(cfg: DictConfig, value: Any, **more: Any) -> Any:
    """Build what `_target_` names, if it lies in a package that may be called.

    Interpolations are resolved once, each in the config it stands in. What comes out is plain data:
    it is checked, and built as it is.

    Args:
        cfg: the whole config, for `allow_targets`.
        value: settings with a `_target_`, or plain ones, which come back as they are.
        more: arguments that only the run knows.

    Raises:
        UsageError: the target lies outside these packages, or it refused a value.
    """
    trusted = [str(name) for name in plain(cfg.allow_targets)]
    try:
        return build_plain(plain(value), _rule(trusted), **more)
    except BuildError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):  # said by the callable itself: clear enough
            raise UsageError(str(cause)) from cause
        raise UsageError(
            f"{error.target} cannot be made from its settings: {cause}; `--cfg job` shows them"
        ) from cause


def plain(value: Any) -> Any:
    """Return settings as dictionaries, lists and values, every interpolation resolved once."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def current_target(name: str) -> str:
    """Return the name that a `_target_` has today, if its module moved.

    >>> current_target("spice_pl.data.datasets.cifar10")
    'spice_pl.data.sources.torchvision.cifar10'
    """
    for old, new in MOVED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _rule(trusted: list[str]) -> Callable[[str, dict[str, Any]], Any]:
    """What settings may call, with packages that the user trusts."""
    allowed = (*ALLOWED_TARGETS, *(f"{name}." for name in trusted))

    def rule(target: str, given: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
        name = current_target(target)
        if name != target:
            warnings.warn(
                f"{target} is now {name}; the old name goes in release 0.3",
                FutureWarning,
                stacklevel=2,
            )
        try:
            found = locate(name, allowed, ALLOWED_NAMES)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"_target_ {name} cannot be imported ({error}); correct it, or install its package"
            ) from error
        if found is None:
            raise UsageError(
                f"_target_ {target} lies outside {', '.join(allowed)}; if you trust it, add "
                f"allow_targets=[{target.partition('.')[0]}]"
            )
        _check_arguments(name, given, trusted)
        return found, given

    return rule


def _check_arguments(name: str, given: Mapping[str, Any], trusted: list[str]) -> None:
    """Refuse arguments that would call, or read code from, what the user has not allowed."""
    if given.get("allow_targets", trusted) != trusted:
        raise UsageError(
            f"{name} has allow_targets={given['allow_targets']} and the job has {trusted}; leave "
            "the former out, and give it for the job if you trust these packages"
        )
    if name == "timm.create_model" and "timm" not in trusted:
        files = [key for key in TIMM_FILES if given.get(key)]
        if files or str(given.get("model_name")).startswith("local-dir:"):
            key = files[0] if files else "model_name"
            raise UsageError(
                f"{key}={given[key]} of timm.create_model may read a file that holds code; give "
                "weights as embed.module.weights=FILE, or add allow_targets=[timm] if you trust it"
            )


def masked(name: str, value: Any) -> Any:
    """Return a setting as it may be written down, without the values of secrets.

    A secret is any text or number below a key that names one, and the password in a URL.
    """
    if isinstance(value, Mapping):
        hidden = bool(SECRET.search(name))
        return {key: masked(name if hidden else str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(name, item) for item in value]
    if SECRET.search(name) and value is not None and not isinstance(value, bool):
        return "***"
    return URL_PASSWORD.sub(r"\1***@", value) if isinstance(value, str) else value


def masked_override(text: str) -> str:
    """Return a `key=value` of the command line as it may be written down.

    A value that holds a secret anywhere is left out as a whole.

    >>> masked_override("logger.wandb.api_key=abc"), masked_override("seed=3")
    ('logger.wandb.api_key=***', 'seed=3')
    >>> masked_override("+note={api_key: abc, n: 1}")
    '+note=***'
    """
    key, equals, value = text.partition("=")
    names = re.findall(r"([^,{}\[\]():=]+)[:=]", re.sub(r"[\\'\"]", "", text))
    if equals and value and any(SECRET.search(name.strip()) for name in names):
        return f"{key}=***"
    return URL_PASSWORD.sub(r"\1***@", text)


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
