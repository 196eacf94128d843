"""A first SIGTERM, SIGINT or SIGUSR1 asks a run to save and stop; a second stops it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, what schedulers send before they kill, and SLURM's --signal=USR1@seconds.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RESUME_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start again with resume=true


class Stopped(SystemExit):
    """The run was asked to stop and has kept what it had; exit code 75."""

    def __init__(self) -> None:
        super().__init__(RESUME_CODE)


class Interrupts:
    """Catches the signals while it is open.

    Attributes:
        asked: the signal that asked to stop, None before.
        deferred: set while someone looks at `asked` and saves; else a signal stops at once.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.deferred = False
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._raised and (error is None or isinstance(error, Exception)):
            # It was raised in the middle of code that made another error of it, or lost it.
            raise Stopped from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:  # a second time: whoever asks will not wait
            raise SystemExit(128 + number)
        self.asked = signal.Signals(number)
        if not self.deferred:
            self._raised = True
            raise Stopped
