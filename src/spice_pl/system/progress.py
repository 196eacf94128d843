"""Show the progress of a job and the time left: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

PAUSE = 10.0  # seconds between two lines, for jobs that are usually short
RARELY = 30.0  # for users who want to know no more than that the job continues


class Bar:
    """A progress bar inside its `with` block; without a terminal, a log line per tenth of the job.

    Args:
        name: name of the job.
        total: number of steps of the job.
        done: steps done before, in an earlier part of a resumed job.
        enabled: False shows nothing, as on all ranks but the first.
        pause: least seconds before the first line and between lines.
    """

    def __init__(
        self, name: str, total: int, *, done: int = 0, enabled: bool = True, pause: float = 0.0
    ) -> None:
        self.name, self.total, self.first, self.done = name, total, done, done
        self.enabled, self.pause = enabled, pause
        self.started = self._said = time.monotonic()
        self._tenth = -1  # so the first step logs a line too, with the time left
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[values]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=done, values="")

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """End the bar, so that the next output starts on its own line."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Count steps as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def show(self, values: str = "") -> None:
        """Show `values` beside the bar, or log a line if a further tenth is done."""
        if self._bar is not None:
            self._bar.update(self._task, values=values)
            return
        now, tenth = time.monotonic(), 10 * self.done // max(1, self.total)
        if not self.enabled or self.done == self.first:
            return
        if tenth <= self._tenth or now - self._said < self.pause:
            return
        self._tenth, self._said = tenth, now
        seconds = now - self.started
        left = seconds / max(1, self.done - self.first) * (self.total - self.done)
        line = f"{self.name} {10 * tenth:3d} %, {seconds:.0f} s, {left:.0f} s left  {values}"
        logger.info(line.rstrip())
