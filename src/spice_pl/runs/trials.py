"""The table of trials without clusters, such as those of a sweep over stage 1: what they logged."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spice_pl.reports.tables import duration_text
from spice_pl.runs.folder import RunFolder
from spice_pl.system.files import atomic
from spice_pl.system.output import printable

NOTE = (
    "Last values of each trial. train/ and val/ are computed without labels, truth/ with them; no "
    "trial was chosen by them. A loss is compared between trials of the same loss only."
)


def logged_table(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Return a table of the last logged values, with a header; [] if nothing was logged.

    Columns are those that any trial has; a head of its own has none. Rows are in the order of
    their names.
    """
    ordered = sorted(runs, key=lambda run: run.path)
    logged = {run: run.metrics.get("logged") or {} for run in ordered}
    names = sorted({name for each in logged.values() for name in each if "_head_" not in name})
    if not names:
        return []
    return [
        ["Trial", *names, "Time"],
        *(
            [
                run.path.name,
                *(f"{each[name]:.4g}" if name in each else "–" for name in names),
                duration_text(float(run.metrics.get("seconds_in_all", 0))),
            ]
            for run, each in logged.items()
        ),
    ]


def show_logged(rows: Sequence[Sequence[str]], folder: Path) -> None:
    """Print the table and write it as trials.csv and trials.md."""
    head, *body = rows
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in body:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(NOTE, highlight=False)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    rule = "|".join([":--", *["--:"] * (len(head) - 1)])
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    made = {"csv": text.getvalue(), "md": "\n".join([lines[0], f"|{rule}|", *lines[1:], "", NOTE])}
    for suffix, content in made.items():
        file = folder / f"trials.{suffix}"
        with atomic(file) as part:
            part.write_text(content, encoding="utf-8", errors="surrogateescape")
        console.print(str(file), highlight=False, soft_wrap=True)
