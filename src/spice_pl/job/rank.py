"""One rank of a job, started by its parent as `python -m spice_pl.job.rank FILE`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from spice_pl.errors import UsageError
from spice_pl.job.errors import full_disk_as_usage_error
from spice_pl.job.job import Job
from spice_pl.job.run import run_stages
from spice_pl.system import ranks


def run_rank(file: str) -> None:
    """Run one rank of a job that the parent wrote to a file."""
    ranks.end_with_parent()
    level = logging.INFO if ranks.is_first_rank() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    job = Job.load(file)
    try:
        with full_disk_as_usage_error(job):
            run_stages(job)
    except UsageError as error:  # every rank has it; the parent says it once
        Path(f"{file}.error{ranks.rank()}").write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from error


if __name__ == "__main__":
    run_rank(sys.argv[1])
