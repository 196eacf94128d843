import pytest
import torch
from tests.nn.formula import fill_by_formula, formula_images
from torch import nn

from spice_pl.nn import WideResNet


def test_reproduces_the_authors_wrn_28_2() -> None:
    backbone, classifier = WideResNet(depth=28, widen_factor=2).eval(), nn.Linear(128, 10)
    fill_by_formula(backbone, classifier)
    with torch.no_grad():
        output = classifier(backbone(formula_images(2, 32)))
    # First image, first five logits of the authors' network for the same weights.
    expected = torch.tensor([10.27673, -22.29558, 32.73133, -41.61568, 48.04288])
    torch.testing.assert_close(output[0, :5], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "widen_factor", "strides", "size", "num_features", "num_convolutions"),
    [
        (28, 2, (1, 2, 2), 32, 128, 28),
        (28, 8, (1, 2, 2), 32, 512, 28),
        (37, 2, (2, 2, 2, 2), 96, 256, 37),
    ],
)
def test_networks_of_the_paper(
    depth: int,
    widen_factor: int,
    strides: tuple[int, ...],
    size: int,
    num_features: int,
    num_convolutions: int,
) -> None:
    with torch.device("meta"):
        backbone = WideResNet(depth, widen_factor, strides)
        maps: list[torch.Size] = []
        backbone.bn1.register_forward_hook(lambda _, __, output: maps.append(output.shape))
        assert backbone(torch.zeros(2, 3, size, size)).shape == (2, num_features)
    side = size // torch.tensor(strides).prod().item()
    assert maps == [(2, num_features, side, side)]
    assert backbone.num_features == num_features
    assert sum(isinstance(m, nn.Conv2d) for m in backbone.modules()) == num_convolutions
    momenta = {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.001}


def test_every_parameter_gets_a_gradient() -> None:
    backbone = WideResNet(depth=10, widen_factor=1)
    backbone(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in backbone.parameters())


def test_initialised_for_leaky_relu() -> None:
    weight = WideResNet(depth=10, widen_factor=4).state_dict()["layer3.0.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / 1.01 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("depth", "strides"), [(29, (1, 2, 2)), (4, (1, 2, 2)), (28, ())])
def test_rejects_a_depth_that_does_not_divide(depth: int, strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"depth {depth} does not divide into {len(strides)} "):
        WideResNet(depth=depth, strides=strides)
