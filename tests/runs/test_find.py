"""Which run a word of the command line means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spice_pl.errors import UsageError
from spice_pl.runs.find import earlier_runs, find_run


def made(
    runs: Path, name: str, *, age: int, digest: str, upstream: str | None = None, **metrics: object
) -> Path:
    folder = runs / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (folder / "dataset.json").write_text(json.dumps({"upstream": upstream}))
    file = folder / "metrics.json"
    file.write_text(json.dumps({"digest": digest, "rows": [], **metrics}))
    os.utime(file, (1_000_000 - age, 1_000_000 - age))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    made(runs, "photos/embed/seed0", age=3, digest="e")
    made(runs, "photos/proto/seed0", age=2, digest="p0", upstream="e", cluster_sizes=[1])
    made(runs, "photos/proto/seed1", age=1, digest="p1", upstream="e", cluster_sizes=[1])
    made(runs, "photos/fixmatch/seed0", age=9, digest="f", upstream="p0", cluster_sizes=[1])
    (runs / "photos/proto/seed0/report.html").write_text("")
    (runs / "photos/proto/unfinished").mkdir()
    for stopped in ("photos/proto/stopped", "cats/proto/a"):
        made(runs, stopped, age=4, digest="s").joinpath("metrics.json").unlink()
    made(runs, "cats/embed/seed0", age=3, digest="c")
    Path("pictures/summer").mkdir(parents=True)
    Path("pictures/summer/1.JPG").write_text("")
    return runs


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("photos", "photos/proto/seed1"),  # the newest with clusters
        ("runs/photos", "photos/proto/seed1"),
        ("photos/fixmatch", "photos/fixmatch/seed0"),
        ("photos/proto/seed0", "photos/proto/seed0"),
        ("runs/photos/proto/seed0/report.html", "photos/proto/seed0"),
    ],
)
def test_a_run_is_found_by_what_names_it(runs: Path, word: str, found: str) -> None:
    assert find_run(word).as_posix() == (runs / found).as_posix()


def test_features_are_enough_where_they_are_asked_for(runs: Path) -> None:
    assert find_run("photos/embed", need="features") == runs / "photos/embed/seed0"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("runs/photos/embed/seed0", r"holds no clusters, .*; these do: runs/photos/fixmatch/seed0"),
        ("photo", "run: it does not exist; give one of those below runs: runs/photos/"),
        ("photos/proto/unfinished", "unfinished is not a finished run: no run is in it; give one"),
        ("photos/proto/stopped", "proto/stopped was stopped before its end; add resume=true to"),
        ("cats/proto", "runs/cats/proto/a was stopped before its end; add resume=true to"),
        ("cats/embed", "the runs in it hold no clusters; give one of those below runs: runs/"),
        ("runs", "it holds the runs of several data sets; give one of those below runs: runs/"),
        (
            "pictures",
            "it is a folder of images; cluster it, .* pictures, or give one of those",
        ),
    ],
)
def test_what_is_no_run_is_refused_with_those_there_are(
    runs: Path, word: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_run(word)
    with pytest.raises(UsageError, match="there is none with clusters below elsewhere"):
        find_run(word if word != "runs/photos/embed/seed0" else "x", "elsewhere")


def test_earlier_runs_are_found_by_digest_whatever_their_name(runs: Path) -> None:
    chain = earlier_runs(runs / "photos/fixmatch/seed0")
    assert chain == [runs / "photos/proto/seed0", runs / "photos/embed/seed0"]
    # Damage and circles end the walk.
    (runs / "photos/embed/seed0/dataset.json").write_text('{"upstream": "f"}')
    (runs / "photos/proto/seed1/metrics.json").write_text("[[[")
    assert earlier_runs(runs / "photos/fixmatch/seed0")[:2] == chain
