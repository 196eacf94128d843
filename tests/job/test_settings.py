"""Settings that name what moved, and the names of functions that other modules read."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.conftest import photographs, write_folder

from spice_pl.callbacks.metrics_csv import CurveLogger
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.settings import MOVED, build, current_target
from spice_pl.system.building import locate

PLAIN = OmegaConf.create({"allow_targets": []})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("spice_pl.data.folder.folder", "spice_pl.data.sources.folder.folder"),
        ("spice_pl.data.datasets.cifar10", "spice_pl.data.sources.torchvision.cifar10"),
        ("spice_pl.data.augment.MoCoView", "spice_pl.data.crop_views.MoCoView"),
        ("spice_pl.data.datasets.digits", "spice_pl.data.sources.torchvision.digits"),
        ("spice_pl.data.imagenet.imagenet", "spice_pl.data.sources.imagenet.imagenet"),
        ("spice_pl.data.arrays.array", "spice_pl.data.sources.arrays.array"),
        (
            "spice_pl.data.sources.archives.hugging_face",
            "spice_pl.data.sources.hugging_face.hugging_face",
        ),
        (
            "spice_pl.data.archives.hugging_face",
            "spice_pl.data.sources.hugging_face.hugging_face",
        ),
        ("spice_pl.data.archives.shards", "spice_pl.data.sources.archives.shards"),
        ("spice_pl.callbacks.curves.CurveLogger", "spice_pl.callbacks.metrics_csv.CurveLogger"),
        ("spice_pl.interop.load_encoder", "spice_pl.models.interop.load_encoder"),
        ("spice_pl.sweep.CompareTrials", "spice_pl.job.sweep.CompareTrials"),
    ],
)
def test_old_names_mean_the_new_ones(old: str, new: str) -> None:
    assert current_target(old) == new
    assert current_target(new) == new
    assert locate(new, ("spice_pl.",)) is not None


def test_no_moved_module_is_there_under_both_names() -> None:
    assert len(MOVED) == 11
    for new in MOVED.values():
        assert current_target(f"{new}x") == f"{new}x"


def test_an_old_name_is_built_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=r"curves\.CurveLogger is now spice_pl\.callbacks\.metr"):
        made = build(
            PLAIN, {"_target_": "spice_pl.callbacks.curves.CurveLogger"}, save_dir=str(tmp_path)
        )
    assert isinstance(made, CurveLogger)
    root = write_folder(tmp_path / "photos", classes=False)
    settings = {"_target_": "spice_pl.data.folder.folder", "root": str(root), "image_size": 8}
    with pytest.warns(FutureWarning, match=r"data\.folder\.folder is now"):
        images = build(PLAIN, settings, cache_dir=str(tmp_path / "cache"))
    assert isinstance(images, ImageSet)
    assert len(images) == len(photographs())


def test_an_old_name_opens_nothing_else() -> None:
    with pytest.raises(UsageError, match=r"_target_ spice_pl\.sweep\.os lies outside"):
        build(PLAIN, {"_target_": "spice_pl.sweep.os"})


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_timm_reads_no_file_that_may_hold_code(key: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    settings = {"_target_": "timm.create_model", "model_name": "resnet10t", key: {"file": "a.pth"}}
    with pytest.raises(UsageError, match=rf"{key}=.*weights as embed\.module\.weights=FILE"):
        build(PLAIN, settings)
    with pytest.raises(UsageError, match=r"model_name=local-dir:/x of timm\.create_model may read"):
        build(PLAIN, {"_target_": "timm.create_model", "model_name": "local-dir:/x"})
    with pytest.raises(UsageError, match="_args_="):
        build(PLAIN, {"_target_": "timm.create_model", "_args_": ["local-dir:/x"]})


def test_a_task_trusts_what_the_job_trusts() -> None:
    predict = {"_target_": "spice_pl.tasks.predict.Predict", "model": "m", "allow_targets": ["os"]}
    with pytest.raises(UsageError, match=r"has allow_targets=\['os'\] and the job has \[\]"):
        build(PLAIN, predict)
    trusting = OmegaConf.create({"allow_targets": ["os"]})
    assert build(trusting, predict).allow_targets == ["os"]


def test_names_that_do_not_exist_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"torch\.nn\.Linearr cannot be imported .*install its pack"
    ):
        build(PLAIN, {"_target_": "torch.nn.Linearr"})
