"""Find the finished run that a word of the command line means.

A run is named by its folder, by a file in it, by the folder of a data set or stage, or by any of
these below the folder of runs: `photos`, `photos/proto/seed0`, `photos/proto/seed0/report.html`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from spice_pl.data.formats import SUFFIXES
from spice_pl.errors import UsageError
from spice_pl.system.command import command

NEEDS = {"clusters": "cluster_sizes", "features": "rows"}  # field of metrics.json by what is needed


def find_run(word: str, runs_dir: str | os.PathLike[str] = "runs", need: str = "clusters") -> Path:
    """Return the folder of a finished run: the newest of `find_runs`, with its arguments."""
    return find_runs(word, runs_dir, need)[0]


def find_runs(
    word: str, runs_dir: str | os.PathLike[str] = "runs", need: str = "clusters"
) -> list[Path]:
    """Return the folders of the finished runs that a word means, the newest first.

    They are several where it names the folder of a data set or stage.

    Args:
        word: as in the list above.
        runs_dir: folder of all runs.
        need: what the run must have: "clusters" or "features".

    Raises:
        UsageError: no such run is found; the message names those that there are.
    """
    places = [Path(word).expanduser(), Path(runs_dir, word)]
    for place in places:
        folder = place.parent if place.is_file() else place
        if is_run(folder):
            if not _has(folder, need):
                raise UsageError(_lacks(folder, need))
            return [folder]
        below = [each for pattern in ("*", "*/*") for each in folder.glob(pattern)]
        if found := [each for each in below if is_run(each) and _has(each, need)]:
            return sorted(found, key=_age)
    raise UsageError(_not_found(word, places, Path(runs_dir), need))


def is_run(folder: Path) -> bool:
    """Whether a folder holds a finished run of a stage, <dataset>/<stage>/<run>."""
    return (folder / "metrics.json").is_file() and (folder / ".hydra" / "config.yaml").is_file()


def earlier_runs(run: Path) -> list[Path]:
    """Return the finished runs that a run was made from, the nearest first.

    They are found among the runs of its data set by the digest in dataset.json.
    """
    digests = {_field(each, "metrics.json", "digest"): each for each in _runs(run.parents[1])}
    found, wanted = [run], _field(run, "dataset.json", "upstream")
    while wanted is not None and wanted in digests and digests[wanted] not in found:
        found.append(digests[wanted])
        wanted = _field(found[-1], "dataset.json", "upstream")
    return found[1:]


def _age(run: Path) -> int:
    return -(run / "metrics.json").stat().st_mtime_ns


def _runs(dataset: Path) -> list[Path]:
    return sorted(each for each in dataset.glob("*/*") if is_run(each))


def _field(run: Path, file: str, name: str) -> str | None:
    try:
        found = json.loads((run / file).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # a damaged file is reported where it is read for its content
    return found if isinstance(found, str) else None


def _has(folder: Path, need: str) -> bool:
    try:
        return NEEDS[need] in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return True  # damaged; the message of its reader says more


def _lacks(folder: Path, need: str) -> str:
    try:
        beside = [each for each in _runs(folder.parents[1]) if _has(each, need)]
    except IndexError:
        beside = []
    others = f"; these do: {', '.join(map(str, beside))}" if beside else ""
    return f"{folder} holds no {need}, only what a stage before them left{others}"


def _not_found(word: str, places: Sequence[Path], runs_dir: Path, need: str) -> str:
    """Return what a word names instead of a finished run, and the way out."""
    why, out = _instead(word, [place for place in places if os.path.exists(place)], need)
    said = f"{word} is not a finished run: {why}"
    known = [each.as_posix() for each in sorted(runs_dir.glob("*/*/*")) if is_run(each)]
    known = [each for each in known if _has(Path(each), need)]
    if not known:
        out = out or "cluster a folder first"
        return (
            f"{said}, and there is none with {need} below {runs_dir}; {out}, or give runs_dir=PATH "
            "where its runs are"
        )
    near = get_close_matches(word, known, n=5, cutoff=0.3) or known[:5]
    more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    ways = [*filter(None, [out]), f"give one of those below {runs_dir}: {', '.join(near)}{more}"]
    return f"{said}; {', or '.join(ways)}"


def _instead(word: str, places: Sequence[Path], need: str) -> tuple[str, str]:
    """Return what is where a word points to, and what to do, if that is known."""
    if not places:
        return "it does not exist", ""
    if started := next(filter(None, map(_started, places)), None):
        out = "add resume=true to the command that started it"
        return f"{started.as_posix()} was stopped before its end", out
    for place in places:
        if any(place.glob("*/*/*/metrics.json")):
            return "it holds the runs of several data sets", ""
        if any(is_run(each) for depth in ("*", "*/*") for each in place.glob(depth)):
            return f"the runs in it hold no {need}", ""
        if _has_images(place):
            return "it is a folder of images", f"cluster it, {shlex.join([*command(), word])}"
    return "no run is in it", ""


def _started(place: Path) -> Path | None:
    """Return the newest run in or below a folder that was started and is not finished."""
    folders = [place, *(each for depth in ("*", "*/*") for each in place.glob(depth))]
    marks = (".hydra/config.yaml", "dataset.json")
    found = [each for each in folders if all((each / mark).is_file() for mark in marks)]
    return max((each for each in found if not is_run(each)), key=_modified, default=None)


def _modified(folder: Path) -> int:
    return folder.stat().st_mtime_ns


def _has_images(place: Path) -> bool:
    """Whether names of images are in a folder or in folders directly below it."""
    files = (each for depth in ("*", "*/*") for each in place.glob(depth))
    return any(each.suffix.lower() in SUFFIXES for each in files)
