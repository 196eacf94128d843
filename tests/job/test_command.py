"""The command line: help at once, clear errors, sweeps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import make_job, run_as_a_person_does, write_folder
from tests.process import train

from spice_pl.errors import UsageError
from spice_pl.job import run
from spice_pl.job.job import Job
from spice_pl.job.words import with_quotes
from spice_pl.runs.folder import RunFolder
from spice_pl.usage import VERBS, conf_folder, usage, verb_usage


def test_help_of_a_verb_names_the_place_of_its_results_as_the_page_does() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "reference", "command.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+) (?!hf:)[^|]*\|[^|]*\| ([^|]*) \|$", page, re.MULTILINE)
    places = dict(rows)
    assert set(places) == set(VERBS)
    for name, verb in VERBS.items():
        said = places[name].strip("`").rstrip("/")
        assert verb.results == ("" if name == "compare" else said), name
        assert verb.results in verb_usage(name, conf_folder())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trsut", "photos"), "trsut is not a folder that exists, .*; did you mean trust\\?"),
        (
            ("nowhere",),
            "nowhere is not a folder that exists, nor a verb .*; --help lists the verbs",
        ),
        ((__file__, "seed=1"), "is a file, not a folder; give the folder that holds the images"),
        (
            ("dataset=folder", "recipe=pretrained", "encoder=resnet"),
            "encoder=resnet: timm has no|needs timm",
        ),
    ],
)
def test_first_words_and_names_of_encoders_are_explained(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "images", classes=False)
    more = (f"dataset.root={tmp_path / 'images'}", f"runs_dir={tmp_path}")
    done = train(*words, *(more if "=" in words[0] else ()))
    assert done.returncode == 2
    assert re.search(f"error: .*({message})", done.stderr)
    assert "Traceback" not in done.stderr


def test_help_answers_without_the_heavy_imports() -> None:
    done = train("--help", options=("-X", "importtime"))
    assert done.returncode == 0
    assert "python train.py DIR\n" in done.stdout
    assert "dataset=    array | cifar10 | " in done.stdout
    packages = set(re.findall(r"\|\s+(\w+)", done.stderr))
    assert "hydra" in packages
    assert packages.isdisjoint({"torch", "pytorch_lightning", "sklearn", "numpy"})


def test_commands_in_messages_begin_with_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("seed=1")
    assert job.command() == "python train.py seed=1"
    monkeypatch.setenv("SPICE_PL_COMMAND", "spice")
    assert job.command() == "spice seed=1"
    assert "  spice DIR\n" in usage(conf_folder())


@pytest.mark.parametrize("key", ["moco.module.learning_rate", "dataset.colours", "epochs"])
def test_unknown_key_is_named_in_full(key: str) -> None:
    done = train(f"{key}=1")
    assert done.returncode != 0
    assert f"error: there is no setting {key}; " in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_end_with_one_message_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(
        *("dataset=folder", "dataset.root=/not/there", "dataset.num_clusters=3"),
        f"runs_dir={tmp_path}",
    )
    with pytest.raises(SystemExit) as stopped:
        run_as_a_person_does(job)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    expected = (
        "error: dataset.root=/not/there does not exist; give dataset.root=PATH, the folder that "
        "holds the images"
    )
    assert message == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "--cfg", "job", "seed=1"], r"error: -m and --cfg exclude each other; give one"),
        (["dataset=folder"], r"error: no value for dataset\.root; give"),
        (["stage=proto"], r"error: stage=proto reads .*\n  python train\.py stage=moco runs_dir="),
    ],
)
def test_mistakes_on_the_command_line_have_no_traceback(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = train(*arguments, f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 2
    assert len(re.findall(message, done.stderr)) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


# Names of folders


def folders(*overrides: str, sweep: bool) -> list[str]:
    job = make_job(*overrides, sweep=sweep)
    return [job.folder(stage).path.as_posix() for stage in ("moco", "proto", "fixmatch")]


def test_folders_of_a_single_run_are_named_by_data_stage_and_seed() -> None:
    expected = [f"runs/digits/{stage}/seed3" for stage in ("moco", "proto", "fixmatch")]
    assert folders("seed=3", "moco.module.lr=0.5", sweep=False) == expected


def test_folders_of_a_sweep_carry_what_reaches_the_stage() -> None:
    assert folders("seed=3", "proto.module.lr=0.5", "trainer.devices=1", sweep=True) == [
        "runs/digits/moco/seed3",
        "runs/digits/proto/seed3,proto.module.lr=0.5",
        "runs/digits/fixmatch/seed3,proto.module.lr=0.5",
    ]


def test_folders_of_an_ablation_share_stage_1() -> None:
    assert folders("seed=3", "proto/ablation=ce", sweep=True)[:2] == [
        "runs/digits/moco/seed3",
        "runs/digits/proto/seed3,proto_ablation=ce",
    ]


def test_sweep_reads_an_upstream_that_is_composed_with_its_own_command_alone() -> None:
    overrides = "stage=proto", "proto.upstream=embed", "proto.module.lr=0.5", "seed=3"
    job = make_job(*overrides, "dataset.limit=900", sweep=True)
    (upstream,) = job.upstream_folders("proto")
    assert upstream.path.as_posix() == "runs/digits/embed/seed3,dataset.limit=900"


def test_only_what_a_sweep_varies_is_in_the_names_of_its_folders(tmp_path: Path) -> None:
    fixed = "dataset.num_clusters=4", "proto.epochs=9"
    job = replace(
        make_job("seed=3", "proto.module.lr=0.5", *fixed, sweep=True),
        swept=("seed=3,4", "proto.module.lr=0.5,1", *fixed),
    )
    names = [job.folder(stage).path.name for stage in ("moco", "proto")]
    assert names == ["seed3", "seed3,proto.module.lr=0.5"]
    file = tmp_path / "job.yaml"
    file.write_text(job.dump())
    assert Job.load(str(file)).folder("proto").path.name == names[1]  # in a rank
    assert job.command(last=["resume=true"]).endswith(
        "-m seed=3,4 proto.module.lr=0.5,1 dataset.num_clusters=4 proto.epochs=9 resume=true"
    )
    drawn = replace(job, swept=(*fixed, "proto.module.lr=interval(0.1,1)"))
    assert drawn.folder("proto").path.name == names[1]
    size = make_job("dataset.image_size=16", "dataset.limit=90", sweep=True)
    size = replace(size, swept=("dataset.image_size=8,16", "dataset.limit=90"))
    assert size.folder("moco").path.name == "seed0,dataset.image_size=16"
    one = replace(job, swept=("proto.module.lr=0.5", *fixed))  # as W&B starts trials
    expected = "seed3,dataset.num_clusters=4,proto.epochs=9,proto.module.lr=0.5"
    assert one.folder("proto").path.name == expected


@pytest.mark.parametrize("varied", ["proto.module.lr=0.5", "moco.module.temperature=0.3"])
def test_the_advice_inside_a_sweep_makes_the_run_that_is_missing(
    tiny: Sequence[str], varied: str
) -> None:
    given = [*tiny, "stage=proto", "seed=5"]
    swept = (*given, f"{varied},0.7")
    job = replace(make_job(*given, varied, sweep=True), swept=swept)
    with pytest.raises(UsageError, match="make it with\n") as missing:
        run.run_stages(job)
    line = str(missing.value).splitlines()[1]
    assert " -m " not in line
    words = shlex.split(line)[2:]  # after python train.py
    run.run_stages(make_job(*with_quotes(words)))
    assert job.folder("moco").finished
    run.run_stages(job)


def test_folders_of_a_sweep_do_not_depend_on_the_order_of_settings() -> None:
    one = folders("moco.epochs=3", "proto.epochs=4", sweep=True)
    other = folders("proto.epochs=4", "moco.epochs=3", sweep=True)
    assert one == other


def test_long_names_stay_apart() -> None:
    many = [f"augment.moco.jitter=[0.{i},0.1,0.1,0.{i}]" for i in range(1, 5)]
    long = "backbone.widths=[8,8,8]", "moco.module.temperature=0.123456789", *many
    first = folders(*long, "proto.epochs=1", sweep=True)
    second = folders(*long, "proto.epochs=2", sweep=True)
    assert first[0] == second[0]
    assert first[1:] != second[1:]
    assert all(len(Path(each).name) < 200 for each in first)


@pytest.mark.slow
def test_sweep_over_seeds_makes_a_run_each(tiny: Sequence[str], tmp_path: Path) -> None:
    done = train("-m", "stage=moco", "seed=0,1", *tiny)
    assert done.returncode == 0, done.stderr
    runs = [RunFolder(path) for path in (tmp_path / "runs/photos/moco").iterdir()]
    assert sorted(run.metrics["seed"] for run in runs) == [0, 1]
    # The sweep ends in one table, over both seeds.
    (row,) = (line for line in done.stdout.splitlines() if "MoCo features" in line and "±" in line)
    mean = sum(run.metrics["rows"][-1]["acc"] for run in runs) / 2
    assert re.search(rf"0 1 +{mean:.3f} ±", row)
    assert (tmp_path / "runs/sweeps/compare.md").is_file()


@pytest.mark.slow
def test_sweep_shares_the_stages_before_the_one_it_varies(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    done = train("-m", "proto.module.lr=1e-3,2e-3", *tiny)
    assert done.returncode == 0, done.stderr
    found = {
        stage: list((tmp_path / "runs/photos" / stage).iterdir())
        for stage in ("moco", "proto", "fixmatch")
    }
    assert {stage: len(paths) for stage, paths in found.items()} == {
        "moco": 1,
        "proto": 2,
        "fixmatch": 2,
    }
    assert all(RunFolder(path).finished for paths in found.values() for path in paths)
    settings = [(path / ".hydra/overrides.yaml").read_text() for path in found["proto"]]
    assert sorted(text.count("proto.module.lr=0.001") for text in settings) == [0, 1]


@pytest.mark.slow
def test_failed_trial_is_told_at_the_end_and_resume_makes_what_is_missing(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    done = train("-m", "stage=moco", "moco.module.temperature=0,0.2", *tiny)
    assert done.returncode == 1
    _, told, after = done.stderr.rpartition("1 of the trials failed, the others are finished")
    assert told
    assert "moco.module.temperature=0 " in after
    assert "UsageError: moco.module.temperature 0 is not positive" in after
    made = list((tmp_path / "runs/photos/moco").iterdir())
    assert len(made) == 1  # the trial that failed left nothing
    checkpoint = made[0] / "last.ckpt"
    written = checkpoint.stat().st_mtime_ns
    done = train("-m", "stage=moco", "moco.module.temperature=0.2,0.3", "resume=true", *tiny)
    assert done.returncode == 0, done.stderr
    assert "of the trials failed" not in done.stderr
    assert checkpoint.stat().st_mtime_ns == written
    assert len(list((tmp_path / "runs/photos/moco").iterdir())) == 2


@pytest.mark.slow
def test_optuna_draws_trials_that_joblib_runs_side_by_side(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="pip install 'spice-pl[sweep]'")
    done = train(
        *("-m", "hydra/sweeper=optuna", "hydra/launcher=joblib", "stage=moco", *tiny),
        *("hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", "hydra.launcher.n_jobs=2"),
        *("hydra.sweeper.sampler.seed=0", "moco.module.lr=interval(0.001,0.1)"),
        "moco.watch_epochs=1",
    )
    assert done.returncode == 0, done.stderr
    runs = [RunFolder(path) for path in (tmp_path / "runs/photos/moco").iterdir()]
    assert len({run.metrics["settings"]["moco.module.lr"] for run in runs}) == len(runs) == 2
    assert all("truth/knn_acc" in run.metrics["logged"] for run in runs)  # and yet
    losses = [run.metrics["logged"]["train/loss"] for run in runs]
    assert [run.metrics["objective"] for run in runs] == losses
    best = yaml.safe_load((tmp_path / "runs/sweeps/optimization_results.yaml").read_text())
    assert best["best_value"] == min(losses)
    assert (tmp_path / "runs/sweeps/compare.md").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there_are_named(tiny: Sequence[str]) -> None:
    with pytest.raises(UsageError, match="accelerator=gpu finds no GPU; use trainer=auto"):
        run.run_stages(
            make_job("trainer=ddp", *(text for text in tiny if not text.startswith("trainer.")))
        )
