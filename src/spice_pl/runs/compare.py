"""Compare runs in one table: mean and spread over seeds, settings, cost, published results.

How alike the clusters of two seeds are is measured without labels.

    spice compare runs/digits runs/photos/fixmatch [--to DIR]

Rows are ordered by data set, stage and settings, never by a score.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.functional.assignment import clustering_scores
from spice_pl.reports.published import PublishedRow, published_results
from spice_pl.reports.tables import NO_LABELS, ResultRow, duration_text, mean_std, score_text
from spice_pl.runs.folder import RunFolder
from spice_pl.system.files import atomic
from spice_pl.system.output import escaped, printable

ALIKE = "Seeds alike"
FOLDER = "folder"  # key that `finished_runs` adds: where the clusters are
COLUMNS = (
    *("Data", "Method", "Run", "K", "Settings that differ", "Protocol", "Seeds"),
    *("ACC", "NMI", "ARI", "Nearest 10", "5 or more", "Score", ALIKE, "Time", "Memory", "Source"),
)
RIGHT = {"K", *COLUMNS[7:-1]}
UNLABELLED = ("agreement", "sure", "score")  # fields of `Compared`
# Settings that may differ within a group: the seed, and where images are.
NOT_COMPARED = ("seed", "cache_dir", "on_bad_image", "root", "path", "name")


@dataclass(frozen=True)
class Line:
    """Runs that differ only in their seed, or one published result.

    Attributes:
        dataset: name of the data set.
        method: name of the stage or baseline.
        settings: settings in which the runs of this data set and method differ.
        protocol: which images were trained on and which were scored.
        seeds: seed of each run; empty for a published result.
        acc: ACC of each run that had labels, in [0, 1].
        nmi: NMI of each run that had labels, in [0, 1].
        ari: ARI of each run that had labels, in [-1, 1].
        repeated: number of runs left out, because the line has one with their seed.
        alike: ARI between the clusters of each two seeds, in [-1, 1]; empty without clusters or
            with one seed.
        runs: name of each run, without the settings that a sweep adds.
        num_clusters: K of each run that has clusters.
        compared: the values of `UNLABELLED` of each run that has them stored.
        seconds: time of each run, with the stages before it.
        memory_mb: largest memory of each run.
        spread: published standard deviation of ACC.
        source: paper of a published result; "here" for runs.
    """

    dataset: str
    method: str
    settings: Mapping[str, str]
    protocol: str
    seeds: tuple[int, ...]
    acc: tuple[float, ...]
    nmi: tuple[float, ...]
    ari: tuple[float, ...]
    seconds: tuple[float, ...] = ()
    memory_mb: tuple[float, ...] = ()
    spread: float | None = None
    source: str = "here"
    repeated: int = 0
    alike: tuple[float, ...] = ()
    runs: tuple[str, ...] = ()
    num_clusters: tuple[int, ...] = ()
    compared: tuple[tuple[float, float, float], ...] = ()

    @property
    def unlabelled(self) -> tuple[float, ...]:
        """Means of the values of `UNLABELLED`; empty where none are stored."""
        return tuple(map(statistics.fmean, zip(*self.compared, strict=True)))

    @property
    def cells(self) -> tuple[str, ...]:
        """Text of each column."""
        acc = _scores(self.acc) + (f" ± {self.spread:.3f}" if self.spread is not None else "")
        unlabelled = ["–"] * len(UNLABELLED)
        if means := self.unlabelled:
            unlabelled = [f"{means[0]:.1%}", f"{means[1]:.0%}", f"{means[2]:.3f}"]
        return (
            *(self.dataset, self.method),
            " ".join(dict.fromkeys(self.runs)) or "–",
            " ".join(map(str, sorted(set(self.num_clusters)))) or "–",
            ", ".join(f"{key}={value}" for key, value in self.settings.items()),
            self.protocol or "–",
            " ".join(map(str, self.seeds)) or "–",
            *(acc, _scores(self.nmi), _scores(self.ari)),
            *unlabelled,
            score_text(statistics.fmean(self.alike) if self.alike else None),
            duration_text(statistics.fmean(self.seconds)) if self.seconds else "–",
            f"{max(self.memory_mb):,.0f} MB" if self.memory_mb else "–",
            self.source,
        )


class GroupKey(NamedTuple):
    """What the runs of one line have in common."""

    dataset: str
    method: str
    protocol: str
    settings: tuple[tuple[str, str], ...]


Group = list[tuple[ResultRow, Mapping[str, Any]]]  # each row with the run that it is from


def finished_runs(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Return the metrics.json of every finished stage in or below some folders.

    Each has one more key, "folder": the folder that it was read from.

    Raises:
        UsageError: a path is not a folder, no run below any of them has scores, or a
            metrics.json is damaged.
    """
    found: dict[Path, dict[str, Any]] = {}
    for given in map(Path, paths):
        path = _place(given)
        if not path.is_dir():
            raise UsageError(f"{given} is not a folder; give folders of runs{_known(str(given))}")
        for file in sorted(path.rglob("metrics.json")):
            metrics = RunFolder(file.parent).metrics
            if metrics.get("rows"):  # tasks may leave none
                found[file.resolve()] = {**metrics, FOLDER: str(file.parent)}
    if not found:
        raise UsageError(
            f"no finished run in or below {', '.join(map(str, paths))}, that is, no "
            f"metrics.json of a stage; give folders of runs{_known(str(paths[0]))}"
        )
    return list(found.values())


def _place(given: Path) -> Path:
    """Return a folder of runs, or that of a data set below the usual one.

    The images may be in a folder of the same name; it holds no runs.
    """
    below = Path("runs", given)
    if given.is_dir() and not (below.is_dir() and not any(given.rglob("metrics.json"))):
        return given
    return below


def _known(word: str) -> str:
    """Return which data sets have a folder of runs, those with names alike first."""
    known = [each for each in sorted(Path("runs").glob("*")) if any(each.glob("*/*/metrics.json"))]
    if not known:
        return "; there are none below runs"
    names = [each.as_posix() for each in known]
    near = get_close_matches(word, names, n=5, cutoff=0.3) or names[:5]
    more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    return f"; below runs are {', '.join(near)}{more}"


def compare(runs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Group runs that differ only in their seed; add the published results of their data sets."""
    groups = _grouped(runs)
    lines = [
        _line(key, group, _differing(key, groups))
        for key, group in sorted(groups.items(), key=_order)
    ]
    datasets = sorted({line.dataset for line in lines})
    return lines + [_published(name, row) for name in datasets for row in published_results(name)]


def markdown(lines: Sequence[Line]) -> str:
    """Return a Markdown table, without empty columns."""
    shown = _filled(lines)
    rule = "|".join("--:" if COLUMNS[i] in RIGHT else ":--" for i in shown)
    rows = [[row[i] for i in shown] for row in (COLUMNS, *(line.cells for line in lines))]
    text = [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows]
    return (
        "\n".join([text[0], f"|{rule}|", *text[1:], *(f"\n{note}" for note in notes(lines))]) + "\n"
    )


def table_csv(lines: Sequence[Line]) -> str:
    """Return the table as CSV, with means, spreads and the number of runs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    scores = [f"{name}_{what}" for name in ("acc", "nmi", "ari") for what in ("mean", "std")]
    head = ["data", "method", "run", "k", "settings", "protocol", "seeds", "runs", *scores]
    means = [f"{name}_mean" for name in ("neighbours", "sure", "score")]
    writer.writerow([*head, *means, "seeds_alike", "seconds_mean", "memory_mb_max", "source"])
    for line in lines:
        numbers: list[float | str] = []
        for values in (line.acc, line.nmi, line.ari):
            numbers.append(statistics.fmean(values) if values else "")
            numbers.append(statistics.stdev(values) if len(values) > 1 else "")
        if line.spread is not None:
            numbers[1] = line.spread
        numbers += line.unlabelled or [""] * len(means)
        numbers.append(statistics.fmean(line.alike) if line.alike else "")
        cost = statistics.fmean(line.seconds) if line.seconds else ""
        memory = max(line.memory_mb, default="")
        cells = line.cells
        writer.writerow([*cells[:7], len(line.seeds), *numbers, cost, memory, line.source])
    return file.getvalue()


def page(lines: Sequence[Line]) -> str:
    """Return the table as a page that opens offline, without empty columns."""
    shown = _filled(lines)

    def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
        made = (
            f"<{tag}{' class=n' if COLUMNS[i] in RIGHT else ''} data-col='{COLUMNS[i]}'"
            f"{' data-none' if cells[i] in ('', '–') else ''}>{escape(cells[i])}</{tag[:2]}>"
            for i in shown
        )
        return f"<tr{kind}>{''.join(made)}</tr>"

    body = "\n".join(row(line.cells, "td", "" if line.seeds else " class=hint") for line in lines)
    below = "".join(f"<p class=hint>{escape(note)}</p>" for note in notes(lines))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{files("spice_pl.reports").joinpath("templates/style.css").read_text(encoding="utf-8")}
</style></head><body><header><h1>Runs compared</h1></header><main>
<div class="scroll" role="region" aria-label="Runs compared" tabindex="0">
<table class="cards"><thead>{row(COLUMNS, "th scope=col")}</thead>
<tbody>
{body}
</tbody></table></div>{below}</main></body></html>
"""


def _filled(lines: Sequence[Line]) -> list[int]:
    """Return the columns that say something: not empty, and names of runs only if they differ."""
    cells = [line.cells for line in lines]
    same = len({line.cells[2] for line in lines if line.runs}) < 2
    return [
        i
        for i, name in enumerate(COLUMNS)
        if any(row[i] not in ("", "–") for row in cells) and not (name == "Run" and same)
    ]


def notes(lines: Sequence[Line]) -> list[str]:
    """Return what a reader of the table needs to know."""
    said = ["Time: mean, with the stages before. Memory: largest."]
    if any(line.acc for line in lines):
        said.insert(0, "ACC, NMI, ARI: mean ± sample standard deviation over seeds.")
    if any(line.alike for line in lines):
        said.append(
            f"{ALIKE}: ARI between the clusters of two seeds, without labels; mean over all pairs. "
            "1 for the same clusters, 0 for no more in common than by chance."
        )
    if any(line.compared for line in lines):
        said.append(
            "Nearest 10, 5 or more, Score: without labels, as in the report; mean over seeds. "
            "Compare them between rows of the same features and K. Nearest 10: share of the ten "
            "most alike images that are in the same cluster. 5 or more: share of images with at "
            "least half of them there, or of as many as a small cluster has. Score, from -2 to 2: "
            "rises where clusters are compact and apart and neighbours share a cluster."
        )
    if repeated := sum(line.repeated for line in lines):
        said.append(
            f"{repeated} results with a seed that their line has already are left out; of runs "
            "that differ only in their name, the first by name counts."
        )
    if any(not line.acc for line in lines):
        said.append(NO_LABELS)
    return said


def write(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write compare.md, compare.csv and compare.html; return where they are."""
    made = {"md": markdown(lines), "csv": table_csv(lines), "html": page(lines)}
    for suffix, text in made.items():
        with atomic(folder / f"compare.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    return [folder / f"compare.{suffix}" for suffix in made]


def show(lines: Sequence[Line], folder: Path, console: Console | None = None) -> None:
    """Print the table and write its files."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown = _filled(lines)
    for i in shown:
        table.add_column(COLUMNS[i], justify="right" if COLUMNS[i] in RIGHT else "left")
    for line in lines:
        # Text, not str: rich would read a "[" in a name as markup.
        style = None if line.seeds else "dim"
        table.add_row(*(Text(printable(line.cells[i])) for i in shown), style=style)
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in notes(lines):
        console.print(note, highlight=False)
    for file in write(lines, folder):
        console.print(str(file), highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the runs in the folders that the command line names."""
    parser = argparse.ArgumentParser(prog="spice compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", help="folders of runs, searched with their subfolders")
    parser.add_argument(
        "--to", help="folder for compare.md, .csv and .html; by default, the one of the runs"
    )
    given = parser.parse_args(arguments)
    try:
        lines = compare(finished_runs(given.runs))
    except UsageError as error:
        print(escaped(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from error
    places = [_place(Path(run)).absolute() for run in given.runs]
    show(lines, Path(given.to or os.path.commonpath(places)))


def _own_rows(run: Mapping[str, Any]) -> list[ResultRow]:
    """Return the rows that this stage added: its clusters', or k-means on pixels and features."""
    rows = [ResultRow(**row) for row in run["rows"]]
    if "cluster_sizes" not in run:
        return rows
    return rows[-2:] if run.get("answer") else rows[-1:]


def _settings(run: Mapping[str, Any]) -> dict[str, str]:
    settings = {**run.get("settings", {}), "images": str(run["fingerprint"])}
    return {
        key: str(value)
        for key, value in sorted(settings.items())
        if key.rpartition(".")[2] not in NOT_COMPARED
    }


def _clusters(row: ResultRow, run: Mapping[str, Any]) -> Tensor | None:
    """Return the clusters (N,) behind a row; None if the run has none or its files are gone.

    Raises:
        UsageError: the file is damaged or has changed.
    """
    if FOLDER not in run or "cluster_sizes" not in run:
        return None
    folder = RunFolder(Path(run[FOLDER]))
    if not (folder.path / "probs.npy").is_file():
        return None
    chosen = run.get("answer") and row.name == run["rows"][-1]["name"]
    probs = folder.answer if chosen else folder.probs
    return torch.from_numpy(np.asarray(probs.argmax(axis=1), dtype=np.int64))


def _compared(row: ResultRow, run: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the values of `UNLABELLED` behind a row without labels; None if they are not stored.

    The last row of a run with an answer has the clusters that were kept.
    """
    kept = bool(run.get("answer")) and row.name == run["rows"][-1]["name"]
    for each in () if row.has_scores else run.get("compared", ()):
        if each["kept"] if kept else each["name"] == row.name:
            agreement, sure, score = (float(each[name]) for name in UNLABELLED)
            return agreement, sure, score
    return None


def _alike(group: Group) -> tuple[float, ...]:
    """Return the adjusted Rand index between the clusters of each two runs."""
    if len(group) < 2:
        return ()
    found = [clusters for row, run in group if (clusters := _clusters(row, run)) is not None]
    return tuple(
        clustering_scores(one, other)["ari"] for one, other in itertools.combinations(found, 2)
    )


def _grouped(runs: Sequence[Mapping[str, Any]]) -> dict[GroupKey, Group]:
    groups: dict[GroupKey, Group] = {}
    for run in runs:
        for row in _own_rows(run):
            settings = {} if "pixels" in row.name else _settings(run)
            key = GroupKey(str(run["dataset"]), row.name, row.protocol, tuple(settings.items()))
            groups.setdefault(key, []).append((row, run))
    return groups


def _differing(key: GroupKey, groups: Iterable[GroupKey]) -> dict[str, str]:
    """Return the settings in which a group differs from others of its data set and method."""
    others = [
        dict(other.settings)
        for other in groups
        if (other.dataset, other.method) == (key.dataset, key.method) and other.settings
    ]
    return {
        name: value
        for name, value in key.settings
        if any(other.get(name) != value for other in others)
    }


def _line(key: GroupKey, group: Group, settings: Mapping[str, str]) -> Line:
    # A seed counts once: a run under a second name is not another sample.
    by_seed = {row.seed: (row, run) for row, run in reversed(group)}
    repeated = len(group) - len(by_seed) if key.settings else 0
    group = [by_seed[seed] for seed in sorted(by_seed)]
    rows = [row for row, _ in group]
    sizes = [int(run.get("num_clusters") or 0) for _, run in group if "cluster_sizes" in run]
    said_by_k = {str(each) for each in sizes}
    measured = (_compared(row, run) for row, run in group)
    return Line(
        dataset=key.dataset,
        method=key.method,
        settings={
            name: value
            for name, value in settings.items()
            if not (name.endswith(".num_clusters") and {value} == said_by_k)
        },
        protocol=key.protocol,
        seeds=tuple(row.seed for row in rows),
        acc=tuple(row.acc for row in rows if row.acc is not None),
        nmi=tuple(row.nmi for row in rows if row.nmi is not None),
        ari=tuple(row.ari for row in rows if row.ari is not None),
        seconds=tuple(row.seconds for row in rows),
        memory_mb=tuple(float(run["peak_memory_mb"]) for _, run in group),
        repeated=repeated,
        alike=_alike(group),
        runs=tuple(Path(run[FOLDER]).name.partition(",")[0] for _, run in group if FOLDER in run),
        num_clusters=tuple(each for each in sizes if each),
        compared=tuple(each for each in measured if each is not None),
    )


def _published(dataset: str, row: PublishedRow) -> Line:
    return Line(
        dataset=dataset,
        method=row.title,
        settings={},
        protocol=row.protocol,
        seeds=(),
        acc=(row.acc,),
        nmi=() if row.nmi is None else (row.nmi,),
        ari=() if row.ari is None else (row.ari,),
        spread=row.spread,
        source=row.source,
    )


def _order(item: tuple[GroupKey, Group]) -> tuple[Any, ...]:
    """Sort by data set and protocol, then along the chain of stages, then by name and settings."""
    key, group = item
    depth = min(
        next(i for i, row in enumerate(run["rows"]) if row["name"] == key.method)
        for _, run in group
    )
    return key.dataset, key.protocol, depth, key.method, key.settings


def _scores(values: Sequence[float]) -> str:
    return mean_std(values) if values else score_text(None)


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


if __name__ == "__main__":
    main()
