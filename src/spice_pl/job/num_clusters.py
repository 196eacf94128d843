"""dataset.num_clusters=auto: estimate K from features once, then run the job with that number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from spice_pl.job.job import Job
from spice_pl.job.plan import Step
from spice_pl.runs.choices import estimate_of
from spice_pl.system.log import USER

logger, user = logging.getLogger(__name__), logging.getLogger(USER)


def known_num_clusters(job: Job) -> int | None:
    """Return K as settings or a finished run give it, 0 if no step needs it.

    None where it has to be estimated.
    """
    given = job.cfg.dataset.num_clusters
    if given != "auto":
        return int(given or 0)
    first = next((name for name in job.stages if job.upstream(name)), None)
    if first is None:
        return 0
    known = None if job.cfg.overwrite else _of_finished_run(job, first)
    if known is None and job.is_task(first):  # a task on features: it needs no K
        return 0
    return known


def settled(job: Job, run: Callable[[Job], object]) -> Job:
    """Return the job with K as a number, or without K if no step needs it.

    K is that of a finished run, if there is one; else the stages before the first that clusters
    are run, and K is estimated from their features.

    Args:
        job: its `dataset.num_clusters` is "auto".
        run: runs a job.
    """
    known = known_num_clusters(job)
    if known is None:
        known = _estimated(job, next(name for name in job.stages if job.upstream(name)), run)
    return job.with_settings({"dataset.num_clusters": known or None})


def _of_finished_run(job: Job, stage: str) -> int | None:
    """Return K of a stage that is finished, or of the nearest one before it that has clusters."""
    for name in (stage, *job.upstream(stage)):
        folder = job.folder(name)
        if folder.finished and "cluster_sizes" in folder.metrics:
            return int(folder.metrics["num_clusters"])
    return None


def _estimated(job: Job, stage: str, run: Callable[[Job], object]) -> int:
    """Run the stages before `stage`, then estimate K from the features of the nearest one."""
    before = job.stages[: job.stages.index(stage)]
    if not job.cfg.overwrite and all(job.folder(name).finished for name in before):
        before = []  # by a job that was stopped after them
    if before:
        run(job.with_settings({"stages": before, "dataset.num_clusters": None, "edits": None}))
    estimate = {
        "stages": ["estimate_k"],
        "dataset.num_clusters": None,
        "estimate_k.upstream": job.upstream(stage)[0],
        "overwrite": True,
        "resume": False,
        "trainer.strategy": "auto",
    }
    folder = job.folder("estimate_k")
    run(job.with_settings(estimate))
    known = int(folder.metrics["estimated_num_clusters"])
    if job.plain:
        clear = "" if folder.metrics["clear"] else ", a guess: other numbers fit about as well"
        user.info("number of clusters: %d%s; dataset.num_clusters=N chooses it", known, clear)
    else:
        logger.info(
            "dataset.num_clusters=auto: %d clusters; give a number to choose yourself", known
        )
    return known


def k_estimate(step: Step) -> dict[str, Any] | None:
    """Return what an estimate of K says about the features that a stage makes clusters of.

    None where nothing was estimated from these features; else as `runs.choices.estimate_of`.
    """
    run = step.folder.path.name
    found = (estimate_of(each, run) for each in step.upstream if each.finished)
    return next(filter(None, found), None)
