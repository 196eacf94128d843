"""Runs in one table: grouped by settings, spread over seeds, with published results."""

from __future__ import annotations

import csv
import io
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.sweep import SWEPT, TRIALS, CompareTrials
from spice_pl.runs.compare import compare, finished_runs, main, markdown, page, show, table_csv
from spice_pl.runs.folder import RunFolder


def run(seed: int, acc: float | None, lr: str = "0.1", **more: Any) -> dict[str, Any]:
    """Metrics of a stage 2 run."""
    scores = {"acc": acc, "nmi": acc, "ari": acc}
    row = {"name": "SPICE stage 2", "protocol": "whole", "seed": seed, "seconds": 60.0 + seed}
    return {
        "dataset": "digits",
        "fingerprint": "f00",
        "peak_memory_mb": 500.0 + seed,
        "settings": {"proto.module.lr": lr, "proto.module.seed": str(seed), "proto.epochs": "3"},
        "cluster_sizes": [1, 0],
        "rows": [row | {"name": "k-means on pixels"} | scores, row | scores],
    } | more


def test_seeds_share_a_row_and_settings_do_not() -> None:
    lines = compare([run(1, 0.9), run(0, 0.8), run(0, 0.7, lr="0.2")])
    assert [line.seeds for line in lines] == [(0, 1), (0,)]
    assert [dict(line.settings) for line in lines] == [
        {"proto.module.lr": "0.1"},
        {"proto.module.lr": "0.2"},
    ]
    assert lines[0].acc == (0.8, 0.9)
    # Mean ± sample standard deviation; no clusters to compare; mean time; largest memory.
    assert lines[0].cells[7:16] == (
        *("0.850 ± 0.071", "0.850 ± 0.071", "0.850 ± 0.071", "–", "–", "–", "–"),
        *("1 min 00 s", "501 MB"),
    )


def test_seeds_whose_clusters_differ_only_in_their_numbers_are_alike(tmp_path: Path) -> None:
    clusters = ([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1])  # the third crosses the others
    runs = []
    for seed, found in enumerate(clusters):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        probs = np.eye(2, dtype=np.float32)[found]
        np.save(folder / "probs.npy", probs)
        np.save(folder / "answer.npy", probs[[0, 0, 3, 3]])  # the same for the first two seeds
        runs.append(run(seed, None, folder=str(folder)))
    (line,) = compare(runs)
    # Hubert and Arabie's index of the crossed pairs, from its table of ones: 2 pairs in each
    # cluster, none in common, 4/6 expected of a largest 2: (0 - 2/3) / (2 - 2/3).
    assert line.alike == pytest.approx((1.0, -0.5, -0.5))
    assert float(next(csv.DictReader(io.StringIO(table_csv([line]))))["seeds_alike"]) == 0.0
    assert "Seeds alike" in markdown([line])
    for each in runs:
        each["answer"] = {"name": "vote", "scores": {}}
        each["rows"][-2:] = [each["rows"][-1], each["rows"][-1] | {"name": "chosen clusters"}]
    network, chosen = compare(runs[:2])
    assert (network.alike, chosen.alike) == ((1.0,), (1.0,))
    assert compare(runs[1:])[0].alike == pytest.approx((-0.5,))
    (tmp_path / "seed0" / "probs.npy").unlink()
    assert compare(runs[:2])[0].alike == ()


def test_a_seed_counts_once() -> None:
    lines = compare([run(0, 0.9), run(0, 0.7), run(1, 0.8)])
    assert lines[0].seeds == (0, 1)
    assert lines[0].acc == (0.9, 0.8)
    assert "1 results with a seed that their line has already are left out" in markdown(lines)


def test_rows_do_not_depend_on_scores() -> None:
    one = compare([run(0, 0.1, lr="0.1"), run(0, 0.9, lr="0.2")])
    other = compare([run(0, 0.9, lr="0.1"), run(0, 0.1, lr="0.2")])
    assert [line.settings for line in one] == [line.settings for line in other]


def test_other_images_of_the_same_name_have_their_own_row() -> None:
    lines = compare([run(0, 0.8), run(1, 0.8, fingerprint="b0b")])
    assert [dict(line.settings) for line in lines] == [{"images": "b0b"}, {"images": "f00"}]


def test_published_results_are_added() -> None:
    lines = compare([run(0, None, dataset="cifar10")])
    published = [line for line in lines if not line.seeds]
    assert len(published) > 5
    spice = next(line for line in published if line.method == "SPICE")
    assert (spice.acc, spice.protocol) == ((0.926,), "whole")
    assert "SPICE (Niu et al. 2022)" in spice.source
    assert not [line for line in compare([run(0, 0.5)]) if not line.seeds]  # none for digits


def test_runs_without_labels_have_no_score() -> None:
    lines = compare([run(0, None)])
    assert lines[0].cells[7:10] == ("–", "–", "–")
    assert "No labels were given" in markdown(lines)


def compared(name: str, agreement: float, *, kept: bool) -> dict[str, Any]:
    more = {"evenness": 1.0, "alike": 1.0, "sure": agreement - 0.1, "score": 10 * agreement}
    return {"name": name, "kept": kept, "agreement": agreement} | more


def test_without_labels_stored_measures_are_shown() -> None:
    runs = [
        run(
            seed,
            None,
            num_clusters=4,
            answer={"name": "vote", "scores": {}},
            compared=[
                compared("vote", 0.8 + seed / 10, kept=True),
                compared("SPICE stage 2", 0.5, kept=False),
            ],
        )
        for seed in (0, 1)
    ]
    for each in runs:
        each["rows"].append(each["rows"][-1] | {"name": "SPICE stage 2, chosen clusters"})
    network, chosen = compare(runs)
    assert network.cells[10:13] == ("50.0%", "40%", "5.000")
    assert chosen.cells[10:13] == ("85.0%", "75%", "8.500")  # means of .8, .9; .7, .8; 8, 9
    rows = list(csv.DictReader(io.StringIO(table_csv([network, chosen]))))
    assert float(rows[1]["neighbours_mean"]) == pytest.approx(0.85)
    assert float(rows[1]["score_mean"]) == pytest.approx(8.5)
    assert "share of the ten most alike" in markdown([network])
    for each in runs:  # with labels there are scores instead
        for row in each["rows"]:
            row |= {"acc": 0.5, "nmi": 0.5, "ari": 0.5}
    assert "Nearest 10" not in markdown(compare(runs))


def test_runs_of_other_names_and_numbers_of_clusters_are_told_apart() -> None:
    def made(name: str, num_clusters: int, folder: str) -> dict[str, Any]:
        found = run(0, None, num_clusters=num_clusters, folder=f"/no/{folder}")
        found["settings"] |= {"dataset.num_clusters": str(num_clusters)}
        found["rows"][-1]["name"] = name
        return found

    runs = [
        made("SPICE stage 2", 4, "proto/seed0,dataset.num_clusters=4"),
        made("SPICE stage 2", 8, "proto/eight"),
        made("k-means", 5, "kmeans/seed0"),
    ]
    lines = compare(runs)
    assert {line.cells[1:4] for line in lines} == {
        ("SPICE stage 2", "seed0", "4"),
        ("SPICE stage 2", "eight", "8"),
        ("k-means", "seed0", "5"),
    }
    assert not any(line.settings for line in lines)  # the column K says it
    assert "| Run | K |" in markdown(lines)
    assert "| Run |" not in markdown(compare([runs[0], runs[2]]))  # they have one name


def test_baselines_are_not_repeated_for_every_setting() -> None:
    features = [run(seed, 0.5, lr) for seed in (0, 1) for lr in ("1", "2")]
    for each in features:
        del each["cluster_sizes"]
    lines = compare(features)
    assert [line.method for line in lines].count("k-means on pixels") == 1
    assert lines[0].seeds == (0, 1)
    assert [line.method for line in lines].count("SPICE stage 2") == 2


def test_all_formats_say_the_same() -> None:
    name = "<b>a|b</b>"
    lines = compare([run(0, 0.8, dataset=name), run(1, 0.9, dataset=name)])
    assert r"<b>a\|b</b>" in markdown(lines)
    assert "&lt;b&gt;a|b&lt;/b&gt;" in page(lines)
    assert name not in page(lines)
    (row,) = csv.DictReader(io.StringIO(table_csv(lines)))
    assert row["data"] == name
    assert float(row["acc_mean"]) == pytest.approx(0.85)
    assert float(row["acc_std"]) == pytest.approx(statistics.stdev([0.8, 0.9]))
    assert (row["runs"], row["seeds"]) == ("2", "0 1")


def test_it_reads_the_folders_of_runs(
    straight: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(straight.runs / "my photos"), "--to", str(tmp_path)])
    shown = capsys.readouterr().out
    for name in ("SPICE stage 2", "SPICE stage 3"):
        assert shown.count(name) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "compare.csv",
        "compare.html",
        "compare.md",
    ]
    assert "SPICE stage 3" in (tmp_path / "compare.md").read_text()


def test_a_folder_of_images_is_not_taken_for_their_runs(
    straight: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(straight.runs.parent)  # which has `my photos` and `runs/my photos`
    main(["my photos", "--to", str(tmp_path)])
    assert "SPICE stage 3" in (tmp_path / "compare.md").read_text()


def test_folders_without_runs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no finished run in or below"):
        finished_runs([tmp_path])
    monkeypatch.chdir(tmp_path)
    none = "digits is not a folder; give folders of runs; there are none below runs"
    with pytest.raises(UsageError, match=f"^{none}$"):
        finished_runs(["digits"])
    for name in ("birds", "digits", "f1", "f2", "f3", "f4"):
        run = tmp_path / "runs" / name / "proto" / "seed0"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text("{}")
    (tmp_path / "runs" / "digi").mkdir()  # it holds no run
    near = "runs/digit is not a folder; give folders of runs; below runs are runs/digits"
    with pytest.raises(UsageError, match=near):
        finished_runs(["runs/digit"])
    with pytest.raises(UsageError, match=r"below runs are runs/birds, .*, runs/f3 and 1 more$"):
        finished_runs(["/a/x"])
    with pytest.raises(SystemExit) as stopped:
        main(["runs/digi"])
    assert stopped.value.code == 2


def test_a_terminal_shows_no_empty_column(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    show(compare([run(0, 0.8), run(1, 0.9)]), tmp_path, console)
    text = console.export_text()
    assert "0.850 ± 0.071" in text
    assert "Settings that differ" not in text


def test_a_sweep_ends_in_a_table(
    straight: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    monkeypatch.setenv(TRIALS, "")  # so that pytest restores it
    callback = CompareTrials()
    callback.on_multirun_start(config)
    folders = [str(straight.folder(stage).path) for stage in ("moco", "proto", "proto")]
    Path(os.environ[TRIALS]).write_text("\n".join(folders))
    callback.on_multirun_end(config)
    assert capsys.readouterr().out.count("SPICE stage 2") == 1
    assert (tmp_path / "compare.html").is_file()


def test_a_sweep_of_a_stage_without_clusters_ends_in_what_it_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweeps")}}})
    monkeypatch.setenv(TRIALS, "")
    monkeypatch.setenv(SWEPT, "")
    callback = CompareTrials()
    callback.on_multirun_start(config)
    logged = {
        "seed0,a|b=2": {"train/loss": 4.12345, "truth/knn_acc": 0.5},
        "seed0,a|b=1": {"train/loss": 3.0, "val/selection_loss_head_0": 1.0},
    }
    folders = [tmp_path / "d/moco" / name for name in logged]
    for folder in folders:
        folder.mkdir(parents=True)
        made = {"stage": "moco", "rows": [], "logged": logged[folder.name], "seconds_in_all": 90.0}
        RunFolder(folder).write_json("metrics.json", made)
    Path(os.environ[TRIALS]).write_text("\n".join(map(str, folders)))
    callback.on_multirun_end(config)
    said = capsys.readouterr()
    assert said.err == ""
    assert "no table" not in said.out
    table = (tmp_path / "sweeps/trials.csv").read_text().splitlines()
    assert table == [
        "Trial,train/loss,truth/knn_acc,Time",
        '"seed0,a|b=1",3,–,1 min 30 s',
        '"seed0,a|b=2",4.123,0.5,1 min 30 s',
    ]
    assert r"| seed0,a\|b=1 | 3 | – |" in (tmp_path / "sweeps/trials.md").read_text()


def test_a_sweep_over_a_task_ends_in_one_line_per_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweeps")}}})
    monkeypatch.setenv(TRIALS, "")
    callback = CompareTrials()
    callback.on_multirun_start(config)
    trust, predict = tmp_path / "d/trust/seed0", tmp_path / "d/predict/seed1"
    for folder in (trust, predict):
        folder.mkdir(parents=True)
    RunFolder(trust).write_json("metrics.json", {"stage": "trust", "verdict": "Real clusters."})
    moco = tmp_path / "d/moco/seed0"  # without labels and clusters there are no rows
    moco.mkdir(parents=True)
    RunFolder(moco).write_json("metrics.json", {"stage": "moco", "rows": []})
    Path(os.environ[TRIALS]).write_text(f"{trust}\n{predict}\n{moco}\n")  # predict has no metrics
    callback.on_multirun_end(config)
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[-3:] == [
        *(f"  {moco}: done", f"  {predict}: done", f"  {trust}: Real clusters."),
    ]
    assert not (tmp_path / "sweeps").exists()
