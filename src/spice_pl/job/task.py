"""Run a task: a step that trains nothing, such as a prediction or a review."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl

from spice_pl.data.images import ImageSet
from spice_pl.job.checks import check_upstream, stamp
from spice_pl.job.job import Job
from spice_pl.job.locks import used_folders
from spice_pl.job.plan import Step
from spice_pl.job.settings import build
from spice_pl.system.provenance import machine, versions
from spice_pl.tasks.base import Context


def run_task(job: Job, step: Step, load_images: Callable[..., ImageSet]) -> None:
    """Run a task, with its folders locked; write metrics.json if it returns any metrics."""
    started = time.monotonic()
    if step.upstream:
        check_upstream(job, step, load_images())
    pl.seed_everything(step.seed, verbose=False)
    task = build(job.cfg, step.own["task"])
    with ExitStack() as held:
        if getattr(task, "locks", True):
            held.enter_context(used_folders(step))
            held.enter_context(step.folder.lock())
            step.folder.clear_temporary()
        stamp(step, keep=False)
        metrics = task(
            Context(
                folder=step.folder,
                upstream=step.upstream,
                images=load_images,
                plain=build(job.cfg, step.settings["augment"]["plain"]),
                num_clusters=step.num_clusters,
                seed=step.seed,
            )
        )
        if metrics is not None:
            _write_metrics(step, metrics, load_images(), time.monotonic() - started)


def _write_metrics(
    step: Step, metrics: Mapping[str, Any], images: ImageSet, seconds: float
) -> None:
    upstream = step.upstream[0] if step.upstream else None
    step.folder.stamp(images.fingerprint, len(images), upstream)
    about = {
        "stage": step.name,
        "seed": step.seed,
        "overrides": list(step.record.overrides),
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
    }
    step.folder.write_json("metrics.json", about | dict(metrics))
