"""Run a job: plan its steps, check them, then run each stage or task.

The command calls `run_stages`. With several devices the parent starts one `job/rank.py` per device,
and each of them calls `run_stages` too.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from omegaconf import OmegaConf

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.budget import FILE_NAME, Budget
from spice_pl.job.checks import check, check_chain, check_folders, check_upstream
from spice_pl.job.errors import quiet
from spice_pl.job.finish import show
from spice_pl.job.job import Job
from spice_pl.job.locks import holds_locks, remove_replaced, used_folders
from spice_pl.job.num_clusters import settled
from spice_pl.job.of_run import chosen_run
from spice_pl.job.outlook import planned
from spice_pl.job.parts import JobImages, build_stage, check_distinct, open_images
from spice_pl.job.plan import Step, check_settings, plan
from spice_pl.job.stage import run_stage
from spice_pl.job.task import run_task
from spice_pl.job.trainer import num_ranks
from spice_pl.reports.tables import duration_text
from spice_pl.system import ranks
from spice_pl.system.interrupts import Interrupts
from spice_pl.system.log import USER

logger, user = logging.getLogger(__name__), logging.getLogger(USER)


def run_stages(job: Job) -> float | None:
    """Run the steps of a job in order, reuse those that are finished; return the objective.

    Raises:
        UsageError: a setting, the data or an earlier artifact does not fit.
        Stopped: a signal asked to stop; what was made is kept, `resume=true` continues.
    """
    quiet()
    check_settings(job)
    if run := chosen_run(job):
        logger.info(run)
    budget, opened = Budget(job.cfg.minutes), JobImages(open_images)
    if not ranks.in_rank() and (job.cfg.minutes is not None or not job.sweep):
        with Interrupts():
            job = planned(job, budget, opened)
    return run_planned(job, budget, opened)


def run_planned(job: Job, budget: Budget, opened: JobImages, *, shown: bool = True) -> float | None:
    """Run a job within its time; K is settled first where it has to be estimated.

    Args:
        job: the job.
        budget: time that it may take.
        opened: images of the job.
        shown: whether the results are printed; False for a part of a job.
    """
    if job.cfg.dataset.num_clusters == "auto":
        shows = shown and not job.plain
        run = functools.partial(run_planned, budget=budget, opened=opened, shown=shows)
        job = settled(job, run)
    steps = plan(job)
    num_processes = num_ranks(job.cfg)
    with Interrupts() as interrupts:
        check_before_work(job, steps, opened)
        todo = [step for step in steps if not step.reused]
        if num_processes > 1 and todo and not ranks.in_rank():
            start_ranks(job, todo, num_processes)
        else:
            run_steps(job, steps, interrupts, budget, opened, shown=shown)
    objective = _metrics(steps[-1]).get("objective")
    return None if objective is None else float(objective)


def check_before_work(job: Job, steps: Sequence[Step], opened: JobImages) -> None:
    """Check folders and edits in the process that the user started."""
    if ranks.is_ours():  # the parent has checked
        return
    if ranks.in_rank():
        check_folders(job, steps, opened)
    else:
        check(job, steps, opened)


def start_ranks(job: Job, steps: Sequence[Step], num_processes: int) -> None:
    """Start one process per device and wait for all; hold the folders of these steps meanwhile."""
    if tasks := [step.name for step in steps if not step.trains]:
        raise UsageError(
            f"stage={','.join(tasks)} trains nothing and runs in one process; use trainer=auto "
            "for it"
        )
    if job.cfg.overwrite:
        remove_replaced(steps)
    with ExitStack() as held:
        for step in steps:
            held.enter_context(used_folders(step))
        locks = [held.enter_context(step.folder.lock()) for step in steps]
        ranks.launch_ranks(num_processes, job.dump(), locks)


def run_steps(
    job: Job,
    steps: Sequence[Step],
    interrupts: Interrupts,
    budget: Budget,
    opened: JobImages,
    *,
    shown: bool,
) -> None:
    """Build and check all stages, then run the steps one after another in this process."""
    load_images = functools.partial(opened, job.cfg)
    todo = [step for step in steps if step.trains and not step.reused]
    if todo:
        load_images()
        logger.info("preset: %s", job.preset)
        check_distinct(load_images(), max(2, *(step.num_clusters for step in todo)))
    stages = {step.name: build_stage(job, step, load_images()) for step in todo}
    if job.cfg.overwrite:
        remove_replaced(steps)
    with ExitStack() as used:
        for step in steps:
            with ExitStack() as held:
                if step.trains and not step.reused:
                    check_upstream(job, step, load_images())
                    used.enter_context(used_folders(step))
                    if holds_locks():  # trials that share a stage wait for it here
                        held.enter_context(step.folder.lock())
                if step.reused:
                    check_chain(step)
                    logger.info("%s: finished earlier, reused from %s", step.name, step.folder.path)
                    if step.name not in budget.works:
                        user.info("%s: made earlier, used again", job.part_name(step.name))
                elif step.trains:
                    images = load_images()
                    if step.name not in stages:  # another run removed what was reused
                        stages[step.name] = build_stage(job, step, images)
                    begun = time.monotonic()
                    job, step = budget_settled(job, step, stages, images, budget)
                    run_stage(job, step, *stages.pop(step.name), images, interrupts)
                    spent = time.monotonic() - begun
                    budget.note(step, spent)
                    user.info("%s: done in %s", job.part_name(step.name), duration_text(spent))
                else:
                    run_task(job, step, load_images)
    if shown and ranks.is_first_rank():
        show(steps[-1].folder, False if job.sweep else job.cfg.open, plain=job.plain)


def budget_settled(
    job: Job, step: Step, stages: dict[str, Any], images: ImageSet, budget: Budget
) -> tuple[Job, Step]:
    """Return job and step with the settings that fit the time left; write them to minutes.json.

    `stages` gets the stage as these settings build it.
    """
    names = job.stages[job.stages.index(step.name) :] if step.name in job.stages else [step.name]
    values = budget.lowered(job, names, max(step.num_clusters, 2))
    own = {key: value for key, value in values.items() if key.startswith(f"{step.name}.")}
    if not own:
        return job, step
    before = {key: OmegaConf.select(job.cfg, key) for key in own}
    job = job.with_settings(values)
    settled_step = next(each for each in plan(job) if each.name == step.name)
    if before != own:
        stages[step.name] = build_stage(job, settled_step, images)
        logger.info("minutes=%g: %s", budget.minutes, ", ".join(f"{k}={v}" for k, v in own.items()))
    content = {"minutes": budget.minutes, "settings": own}
    settled_step.folder.write_json(FILE_NAME, content)
    return job, settled_step


def _metrics(step: Step) -> dict[str, Any]:
    """Return what a step left in metrics.json; empty after a task that leaves none."""
    return step.folder.metrics if step.folder.finished else {}
