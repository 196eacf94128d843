"""Titles say where weights come from, whatever an experiment is called."""

from __future__ import annotations

import pytest
from tests.conftest import make_job

from spice_pl.job.plan import plan

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


def test_titles_of_random_weights_that_are_trained_stay() -> None:
    titles = [step.record.title for step in plan(make_job("dataset=digits"))]
    assert titles == ["MoCo", "SPICE stage 2", "SPICE stage 3"]
