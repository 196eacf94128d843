"""Stop on signals: a first SIGTERM, SIGINT, SIGHUP or SIGUSR1 saves and stops, a second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# Sent by schedulers before they kill, by Ctrl-C, by a terminal that is closed, and by SLURM's
# --signal=USR1@seconds.
# Windows has no SIGUSR1, and sends SIGBREAK for Ctrl-Break.
SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGBREAK")
    if hasattr(signal, name)
)
RESUME_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong; continue with resume=true


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; exits with code 75."""

    def __init__(self) -> None:
        super().__init__(RESUME_CODE)


class Interrupts:
    """Handles the signals inside its `with` block.

    Attributes:
        asked: the signal that was received; None before.
        deferred: set True by code that checks `asked` regularly, to save and then stop. While it is
            False, a signal raises `Stopped` at once.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.deferred = False
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                each: signal.signal(each, self._handle)
                for each in SIGNALS
                # nohup has a process ignore that its terminal is closed
                if (each.name, signal.getsignal(each)) != ("SIGHUP", signal.SIG_IGN)
            }
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
            # Other code may swallow or re-wrap `Stopped`; raise it again on exit.
            raise Stopped from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:  # the second signal: stop without saving
            raise SystemExit(128 + number)
        self.asked = signal.Signals(number)
        if not self.deferred:
            self._raised = True
            raise Stopped


@contextmanager
def until_signal() -> Iterator[None]:
    """Leave the block at the first of the signals as at its normal end."""
    try:
        with Interrupts():
            yield
    except Stopped:
        return
