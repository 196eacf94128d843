"""A job: its composed settings, and the folders of its stages."""

from __future__ import annotations

import copy
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spice_pl.errors import UsageError
from spice_pl.job.settings import masked_override
from spice_pl.job.words import as_typed
from spice_pl.nn.encoders import pretrained
from spice_pl.runs.edited import reviewed_run
from spice_pl.runs.edits import Edits, read_edits
from spice_pl.runs.find import earlier_runs
from spice_pl.runs.folder import RunFolder
from spice_pl.system.command import command

OmegaConf.register_new_resolver(
    "folder_name", lambda root: Path(str(root)).expanduser().resolve().name, replace=True
)
OmegaConf.register_new_resolver(  # a property of the encoder that a name stands for
    "pretrained", lambda name, what: getattr(pretrained(name), what), replace=True
)
OmegaConf.register_new_resolver("last", lambda names: names[-1], replace=True)

# Settings that change where or how a job runs, but not what it computes.
NOT_IN_NAMES = {
    *("stage", "stages", "dataset", "run", "seed", "preset", "experiment", "resume", "overwrite"),
    *("hydra", "runs_dir", "cache_dir", "trainer", "logger", "on_bad_image", "allow_targets"),
    *("map", "like", "of", "checkpoint_minutes", "open", "spreadsheet"),
}

# What the stages of `recipe=pretrained` make.
PARTS = {
    "embed": "features",
    "estimate_k": "number of clusters",
    "proto": "clusters",
    "kmeans": "clusters",
}

# Settings of the data set that its name, which is a folder above, does not say.
PLACES_OF_DATASET = tuple(f"dataset.{key}=" for key in ("root", "path", "table", "name"))


def upstream_names(value: Any) -> list[str]:
    """Return what the setting `upstream` names: a stage, several, or none.

    >>> upstream_names(None), upstream_names("moco"), upstream_names(["embed", "embed/lite2"])
    ([], ['moco'], ['embed', 'embed/lite2'])
    """
    if value is None:
        return []
    return [str(value)] if isinstance(value, str) else [str(each) for each in value]


@dataclass(frozen=True)
class Job:
    """The composed settings of one job, and the command line they came from.

    Attributes:
        cfg: composed settings.
        overrides: settings that the command line changed.
        preset: name of the preset that was applied, or "none".
        sweep: whether the job is a trial of a sweep (`-m`).
        swept: settings of the sweep as they were typed, such as seed=0,1; () where a program that
            draws the values, such as W&B's, starts one trial at a time.
    """

    cfg: DictConfig
    overrides: tuple[str, ...]
    preset: str
    sweep: bool
    swept: tuple[str, ...] = ()

    @property
    def stages(self) -> list[str]:
        """Stages to run, in order."""
        return [str(name) for name in self.cfg.stages]

    @property
    def plain(self) -> bool:
        """Whether it clusters images of your own by `recipe=pretrained`, as `spice photos` does.

        Its messages are for users who do not know the method.
        """
        trains = any(not self.is_task(name) for name in self.stages)
        return trains and not self.sweep and OmegaConf.is_interpolation(self.cfg, "backbone")

    def part_name(self, stage: str) -> str:
        """Return what a stage makes, for the messages of a `plain` job; else its name."""
        return PARTS.get(stage, stage) if self.plain else stage

    def with_settings(self, values: Mapping[str, Any]) -> Job:
        """Return a copy of the job with some settings replaced, by dotted key."""
        cfg = copy.deepcopy(self.cfg)
        for key, value in values.items():
            OmegaConf.update(cfg, key, value)
        return replace(self, cfg=cfg)

    @cached_property
    def edits(self) -> Edits | None:
        """The user's changes to the clusters of an earlier run, if `edits` names a file."""
        return read_edits(self.cfg.edits) if self.cfg.edits else None

    def is_task(self, stage: str) -> bool:
        """Whether a stage is a task, which trains nothing."""
        return "task" in self.cfg[stage]

    def upstream(self, stage: str) -> list[str]:
        """Return the stages that a stage builds on, the nearest first."""
        # A stage of your own is composed only when it runs; `edits` is a setting too.
        if not isinstance(self.cfg.get(stage), DictConfig):
            return []
        first = upstream_names(self.cfg[stage].upstream)[:1]
        return [each for name in first for each in (name, *self.upstream(name))]

    def more_upstream(self, stage: str) -> list[RunFolder]:
        """Return the folders that a stage reads beside its first upstream: STAGE or STAGE/RUN."""
        if not self.upstream(stage):
            return []
        more = upstream_names(self.cfg[stage].upstream)[1:]
        return [self._folder_of(*name.partition("/")[::2]) for name in more]

    def _folder_of(self, stage: str, run: str) -> RunFolder:
        folder = self.folder(stage)
        return replace(folder, path=folder.path.with_name(run)) if run else folder

    def upstream_folders(self, stage: str) -> list[RunFolder]:
        """Return the folders of these stages, the nearest first.

        With edits, these are the edited run, the reviewed run, and the runs before that one. For a
        task on the run `of`, they are that run and those that it was made from.
        """
        if self.cfg.of and self.is_task(stage) and self.upstream(stage):
            paths = [Path(self.cfg.of), *earlier_runs(Path(self.cfg.of))]
            return [RunFolder(path, str(self.cfg.embeddings)) for path in paths]
        if self.edits is None or self.is_task(stage) or not self.upstream(stage):
            return [self.folder(each) for each in self.upstream(stage)]
        runs = Path(self.cfg.runs_dir, str(self.cfg.dataset.name))
        reviewed = reviewed_run(self.edits, runs)
        before, run = reviewed.path.parent.name, reviewed.path.name
        earlier = self.upstream(before) if before in self.cfg else []
        return [self.folder("edits"), reviewed, *(RunFolder(runs / each / run) for each in earlier)]

    def folder(self, stage: str) -> RunFolder:
        """Return the folder of a stage's artifacts: runs/<dataset>/<stage>/<run>.

        In a sweep, the swept settings that affect this stage are part of the run's name. Trials
        thus have folders of their own and share the stages before the one that they vary. A task on
        the run `of` has a folder in that run; predictions have one per data set.

        Raises:
            UsageError: the run or the data set has a name that is not a valid folder name.
        """
        cfg, name = self.cfg, str(self.cfg.run)
        if self.sweep:
            name = ",".join([name, *self._reaching(stage)])
            if len(name) > 150:
                digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
                name = f"{name[:140]}-{digest}"
        for key, part in (("run", name), ("dataset.name", str(cfg.dataset.name))):
            if part.startswith(".") or not part or set(part) & set("/\\\0\n\r"):
                raise UsageError(
                    f"{key}={part!r} is not a valid folder name; leave out / and \\, line ends and "
                    "a dot at its start (runs_dir=PATH chooses where the folders are)"
                )
        place = Path(cfg.runs_dir, str(cfg.dataset.name), stage, name)
        if cfg.of and stage in cfg and self.is_task(stage):
            place = Path(cfg.of, stage, *([str(cfg.dataset.name)] if stage == "predict" else []))
        return RunFolder(place, str(cfg.embeddings))

    def _reaching(self, stage: str) -> list[str]:
        """Return the swept settings that affect a stage, with the values of this trial.

        Where it is not known what is swept, all settings of the command line count.
        """
        # A stage can read another's settings by interpolation, as freematch reads those of
        # fixmatch. A stage of your own has settings only in jobs that run it.
        own = self.cfg[stage] if stage in self.cfg else OmegaConf.create()
        read = set(re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(own)))
        others = {
            key
            for key, value in self.cfg.items()
            if isinstance(value, DictConfig) and ("upstream" in value or key == "selectors")
        } - {stage, *self.upstream(stage), *read}
        others -= {each.path.parent.name for each in self.more_upstream(stage)}
        swept = {key_of(text) for text in self.swept if is_swept(text)}
        kept = []
        for override in self.overrides:
            text = override.lstrip("+~")
            first = re.split(r"[=.@/]", text, maxsplit=1)[0]
            of_dataset = text.startswith("dataset.") and not text.startswith(PLACES_OF_DATASET)
            counts = first not in NOT_IN_NAMES or of_dataset
            if counts and first not in others and (not swept or key_of(text) in swept):
                kept.append(masked_override(text).replace("/", "_").replace(" ", ""))
        return sorted(kept)

    def command(self, *first: str, without: Sequence[str] = (), last: Sequence[str] = ()) -> str:
        """Return the command line of this job, for a shell.

        Args:
            first: arguments before the job's own settings.
            without: settings to leave out.
            last: arguments after the job's own settings.
        """
        left_out = tuple(f"{key}=" for key in without)
        same = [
            as_typed(masked_override(text), sweep=self.sweep)
            for text in (self.swept if self.sweep and self.swept else self.overrides)
            if not text.startswith(left_out)
        ]
        sweep = ["-m"] if self.sweep else []  # folders of a sweep have other names
        return shlex.join([*command(), *sweep, *first, *same, *last])

    def dump(self) -> str:
        """Return the job as YAML, so that ranks need not compose it again."""
        settings = {
            "cfg": literal(OmegaConf.to_container(self.cfg, resolve=True)),
            "overrides": list(self.overrides),
            "preset": self.preset,
            "sweep": self.sweep,
            "swept": list(self.swept),
        }
        return OmegaConf.to_yaml(OmegaConf.create(settings))

    @classmethod
    def load(cls, file: str) -> Job:
        """Read what `dump` returned."""
        job = OmegaConf.load(file)
        given = (tuple(job.overrides), str(job.preset), bool(job.sweep), tuple(job.swept))
        return cls(job.cfg, *given)


def key_of(override: str) -> str:
    """Return the name of the setting that a word of the command line gives.

    >>> key_of("+proto.epochs=1,2"), key_of("proto/ablation=ce")
    ('proto.epochs', 'proto/ablation')
    """
    return override.lstrip("+~").partition("=")[0]


def is_swept(override: str) -> bool:
    """Whether a word of the command line of a sweep gives several values, or draws them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:  # a value that was masked
        return False


def literal(value: Any) -> Any:
    r"""Return resolved settings in which OmegaConf finds nothing to resolve again.

    Backslashes before an interpolation escape each other there, so all of them are doubled.

    >>> print(literal("${a}"), literal(r"\${a}"))
    \${a} \\\${a}
    """
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
