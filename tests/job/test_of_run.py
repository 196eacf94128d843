"""Tasks on a run: its settings are used, and the command line's come last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from tests.conftest import CONF, NUM_CLASSES, PIXELS, Finished, write_folder

from spice_pl.cli import with_verb
from spice_pl.job.job import Job
from spice_pl.job.loader import Loader
from spice_pl.job.of_run import chosen_run
from spice_pl.job.parts import open_images
from spice_pl.job.run import run_stages
from spice_pl.job.words import with_quotes
from spice_pl.runs.folder import RunFolder


def job_of(*words: str) -> Job:
    """Make the job of a command line that begins with a verb."""
    overrides = with_verb(list(words))
    loader = Loader(create_config_search_path(str(CONF)))
    cfg: Any = loader.load_configuration("config", overrides, RunMode.RUN)
    del cfg._content["hydra"]
    return Job(cfg, tuple(overrides), "none", sweep=False)


def test_settings_are_those_of_the_run(straight: Finished) -> None:
    run = straight.folder("proto").path
    job = job_of("trust", str(run), "trust.task.num_nulls=3", "augment.weak.padding=2")
    assert job.stages == ["trust"]
    assert job.cfg.dataset.image_size == PIXELS
    assert job.cfg.dataset.num_clusters == NUM_CLASSES
    assert list(job.cfg.backbone.widths) == [8]
    assert job.cfg.trust.task.num_nulls == 3  # the command line's come last
    assert job.cfg.augment.weak.padding == 2
    assert job.folder("trust").path == run / "trust"
    found = [each.path for each in job.upstream_folders("trust")]
    assert found == [run, straight.folder("moco").path]


def test_images_that_were_moved_are_found_where_the_setting_says(
    straight: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting of the run's data set is known, though the default data set has no such setting."""
    run = str(straight.folder("proto").path)
    assert job_of("trust", run, f"dataset.root={tmp_path}").cfg.dataset.root == str(tmp_path)
    with pytest.raises(SystemExit):
        job_of("trust", run, f"dataset.rot={tmp_path}")
    assert "no setting dataset.rot; did you mean dataset.root?" in capsys.readouterr().err


def test_new_images_are_decoded_as_the_run_decoded_its_own(
    straight: Finished, tmp_path: Path
) -> None:
    new = write_folder(tmp_path / "new", classes=False)
    job = job_of("predict", str(straight.folder("fixmatch").path), str(new))
    assert job.cfg.dataset.root == str(new)
    assert job.cfg.dataset.image_size == PIXELS
    assert job.cfg.dataset.num_clusters is None  # new images may be fewer than clusters
    assert job.cfg.predict.model == str(straight.folder("fixmatch").path)
    assert job.folder("predict").path == straight.folder("fixmatch").path / "predict" / "new"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trust", "RUN", "dataset=digits"), "are read as the run did; leave dataset= out"),
        (("trust", "RUN", "trust.num_nulls=2"), "there is no setting trust.num_nulls"),
        (("trust", "not/there"), "not/there is not a finished run"),
        (("trust",), "trust takes RUN, none given; the form is"),
        (("trust", "seed=1"), "trust takes RUN, none given; the form is"),
        (("predict", "RUN"), "predict takes RUN and NEW, 1 given"),
        (("predict", "RUN", "not/there"), "NEW=not/there does not exist; give a folder"),
        (("predict", "RUN", __file__), "is a file, not a folder; give a folder of images"),
    ],
)
def test_mistakes_are_named(
    words: tuple[str, ...], message: str, straight: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(straight.folder("proto").path)
    with pytest.raises(SystemExit) as stopped:
        job_of(*(run if word == "RUN" else word for word in words))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_of_settings_cannot_call_what_the_run_names(finished: Finished) -> None:
    """Settings of a run from elsewhere are data: allow_targets in it does not count."""
    run = finished.folder("proto").path
    file = run / ".hydra" / "config.yaml"
    text = file.read_text().replace("allow_targets: []", "allow_targets: [os]")
    assert "[os]" in text
    file.write_text(text)
    assert list(job_of("report", str(run)).cfg.allow_targets) == []


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("trust", "RUN", "seed=1"), {"of": "RUN", "seed": "1"}),
        (("sort", "RUN/report.html"), {"of": "RUN/report.html"}),
        (("report", "photos/proto/seed0,a.b=4"), {"of": "photos/proto/seed0,a.b=4"}),
        (("export", "RUN", "stage=x"), {"of": "RUN", "stage": "x"}),
        (("predict", "new=1", "RUN", "open=false"), {"of": "new=1", "dataset.root": "RUN"}),
        (("edit", "seed=0", "RUN", "e=1.json"), {"of": "RUN", "edit.file": "e=1.json"}),
        (("name", "RUN", "cat,dog", "seed=0"), {"of": "RUN", "name.words": "cat,dog"}),
        (("review", "photos", "seed=0"), {"of": "photos", "seed": "0"}),
    ],
)
def test_the_folder_of_a_run_of_a_sweep_is_not_a_setting(
    words: tuple[str, ...],
    values: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folders and files with "=" in their names are words; without one missing it is a setting."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/photos/proto/seed0,a.b=4")
    run.mkdir(parents=True)
    for file in (run / "report.html", Path("e=1.json")):
        file.write_text("")
    Path("new=1").mkdir()
    named = {key: value.replace("RUN", str(run)) for key, value in values.items()}
    parsed = OverridesParser.create().parse_overrides(
        with_quotes(with_verb([word.replace("RUN", str(run)) for word in words]))
    )
    found = {each.get_key_element(): str(each.value()) for each in parsed}
    assert found.items() >= named.items()


def test_a_run_of_a_sweep_is_read_as_any_other(finished: Finished) -> None:
    run = finished.folder("proto").path
    swept = run.rename(run.with_name("seed0,dataset.num_clusters=4"))
    job = job_of("trust", str(swept), "augment.weak.padding=2")
    assert job.folder("trust").path == swept / "trust"
    assert job.cfg.run == swept.name
    assert job.upstream_folders("trust")[0].path == swept


def test_the_newest_of_several_runs_is_named(finished: Finished) -> None:
    """The data set has two runs with clusters, of stages 2 and 3; stage 3 was the last."""
    folder = finished.folder("fixmatch").path
    job = job_of("trust", str(folder.parents[1]))
    assert chosen_run(job) == f"run: {folder}, the newest of 2"
    below = job_of("trust", folder.parents[1].name, f"runs_dir={folder.parents[2]}")
    assert chosen_run(below) == chosen_run(job)
    assert chosen_run(job_of("trust", str(folder))) is None  # there was no choice
    assert chosen_run(job_of("trust", str(folder.parent))) is None
    assert chosen_run(replace(job, overrides=("stage=trust",))) is None


def test_new_images_have_no_unknown_clusters(
    straight: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = write_folder(tmp_path / "new", classes=False)
    cache = f"cache_dir={tmp_path / 'cache'}"
    job = job_of("predict", str(straight.folder("fixmatch").path), str(new), cache)
    with caplog.at_level("INFO"):
        images = open_images(job.cfg)
        open_images(job.with_settings({"stages": ["estimate_k"]}).cfg)
    said = f"new: {len(images)} images of {PIXELS} x {PIXELS} pixels"
    assert said in caplog.messages
    assert f"{said}, unknown clusters, protocol whole, no labels" in caplog.text


@pytest.mark.slow
def test_verbs_run_on_a_run_and_leave_their_results_in_it(finished: Finished) -> None:
    run = finished.folder("proto").path
    for verb in ("trust", "report", "estimate-k", "export"):
        run_stages(job_of(verb, str(run)))
    assert (run / "trust" / "trust.html").is_file()
    assert (run / "estimate_k" / "metrics.json").is_file()
    assert (run / "export" / "model.pt2").is_file()
    run_stages(job_of("trust", str(run)))  # again: nothing is in its way
    assert RunFolder(run).finished


@pytest.mark.parametrize("backslashes", [0, 1, 2, 3])
def test_settings_of_a_foreign_run_show_no_secret(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backslashes: int
) -> None:
    """An interpolation in the saved settings of a run stays the text that it is there."""
    monkeypatch.setenv("SPICE_TEST_SECRET", "s3cret")
    run = finished.folder("proto").path
    file = run / ".hydra" / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    text = "/x/" + "\\" * backslashes + "${oc.env:SPICE_TEST_SECRET}"
    saved["dataset"]["root"] = text
    file.write_text(yaml.safe_dump(saved))
    job = job_of("trust", str(run))
    assert job.cfg.dataset.root == text
    assert "s3cret" not in job.dump()
    (tmp_path / "job.yaml").write_text(job.dump())
    assert Job.load(str(tmp_path / "job.yaml")).cfg.dataset.root == text
