"""Standard output that is closed, full, or a pipe whose reader has ended, such as `head`."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress

PIPE_CODE = 141  # 128 + SIGPIPE, as other programs end then


class Output(io.TextIOWrapper):
    """A stream that ends the process with one message or code where it cannot be written to.

    By `SystemExit`, since Hydra prints a traceback for any `Exception`.
    """

    def write(self, text: str, /) -> int:
        """Write text.

        Raises:
            SystemExit: code 141 for a pipe without a reader, 2 for any other reason.
        """
        try:
            return super().write(text)
        except OSError as error:
            end_output(error)
            raise

    def flush(self) -> None:
        """Write what is buffered; see `write`."""
        try:
            super().flush()
        except OSError as error:
            end_output(error)
            raise


class Messages(io.TextIOWrapper):
    """Standard error. What cannot be written there is lost, since nothing else could say so."""

    def write(self, text: str, /) -> int:
        """Write text."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with suppress(OSError):
            super().flush()


def end_output(error: OSError) -> None:
    """Leave out the rest of standard output, and end the process.

    Raises:
        SystemExit: see `Output.write`.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        raise SystemExit(PIPE_CODE) from error
    print(
        f"\nerror: standard output cannot be written to ({error.strerror}); send it to another "
        "place. The files that a run has finished are complete",
        file=sys.stderr,
    )
    raise SystemExit(2) from error


def open_output() -> None:
    """Give this process an `Output` and `Messages`; what a closed stream is sent gets lost."""
    for number, name, kind in ((1, "stdout", Output), (2, "stderr", Messages)):
        before = getattr(sys, name)
        if before is None:
            _occupy(number)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(before) is io.TextIOWrapper and before is getattr(sys, f"__{name}__"):
            lines = before.line_buffering
            made = kind(before.buffer, before.encoding, before.errors, line_buffering=lines)
            setattr(sys, name, made)


def _occupy(number: int) -> None:
    """Open a closed descriptor, so that no file of ours gets its number and is written to."""
    try:
        os.fstat(number)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def printable(text: str) -> str:
    r"""Return a text for logs and terminals: line ends and other control characters are escaped.

    >>> print(printable("a\nb"))
    a\nb
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def escaped(text: str) -> str:
    r"""Return a message of several lines with all control characters but line ends escaped.

    >>> print(escaped("a\nb\x1b[2J"))
    a
    b\x1b[2J
    """
    return "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n"))


class EscapedMessages(logging.Filter):
    """Escapes control characters in log messages: names in files could rewrite the terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the message of a record, and keep it."""
        record.msg, record.args = escaped(record.getMessage()), None
        return True


ESCAPED = EscapedMessages()  # one object, so that a handler gets it once
