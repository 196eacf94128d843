"""Check what Hydra itself would call, before it does.

Callbacks, launcher, sweeper and logging are made from Hydra's own settings (`hydra.*`) before a
job starts, and any file of settings may hold some. `checked_hydra` lets Hydra compose with a loader
that checks these settings each time: for a run, for `--cfg`, and for every trial of a sweep, in the
worker processes of joblib too.

Names must be written out there. Hydra resolves interpolations when it builds, after any check.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal import hydra as composing
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from spice_pl.errors import UsageError
from spice_pl.job.settings import current_target
from spice_pl.system.output import escaped

# Parts of Hydra's settings from which it makes objects.
PARTS = ("callbacks", "launcher", "sweeper", "hydra_logging", "job_logging")
# Keys whose value Hydra, a plugin or logging.config calls.
CALLING = ("_target_", "()", "class", "custom_search_space")
# Keys of plugins that run shell commands or may read pickles (optuna's storage=redis://...).
REACHING = ("setup", "additional_parameters", "storage")
CALLED = (
    "spice_pl.job.sweep.CompareTrials",
    "hydra.experimental.callbacks.LogJobReturnCallback",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    *(
        f"optuna.samplers.{name}Sampler"
        for name in ("CmaEs", "Grid", "MOTPE", "NSGAII", "Random", "TPE")
    ),
    *("logging.FileHandler", "logging.NullHandler", "logging.StreamHandler", "logging.Formatter"),
)
# Interpolations in Hydra's own defaults; all are of typed text.
DEFAULTS = (
    "${hydra.job.name}",
    "hydra-${hydra.job.name}.log",
    "${hydra.runtime.output_dir}/${hydra.job.name}.log",
    "${hydra.sweep.dir}/.submitit/%j",
)


@contextmanager
def checked_hydra() -> Iterator[None]:
    """Have Hydra compose with `CheckedLoader`; it has no hook between composing and building."""
    before = composing.ConfigLoaderImpl  # type: ignore[attr-defined]
    composing.ConfigLoaderImpl = CheckedLoader  # type: ignore[attr-defined]
    try:
        yield
    finally:
        composing.ConfigLoaderImpl = before  # type: ignore[attr-defined]


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's loader of settings, which ends the process where `check_composed` refuses them."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **more: Any
    ) -> DictConfig:
        """Compose and check; see `ConfigLoaderImpl.load_configuration`."""
        cfg = super().load_configuration(config_name, overrides, *args, **more)
        try:
            check_composed(cfg, overrides)
        except UsageError as error:
            print(escaped(f"\nerror: {error}"), file=sys.stderr)
            raise SystemExit(2) from error
        _rename_moved(cfg)
        return cfg


def check_composed(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse settings of Hydra that would call or read what the user did not allow.

    Args:
        cfg: composed, with the node `hydra`.
        overrides: of the command line, the only place where `allow_targets` counts.

    Raises:
        UsageError: a name in `hydra.*` is not one of `CALLED` and lies outside `allow_targets`, an
            interpolation stands there, `hydra.job.env_set` is used, or a file sets `allow_targets`.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    hydra = raw.pop("hydra")
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    for path, value in _allowing(raw):
        if value not in (None, [], "${allow_targets}") and path not in given:
            raise UsageError(
                f"{path}={value} is set by a file of settings; if you trust these packages, give "
                "allow_targets=[...] on the command line"
            )
    trusted = tuple(f"{name}." for name in raw.get("allow_targets") or ())
    for part in PARTS:
        _check(hydra[part], f"hydra.{part}", trusted)
    env_set = hydra["job"]["env_set"]
    _check(env_set, "hydra.job.env_set", trusted)
    for name, text in env_set.items():  # env_copy adds variables as they are
        if os.environ.get(name) != text:
            raise UsageError(
                f"hydra.job.env_set.{name} sets a variable that this job's processes would follow; "
                f"set it in the shell: {name}=... before the command"
            )


def _allowing(raw: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys named allow_targets, and their values."""
    items: Any = ()
    if isinstance(raw, Mapping):
        items = raw.items()
    elif isinstance(raw, list):
        items = enumerate(raw)
    for key, value in items:
        if key == "allow_targets":
            yield f"{path}{key}", value
        yield from _allowing(value, f"{path}{key}.")


def _check(value: Any, path: str, trusted: tuple[str, ...]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in CALLING and item is not None:
                _check_name(item, f"{path}.{key}", trusted)
            elif key in REACHING and item and "hydra_plugins." not in trusted:
                raise UsageError(
                    f"{path}.{key}={item} may run commands or code; leave it out, or add "
                    "allow_targets=[hydra_plugins] on the command line if you trust it"
                )
            else:
                _check(item, f"{path}.{key}", trusted)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, f"{path}.{i}", trusted)
    elif isinstance(value, str):
        if value.startswith("ext://") and value not in ("ext://sys.stdout", "ext://sys.stderr"):
            _check_name(value.removeprefix("ext://"), path, trusted)
        if "${" in value and value not in DEFAULTS:
            raise UsageError(
                f"{path}={value} holds an interpolation, which Hydra would resolve after this "
                "check; write out its value"
            )
        if "\n" in value and path.startswith("hydra.launcher"):  # a script of SLURM has lines
            raise UsageError(f"{path}={value!r} has more than one line; give one")


def _check_name(name: Any, path: str, trusted: tuple[str, ...]) -> None:
    if not isinstance(name, str) or not (
        current_target(name) in CALLED or name.startswith(trusted)
    ):
        raise UsageError(
            f"{path}={name} would be called by Hydra before the job starts; leave it out, or add "
            f"allow_targets=[{str(name).partition('.')[0]}] on the command line if you trust it"
        )


def _rename_moved(cfg: DictConfig) -> None:
    """Give callbacks of earlier releases the names that they have today."""
    for node in cfg.hydra.callbacks.values():
        old = node["_target_"]
        if (new := current_target(old)) != old:
            node["_target_"] = new
            warnings.warn(
                f"{old} is now {new}; the old name goes in release 0.3", FutureWarning, stacklevel=2
            )
