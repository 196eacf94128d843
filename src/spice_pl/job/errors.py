"""How errors reach the user: one message, an exit code, and what to type next."""

from __future__ import annotations

import errno
import logging
import os
import reprlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import CompactHydraException

from spice_pl.errors import UsageError
from spice_pl.job import sweep
from spice_pl.job.job import Job
from spice_pl.system import ranks
from spice_pl.system.files import is_disk_full, is_unwritable, unwritable
from spice_pl.system.interrupts import Stopped
from spice_pl.system.output import ESCAPED, end_output, escaped


class TrialFailed(CompactHydraException):
    """A mistake in a trial of a sweep, which Hydra reports without a traceback."""


@contextmanager
def clear_errors(job: Job) -> Iterator[None]:
    """Print one message for a mistake that the user can correct, and exit with code 2.

    Raises:
        SystemExit: code 2 for a mistake; `Stopped`, code 75, after a signal.
        TrialFailed: a mistake in a trial of a sweep, whose other trials continue.
    """
    try:
        with full_disk_as_usage_error(job):
            yield
    except Stopped:
        if ranks.is_first_rank():
            command = job.command(without=("resume", "overwrite"), last=["resume=true"])
            print(f"\nstopped; what was made is kept. Continue with\n  {command}", file=sys.stderr)
        raise
    except Exception as error:
        if isinstance(error, UsageError):
            print(escaped(f"\nerror: {error}"), file=sys.stderr)
        if job.sweep:
            sweep.note_failure(job.overrides, error)
            if isinstance(error, UsageError):
                raise TrialFailed("at least one trial failed") from error
        elif isinstance(error, UsageError):
            raise SystemExit(2) from error
        raise


@contextmanager
def full_disk_as_usage_error(job: Job) -> Iterator[None]:
    """Turn the system's error of a full or closed disk or pipe into a message or an exit code.

    Raises:
        UsageError: names the file and the way out.
        SystemExit: the output is a pipe that was closed.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UsageError(
                f"no space left to write {error.filename or f'a file under {job.cfg.runs_dir}'} "
                f"({error.strerror}); files that are there are complete. Free some space, then "
                "continue with resume=true"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            name = reprlib.repr(os.fsdecode(error.filename or ""))
            raise UsageError(
                f"{name} is too long for the name of a file on this system; give a shorter one"
            ) from error
        if isinstance(error, BrokenPipeError):  # in a rank; the command has an `Output`
            end_output(error)
        for key in ("runs_dir", "cache_dir"):
            place, file = Path(job.cfg[key]).expanduser().absolute(), error.filename
            if is_unwritable(error) and file and _shares(place, Path(os.fsdecode(file)).absolute()):
                raise unwritable(key, job.cfg[key], error) from error
        raise


def _shares(place: Path, file: Path) -> bool:
    """Whether a file is below a place, or the place below the file."""
    return file.is_relative_to(place) or place.is_relative_to(file)


def quiet() -> None:
    """Keep messages that the user cannot act on out of the log, and escape the others."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(ESCAPED)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for known in (
        "resuming from a checkpoint that ended before the epoch",  # the sampler continues there
        "It is recommended to use `self.log",  # with sync_dist; the values are of all ranks already
        "does not have many workers",  # images are in memory, whole batches at a time
        "Checkpoint directory .* exists and is not empty",
        "Experiment logs directory .* exists and is not empty",
        "torch.distributed.nn.functional.all_gather is deprecated",  # inside Lightning
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{known}.*")
