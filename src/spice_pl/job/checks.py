"""What is checked before work starts, and what a run writes about its settings.

Nothing that an earlier run left may be mixed with other settings, other images or another
upstream run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.job import Job
from spice_pl.job.parts import JobImages
from spice_pl.job.plan import Step
from spice_pl.job.settings import current_target, flat, masked
from spice_pl.job.words import as_typed
from spice_pl.runs.edited import write_edited
from spice_pl.runs.edits import Edits
from spice_pl.runs.folder import RunFolder
from spice_pl.system.building import locate
from spice_pl.system.command import quoted
from spice_pl.system.files import atomic, check_folder

logger = logging.getLogger(__name__)

MAX_SETTINGS = 1_000_000  # bytes of the saved settings of a run, which take a few thousand
# Settings that say where images are. The fingerprint decides whether they are the same.
PLACES = {"dataset.root", "dataset.path", "dataset.table"}


def check(job: Job, steps: Sequence[Step], opened: JobImages) -> None:
    """Write the run that edits describe, if any, then check the folders of all steps.

    Raises:
        UsageError: edits do not fit, or a folder holds a run with other settings.
    """
    if job.edits is not None:
        _take_edits(job, job.edits, steps)
    check_folders(job, steps, opened)
    for step in steps:
        if not step.reused:  # before hours of work
            check_folder("runs_dir", str(job.cfg.runs_dir), step.folder.path)


def check_folders(job: Job, steps: Sequence[Step], opened: JobImages) -> None:
    """Refuse to mix with what earlier runs left.

    Raises:
        UsageError: says what differs, and how to keep or replace the earlier run.
    """
    if job.cfg.overwrite and job.cfg.resume:
        raise UsageError("overwrite=true and resume=true exclude each other; give one of them")
    if job.cfg.overwrite:
        return
    longer = []
    for step in steps:
        file = step.folder.path / ".hydra" / "config.yaml"
        if not file.is_file():
            continue
        changed = _changed(saved_settings(file), step)
        if step.continues and _has_more_epochs(step, changed):
            del changed[f"{step.name}.epochs"]
            longer += [step] if step.folder.finished else []
        if changed and changed.keys() <= PLACES:
            _check_place(job, step, changed, opened)
            changed = {}
        _check_folder(step, changed, alone=len(steps) == 1)
    if longer:
        _continue_finished(steps, longer)


def check_chain(step: Step) -> None:
    """Refuse to reuse a run whose upstream has been run again since."""
    if step.upstream and step.upstream[0].finished:
        step.folder.check_upstream(step.upstream[0], step.more)


def check_upstream(job: Job, step: Step, images: ImageSet) -> None:
    """Refuse an upstream that does not exist or was made from other images."""
    for upstream in (*step.upstream[:1], *step.more):
        if not upstream.finished:
            stage, run = upstream.path.parent.name, upstream.path.name
            # By its name, a single run has the folder that a trial of a sweep reads.
            single = replace(job, sweep=False)
            other = run != step.folder.path.name or (job.sweep and run != str(job.cfg.run))
            named = [f"stage={stage}", *([as_typed(f"run={quoted(run)}")] if other else [])]
            without = ("stage", "overwrite", *(["run"] if other else []))
            raise UsageError(
                f"stage={step.name} reads what stage={stage} writes to {upstream.path}, and that "
                f"does not exist; make it with\n  {single.command(*named, without=without)}\n"
                "or run all stages with stage=all"
            )
        upstream.check_dataset(images.fingerprint, len(images))
        upstream.check_digests()


def same_features(step: Step, images: ImageSet) -> RunFolder | None:
    """Return a finished run, under another name, of the same stage that trains nothing.

    Raises:
        UsageError: a file of that run is damaged.
    """
    if step.epochs or step.upstream:
        return None
    for path in sorted(step.folder.path.parent.glob("*")):
        earlier, settings = RunFolder(path), path / ".hydra" / "config.yaml"
        if path == step.folder.path or not (earlier.finished and settings.is_file()):
            continue
        if not _changed(saved_settings(settings), step) and earlier.fits(images.fingerprint):
            earlier.check_digests("features.npy")
            return earlier
    return None


def stamp(step: Step, *, keep: bool) -> None:
    """Write the settings of a run; remove what an earlier run left unless this one continues it."""
    if not keep:
        step.folder.forget()
    for name, settings in (
        ("overrides.yaml", list(step.record.overrides)),
        ("config.yaml", masked("", step.settings)),
    ):
        with atomic(step.folder.path / ".hydra" / name) as temporary:
            OmegaConf.save(OmegaConf.create(settings), temporary)


def _has_more_epochs(step: Step, changed: Mapping[str, tuple[Any, Any]]) -> bool:
    before, now = changed.get(f"{step.name}.epochs", (0, 0))
    return isinstance(before, int) and isinstance(now, int) and before < now


def _check_place(
    job: Job, step: Step, changed: Mapping[str, tuple[Any, Any]], opened: JobImages
) -> None:
    """Compare the images with those of an earlier run that read them from another place.

    Raises:
        UsageError: they are others, or a task would replace what it made of them.
    """
    folder = step.folder
    if not step.trains and not step.upstream and not folder.finished:
        raise UsageError(
            f"{folder.path} holds what stage={step.name} made of the images in another place:\n  "
            f"{_lines(changed)}\ngive dataset.name=NAME or run=NAME to keep both, or "
            "overwrite=true to replace it"
        )
    if not folder.finished and not step.continues:  # nothing is kept
        return
    images = opened(job.cfg)
    folder.check_dataset(images.fingerprint, len(images))
    logger.info("%s: the same images in another place: %s", step.name, _lines(changed))


def _continue_finished(steps: Sequence[Step], longer: Sequence[Step]) -> None:
    """Mark finished runs as unfinished that are to be trained for more epochs.

    Raises:
        UsageError: a later step of the job was made from one of them.
    """
    first = longer[0]
    for step in steps[steps.index(first) + 1 :]:
        if step.folder.finished:
            raise UsageError(
                f"{step.folder.path} was made from {first.folder.path}, which "
                f"{first.name}.epochs={first.epochs} changes; give stage={first.name} to train "
                "that one alone, then run the later stages with overwrite=true"
            )
    for step in longer:
        logger.info("%s: continues to %d epochs", step.name, step.epochs)
        (step.folder.path / "metrics.json").unlink()


def _lines(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n  ".join(f"{key}: {before} -> {now}" for key, (before, now) in changed.items())


def _check_folder(step: Step, changed: Mapping[str, tuple[Any, Any]], *, alone: bool) -> None:
    folder = step.folder
    if changed and (folder.finished or step.resume):
        more = changed.keys() == {f"{step.name}.epochs"} and _has_more_epochs(step, changed)
        way = "resume=true to train on, " if more and folder.checkpoint.is_file() else ""
        raise UsageError(
            f"{folder.path} was made with other settings:\n  {_lines(changed)}\n"
            f"give those again, or use {way}overwrite=true to replace it, or another run=NAME"
            f"{_quick(step, changed)}"
        )
    if folder.finished or step.continues:
        check_chain(step)
    if folder.finished and alone and step.trains and not step.resume:  # a task shows its result
        raise UsageError(
            f"{folder.path} is finished; overwrite=true replaces it, run=NAME keeps it and "
            "makes another, resume=true shows its result"
        )
    if not folder.finished and folder.checkpoint.is_file() and not step.resume:
        raise UsageError(
            f"{folder.path} holds an unfinished run; resume=true continues where it stopped, "
            "overwrite=true starts from scratch"
        )


def _quick(step: Step, changed: Mapping[str, Any]) -> str:
    """Return the quick way to another number of clusters, if nothing else has changed."""
    same = {"dataset.num_clusters", f"{step.name}.module.num_clusters"}
    stored = step.upstream and step.upstream[0].finished
    if not stored or not changed.keys() <= same or step.name == "kmeans":
        return ""
    number = step.settings["dataset"]["num_clusters"]
    return (
        f"; stage=kmeans dataset.num_clusters={number} keeps it and makes {number} clusters of "
        "the stored features within seconds"
    )


def saved_settings(file: Path) -> dict[str, Any]:
    """Read the settings that a run was made with."""
    try:
        if file.stat().st_size > MAX_SETTINGS:  # YAML is slow to read
            raise ValueError(f"it is larger than {MAX_SETTINGS // 1000} kB")
        text = file.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, which can grow without end")
        # They were resolved when they were written: what looks like an interpolation is text.
        found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if not isinstance(found, dict):
            raise ValueError("it holds no settings")
    # YAML can be broken in many ways, and means any type.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{file} is damaged ({reason}); overwrite=true makes its run again"
        ) from error
    return {str(key): value for key, value in found.items()}


def _changed(saved: Mapping[str, Any], step: Step) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a step that differ from those its folder was made with, and both."""
    parts = ["seed", "dataset", "backbone", "augment", step.name]
    if step.upstream:  # features do not depend on what is read from them
        parts.append("embeddings")
    given = masked("", step.settings)
    saved = {"embeddings": "cosine", **saved}  # of a run made before there was a choice
    old, new = (flat({key: each.get(key) for key in parts}) for each in (saved, given))
    targets = {key for key in old if key.endswith("_target_")}
    old |= {key: current_target(str(old[key])) for key in targets}
    free = ["dataset.cache_dir", "dataset.on_bad_image"]
    free.append(f"{step.name}.checkpoint_epochs")  # a setting of before 0.2, without effect
    if not _needs_count(step) or old.get("dataset.num_clusters") is None:
        free += ["dataset.num_clusters", f"{step.name}.module.num_clusters"]
    changed = {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    }
    minutes = saved.get("minutes"), given.get("minutes")
    if changed and minutes[0] != minutes[1]:  # which chose some of these
        changed = {"minutes": minutes, **changed}
    return changed


def _needs_count(step: Step) -> bool:
    """Return whether what a step makes depends on K: features alone do not."""
    module = step.own.get("module", {})
    if step.upstream or "num_clusters" not in module:
        return bool(step.upstream)
    kind = locate(current_target(str(module.get("_target_"))), ("spice_pl.stages.",))
    return bool(getattr(kind, "has_clusters", False))


def _take_edits(job: Job, edits: Edits, steps: Sequence[Step]) -> None:
    """Write the edited run that the only step of the job trains on."""
    step = steps[0]
    if len(steps) != 1 or not job.upstream(step.name):
        raise UsageError(
            "edits are taken by one stage that trains on, such as stage=fixmatch, and stages are "
            f"{job.stages}"
        )
    edited, reviewed, *_ = step.upstream
    if step.folder.path.resolve() == reviewed.path.resolve():
        raise UsageError(
            f"the edits are of {reviewed.path}, which this job would overwrite; give another "
            "run=NAME, such as run=reviewed"
        )
    write_edited(edits, reviewed, edited, step.num_clusters)
