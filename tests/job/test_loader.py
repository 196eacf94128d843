"""Mistakes of the command line: one message each, with what is near."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import CONF, make_job
from tests.process import train

from spice_pl.errors import UsageError
from spice_pl.job.loader import Loader, checked_settings, nearest_keys
from spice_pl.job.plan import check_settings


def refused(*overrides: str) -> str:
    """Return what is printed for a command line that composes to nothing."""
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    loader = Loader(create_config_search_path(str(CONF)))
    with pytest.raises(SystemExit) as stopped:
        loader.load_configuration("config", list(overrides), RunMode.RUN)
    assert stopped.value.code == 2
    return ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moco.epoch=3", "there is no setting moco.epoch; did you mean moco.epochs?"),
        ("+moco.epoch=3", "there is no setting moco.epoch; did you mean moco.epochs?"),
        ("++moco.epoch=3", "there is no setting moco.epoch; did you mean moco.epochs?"),
        ("~moco.epoch", "there is no setting moco.epoch; did you mean moco.epochs?"),
        ("epochs=3", "did you mean moco.epochs or proto.epochs or fixmatch.epochs?"),
        ("+moco.more.epochs=3", "there is no setting moco.more.epochs"),
        ("moco.module.learning_rate=1", "; moco.module has backbone, "),
        ("+seeds=3", "there is no setting seeds; did you mean seed?"),
        ("+selectors.mine=3", "there is no setting selectors.mine"),
        ("stage=trsut", "did you mean trust?"),
        ("dataset=cifr10", "did you mean cifar10?"),
        ("photo", "'photo' cannot be read: it is not a folder that exists"),
        ("moco=3", "moco=3 puts one value in the place of the settings moco.*"),
        ("stages=[proto", "'stages=[proto' cannot be read"),
    ],
)
def test_mistake_is_named_with_what_is_near(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(override)
    said = capsys.readouterr().err
    assert message in said
    assert "use +" not in said


def test_a_mistake_beside_a_setting_without_default_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused("dataset=folder", "dataset.root=/photos", "dataset.num_cluster=5")
    said = capsys.readouterr().err
    assert "no setting dataset.num_cluster; did you mean dataset.num_clusters?" in said


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.num_nodes=2",
        "+backbone.in_channels=3",
        "+selectors.mine={_target_: spice_pl.functional.selectors.random_labels}",
        "+proto.streams.images.views.third=${augment.plain}",
        "+logger.tensorboard.name=x",
        "+logger/tensorboard@logger=tensorboard",
    ],
)
def test_what_is_read_may_be_added(override: str) -> None:
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    loader = Loader(create_config_search_path(str(CONF)))
    if "/" not in override:
        loader.load_configuration("config", [override], RunMode.RUN)
    assert nearest_keys("epochz", ["seed"], []) == []


def test_stage_and_a_file_of_settings_may_not_contradict_each_other(
    tmp_path: Path,
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nstages: [moco]\n")
    done = train("--config-dir", str(tmp_path), "experiment=mine", "stage=trust")
    assert done.returncode == 2
    assert "stage=trust and the other settings contradict each other" in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moco.epochs=-1", r"moco\.epochs=-1 is not a whole number of at least 0"),
        ("moco.epochs=abc", r"moco\.epochs=abc is not a whole number"),
        ("moco.epochs=2.5", r"moco\.epochs=2\.5 is not a whole number"),
        ("moco.epochs=true", r"moco\.epochs=True is not a whole number"),
        ("moco.epochs=null", r"moco\.epochs=null is not a whole number"),
        ("moco.module.lr=nan", r"moco\.module\.lr=nan is not a number of at least 0"),
        ("fixmatch.module.ema_decay=1.5", r"ema_decay=1\.5 is not a number from 0 to 1"),
        ("seed=x", r"seed=x is not a whole number from 0"),
        ("dataset.num_clusters=ten", "num_clusters=ten is not a whole number or null or auto"),
        ("overwrite=no", "overwrite=no is not true or false"),
        ("stage=trust", None),
        ("dataset.num_clusters=auto", None),
        ("proto.module.hidden_dim=null", None),
    ],
)
def test_values_are_checked_by_kind_whatever_the_stage(override: str, message: str | None) -> None:
    job = make_job("stage=proto", *(["stage=trust"] if override == "stage=trust" else [override]))
    if message is None:
        check_settings(job)
        return
    with pytest.raises(UsageError, match=message):
        check_settings(job)


def test_every_choice_of_settings_passes_the_check_of_values() -> None:
    for group in ("dataset", "preset", "experiment"):
        for file in sorted((CONF / group).glob("*.yaml")):
            more = ["dataset.root=x"] if group == "dataset" else []
            if file.stem in ("digits", "mnist5k", "array", "hugging_face"):
                more = []
            from spice_pl.job.values import check_values

            check_values(make_job(f"{group}={file.stem}", *more).cfg)


def test_hydra_composes_as_before_outside() -> None:
    from hydra._internal import hydra as composing

    before = composing.ConfigLoaderImpl  # type: ignore[attr-defined]
    with checked_settings():
        assert composing.ConfigLoaderImpl is Loader  # type: ignore[attr-defined]
    assert composing.ConfigLoaderImpl is before  # type: ignore[attr-defined]


def test_a_setting_may_have_the_name_of_a_stage() -> None:
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    loader = Loader(create_config_search_path(str(CONF)))
    given = ["stage=predict", "predict.sort=copy"]
    cfg = loader.load_configuration("config", given, RunMode.RUN)
    assert cfg.predict.sort == "copy"
