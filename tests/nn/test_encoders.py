"""Pretrained encoders by name, and the choice of encoder=auto."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.nn.test_pretrained import needs_weights

from spice_pl.errors import UsageError
from spice_pl.nn import encoders
from spice_pl.nn.encoders import PREFERRED, pretrained, trained_by


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    pretrained.cache_clear()
    yield
    pretrained.cache_clear()


@pytest.mark.parametrize("name", PREFERRED)
def test_auto_takes_the_first_that_is_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    here = PREFERRED[PREFERRED.index(name) :]
    monkeypatch.setattr(encoders, "is_here", lambda each: each in here)
    found = pretrained("auto")
    assert found.name == name
    assert "on this machine" in found.reason


def test_without_any_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "is_here", lambda name: False)
    with pytest.raises(UsageError, match=r"spice-pl\[backbones\].*encoder=NAME.*recipe=scratch"):
        pretrained("auto")


@needs_weights
def test_the_packaged_network_is_here_without_a_hub() -> None:
    assert encoders.is_here("efficientnet_lite0")
    found = pretrained("efficientnet_lite0")
    assert (found.pixels, found.trained_by) == (160, "ImageNet labels")
    # It was trained on (x - 127) / 128 of levels x in 0 to 255.
    assert found.mean == pytest.approx([127 / 255] * 3, abs=1e-5)
    assert found.std == pytest.approx([128 / 255] * 3, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "trained_by", "pixels"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "images alone", 224),
        ("vit_base_patch16_clip_224.openai", "text", 224),
        ("resnet18.a1_in1k", "ImageNet labels", 224),
    ],
)
def test_a_network_of_timm_brings_its_own_normalisation(
    name: str, trained_by: str, pixels: int
) -> None:
    models = pytest.importorskip("timm.models")
    found, config = pretrained(name), models.get_pretrained_cfg(name)
    assert (found.trained_by, found.pixels) == (trained_by, pixels)
    assert (found.mean, found.std) == (list(config.mean), list(config.std))
    assert found.backbone["model_name"] == name
    assert trained_by in found.title


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_clip_224.openai_ft_in1k", "text, then ImageNet labels"),
        ("hiera_base_224.mae_in1k_ft_in1k", "images alone, then ImageNet labels"),
        ("hiera_base_224.mae", "images alone"),
        ("convnextv2_tiny.fcmae_ft_in22k_in1k", "images alone, then ImageNet labels"),
        ("vit_huge_patch14_gap_224.in1k_ijepa", "images alone"),
        ("eva02_base_patch14_224.mim_in22k", "text and images"),
        ("resnext101_32x8d.fb_wsl_ig1b_ft_in1k", "ImageNet labels"),
        ("vit_base_patch16_eupe.eupe_lvd1689m", "unknown"),  # distilled from text-trained ones too
        ("aimv2_large_patch14_224.apple_pt", "unknown"),
    ],
)
def test_what_trained_a_network_is_read_from_its_tag(name: str, expected: str) -> None:
    assert trained_by(name) == expected


def test_an_unknown_name_is_refused_with_names_that_work() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"encoder=vit_tiny_nonsense: .*efficientnet_lite0"):
        pretrained("vit_tiny_nonsense")
