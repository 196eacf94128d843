"""Titles say where weights come from, whatever an experiment is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.conftest import make_job

from spice_pl.job.parts import other_normalisation
from spice_pl.job.plan import plan
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Stage

PHOTOS = ("dataset=folder", "dataset.root=x", "dataset.num_clusters=3")


@pytest.mark.parametrize(
    ("overrides", "origin"),
    [
        (("experiment=photos_pretrained",), "efficientnet_lite0 (ImageNet labels)"),
        (("experiment=photos_pretrained", "backbone=resnet_small"), "ResNet (random weights)"),
        (
            ("experiment=photos_pretrained", "backbone.pretrained=false"),
            "efficientnet_lite0 (random weights)",
        ),
        (
            ("experiment=photos_pretrained", "embed.module.weights=there/mine.pth"),
            "efficientnet_lite0 (weights of mine.pth)",
        ),
        (
            (
                *("experiment=photos_pretrained", "backbone=timm", "backbone.pretrained=true"),
                "backbone.model_name=vit_base_patch16_clip_224.openai",
            ),
            "vit_base_patch16_clip_224.openai (text)",
        ),
        (("encoder=efficientnet_lite2",), "efficientnet_lite2 (ImageNet labels)"),
    ],
)
def test_titles_name_the_weights_that_are_loaded(overrides: tuple[str, ...], origin: str) -> None:
    steps = plan(make_job(*PHOTOS, *overrides))
    assert [step.record.title for step in steps] == [origin, f"SPICE stage 2 on {origin}"]


def test_stages_further_down_name_the_pretrained_network_too() -> None:
    origin = "efficientnet_lite0 (ImageNet labels)"
    photos = (*PHOTOS, "experiment=photos_pretrained")
    job = make_job(*photos, "stages=[embed,proto,fixmatch,scan,selflabel]", "scan.upstream=embed")
    assert [step.record.title for step in plan(job)][2:] == [
        f"SPICE stage 3 on {origin}",
        f"SCAN on {origin}",
        f"SCAN self-label on {origin}",
    ]
    job = make_job(*photos, "stages=[embed,proto,fixmatch]", "fixmatch.module.init=scratch")
    assert plan(job)[2].record.title == "SPICE stage 3"  # a new network


def test_a_stage_that_reads_two_networks_names_both(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x" / "embed" / "lite2")
    folder.path.mkdir(parents=True)
    folder.write_json("metrics.json", {"stage": "embed", "title": "lite2 (ImageNet labels)"})
    job = make_job(
        *(*PHOTOS, "encoder=efficientnet_lite0", f"runs_dir={tmp_path}"),
        *("stages=[embed,turtle]", "turtle.upstream=[embed,embed/lite2]"),
    )
    expected = "TURTLE on efficientnet_lite0 (ImageNet labels) and lite2 (ImageNet labels)"
    assert plan(job)[1].record.title == expected


class Network(torch.nn.Module):
    pretrained_cfg: ClassVar[dict[str, Any]] = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.mark.parametrize(
    ("backbone", "weights", "mean", "warned"),
    [
        ({"pretrained": True}, None, 0.485, True),
        ({"pretrained": False}, "file.pth", 0.485, True),
        ({"pretrained": True}, None, 0.5, False),
        ({"pretrained": False}, None, 0.485, False),  # random weights
        ({"_target_": "my.net", "pretrained": True}, None, 0.485, False),
    ],
)
def test_another_normalisation_than_timms_is_said(
    backbone: dict[str, Any], weights: str | None, mean: float, warned: bool
) -> None:
    module = Stage()
    module.encoder = Network()
    own = {
        "backbone": {"_target_": "timm.create_model", "model_name": "net.in1k", **backbone},
        "weights": weights,
    }
    settings = {"dataset": {"mean": [mean] * 3, "std": [0.2] * 3}}
    said = other_normalisation(own, module, settings)
    assert (said is not None) == warned
    if said is not None:
        assert "give dataset.mean=[0.5,0.5,0.5], or recipe=pretrained encoder=net.in1k" in said


def test_titles_of_random_weights_that_are_trained_stay() -> None:
    titles = [step.record.title for step in plan(make_job("dataset=digits"))]
    assert titles == ["MoCo", "SPICE stage 2", "SPICE stage 3"]
