from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nn.formula import fill_by_formula, formula_images
from torchvision.models import resnet34

from spice_pl.nn import ClusterHead, ResNet
from spice_pl.nn.resnet import WhitenedPatches


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        # First image, first five outputs of the authors' MoCo networks for the same weights.
        ({}, 32, [-0.7292205, 10.7538, 13.40316, 5.02898, -7.444777]),
        (
            {"blocks": (3, 4, 6, 3), "stem": "conv3_pool"},
            96,
            [11.42797, 3.381738, -7.455487, -12.14014, -6.81816],
        ),
    ],
    ids=["resnet18_cifar", "clusterresnet_96"],
)
def test_reproduces_the_authors_encoders(
    config: dict[str, Any], size: int, expected: list[float]
) -> None:
    backbone, projection = ResNet(**config).eval(), ClusterHead(512, 512, 128)
    fill_by_formula(backbone, projection, first=2)  # the authors' queue and pointer are 0 and 1
    with torch.no_grad():
        output = projection.logits(backbone(formula_images(2, size)))
    torch.testing.assert_close(output[0, :5], torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_imagenet_stem_is_torchvisions_resnet34() -> None:
    reference = resnet34().eval()
    reference.fc = torch.nn.Identity()
    backbone = ResNet(blocks=(3, 4, 6, 3), stem="conv7").eval()
    backbone.load_state_dict(reference.state_dict())
    images = formula_images(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), reference(images))


@pytest.mark.parametrize(
    ("stem", "size", "side"),
    [
        ("conv3", 32, 4),
        ("conv3_stride2", 32, 2),
        ("whitened", 32, 2),
        ("conv3_pool", 32, 3),
        ("conv3_pool", 64, 5),
        ("conv3_pool", 96, 7),
        ("conv7", 224, 7),
    ],
)
def test_the_stem_decides_the_size_of_the_last_map(stem: Any, size: int, side: int) -> None:
    backbone = ResNet(blocks=(1, 1, 1, 1), widths=(2, 2, 2, 2), stem=stem)
    sides = []
    last = backbone.get_submodule("layer4")
    last.register_forward_hook(lambda _, __, output: sides.append(output.shape[2:]))
    backbone(torch.zeros(2, 3, size, size))
    assert sides == [(side, side)]


def test_small_network_for_cpus() -> None:
    backbone = ResNet(blocks=(1, 1, 1), widths=(32, 64, 128), in_channels=1)
    features = backbone(torch.randn(4, 1, 28, 28))
    assert features.shape == (4, backbone.num_features)
    assert backbone.num_features == 128
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in backbone.parameters())


def test_initialised_like_torchvision() -> None:
    weight = ResNet().state_dict()["layer4.1.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks": (1, 1)}, r"blocks \[1, 1\] and widths \[64, .*describe 2 and 4 stages"),
        ({"blocks": (), "widths": ()}, "describe 0 and 0 stages"),
        (
            {"stem": "conv5"},
            "stem 'conv5' is unknown; choose one of conv3, conv3_stride2, ",
        ),
    ],
)
def test_rejects_invalid_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**config)


def test_whitened_patches_are_uncorrelated_with_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(27, 27, generator=generator)
    patches = torch.randn(2000, 27, generator=generator) @ mixing
    images = patches.view(2000, 3, 3, 3)  # one patch each
    stem = WhitenedPatches(epsilon=0.0)
    stem.fit(images)
    centre = F.conv2d(images, stem.weight)[:, :, 0, 0]  # (2000, 54)
    torch.testing.assert_close(centre[:, :27], -centre[:, 27:])
    covariance = centre[:, :27].T @ centre[:, :27] / len(centre)
    torch.testing.assert_close(covariance, torch.eye(27), rtol=0, atol=1e-3)


def test_whitened_stem_is_fitted_and_not_trained() -> None:
    torch.manual_seed(0)
    backbone = ResNet(blocks=(1,), widths=(4,), stem="whitened")
    before = backbone.get_buffer("conv1.weight").clone()
    backbone.fit_stem(torch.rand(8, 3, 8, 8))
    assert not torch.equal(backbone.get_buffer("conv1.weight"), before)
    assert "conv1.weight" not in dict(backbone.named_parameters())
    other = ResNet(blocks=(1,), widths=(4,), stem="whitened")
    other.load_state_dict(backbone.state_dict())
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(other.eval()(images), backbone.eval()(images))
