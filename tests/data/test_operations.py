"""Each operation, with a parameter of its own per image, against torchvision image by image.

Tolerances are in levels of 255.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from spice_pl.data import operations as ops

SIZES = (8, 16, 32, 33)
Reference = Callable[[Tensor, float], Tensor]


def _images(size: int, num_images: int = 6) -> Tensor:
    """Noise, a smooth image, a grey one, a flat one, a dark one and a saturated one."""
    images = torch.randint(0, 256, (num_images, 3, size, size), generator=_generator(size))
    ramp = torch.linspace(0, 255, size).long()
    images[1] = torch.stack(
        (ramp.expand(size, size), ramp[:, None].expand(size, size), 255 - images[1, 0])
    )
    images[2] = images[2, :1]
    images[3] = 77
    images[4] //= 5
    images[5, 0] = 255
    return images.to(torch.uint8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _spread(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 6)


def _affine(image: Tensor, translate: tuple[float, float], shear: tuple[float, float]) -> Tensor:
    shear_degrees = [math.degrees(math.atan(slope)) for slope in shear]
    warped: Tensor = tv.affine(image, 0.0, list(translate), 1.0, shear_degrees, center=[0, 0])
    return warped


def _light(kind: int) -> Callable[[Tensor, Tensor], Tensor]:
    def adjust(images: Tensor, factor: Tensor) -> Tensor:
        return ops.adjust_light_(images, factor, torch.full((len(images),), kind))

    return adjust


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("batched", "reference", "low", "high"),
    [
        (ops.rotate, tv.rotate, -29.3, 28.9),
        (ops.shear_x, lambda x, slope: _affine(x, (0, 0), (slope, 0)), -0.097, 0.093),
        (ops.shear_y, lambda x, slope: _affine(x, (0, 0), (0, slope)), -0.097, 0.093),
        (ops.translate_x, lambda x, p: _affine(x, (p * x.shape[-1], 0), (0, 0)), -0.097, 0.093),
        (ops.translate_y, lambda x, p: _affine(x, (0, p * x.shape[-1]), (0, 0)), -0.097, 0.093),
        (ops.posterize, lambda image, bits: tv.posterize(image, int(bits)), 4.0, 7.99),
        (ops.solarize, tv.solarize, 0.0, 254.9),
        (lambda images, _: ops.autocontrast(images), lambda image, _: tv.autocontrast(image), 0, 0),
        (lambda images, _: ops.equalize(images), lambda image, _: tv.equalize(image), 0, 0),
    ],
    ids=[
        "rotate",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
        "posterize",
        "solarize",
        "autocontrast",
        "equalize",
    ],
)
def test_operations_on_whole_levels_are_exact(
    batched: Callable[[Tensor, Tensor], Tensor],
    reference: Reference,
    low: float,
    high: float,
    size: int,
) -> None:
    images, parameter = _images(size), _spread(low, high)
    result = batched(images.float(), parameter).floor()
    expected = [reference(x, p) for x, p in zip(images, parameter.tolist(), strict=True)]
    torch.testing.assert_close(result, torch.stack(expected).float(), rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("batched", "reference", "low", "high", "level_tolerance"),
    [
        (ops.adjust_brightness, tv.adjust_brightness, 0.05, 1.5, 1),
        (ops.adjust_contrast, tv.adjust_contrast, 0.05, 1.5, 1),
        (ops.adjust_saturation, tv.adjust_saturation, 0.05, 1.5, 1),
        (_light(0), tv.adjust_brightness, 0.05, 1.5, 1),
        (_light(1), tv.adjust_contrast, 0.05, 1.5, 1),
        (_light(2), tv.adjust_saturation, 0.05, 1.5, 1),
        (ops.adjust_hue_, tv.adjust_hue, -0.5, 0.5, 1),
        (lambda images, _: ops.grayscale(images), lambda x, _: tv.rgb_to_grayscale(x, 3), 0, 0, 1),
    ],
    ids=["brightness", "contrast", "saturation", "light0", "light1", "light2", "hue", "grayscale"],
)
def test_colour_equals_torchvision(
    batched: Callable[[Tensor, Tensor], Tensor],
    reference: Reference,
    low: float,
    high: float,
    level_tolerance: int,
    size: int,
) -> None:
    """Float images agree to rounding, 0.01 levels; torchvision's uint8 path truncates grey values
    on the way, which moves its result by up to one level."""
    images, parameter = _images(size), _spread(low, high)
    result = batched(images.float(), parameter)
    pairs = list(zip(images, parameter.tolist(), strict=True))
    exact = torch.stack([reference(x / 255, p) * 255 for x, p in pairs])
    torch.testing.assert_close(result, exact, rtol=0, atol=0.01)
    levels = torch.stack([reference(x, p) for x, p in pairs]).float()
    # 1e-3: a result just under a whole number must not count as the level below it.
    assert float(((result + 1e-3).floor() - levels).abs().max()) <= level_tolerance


@pytest.mark.parametrize("size", [2, *SIZES])
def test_sharpness_equals_torchvision(size: int) -> None:
    """One level: factors such as 0.23 times a whole number can land on either side of another."""
    images, factor = _images(size), _spread(0.05, 1.9)
    result = ops.adjust_sharpness(images.float(), factor).floor()
    pairs = zip(images, factor.tolist(), strict=True)
    expected = torch.stack([tv.adjust_sharpness(x, p) for x, p in pairs]).float()
    assert float((result - expected).abs().max()) <= 1
    assert float((result != expected).float().mean()) < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_crop_resize_equals_torchvision_with_and_without_antialias(size: int) -> None:
    images = _images(size).float()
    half = size // 2
    box = torch.tensor(
        [
            [0, 0, size, size],
            [1, 2, half, half],
            [size - 1, 0, 1, size],
            [0, size - half, size, half],
            [2, 1, half + 1, half - 1],
            [half, half, 3, 2],
        ]
    )
    mirrored = torch.arange(6) % 2 == 1
    result = ops.crop_resize(images, box.float(), mirrored)
    for antialias in (False, True):
        for i, (top, left, height, width) in enumerate(box.tolist()):
            expected = tv.resized_crop(
                images[i], top, left, height, width, [size, size], antialias=antialias
            )
            expected = expected.flip(-1) if mirrored[i] else expected
            torch.testing.assert_close(result[i], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_warp_before_a_whole_crop_equals_torchvision(size: int) -> None:
    images = _images(size).float()
    degrees, shear = _spread(-20, 20), _spread(8, -8)
    box = torch.tensor([0.0, 0.0, size, size]).expand(6, 4)
    matrix = ops.rotation_matrix(degrees, shear)
    result = ops.crop_resize(images, box, None, matrix)
    for i in range(6):
        expected = tv.affine(
            images[i],
            float(degrees[i]),
            [0, 0],
            1.0,
            [float(shear[i]), 0.0],
            InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(result[i], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [*SIZES, 56])  # 56 is blurred in blocks, the last one smaller
def test_blur_equals_torchvision(size: int) -> None:
    images, sigma = _images(size), _spread(0.1, 2.0)
    radius = min(6, size - 1)
    result = ops.gaussian_blur(images.float(), sigma, 6)
    for i, width in enumerate(sigma.tolist()):
        kernel = [2 * radius + 1] * 2
        exact = tv.gaussian_blur(images[i].float(), kernel, [width] * 2)
        torch.testing.assert_close(result[i], exact, rtol=0, atol=0.01)
        levels = tv.gaussian_blur(images[i], kernel, [width] * 2).float()
        assert float((result[i].round() - levels).abs().max()) <= 1  # a sum close to a half


def test_flip_and_shifted_crop_are_exact() -> None:
    images = _images(9)
    mask = torch.tensor([True, False, True, False, False, True])
    result = ops.flip(images, mask)
    assert torch.equal(result[mask], images[mask].flip(-1))
    assert torch.equal(result[~mask], images[~mask])
    top, left = torch.tensor([0, 3, 6, 1, 2, 5]), torch.tensor([6, 3, 0, 5, 1, 2])
    result = ops.shifted_crop(images, 3, top, left)
    for i in range(6):
        padded = tv.pad(images[i], [3])
        assert torch.equal(result[i], tv.crop(padded, int(top[i]), int(left[i]), 9, 9))


def test_cutout_is_clipped_at_the_border() -> None:
    images = torch.ones(3, 3, 8, 8)
    side, row, column = torch.tensor([1, 4, 16]), torch.tensor([3, 0, 7]), torch.tensor([5, 7, 0])
    hidden = (ops.cutout_(images, side, row, column) == 0).all(dim=1)
    assert hidden[0].nonzero().tolist() == [[3, 5]]
    assert hidden[1].nonzero().tolist() == [[r, c] for r in (0, 1) for c in (5, 6, 7)]
    assert hidden[2].sum() == 8 * 8


def test_hue_of_tiny_colour_differences_stays_finite() -> None:
    images = torch.full((1, 3, 4, 4), 100.0)
    images[:, 0] += 1e-5
    turned = ops.adjust_hue_(images.clone(), torch.tensor([0.3]))
    torch.testing.assert_close(turned, images, rtol=0, atol=1e-3)
