"""Run jobs from Python as the command runs them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from spice_pl.job.job import Job
from spice_pl.job.of_run import with_settings_of_run
from spice_pl.job.run import run_stages
from spice_pl.system.command import quoted
from spice_pl.system.interrupts import RESUME_CODE, SIGNALS
from spice_pl.usage import conf_folder


def job_of(overrides: Sequence[str], of: Path | None = None) -> Job:
    """Return the job of a command line; with `of`, a task with the settings of that run."""
    given = [*overrides, *([] if of is None else [f"of={quoted(of)}"])]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", given)
        if of is not None:
            parser = OverridesParser.create()
            cfg = with_settings_of_run(cfg, parser.parse_overrides(list(overrides)))
        return Job(cfg, tuple(given), "none", sweep=False)


def run(job: Job, *, quiet: bool, kept: str) -> Path:
    """Run all stages; return the folder of the last one.

    Args:
        job: the job.
        quiet: whether not to print the table of results.
        kept: what is left of a job that is stopped, for the message.

    Raises:
        KeyboardInterrupt: a signal asked to stop. The command exits with a code instead, which
            would end a script or a notebook without a word.
    """
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        try:
            run_stages(job)
        except SystemExit as error:
            if error.code not in {RESUME_CODE, *(128 + number for number in SIGNALS)}:
                raise
            raise KeyboardInterrupt(f"a signal stopped the run; {kept}") from error
    return job.folder(job.stages[-1]).path
