"""What is checked before work starts, and what a run writes about its settings.

Nothing that an earlier run left may be mixed with other settings, other images or another
upstream run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.job import Job
from spice_pl.job.plan import Step
from spice_pl.job.settings import current_target, flat, masked
from spice_pl.runs.edited import write_edited
from spice_pl.runs.edits import Edits
from spice_pl.system.files import atomic


def check(job: Job, steps: Sequence[Step]) -> None:
    """Write the run that edits describe, if any, then check the folders of all steps.

    Raises:
        UsageError: edits do not fit, or a folder holds a run with other settings.
    """
    if job.edits is not None:
        _take_edits(job, job.edits, steps)
    check_folders(job, steps)


def check_folders(job: Job, steps: Sequence[Step]) -> None:
    """Refuse to mix with what earlier runs left.

    Raises:
        UsageError: says what differs, and how to keep or replace the earlier run.
    """
    if job.cfg.overwrite and job.cfg.resume:
        raise UsageError("overwrite=true and resume=true exclude each other; give one of them")
    if job.cfg.overwrite:
        return
    for step in steps:
        saved = step.folder.path / ".hydra" / "config.yaml"
        if saved.is_file():
            _check_folder(step, saved_settings(saved), alone=len(steps) == 1)


def check_chain(step: Step) -> None:
    """Refuse to reuse a run whose upstream has been run again since."""
    if step.upstream and step.upstream[0].finished:
        step.folder.check_upstream(step.upstream[0])


def check_upstream(job: Job, step: Step, images: ImageSet) -> None:
    """Refuse an upstream that does not exist or was made from other images."""
    if not step.upstream:
        return
    upstream = step.upstream[0]
    if not upstream.finished:
        stage = upstream.path.parent.name
        command = job.command(f"stage={stage}", without=("stage", "overwrite"))
        raise UsageError(
            f"stage={step.name} reads what stage={stage} writes to {upstream.path}, and that "
            f"does not exist; make it with\n  {command}\nor run all stages with stage=all"
        )
    upstream.check_dataset(images.fingerprint, len(images))
    upstream.check_digests()


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


def _check_folder(step: Step, saved: Mapping[str, Any], *, alone: bool) -> None:
    folder = step.folder
    changed = _changed(saved, step)
    if changed and (folder.finished or step.resume):
        raise UsageError(
            f"{folder.path} was made with other settings:\n  " + "\n  ".join(changed) + "\n"
            "give those again, or use overwrite=true to replace it, or another run=NAME"
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


def saved_settings(file: Path) -> dict[str, Any]:
    """Read the settings that a run was made with."""
    try:
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


def _changed(saved: Mapping[str, Any], step: Step) -> list[str]:
    """List the settings of a step that differ from those its folder was made with."""
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
    if not step.upstream or old.get("dataset.num_clusters") is None:  # features need no K
        free += ["dataset.num_clusters", f"{step.name}.module.num_clusters"]
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    ]


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
