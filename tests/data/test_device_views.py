"""What views compute on a GPU is what they compute on a processor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.augment import ALL_14, PlainView, StrongView, WeakView
from spice_pl.data.crop_views import MoCoView, PatchView

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.21, 0.22)
BATCH = 60

VIEWS: dict[str, PlainView] = {
    "plain": PlainView(MEAN, STD),
    "weak": WeakView(MEAN, STD),
    "only flipped": WeakView(MEAN, STD, padding=0),
    "strong": StrongView(MEAN, STD),
    "strong with crop, without cutout": StrongView(MEAN, STD, padding=4, num_ops=2, max_cutout=0),
    "no operations": StrongView(MEAN, STD, num_ops=0),
    "moco": MoCoView(MEAN, STD),
    "moco with rotation": MoCoView(MEAN, STD, rotate_degrees=20, shear=5),
    "patches": PatchView(MEAN, STD, num_patches=2),
    "small patches": PatchView(MEAN, STD, num_patches=3, side=6, max_scale=0.4),
    "moco without jitter": MoCoView(MEAN, STD, jitter_prob=0),
    **{name: StrongView(MEAN, STD, num_ops=1, operations=[name], max_cutout=0) for name in ALL_14},
}


def photographs(pixels: int) -> Tensor:
    """Smooth images with noise, and one of a single level."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(BATCH, 3, 4, 4, generator=generator)
    images = 255 * F.interpolate(coarse, size=pixels, mode="bilinear")
    images += 9 * torch.randn(images.shape, generator=generator)
    images[0] = 7
    return images.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("pixels", [8, 32])
@pytest.mark.parametrize("name", VIEWS)
def test_both_ways_give_the_same_view(name: str, pixels: int) -> None:
    view, images = VIEWS[name], photographs(pixels)
    uniforms = torch.rand(BATCH, view.num_uniforms, generator=torch.Generator().manual_seed(1))
    expected = view(images, uniforms)
    found = view._on_device(images, view._parameters(uniforms, pixels))
    assert found.shape == expected.shape
    levels = 255 * 0.2 * (found - expected).abs()
    # After an operation levels are rounded down, so a rounding error can move one by a level.
    assert float((levels > 0.1).float().mean()) < 1e-4


def test_a_subclass_that_changes_the_view_alone_keeps_its_change() -> None:
    class Mine(WeakView):
        def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
            return images.float()

    class MineToo(Mine):
        def _on_device(self, images: Tensor, parameters: Tensor) -> Tensor:
            return images.float()

    assert VIEWS["weak"]._has_own_way
    assert not Mine(MEAN, STD)._has_own_way
    assert MineToo(MEAN, STD)._has_own_way


@pytest.mark.parametrize(
    "name", ["plain", "weak", "strong", "moco", "moco with rotation", "small patches"]
)
def test_a_view_of_a_gpu_is_traced_whole(name: str) -> None:
    view, images = VIEWS[name], photographs(8)
    uniforms = torch.rand(BATCH, view.num_uniforms)
    parameters = view._parameters(uniforms, 8)
    torch._dynamo.reset()
    whole = torch.compile(view._on_device, backend="eager", fullgraph=True)
    expected = view._on_device(images, parameters)
    torch.testing.assert_close(whole(images, parameters), expected)
