"""The fast copy of a frozen network gives the same features."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.nn.formula import formula_images
from tests.nn.test_pretrained import needs_weights
from torch import Tensor, nn

from spice_pl.nn.frozen import PART, Frozen, in_parts
from spice_pl.nn.pretrained import efficientnet_lite
from spice_pl.nn.resnet import ResNet
from spice_pl.nn.wide_resnet import WideResNet


def trained(network: nn.Module) -> nn.Module:
    """Return the network in train mode, with statistics and scales other than 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                assert values is not None
                values.normal_(std=0.3)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
    return network.train()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def compare(network: nn.Module, images: Tensor) -> Frozen:
    before = copy.deepcopy(network.state_dict())
    frozen = Frozen(network)
    assert network.training
    features = frozen(images)
    with torch.no_grad():
        expected = network.eval()(images)
    assert not features.requires_grad
    largest = float(expected.abs().max())
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * largest)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    return frozen


@pytest.mark.parametrize("stem", ["conv3", "whitened"])
def test_a_resnet_has_no_batchnorm_left_and_the_same_features(stem: str) -> None:
    frozen = compare(trained(ResNet((1, 1), (8, 16), stem=stem)), formula_images(3, 32))  # type: ignore[arg-type]
    assert norms(frozen.network) == (stem == "whitened")  # its stem is not an nn.Conv2d


def test_batchnorm_before_an_activation_and_a_convolution_stays() -> None:
    network = trained(WideResNet(depth=10, widen_factor=1))
    frozen = compare(network, formula_images(3, 32))
    assert 0 < norms(frozen.network) < norms(network)


@needs_weights
def test_layers_of_timm_are_folded() -> None:
    frozen = compare(efficientnet_lite(0).train(), formula_images(2, 64))
    assert norms(frozen.network) == 0


class Twice(nn.Module):
    """Use one convolution for two BatchNorms, and the output of one for a BatchNorm and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.read = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        first = self.norms[1](self.shared(self.norms[0](self.shared(images))))
        second = self.read(first)
        features: Tensor = (second + self.norms[2](second)).mean(dim=(2, 3))
        return features


class Standardised(nn.Conv2d):
    """Convolution that subtracts the mean of its weights."""

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = nn.functional.conv2d(images, self.weight - self.weight.mean(), self.bias)
        return maps


class Named(nn.Sequential):
    """Call layers with a keyword argument."""

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(input=images)
        return images


class Branching(nn.Module):
    """Network whose control flow depends on its input, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.conv(images))
        features: Tensor = maps.mean(dim=(2, 3)) if maps.shape[0] < 100 else maps.amax(dim=(2, 3))
        return features


@pytest.mark.parametrize(
    ("network", "left"),
    [
        (Twice(), 3),
        (nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), 1),
        (Branching(), 1),
        (Named(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten()), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), 0),
    ],
)
def test_only_plain_convolutions_and_batchnorms_are_folded(network: nn.Module, left: int) -> None:
    assert norms(compare(trained(network), formula_images(2, 8)).network) == left


def test_the_parts_of_a_batch_are_the_batch() -> None:
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 256, 256)
    sizes = [len(part) for part in in_parts(images)]
    assert sizes == [4, 1]
    assert sizes[0] * 256 * 256 <= PART
    assert torch.equal(torch.cat(list(in_parts(images))), images)
    assert [len(part) for part in in_parts(torch.zeros(2, 3, 1024, 1024))] == [1, 1]
    assert len(in_parts(images.to("meta"))) == 1  # one part on other devices
