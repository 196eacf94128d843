"""Hydra's loader of settings, with mistakes of the command line said in our words.

Hydra's own message for an unknown key advises to add it with "+", and then the job trains with a
setting that nothing reads. Here an unknown key is refused, with or without "+", and the nearest
name is given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from hydra._internal import hydra as composing
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spice_pl.errors import UsageError
from spice_pl.job.guard import CheckedLoader
from spice_pl.job.of_run import with_settings_of_run
from spice_pl.system.output import escaped

NODES = ("module", "task", "streams", "dataset", "reliable", "selectors", "augment", "trainer")


@contextmanager
def checked_settings() -> Iterator[None]:
    """Have Hydra compose with `Loader`."""
    before = composing.ConfigLoaderImpl  # type: ignore[attr-defined]
    composing.ConfigLoaderImpl = Loader  # type: ignore[attr-defined]
    try:
        yield
    finally:
        composing.ConfigLoaderImpl = before  # type: ignore[attr-defined]


class Loader(CheckedLoader):
    """Loader that ends the process with one message where the command line has a mistake."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **more: Any
    ) -> DictConfig:
        """Compose and check; see `ConfigLoaderImpl.load_configuration`."""
        try:
            later = _of_its_data_set(overrides)
            overrides = [text for text in overrides if text not in later]
            try:
                cfg = super().load_configuration(config_name, overrides, *args, **more)
            except HydraException as error:
                self._explain(error, config_name, overrides, *args, **more)
                raise
            given = _parsed(overrides)
            self._check_nodes(given)
            check_stage(cfg, given)
            if cfg.of:
                cfg = with_settings_of_run(cfg, given)
                _change(cfg, _parsed(later))
            added = [each for each in given if each.is_add() or each.is_force_add()]
            if added:
                self._check_added(added, config_name, overrides, *args, **more)
        except UsageError as error:
            print(escaped(f"\nerror: {error}"), file=sys.stderr)
            raise SystemExit(2) from error
        return cfg

    def _explain(
        self,
        error: HydraException,
        config_name: str | None,
        overrides: list[str],
        *args: Any,
        **more: Any,
    ) -> None:
        """Raise what a person can act on in place of Hydra's error, if there is something.

        Raises:
            UsageError: names the word, the group or the key, and what is near.
        """
        if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
            group, _, option = error.missing_cfg_file.rpartition("/")
            raise UsageError(not_among(f"{group}={option}", option, error.options)) from error
        given = _parsed(overrides)
        keys = [each for each in given if not self._is_group(each)]
        if not isinstance(error, ConfigCompositionException) or not keys:
            return
        cfg = self._without(keys, config_name, overrides, *args, **more)
        for each in keys:
            if not (each.is_add() or each.is_force_add()) and not _has(cfg, each.key_or_group):
                raise UsageError(unknown_key(each.key_or_group, cfg)) from error

    def _check_added(
        self,
        added: Sequence[Override],
        config_name: str | None,
        overrides: list[str],
        *args: Any,
        **more: Any,
    ) -> None:
        """Refuse a key that is added with "+" where nothing reads it.

        Raises:
            UsageError: names the key and the nearest one.
        """
        keys = [each for each in added if not self._is_group(each)]
        if not keys:
            return
        cfg = self._without(keys, config_name, overrides, *args, **more)
        for each in keys:
            key = str(each.key_or_group)
            if not key.startswith("hydra.") and not _may_be_added(cfg, key, each.value()):
                raise UsageError(unknown_key(key, cfg))

    def _check_nodes(self, given: Sequence[Override]) -> None:
        """Refuse one value where a node of settings is: moco=3, proto.module=0.

        Raises:
            UsageError: names it.
        """
        stages = set(self.get_group_options("stage"))
        for each in given:
            key, value = str(each.key_or_group), each.value()
            plain = isinstance(value, int | float | str) and "${" not in str(value)
            node = key in stages or key.rpartition(".")[2] in NODES
            if plain and node and not (each.is_delete() or self._is_group(each)):
                raise UsageError(
                    f"{each.input_line} puts one value in the place of the settings {key}.*; give "
                    f"one of these, as {key}.NAME=VALUE"
                )

    def _without(
        self,
        keys: Sequence[Override],
        config_name: str | None,
        overrides: list[str],
        *args: Any,
        **more: Any,
    ) -> DictConfig:
        """Compose without some overrides."""
        left_out = {each.input_line for each in keys}
        rest = [text for text in overrides if text not in left_out]
        return super().load_configuration(config_name, rest, *args, **more)

    def _is_group(self, override: Override) -> bool:
        return bool(self.repository.group_exists(override.key_or_group))


def _of_its_data_set(overrides: Sequence[str]) -> list[str]:
    """Return the settings `dataset.KEY=VALUE` that are of the data set of a run, given by of=RUN.

    They can be checked once the settings of the run are read.
    """
    keys = [text.partition("=")[0] for text in overrides]
    if "of" not in keys or "dataset" in keys:
        return []
    return [text for text, key in zip(overrides, keys, strict=True) if key.startswith("dataset.")]


def _change(cfg: DictConfig, given: Sequence[Override]) -> None:
    """Change settings that there are.

    Raises:
        UsageError: there is no such setting.
    """
    for each in given:
        key = str(each.key_or_group)
        if not _has(cfg, key):
            raise UsageError(unknown_key(key, cfg))
        OmegaConf.update(cfg, key, each.value())


def check_stage(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Refuse a stage of the command line that other settings replace by other stages.

    Raises:
        UsageError: names both.
    """
    given = {each.key_or_group: each for each in overrides}
    if "stage" not in given or "stages" in given:
        return
    choice = OmegaConf.select(cfg, "hydra.runtime.choices.stage")
    stages = [str(name) for name in cfg.stages]
    if choice not in (None, "all") and choice not in stages:
        raise UsageError(
            f"stage={choice} and the other settings contradict each other: a file of settings, "
            f"such as that of experiment=, sets stages={stages}; leave stage={choice} out, or let "
            "that file set chain in place of stages"
        )


def unknown_key(key: str, cfg: DictConfig) -> str:
    """Return the message for a key that is not among the settings."""
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    settings.pop("hydra", None)
    near = nearest_keys(key, list(_keys(settings)), [str(name) for name in cfg.stages])
    parent = _node(cfg, key.rpartition(".")[0])
    advice = "`--cfg job` prints all settings"
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    elif parent is not cfg and isinstance(parent, DictConfig):
        names = [str(name) for name in parent if not str(name).startswith("_")]
        advice = f"{key.rpartition('.')[0]} has {', '.join(names)}"
    return f"there is no setting {key}; {advice}"


def nearest_keys(key: str, known: Sequence[str], stages: Sequence[str]) -> list[str]:
    """Return at most three keys that are nearest to one that does not exist.

    >>> nearest_keys("epochs", ["moco.epochs", "proto.epochs", "seed"], ["proto"])
    ['proto.epochs']
    >>> nearest_keys("moco.epoch", ["moco.epochs", "proto.epochs"], ["proto"])
    ['moco.epochs']
    """
    parent, _, name = key.rpartition(".")
    beside = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == parent}
    if parent and (found := get_close_matches(name, beside, n=2, cutoff=0.7)):
        return [beside[each] for each in found]
    same = [each for each in known if each.rpartition(".")[2] == name]
    same = [each for each in same if each.partition(".")[0] in stages] or same
    near = get_close_matches(key, known, n=2, cutoff=0.7)
    return sorted(same, key=len)[:3] or [each for each in near if parent not in known or not parent]


def not_among(given: str, word: str, options: Sequence[str]) -> str:
    """Return the message for a word that is not one of the options.

    >>> not_among("stage=trsut", "trsut", ["all", "trust"])
    'stage=trsut is none of all, trust; did you mean trust?'
    """
    near = get_close_matches(word, options, n=1, cutoff=0.5)
    advice = f"; did you mean {near[0]}?" if near else ""
    return f"{given} is none of {', '.join(sorted(options))}{advice}"


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Parse a command line.

    Raises:
        UsageError: a word is not a setting.
    """
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            reason = str(error).splitlines()[0]
            if "=" not in text:
                reason = "it is not a folder that exists, and a setting is key=value"
            raise UsageError(
                f"{text!r} cannot be read: {reason}; quote a value with special characters, "
                "key=\"'a, b'\", and see --help"
            ) from error
    return parsed


def _keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = _node(cfg, parent)
    # `in` says no for a value that is still ???, such as dataset.root.
    return isinstance(node, DictConfig) and name in list(node)


def _node(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key, throw_on_missing=False) if key else cfg
    except OmegaConfBaseException:  # an interpolation that leads nowhere yet
        return None


def _may_be_added(cfg: DictConfig, key: str, value: Any) -> bool:
    """Whether something reads a new key: the class that its parent names, or a list of its kind.

    A node whose values are all nodes, such as `selectors` or `logger`, takes another node.
    """
    if _has(cfg, key):
        return True
    parent, _, _ = key.rpartition(".")
    node = _node(cfg, parent)
    if not isinstance(node, DictConfig):  # a whole node, given key by key: +logger.mine.name=x
        return _is_list_of_nodes(cfg, parent.rpartition(".")[0])
    return "_target_" in node or (
        _is_list_of_nodes(cfg, parent) and (isinstance(value, dict) or "${" in str(value))
    )


def _is_list_of_nodes(cfg: DictConfig, key: str) -> bool:
    node = _node(cfg, key)
    if not isinstance(node, DictConfig) or not key:
        return False
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return all(isinstance(each, dict) or "${" in str(each) for each in raw.values())
