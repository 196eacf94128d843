"""dataset.num_clusters=auto: estimate K from features once, then run the job with that number."""

from __future__ import annotations

import logging
from collections.abc import Callable

from spice_pl.job.job import Job

logger = logging.getLogger(__name__)


def settled(job: Job, run: Callable[[Job], object]) -> Job:
    """Return the job with K as a number, or without K if no step needs it.

    K is that of a finished run, if there is one; else the stages before the first that clusters
    are run, and K is estimated from their features.

    Args:
        job: its `dataset.num_clusters` is "auto".
        run: runs a job.
    """
    clustering = [name for name in job.stages if job.upstream(name)]
    if not clustering:
        return job.with_settings({"dataset.num_clusters": None})
    first = clustering[0]
    known = None if job.cfg.overwrite else _of_finished_run(job, first)
    if known is None and job.is_task(first):  # a task on features: it needs no K
        return job.with_settings({"dataset.num_clusters": None})
    if known is None:
        known = _estimated(job, first, run)
    return job.with_settings({"dataset.num_clusters": known})


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
    logger.info("dataset.num_clusters=auto: %d clusters; give a number to choose yourself", known)
    return known
