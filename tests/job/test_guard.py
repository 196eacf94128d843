"""What Hydra itself would call is checked before it calls anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal import hydra as composing
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig
from tests.conftest import CONF
from tests.process import train

from spice_pl.job.guard import CALLED, CheckedLoader, checked_hydra
from spice_pl.job.sweep import CompareTrials


def composed(*overrides: str) -> DictConfig:
    """Compose as the command does, Hydra's own settings too."""
    with checked_hydra(), initialize_config_dir(str(CONF), version_base="1.3"):
        assert vars(composing)["ConfigLoaderImpl"] is CheckedLoader
        return compose("config", list(overrides), return_hydra_config=True)


def evil_folder(folder: Path, settings: dict[str, Any]) -> str:
    """An experiment `evil` with these settings; returns the override that lets Hydra find it."""
    (folder / "experiment").mkdir()
    text = "# @package _global_\n" + yaml.safe_dump(settings)
    (folder / "experiment" / "evil.yaml").write_text(text)
    return f"hydra.searchpath=[file://{folder}]"


def test_hydra_gets_its_loader_back() -> None:
    composed()
    assert vars(composing)["ConfigLoaderImpl"] is ConfigLoaderImpl


CALLS = {"_target_": "pathlib.Path.touch"}
POPEN = {"class": "subprocess.Popen", "args": ["true"]}
TRIALS = {"_target_": "spice_pl.job.sweep.CompareTrials"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callbacks": {"evil": CALLS}}, r"evil\._target_=pathlib\.Path\.touch would be"),
        ({"callbacks": {"evil": {"_target_": "${like}"}}}, r"evil\._target_=\$\{like\} would be"),
        ({"callbacks": {"evil": TRIALS | {"x": CALLS}}}, r"evil\.x\._target_="),
        (
            {"callbacks": {"evil": TRIALS | {"x": "${evil}"}}},
            r"x=\$\{evil\} holds an inter",
        ),
        (
            {"callbacks": {"evil": TRIALS | {"x": "\\${oc.create:{}}"}}},
            r"x=\\\$.* an inter",
        ),
        ({"callbacks": {"evil": TRIALS | {"x": [["${evil}"]]}}}, r"x\.0\.0=.* an interpolation"),
        ({"launcher": CALLS}, r"\.launcher\._target_="),
        ({"sweeper": {"sampler": CALLS}}, r"\.sweeper\.sampler\._target_="),
        (
            {"sweeper": {"custom_search_space": "os.system"}},
            r"custom_search_space=os\.system",
        ),
        (
            {"sweeper": {"storage": "redis://host"}},
            r"sweeper\.storage=redis://host may run",
        ),
        ({"launcher": {"setup": ["touch x"]}}, r"launcher\.setup=\['touch x'\] may run commands"),
        ({"launcher": {"comment": "a\nb"}}, r"launcher\.comment='a\\nb' has more than one line"),
        (
            {"job_logging": {"handlers": {"x": {"()": "os.system"}}}},
            r"handlers\.x\.\(\)=os",
        ),
        ({"job_logging": {"handlers": {"x": POPEN}}}, r"handlers\.x\.class=subprocess\.Popen"),
        ({"job_logging": {"formatters": {"x": {"()": "os.system"}}}}, r"formatters\.x\.\(\)="),
        ({"job_logging": {"filters": {"x": {"()": "os.system"}}}}, r"filters\.x\.\(\)="),
        ({"hydra_logging": {"handlers": {"x": POPEN}}}, r"_logging\.handlers\.x\.class="),
        ({"job_logging": {"x": "ext://antigravity.x"}}, r"job_logging\.x=antigravity\.x would be"),
        ({"job": {"env_set": {"PYTHONPATH": "/evil"}}}, r"env_set\.PYTHONPATH sets a variable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_in_hydras_own_settings_are_refused(
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = evil_folder(tmp_path, {"hydra": settings, "like": "pathlib.Path.touch"})
    plugins = []
    if "sweeper" in settings:
        pytest.importorskip("optuna", reason="pip install 'spice-pl[sweep]'")
        plugins = ["hydra/sweeper=optuna"]
    if "launcher" in settings:
        pytest.importorskip("submitit", reason="pip install 'spice-pl[sweep]'")
        plugins = ["hydra/launcher=submitit_slurm"]
    with pytest.raises(SystemExit) as stopped:
        composed(here, "experiment=evil", *plugins)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(f"^error: hydra.*{message}", lines[0]), lines


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("stage=moco", "logger=wandb", "hydra/job_logging=default", "hydra/hydra_logging=none"),
        ("hydra/launcher=joblib", "hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0"),
        ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"),
        ("hydra/launcher=submitit_local", "hydra/sweeper/sampler=cmaes", "hydra/sweeper=optuna"),
        ("experiment=table7",),
        ("hydra.job.env_copy=[PATH]", "hydra.verbose=true", "hydra.run.dir=${runs_dir}/x"),
    ],
    ids=str,
)
def test_what_the_docs_name_composes(overrides: tuple[str, ...]) -> None:
    if any("optuna" in text or "joblib" in text for text in overrides):
        pytest.importorskip("optuna", reason="pip install 'spice-pl[sweep]'")
    if any("submitit" in text for text in overrides):
        pytest.importorskip("submitit", reason="pip install 'spice-pl[sweep]'")
    cfg = composed(*overrides)
    assert cfg.hydra.callbacks.compare._target_ in CALLED


def test_what_the_command_line_allows_is_let_through(tmp_path: Path) -> None:
    here = evil_folder(tmp_path, {"hydra": {"callbacks": {"mine": {"_target_": "mine.Callback"}}}})
    cfg = composed(here, "experiment=evil", "allow_targets=[mine]")
    assert cfg.hydra.callbacks.mine._target_ == "mine.Callback"
    with pytest.raises(SystemExit):
        composed(here, "experiment=evil", "allow_targets=[min]")
    plugins = ("hydra/launcher=submitit_slurm", "hydra.launcher.setup=['module load cuda']")
    assert composed(*plugins, "allow_targets=[hydra_plugins]").hydra.launcher.setup


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"allow_targets": ["os"]}, r"allow_targets=\['os'\]"),
        ({"allow_targets": "${more}", "more": ["os"]}, r"allow_targets=\$\{more\}"),
        ({"predict": {"task": {"allow_targets": ["os"]}}}, r"predict\.task\.allow_targets="),
        ({"other": [{"allow_targets": ["os"]}]}, r"other\.0\.allow_targets="),
    ],
    ids=str,
)
def test_a_file_of_settings_allows_nothing(
    settings: dict[str, Any], path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = evil_folder(tmp_path, settings)
    with pytest.raises(SystemExit):
        composed(here, "experiment=evil")
    assert "is set by a file of settings; if you trust" in capsys.readouterr().err
    if "predict" not in settings and "other" not in settings:  # the command line wins
        assert composed(here, "experiment=evil", "allow_targets=[a]").allow_targets == ["a"]


def test_callbacks_of_earlier_releases_are_found(tmp_path: Path) -> None:
    old = {"_target_": "spice_pl.sweep.CompareTrials"}
    here = evil_folder(tmp_path, {"hydra": {"callbacks": {"compare": old}}})
    with pytest.warns(FutureWarning, match=r"sweep\.CompareTrials is now spice_pl\.job\."):
        cfg = composed(here, "experiment=evil")
    target = cfg.hydra.callbacks.compare._target_
    assert target == f"{CompareTrials.__module__}.{CompareTrials.__qualname__}"


def test_the_command_is_guarded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    evil = {"_target_": "numpy.save", "file": str(trace), "arr": [1]}
    evil_folder(tmp_path, {"hydra": {"callbacks": {"evil": evil}}})
    done = train("--config-dir", str(tmp_path), "experiment=evil", "stage=moco")
    assert done.returncode == 2
    assert done.stderr.startswith("\nerror: hydra.callbacks.evil._target_=numpy.save would")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "experiment"]


def test_pickled_settings_are_not_run_again(tmp_path: Path) -> None:
    for word in ("--experimental-rerun=x.pickle", "--exp"):
        done = train(word, str(tmp_path))
        assert done.returncode == 2
        assert done.stderr.startswith("error: --experimental-rerun reads a pickle")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_every_trial_of_a_sweep_is_checked(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    evil = {"job_logging": {"handlers": {"x": {"class": "subprocess.Popen"}}}}
    evil_folder(tmp_path, {"hydra": evil})
    (tmp_path / "experiment" / "good.yaml").write_text("# @package _global_\n")
    done = train(
        *("-m", "--config-dir", str(tmp_path), "experiment=good,evil", "stage=inspect"),
        *(f"hydra/launcher={launcher}", f"runs_dir={tmp_path / 'runs'}"),
        *(f"cache_dir={tmp_path / 'cache'}", "inspect.task.num_pictures=4"),
    )
    assert done.returncode != 0
    assert "error: hydra.job_logging.handlers.x.class=subprocess.Popen would be" in done.stderr
