import importlib
from collections.abc import Callable

import pytest
import torch
from tests.nn.formula import formula_images
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from spice_pl.nn.places import feature_map, fine_feature_map
from spice_pl.nn.pretrained import torchvision_backbone
from spice_pl.nn.resnet import ResNet
from spice_pl.nn.wide_resnet import WideResNet


class Windows(nn.Module):
    """Mean colours of windows of 8 x 8 pixels, pooled: a network with a known feature map."""

    num_features = 3

    def __init__(self, *, flatten: bool = False) -> None:
        super().__init__()
        self.windows, self.flatten = nn.AvgPool2d(8), flatten

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.windows(images)
        return maps.flatten(1) if self.flatten else maps.mean(dim=(2, 3))


def test_shifts_refine_the_feature_map() -> None:
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)  # each pixel is its column
    coarse, fine = feature_map(Windows(), ramp), fine_feature_map(Windows(), ramp)
    assert coarse is not None
    assert fine is not None
    torch.testing.assert_close(coarse[0, 0], torch.tensor([[3.5, 11.5]] * 2))
    assert fine.shape == (1, 3, 8, 8)
    # The centres of the windows are columns 1, 3, ..., 15; the outer windows repeat the border.
    inside = torch.tensor([4.5, 6.5, 8.5, 10.5])
    torch.testing.assert_close(fine[0, 0, :, 2:6], inside.expand(8, 4))
    assert (fine.diff(dim=3) > 0).all()
    assert (fine.diff(dim=2) == 0).all()


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(blocks=(1, 1), widths=(4, 8)),
    "bottleneck": lambda: ResNet(blocks=(1,), widths=(4,), stem="conv7", block="bottleneck"),
    "wide resnet": lambda: WideResNet(depth=10, widen_factor=1),
    "torchvision": lambda: torchvision_backbone("shufflenet_v2_x0_5"),
    "timm": lambda: importlib.import_module("timm").create_model("resnet10t", num_classes=0),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_mean_of_the_feature_map_is_the_features(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    backbone = BACKBONES[name]().eval()
    images = formula_images(2, 64)
    maps = feature_map(backbone, images)
    assert maps is not None
    assert maps.shape[2] * maps.shape[3] > 1
    with torch.no_grad():
        torch.testing.assert_close(maps.mean(dim=(2, 3)), backbone(images))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_tokens_and_flattened_maps_give_none() -> None:
    transformer = VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16
    ).eval()
    transformer.heads, transformer.num_features = nn.Identity(), 16
    assert fine_feature_map(transformer, formula_images(1, 32)) is None
    flat = Windows(flatten=True)
    flat.num_features = 12
    assert fine_feature_map(flat, formula_images(1, 16)) is None
