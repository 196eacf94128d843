"""The steps of a job: each stage or task with its settings resolved, typed and checked.

`plan` reads the composed settings once. What runs after it reads a `Step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spice_pl.errors import UsageError
from spice_pl.job.job import Job
from spice_pl.job.origin import EMBED, titled
from spice_pl.job.settings import flat, masked, masked_override, missing
from spice_pl.job.values import check_values
from spice_pl.nn.encoders import pretrained
from spice_pl.runs.clusters import FILE_NAME as CLUSTERS
from spice_pl.runs.clusters import ReliableRule
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.results import Record
from spice_pl.system import ranks

WORDS = {
    "embeddings": ("cosine", "smoothed"),
    "answer": ("network", "auto"),
    "open": ("auto", True, False),
    "map": ("pca", "tsne"),
}
ASKED = ("stage", "dataset.num_clusters", "overwrite")  # settings that the advice below replaces


@dataclass(frozen=True)
class Step:
    """One stage or task of a job.

    Attributes:
        name: name of the stage, as in `stage=NAME`.
        folder: where its artifacts are.
        upstream: artifacts of the stages before it, the nearest first.
        settings: all settings of the job, resolved to plain values.
        trains: True for a stage with a LightningModule, False for a task.
        epochs: epochs to train; 0 only predicts.
        watch_epochs: epochs between two validations.
        seed: seed of the run.
        num_clusters: K; 0 while it is unknown.
        resume: whether to continue from the checkpoint, if there is one.
        overwrite: whether to run a finished step again.
        reliable: which images count as reliable in clusters.csv.
        record: what metrics.json says about the settings.
        more: artifacts of the further stages that `upstream` names, if it is a list.
    """

    name: str
    folder: RunFolder
    upstream: tuple[RunFolder, ...]
    settings: Mapping[str, Any]
    trains: bool
    epochs: int
    watch_epochs: int
    seed: int
    num_clusters: int
    resume: bool
    overwrite: bool
    reliable: ReliableRule
    record: Record
    more: tuple[RunFolder, ...] = ()

    @property
    def own(self) -> Mapping[str, Any]:
        """Settings of this stage."""
        settings: Mapping[str, Any] = self.settings[self.name]
        return settings

    @property
    def reused(self) -> bool:
        """Whether the step is finished and stays as it is."""
        return self.folder.finished and not self.overwrite

    @property
    def continues(self) -> bool:
        """Whether training continues from a checkpoint."""
        return self.resume and self.folder.checkpoint.is_file()


def check_settings(job: Job) -> None:
    """Refuse settings without a value, and those that exclude each other.

    Raises:
        UsageError: names them.
    """
    OmegaConf.set_struct(job.cfg, True)
    if absent := missing(job.cfg):
        raise UsageError(f"no value for {', '.join(absent)}; give it on the command line")
    check_values(job.cfg)
    for key, words in WORDS.items():
        if job.cfg[key] not in words:
            allowed = ", ".join(str(word).lower() for word in words)
            raise UsageError(f"{key}={job.cfg[key]} is none of {allowed}")
    if OmegaConf.is_interpolation(job.cfg, "backbone"):  # recipe=pretrained
        pretrained(str(job.cfg.encoder))  # in an interpolation its message would be a traceback
    if job.cfg.like and not Path(str(job.cfg.like), CLUSTERS).is_file():
        raise UsageError(
            f"like={job.cfg.like} is not the folder of a run with clusters, since it has no "
            f"{CLUSTERS}; give runs/<dataset>/<stage>/<run>"
        )
    minutes = job.cfg.minutes
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise UsageError(f"minutes={minutes} is not a positive number; give one, or null for none")
    if job.cfg.edits and ranks.in_rank() and not ranks.is_ours():
        raise UsageError(
            "edits are written as a run by one process; leave torchrun or srun out and let "
            "trainer=ddp start the processes"
        )
    named = next((text for text in job.overrides if text.startswith("backbone=")), None)
    if named and OmegaConf.is_interpolation(job.cfg, "backbone"):
        raise UsageError(
            f"{named} and recipe=pretrained name two networks; give encoder=NAME for another "
            "pretrained one, or recipe=scratch to train this one from random weights"
        )
    _check_num_clusters(job)


def plan(job: Job) -> list[Step]:
    """Return the steps of a job in order; its number of clusters is settled."""
    settings: Any = OmegaConf.to_container(job.cfg, resolve=True)
    return [_step(job, name, settings) for name in job.stages]


def _step(job: Job, name: str, settings: Mapping[str, Any]) -> Step:
    own, num_clusters = settings[name], int(settings["dataset"]["num_clusters"] or 0)
    shown = masked("", {key: settings[key] for key in ("dataset", "backbone", name)})
    record = Record(
        stage=name,
        title=_title(job, name, settings),
        num_clusters=num_clusters,
        seed=int(settings["seed"]),
        preset=job.preset,
        overrides=[masked_override(text) for text in job.overrides],
        settings={key: str(value) for key, value in flat(shown).items()},
    )
    return Step(
        name=name,
        folder=job.folder(name),
        upstream=tuple(job.upstream_folders(name)),
        settings=settings,
        trains=not job.is_task(name),
        epochs=int(own.get("epochs", 0)),
        watch_epochs=int(own.get("watch_epochs", 1)),
        seed=record.seed,
        num_clusters=num_clusters,
        resume=bool(settings["resume"]),
        overwrite=bool(settings["overwrite"]),
        reliable=ReliableRule(**settings["reliable"]),
        record=record,
        more=tuple(job.more_upstream(name)),
    )


def _title(job: Job, name: str, settings: Mapping[str, Any]) -> str:
    """Return the title of a stage; a finished upstream of another job says what it is made of."""
    recorded = None
    if EMBED not in job.stages and EMBED in job.upstream(name):
        embed = job.folder(EMBED)
        recorded = str(embed.metrics["title"]) if embed.finished else None
    more = [each.metrics["title"] for each in job.more_upstream(name) if each.finished]
    return titled(name, settings, recorded, more)


def _check_num_clusters(job: Job) -> None:
    """Refuse to train clusters without their number; stage 1 and tasks do without."""
    given = job.cfg.dataset.num_clusters
    clustering = [name for name in job.stages if job.upstream(name) and not job.is_task(name)]
    if given is None and clustering:
        raise UsageError(
            f"dataset.num_clusters={given} is not a number; give one, or the word auto, which "
            "takes the estimate of\n"
            f"  {job.command('stage=estimate_k', without=ASKED)}\n"
            "from the features of stage 1"
        )
