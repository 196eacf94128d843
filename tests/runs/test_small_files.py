"""Damaged, oversized and mistyped files of a run: each gives one message that names the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.reports.tables import ResultRow
from spice_pl.runs import small_files
from spice_pl.runs.compare import finished_runs
from spice_pl.runs.edits import FORMAT, parse_edits, read_edits
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.results import last_logged
from spice_pl.runs.small_files import METRICS, STAMP

EDITS: dict[str, Any] = {
    "format": FORMAT,
    "reviewed": "proto/seed0",
    "fingerprint": "f",
    "digest": "d",
    "num_clusters": 3,
    "names": {},
    "merge": [],
    "split": {},
    "move": {},
}
READERS: dict[str, Callable[[RunFolder], Any]] = {
    "metrics.json": lambda folder: folder.metrics,
    "dataset.json": lambda folder: folder.check_dataset("f", 90),
    "names.json": lambda folder: folder.names,
    "edits.json": lambda folder: read_edits(folder.path / "edits.json"),
    "metrics.csv": last_logged,
}
DAMAGE = {
    "empty": b"",
    "half": b'{"0": "ca',
    "no object": b'["0"]',
    "not UTF-8": b'{"0": "\xff"}',
    "UTF-16": '{"0": "a"}'.encode("utf-16"),
    "100,000 levels": b'{"0": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "21 levels": b'{"0": ' + b"[" * 21 + b"]" * 21 + b"}",
    "number of 5,000 digits": b'{"num_images": ' + b"9" * 5000 + b"}",
    "64 MB": b'{"0": "' + b"a" * 64_000_000 + b'"}',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["metrics.json", "dataset.json", "names.json", "edits.json"])
def test_a_damaged_file_is_one_message(tmp_path: Path, name: str, damage: str) -> None:
    (tmp_path / name).write_bytes(DAMAGE[damage])
    with pytest.raises(UsageError, match=rf"{name} (is damaged|does not name|cannot be read)") as e:
        READERS[name](RunFolder(tmp_path))
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    "log",
    [
        b"epoch,train/loss\nx,1\n",
        b"epoch,train/loss\n1.5,1\n",
        b"epoch,train/loss\n-1,1\n",
        b"epoch,train/loss\n99999999999999999999,1\n",
        b"epoch,train/loss\n1,low\n",
        b"epoch,train/loss\n1,2,3\n",
        b"epoch,train/loss\n1,\xff\n",
        b"epoch,train/loss\n1," + b"1" * 131_073 + b"\n",
        b"epoch,train/loss\n" + b"1,0.5\n" * 11_000_000,
    ],
    ids=lambda log: log[16:40].decode("latin-1").strip(),
)
def test_a_damaged_log_is_one_message(finished: Finished, log: bytes) -> None:
    folder = finished.folder("proto")
    (folder.path / "metrics.csv").write_bytes(log)
    with pytest.raises(UsageError, match=r"metrics\.csv is damaged"):
        last_logged(folder)


def test_a_log_of_steps_only_has_values_and_no_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("lr,step\n0.1,0\n0.05,50\n")
    assert last_logged(RunFolder(tmp_path)) == {"lr": 0.05}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_clusters", 1e9),
        ("num_clusters", 10**9),  # more than images
        ("num_clusters", -1),
        ("num_clusters", True),
        ("num_images", 10**30),
        ("seed", "0"),
        ("seconds", -1),
        ("seconds", float("inf")),
        ("peak_memory_mb", None),
        ("digest", 5),
        ("digests", {"probs.npy": 5}),
        ("digests", ["probs.npy"]),
        ("fingerprint", None),
        ("stage", ["proto"]),
        ("stage", "\ud800"),
        ("overrides", "seed=0"),
        ("overrides", [1]),
        ("settings", {"a": {"b": 1}}),
        ("versions", []),
        ("objective", "low"),
        ("cluster_sizes", ["1"]),
        ("rows", {}),
        ("rows", [{"name": "SPICE"}]),
        ("rows", ["SPICE"]),
    ],
)
def test_a_field_of_another_type_is_named(finished: Finished, field: str, value: Any) -> None:
    folder = finished.folder("proto")
    file = folder.path / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    reason = f"('{field}' is|it has more clusters than images)"
    message = rf"metrics\.json is damaged \({reason}.*; delete .*metrics\.json .* with resume=true"
    with pytest.raises(UsageError, match=message):
        _ = folder.metrics
    with pytest.raises(UsageError, match=message):
        finished_runs([finished.runs])
    with pytest.raises(UsageError, match=message):
        run_stages(finished.job("stage=proto", "resume=true"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 10**9, "num_clusters": 10**9},
        {"num_images": 89},
    ],
)
def test_a_number_of_images_that_is_not_the_data_sets_is_refused(
    finished: Finished, change: dict[str, int]
) -> None:
    folder = finished.folder("fixmatch")
    folder.write_json("metrics.json", folder.metrics | change)
    with pytest.raises(UsageError, match=r"metrics\.json is damaged .*number of images .* 90"):
        run_stages(finished.job("stage=report"))


@pytest.mark.parametrize("name", ["rows", "num_clusters", "seed", "digest", "versions"])
def test_a_field_that_is_missing_is_named(finished: Finished, name: str) -> None:
    folder = finished.folder("fixmatch")
    metrics = dict(folder.metrics)
    del metrics[name]
    folder.write_json("metrics.json", metrics)
    with pytest.raises(UsageError, match=rf"metrics\.json is damaged \(it lacks '{name}'\)"):
        run_stages(finished.job("stage=report"))
    assert folder.metrics.get(name) is None


@pytest.mark.parametrize("name", STAMP)
def test_a_stamp_is_complete_and_typed(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    stamp = {"fingerprint": "f", "num_images": 9, "upstream": None}
    folder.write_json("dataset.json", stamp)
    folder.check_dataset("f", 9)
    folder.write_json("dataset.json", {key: stamp[key] for key in stamp if key != name})
    with pytest.raises(UsageError, match=rf"dataset\.json is damaged \(it lacks '{name}'\)"):
        folder.check_dataset("f", 9)
    folder.write_json("dataset.json", stamp | {name: [1]})
    with pytest.raises(UsageError, match=rf"dataset\.json is damaged \('{name}' is \[1\], not "):
        folder.check_dataset("f", 9)


@pytest.mark.parametrize(
    "names",
    [
        *({key: "a"} for key in ("01", "-1", "²", "x", " 1", "1_0", "9" * 10)),
        *({"0": name} for name in (5, None, ["a"], "\ud800")),
    ],
)
def test_names_of_what_is_not_a_cluster_are_refused(tmp_path: Path, names: Any) -> None:
    (tmp_path / "names.json").write_text(json.dumps(names))
    with pytest.raises(UsageError, match=r'names\.json does not name .*its form is \{"0": "cats"'):
        _ = RunFolder(tmp_path).names


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\x9b2J", "\u202egpj", "a\u2028b", "\0"])
def test_names_that_could_rewrite_a_terminal_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"0": name}))
    with pytest.raises(UsageError, match="without control characters"):
        _ = RunFolder(tmp_path).names
    with pytest.raises(UsageError, match="a name with control characters"):
        parse_edits(EDITS | {"names": {"0": name}}, "x")


def test_names_may_be_written_by_any_editor(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"0": "Füchse", "12": "日"}', encoding="utf-8-sig")
    assert RunFolder(tmp_path).names == {0: "Füchse", 12: "日"}


@pytest.mark.parametrize(
    "change",
    [
        {"names": {"1": "a", "01": "b"}},
        {"names": {"0": "\ud800"}},
        {"split": {"²": 2}},
        {"move": {"a": 10**30}},
        {"move": {"a": [[[["deep"]]]]}},
        {"merge": 5},
        {"num_clusters": 1e9},
    ],
)
def test_edits_of_another_type_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="edits has a value of another type"):
        parse_edits(EDITS | change, "edits")


def test_the_schema_is_that_of_what_is_written(straight: Finished) -> None:
    metrics = straight.folder("fixmatch").metrics
    kinds = {name: kind for name, kind in METRICS.items() if name != "checksum"}  # not handed on
    assert metrics.keys() >= kinds.keys()
    assert all(kind.holds(metrics[name]) for name, kind in kinds.items())
    assert small_files._ROW.keys() == {each.name for each in dataclasses.fields(ResultRow)}
    row = {"name": "a", "acc": 0.5, "nmi": None, "ari": None, "protocol": "", "seed": 0}
    assert METRICS["rows"].holds([row | {"seconds": 1.5}])  # purity, recall and oracle came later
    assert not METRICS["rows"].holds([row])


def test_a_table_of_impossible_values_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    header = "image,cluster,confidence,agreement,reliable\n"
    good = "a,0,1.0000,0.5000,1\nb,1,0.5000,0.0000,0\n"
    file = tmp_path / "clusters.csv"
    file.write_text(header + good)
    assert folder.read_clusters().clusters.tolist() == [0, 1]
    for row in ("-1,1,1,1", "2,1,1,1", "0,nan,1,1", "0,1,1.5,1", "0,1,1,yes", "x,1,1,1", "0"):
        file.write_text(f"{header}a,{row}\nb,1,0.5000,0.0000,0\n")
        with pytest.raises(UsageError, match=r"clusters\.csv is damaged"):
            folder.read_clusters()
