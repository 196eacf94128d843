"""Write results as tables: Markdown for files, rich for the terminal."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Column, Table
from rich.text import Text

from spice_pl.reports.choices import Compared
from spice_pl.system.output import printable

NO_LABELS = "No labels were given, so no accuracy can be computed."
ORACLE = "Oracle rows used the true labels; do not compare them with rows that did not."
_SCORES = ("ACC", "Recall", "NMI", "ARI")
RECALL = "The classes differ in size: ACC counts every image alike, Recall every class alike."
LEFT = {"Name", "Protocol"}
COMPARED = ("Clusters", "Sizes", "Nearest 10", "5 or more", "Evenness", "Score")
COMPARED_NOTE = (
    "No labels were given, so no accuracy can be computed. Nearest 10: share of the ten most alike "
    "images that are in the same cluster. 5 or more: share of images with at least half of them "
    "there, or of as many as a small cluster has. Score, from -2 to 2: rises where clusters are "
    "compact and apart and neighbours share a cluster."
)


@dataclass(frozen=True)
class ResultRow:
    """One result with its scores, protocol, seed and time.

    Attributes:
        name: name of the stage or baseline.
        acc: accuracy after the best one-to-one match, in [0, 1]; None without labels.
        nmi: normalised mutual information, geometric mean, in [0, 1]; None without labels.
        ari: adjusted Rand index, in [-1, 1]; None without labels.
        protocol: which images were trained on and which were scored.
        seed: seed of the run.
        seconds: wall time.
        oracle: whether the true labels were used to train or choose this result.
        purity: share of the images that are of their cluster's most frequent class, in [0, 1]; None
            without labels, or if there are not more clusters than classes.
        recall: mean over classes of the share of their images that are in the class's cluster, in
            [0, 1]; None without labels, or if the classes are of about equal size.
    """

    name: str
    acc: float | None
    nmi: float | None
    ari: float | None
    protocol: str
    seed: int
    seconds: float
    oracle: bool = False
    purity: float | None = None
    recall: float | None = None

    @property
    def has_scores(self) -> bool:
        """Whether the result was scored with labels."""
        return self.acc is not None or self.nmi is not None or self.ari is not None


def score_text(value: float | None) -> str:
    """Return three decimals, or an en dash for None.

    >>> score_text(0.91249), score_text(None)
    ('0.912', '–')
    """
    return "–" if value is None else f"{value:.3f}"


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> duration_text(4.26), duration_text(125), duration_text(7384)
    ('4.3 s', '2 min 05 s', '2 h 03 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def mean_std(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation (n - 1), or the one value.

    >>> mean_std([0.908, 0.912, 0.916]), mean_std([0.912])
    ('0.912 ± 0.004', '0.912')

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("mean_std got no values; give it the score of at least one seed")
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def footnotes(rows: Sequence[ResultRow]) -> list[str]:
    """Return notes that the rows need: purity, recall, missing labels, use of labels."""
    notes = []
    for row in rows:
        if row.purity is not None:
            notes.append(
                f"{row.name}: more clusters than classes. ACC counts one cluster per class; if "
                f"each cluster counts as its most frequent class, {row.purity:.3f} of the images "
                "are right (purity)."
            )
    if _unequal(rows):
        notes.append(RECALL)
    if not all(row.has_scores for row in rows):
        notes.append(NO_LABELS)
    if any(row.oracle for row in rows):
        notes.append(ORACLE)
    return notes


def results_markdown(rows: Sequence[ResultRow]) -> str:
    """Return a Markdown table with footnotes below; it ends with a newline."""
    columns = _columns(rows)
    rule = "|".join(":--" if column in LEFT else "--:" for column in columns)
    lines = [f"| {' | '.join(columns)} |", f"|{rule}|"]
    for row in rows:
        cells = _cells(row)
        lines.append(f"| {' | '.join(_markdown(cells[column]) for column in columns)} |")
    return "\n".join([*lines, *(f"\n{note}" for note in footnotes(rows))]) + "\n"


def results_rich(rows: Sequence[ResultRow]) -> Table:
    """Return a table for the terminal with the footnotes as its caption."""
    table = Table(
        box=SIMPLE,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        caption=Text("\n".join(map(printable, footnotes(rows)))) if footnotes(rows) else None,
        caption_justify="left",
    )
    columns = _columns(rows)
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for row in rows:
        cells = _cells(row)
        # Text, not str: a "[" in a name is not markup.
        table.add_row(
            *(Text(printable(cells[column])) for column in columns),
            style="dim" if row.oracle else None,
        )
    return table


def compared_markdown(rows: Sequence[Compared]) -> str:
    """Return a Markdown table of clusterings without labels; it ends with a newline."""
    lines = [f"| {' | '.join(COMPARED)} |", "|:--" + "|--:" * (len(COMPARED) - 1) + "|"]
    lines += [f"| {' | '.join(map(_markdown, _compared_cells(row)))} |" for row in rows]
    return "\n".join([*lines, f"\n{COMPARED_NOTE}"]) + "\n"


def compared_rich(rows: Sequence[Compared]) -> Table:
    """Return a table of clusterings without labels for the terminal."""
    table = Table(
        *(Column(name, justify="left" if i == 0 else "right") for i, name in enumerate(COMPARED)),
        box=SIMPLE,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        caption=COMPARED_NOTE,
        caption_justify="left",
    )
    for row in rows:
        table.add_row(*map(Text, _compared_cells(row)), style=None if row.kept else "dim")
    return table


def _compared_cells(row: Compared) -> list[str]:
    return [
        f"{row.name} (kept)" if row.kept else row.name,
        row.sizes,
        f"{row.agreement:.1%}",
        f"{row.sure:.0%}",
        f"{row.evenness:.3f}",
        f"{row.score:.3f}",
    ]


def _unequal(rows: Sequence[ResultRow]) -> bool:
    return any(row.recall is not None for row in rows)


def _columns(rows: Sequence[ResultRow]) -> list[str]:
    """Return the columns of a table; those of scores only if a row has scores."""
    scores = _SCORES if any(row.has_scores for row in rows) else ()
    return [
        "Name",
        *(column for column in scores if column != "Recall" or _unequal(rows)),
        *("Protocol", "Seed", "Time"),
    ]


def _cells(row: ResultRow) -> dict[str, str]:
    scores = (row.acc, row.recall, row.nmi, row.ari)
    return {
        "Name": f"{row.name} (oracle)" if row.oracle else row.name,
        **dict(zip(_SCORES, map(score_text, scores), strict=True)),
        "Protocol": row.protocol,
        "Seed": str(row.seed),
        "Time": duration_text(row.seconds),
    }


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
