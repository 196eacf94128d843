"""A job: its settings, where each of its stages lives, and what may be reused or gone on with."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.settings import flat, masked, masked_override
from spice_pl.runs.edited import reviewed_run, write_edited
from spice_pl.runs.edits import read_edits
from spice_pl.runs.folder import RunFolder
from spice_pl.system.command import command
from spice_pl.system.files import atomic

OmegaConf.register_new_resolver(
    "folder_name", lambda root: Path(str(root)).expanduser().resolve().name, replace=True
)

# Settings that change where or how a run goes but not what it computes.
NOT_IN_NAMES = {
    *("stage", "stages", "dataset", "run", "seed", "preset", "experiment", "resume", "overwrite"),
    *("hydra", "runs_dir", "cache_dir", "trainer", "logger", "on_bad_image", "allow_targets"),
    *("map", "like", "checkpoint_minutes"),
}

SWEPT_OF_DATASET = tuple(
    f"dataset.{key}=" for key in ("num_clusters", "protocol", "classes", "imbalance", "limit")
)


@dataclass(frozen=True)
class Job:
    """One job: its composed config and the command line it came from."""

    cfg: DictConfig
    overrides: tuple[str, ...]
    preset: str
    sweep: bool

    @property
    def stages(self) -> list[str]:
        """Stages to run, in order."""
        return [str(name) for name in self.cfg.stages]

    def upstream(self, stage: str) -> list[str]:
        """Return the stages that a stage builds on, the nearest first."""
        if stage not in self.cfg:  # composed with its own command alone; its artifacts are read
            return []
        name = self.cfg[stage].upstream
        return [] if name is None else [str(name), *self.upstream(str(name))]

    def upstream_folders(self, stage: str) -> list[RunFolder]:
        """Return where these lie; with edits, the edited run and what it was made from."""
        if not self.cfg.edits or "task" in self.cfg[stage] or not self.upstream(stage):
            return [self.folder(each) for each in self.upstream(stage)]
        runs = Path(self.cfg.runs_dir, str(self.cfg.dataset.name))
        reviewed = reviewed_run(read_edits(self.cfg.edits), runs)
        before, run = reviewed.path.parent.name, reviewed.path.name
        earlier = self.upstream(before) if before in self.cfg else []
        return [self.folder("edits"), reviewed, *(RunFolder(runs / each / run) for each in earlier)]

    def folder(self, stage: str) -> RunFolder:
        """Return where a stage's artifacts live: runs/<dataset>/<stage>/<run>.

        In a sweep the run's name carries the settings that reach this stage, so that trials have
        their own folders and share the stages before the one they vary.
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
                    f"{key}={part!r} is no name for a folder; leave out / and \\, line ends and a "
                    "dot at its start (runs_dir=PATH chooses where the folders are)"
                )
        return RunFolder(Path(cfg.runs_dir, str(cfg.dataset.name), stage, name))

    def _reaching(self, stage: str) -> list[str]:
        # A stage may read another's settings by interpolation, as freematch those of fixmatch. One
        # that was composed with its own command alone, as embed, has none here.
        own = self.cfg[stage] if stage in self.cfg else OmegaConf.create()
        read = set(re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(own)))
        others = {
            key
            for key, value in self.cfg.items()
            if isinstance(value, DictConfig) and ("upstream" in value or key == "selectors")
        } - {stage, *self.upstream(stage), *read}
        kept = []
        for override in self.overrides:
            text = override.lstrip("+~")
            first = re.split(r"[=.@/]", text, maxsplit=1)[0]
            swept = first not in NOT_IN_NAMES or text.startswith(SWEPT_OF_DATASET)
            if swept and first not in others:
                kept.append(text.replace("/", "_").replace(" ", ""))
        return sorted(kept)

    def command(self, *first: str, without: Sequence[str] = (), last: Sequence[str] = ()) -> str:
        """Return the command line of this job, some settings left out and others added."""
        left_out = tuple(f"{key}=" for key in without)
        same = [masked_override(text) for text in self.overrides if not text.startswith(left_out)]
        sweep = ["-m"] if self.sweep else []  # its folders have other names
        return shlex.join([*command(), *sweep, *first, *same, *last])

    def reused(self, stage: str) -> bool:
        """Whether a stage is finished and stays as it is."""
        return self.folder(stage).finished and not self.cfg.overwrite

    def dump(self) -> str:
        """Return the job as YAML, for ranks that must not compose it again."""
        settings = {
            "cfg": OmegaConf.to_container(self.cfg, resolve=True),
            "overrides": list(self.overrides),
            "preset": self.preset,
            "sweep": self.sweep,
        }
        return OmegaConf.to_yaml(OmegaConf.create(settings))

    @classmethod
    def load(cls, file: str) -> Job:
        """Read what `dump` returned."""
        job = OmegaConf.load(file)
        return cls(job.cfg, tuple(job.overrides), str(job.preset), bool(job.sweep))


def check_folders(job: Job) -> None:
    """Refuse to mix with what earlier runs left, before any work starts."""
    cfg = job.cfg
    if cfg.overwrite and cfg.resume:
        raise UsageError("overwrite=true and resume=true exclude each other; give one of them")
    if cfg.overwrite:
        return
    for name in job.stages:
        folder = job.folder(name)
        saved = folder.path / ".hydra" / "config.yaml"
        if not saved.is_file():
            continue
        changed = _changed(_saved(saved), cfg, name)
        if changed and (folder.finished or cfg.resume):
            raise UsageError(
                f"{folder.path} was made with other settings:\n  " + "\n  ".join(changed) + "\n"
                "give those again, or use overwrite=true to make it anew, or another run=NAME"
            )
        if folder.finished or (cfg.resume and folder.checkpoint.is_file()):
            check_chain(job, name)
        if folder.finished and len(job.stages) == 1 and not cfg.resume:
            raise UsageError(
                f"{folder.path} is finished; overwrite=true makes it anew, run=NAME keeps it and "
                "makes another, resume=true shows its result"
            )
        if not folder.finished and folder.checkpoint.is_file() and not cfg.resume:
            raise UsageError(
                f"{folder.path} holds an unfinished run; resume=true goes on where it stopped, "
                "overwrite=true starts anew"
            )


def _saved(file: Path) -> dict[str, Any]:
    """Settings that a run was made with."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
        if not isinstance(found, dict):
            raise ValueError("it holds no settings")
    # YAML can be broken in many ways, and means any type.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{file} is damaged ({reason}); overwrite=true makes its run anew"
        ) from error
    return {str(key): value for key, value in found.items()}


def check_chain(job: Job, name: str) -> None:
    """Refuse to reuse a run whose upstream was made anew since."""
    upstream = job.upstream_folders(name)
    if upstream and upstream[0].finished:
        job.folder(name).check_upstream(upstream[0])


def take_edits(job: Job) -> None:
    """Make the edited run that the stages of a job train on from, if there are edits.

    Raises:
        UsageError: the edits do not fit, or would be trained into the very run they are of.
    """
    if not job.cfg.edits:
        return
    if len(job.stages) != 1 or not job.upstream(job.stages[0]):
        raise UsageError(f"edits are taken by one stage that trains on, such as stage=fixmatch, "
                         f"and stages are {job.stages}")  # fmt: skip
    edited, reviewed, *_ = job.upstream_folders(job.stages[0])
    if job.folder(job.stages[0]).path.resolve() == reviewed.path.resolve():
        raise UsageError(
            f"the edits are of {reviewed.path}, which this job would make anew; give another "
            "run=NAME, such as run=reviewed"
        )
    write_edited(read_edits(job.cfg.edits), reviewed, edited, int(job.cfg.dataset.num_clusters))


def _changed(saved: Mapping[str, Any], cfg: DictConfig, name: str) -> list[str]:
    """Settings of a stage that differ from those its folder was made with."""
    parts = ("seed", "dataset", "backbone", "augment", name)
    given = OmegaConf.to_container(cfg, resolve=True)
    old, new = (flat({key: each.get(key) for key in parts}) for each in (saved, masked("", given)))
    free = ["dataset.cache_dir", "dataset.on_bad_image"]
    if old.get("dataset.num_clusters") is None:  # stage 1 was trained before K was known
        free += ["dataset.num_clusters", f"{name}.module.num_clusters"]
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    ]


def check_upstream(job: Job, name: str, upstream: RunFolder, images: ImageSet) -> None:
    """Refuse an upstream that is not there or that other images made."""
    if not upstream.finished:
        stage = upstream.path.parent.name
        command = job.command(f"stage={stage}", without=("stage", "overwrite"))
        raise UsageError(
            f"stage={name} reads what stage={stage} leaves in {upstream.path}, and that is not "
            f"there; make it with\n  {command}\nor run all stages with stage=all"
        )
    upstream.check_dataset(images.fingerprint, len(images))
    upstream.check_digests()


def stamp(job: Job, folder: RunFolder, *, keep: bool) -> None:
    """Write the settings of a run; forget what an earlier run left there unless it goes on."""
    if not keep:
        forget(folder)
    for name, settings in (
        ("overrides.yaml", [masked_override(text) for text in job.overrides]),
        ("config.yaml", masked("", OmegaConf.to_container(job.cfg, resolve=True))),
    ):
        with atomic(folder.path / ".hydra" / name) as temporary:
            OmegaConf.save(OmegaConf.create(settings), temporary)


def forget(folder: RunFolder) -> None:
    """Remove what says that a run is finished or can be gone on with."""
    for name in ("metrics.json", "metrics.csv", folder.checkpoint.name):
        (folder.path / name).unlink(missing_ok=True)
