import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from spice_pl.data.augment import ALL_14, RANDAUGMENT, PlainView, StrongView, View, WeakView
from spice_pl.data.crop_views import MoCoView, PatchView
from spice_pl.data.keyed import keyed_generator, keyed_uniform
from spice_pl.data.operations import random_boxes

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
IDENTITY: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
VIEWS = [
    PlainView(MEAN, STD),
    WeakView(MEAN, STD),
    StrongView(MEAN, STD),
    StrongView(MEAN, STD, padding=4, num_ops=2, max_cutout=4),
    MoCoView(MEAN, STD),
    MoCoView(MEAN, STD, flip=0.0, rotate_degrees=15, shear=10),
]
IDS = ["plain", "weak", "strong", "fixmatch", "moco", "digits"]


def _images(num_images: int, size: int) -> Tensor:
    shape = (num_images, 3, size, size)
    return torch.randint(0, 256, shape, generator=keyed_generator(size), dtype=torch.uint8)


def _uniforms(view: View, num_images: int, epoch: int = 0) -> Tensor:
    return keyed_uniform(0, epoch, torch.arange(num_images), 0, view.num_uniforms)


@pytest.mark.parametrize("size", [8, 16, 32, 33])
@pytest.mark.parametrize("view", VIEWS, ids=IDS)
def test_views_are_finite_normalised_and_leave_their_input(view: View, size: int) -> None:
    images = _images(24, size)
    before = images.clone()
    result = view(images, _uniforms(view, 24))
    assert torch.equal(images, before)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    levels = result * std + mean
    assert levels.min() > -1e-5
    assert levels.max() < 1 + 1e-5


@pytest.mark.parametrize("view", VIEWS, ids=IDS)
def test_an_image_looks_the_same_in_any_batch(view: View) -> None:
    images, uniforms = _images(60, 16), _uniforms(view, 60)
    whole = view(images, uniforms)
    assert torch.equal(whole, view(images, uniforms))
    order = torch.randperm(60, generator=keyed_generator(1))
    torch.testing.assert_close(view(images[order], uniforms[order]), whole[order])
    for rows in (slice(7, 8), slice(20, 33)):
        torch.testing.assert_close(view(images[rows], uniforms[rows]), whole[rows])
    assert view(images[:0], uniforms[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("view", VIEWS, ids=IDS)
def test_large_batches_are_made_in_parts(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    images, uniforms = _images(9, 16), _uniforms(view, 9)
    whole = view(images, uniforms)
    monkeypatch.setattr("spice_pl.data.crop_views.LEVELS_AT_ONCE", 3 * 16 * 16 * 2)  # 5 parts of 2
    torch.testing.assert_close(view(images, uniforms), whole)


@pytest.mark.parametrize("view", VIEWS[1:], ids=IDS[1:])
def test_epochs_differ(view: View) -> None:
    images = _images(40, 16)
    one, other = (view(images, _uniforms(view, 40, epoch)) for epoch in (0, 1))
    assert float((one != other).flatten(1).any(dim=1).float().mean()) > 0.8


@pytest.mark.parametrize("view", VIEWS, ids=IDS)
def test_views_travel_to_workers(view: View) -> None:
    assert pickle.loads(pickle.dumps(view)) == view  # noqa: S301


def test_plain_view_equals_torchvision() -> None:
    images = _images(5, 9)
    expected = tv.normalize(tv.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    view = PlainView(MEAN, STD)
    torch.testing.assert_close(view(images, torch.empty(5, 0)), expected)


def test_weak_view_shows_every_offset_and_flips_half_the_images() -> None:
    num_images = 4000
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).expand(num_images, 3, 4, 4)
    view = WeakView(**IDENTITY, padding=1)
    result = view(image, _uniforms(view, num_images)).round()
    patterns, counts = torch.unique(result[:, 0].flatten(1), dim=0, return_counts=True)
    assert len(patterns) == 2 * 3 * 3
    assert counts.min() > 222 - 4.5 * 14.5  # binomial
    assert counts.max() < 222 + 4.5 * 14.5
    shown = {tuple(row) for row in patterns.int().tolist()}
    for flipped, top, left in itertools.product((False, True), range(3), range(3)):
        source = image[0, :1].flip(-1) if flipped else image[0, :1]
        assert tuple(tv.crop(tv.pad(source, [1]), top, left, 4, 4).flatten().tolist()) in shown


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [WeakView, StrongView, MoCoView])
def test_flip_probability(kind: type, probability: float) -> None:
    settings: dict[type, dict[str, Any]] = {
        WeakView: {"padding": 0},
        StrongView: {"num_ops": 0, "max_cutout": 0},
        MoCoView: {
            "min_scale": 1.0,
            "ratio": (1, 1),
            "jitter_prob": 0,
            "gray_prob": 0,
            "blur_prob": 0,
        },
    }
    view = kind(**IDENTITY, flip=probability, **settings[kind])
    image = _images(1, 6)
    result = view(image.expand(3000, -1, -1, -1), _uniforms(view, 3000))
    flipped = (result - image.flip(-1)).abs().amax(dim=(1, 2, 3)) < 0.01
    same = (result - image).abs().amax(dim=(1, 2, 3)) < 0.01
    assert bool((flipped ^ same).all())
    assert float(flipped.float().mean()) == pytest.approx(probability, abs=0.04)


def test_crop_boxes_are_distributed_as_in_torchvision() -> None:
    num_images, size = 6000, 32
    uniforms = keyed_uniform(0, 0, torch.arange(num_images), 0, 22)
    boxes = random_boxes(uniforms, size, 0.2, (3 / 4, 4 / 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [
            RandomResizedCrop.get_params(torch.empty(3, size, size), [0.2, 1.0], [3 / 4, 4 / 3])
            for _ in range(num_images)
        ]
    reference = torch.tensor(params, dtype=torch.float32)
    end = boxes[:, :2] + boxes[:, 2:]
    assert boxes[:, :2].min() >= 0
    assert end.max() <= size
    measures: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1] + b[:, 3],
    )
    for measure in measures:
        ours, theirs = measure(boxes).msort(), measure(reference).msort()
        steps = torch.cat((ours, theirs))
        gap = torch.searchsorted(ours, steps, right=True)
        gap = gap - torch.searchsorted(theirs, steps, right=True)
        # Kolmogorov-Smirnov: 0.036 is passed by one pair of equal distributions in a thousand.
        assert float(gap.abs().max()) / num_images < 0.036


def test_areas_of_crops_are_between_the_smallest_and_the_largest_share() -> None:
    uniforms = torch.rand(500, 22, generator=keyed_generator(0))
    boxes = random_boxes(uniforms, 32, 0.25, (1.0, 1.0), 0.25)
    assert {tuple(box) for box in boxes[:, 2:].tolist()} == {(16, 16)}
    area = random_boxes(uniforms, 320, 0.1, (1.0, 1.0), 0.4)[:, 2:].prod(dim=1) / 320**2
    assert 0.098 < float(area.min()) < 0.11
    assert 0.39 < float(area.max()) < 0.402


def test_patches_of_their_native_size_are_parts_of_the_image() -> None:
    off: dict[str, Any] = {"jitter_prob": 0, "gray_prob": 0, "blur_prob": 0, "flip": 0}
    view = PatchView(
        **IDENTITY, **off, num_patches=5, side=4, min_scale=0.25, max_scale=0.25, ratio=(1, 1)
    )
    images = _images(6, 8)
    patches = view(images, _uniforms(view, 6))
    assert patches.shape == (6, 5, 3, 4, 4)
    for image, of_image in zip(images.float(), patches, strict=True):
        windows = image.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        found = (windows[None] - of_image[:, None]).abs().amax(dim=(2, 3, 4)).min(dim=1)
        assert float(found.values.max()) < 1e-2  # levels
        assert len(set(found.indices.tolist())) > 1


def test_a_patch_is_the_view_of_moco_with_its_own_numbers() -> None:
    one, many = MoCoView(**IDENTITY, side=6), PatchView(**IDENTITY, side=6, num_patches=3)
    images, uniforms = _images(5, 8), _uniforms(many, 5)
    patches = many(images, uniforms)
    for number, part in enumerate(uniforms.chunk(3, dim=1)):
        torch.testing.assert_close(patches[:, number], one(images, part))


def test_large_batches_of_small_patches_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    view = PatchView(**IDENTITY, num_patches=3, side=4)
    images, uniforms = _images(7, 8), _uniforms(view, 7)
    whole = view(images, uniforms)
    monkeypatch.setattr("spice_pl.data.crop_views.LEVELS_AT_ONCE", 1000)  # six parts
    torch.testing.assert_close(view(images, uniforms), whole)


def test_half_a_side_is_the_mean_of_four_pixels() -> None:
    off: dict[str, Any] = {"jitter_prob": 0, "gray_prob": 0, "blur_prob": 0, "flip": 0}
    view = MoCoView(**IDENTITY, **off, side=4, min_scale=1.0, ratio=(1, 1))
    images = _images(3, 8)
    expected = torch.nn.functional.avg_pool2d(images.float(), 2)
    torch.testing.assert_close(view(images, _uniforms(view, 3)), expected, atol=1e-3, rtol=0)


def test_crop_falls_back_to_the_largest_allowed_box() -> None:
    """Full area with a ratio of at least 2 never fits a square."""
    boxes = random_boxes(torch.rand(5, 22, generator=keyed_generator(0)), 32, 1.0, (2.0, 3.0))
    assert boxes.tolist() == [[8, 0, 16, 32]] * 5


def test_colour_jitter_takes_every_order_and_equals_torchvision() -> None:
    view = MoCoView(
        **IDENTITY, min_scale=1.0, ratio=(1, 1), jitter_prob=1, gray_prob=0, blur_prob=0, flip=0
    )
    num_images = 240
    images, uniforms = _images(num_images, 4), _uniforms(view, num_images)
    result = view(images, uniforms) / 255
    factors = torch.cat((0.6 + 0.8 * uniforms[:, 2:5], -0.1 + 0.2 * uniforms[:, 5:6]), dim=1)
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    seen = []
    for image, target, factor in zip(images / 255, result, factors.tolist(), strict=True):
        for order in itertools.permutations(range(4)):
            candidate = image
            for step in order:
                candidate = steps[step](candidate, factor[step])
            if torch.allclose(candidate, target, atol=1e-5):
                seen.append(order)
                break
        else:
            pytest.fail("no order of the four steps explains the view")
    assert len(set(seen)) == 24


def test_moco_probabilities_and_ranges() -> None:
    images = _images(2000, 4)
    off: dict[str, Any] = {"min_scale": 1.0, "ratio": (1, 1), "flip": 0.0}
    gray = MoCoView(**IDENTITY, **off, jitter_prob=0, blur_prob=0)
    result = gray(images, _uniforms(gray, 2000))
    is_gray = (result.amax(dim=1) - result.amin(dim=1)).amax(dim=(1, 2)) < 1e-3
    assert float(is_gray.float().mean()) == pytest.approx(0.2, abs=0.04)
    for name in ("jitter_prob", "blur_prob"):
        other: dict[str, Any] = {"jitter_prob": 0, "blur_prob": 0} | {name: 0.7}
        view = MoCoView(**IDENTITY, **off, **other, gray_prob=0, blur_sigma=(1, 2))
        result = view(images, _uniforms(view, 2000))
        changed = (result - images).abs().amax(dim=(1, 2, 3)) > 1e-2
        assert float(changed.float().mean()) == pytest.approx(0.7, abs=0.05)


def test_randaugment_draws_each_operation_alike_with_magnitudes_over_its_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, list[Tensor]] = {name: [] for name in ALL_14}
    for name, (_, low, high) in RANDAUGMENT.items():

        def record(images: Tensor, magnitude: Tensor, name: str = name) -> Tensor:
            drawn[name].append(magnitude.clone())
            return images

        monkeypatch.setitem(RANDAUGMENT, name, (record, low, high))
    num_images = 3500
    view = StrongView(MEAN, STD)
    view(torch.zeros(num_images, 3, 1, 1, dtype=torch.uint8), _uniforms(view, num_images))
    for name, (_, low, high) in RANDAUGMENT.items():
        if name == "Identity":
            continue
        magnitudes = torch.cat(drawn[name])
        assert len(magnitudes) == pytest.approx(1000, abs=140)
        assert magnitudes.min() >= low
        assert magnitudes.max() <= high
        assert float(magnitudes.mean()) == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
        assert float(magnitudes.max() - magnitudes.min()) >= 0.97 * (high - low)


@pytest.mark.parametrize("name", ALL_14)
def test_strong_view_applies_the_named_operation(name: str) -> None:
    """Every slot the same operation: the view is that operation repeated, on whole levels."""
    view = StrongView(**IDENTITY, flip=0, num_ops=2, operations=[name], max_cutout=0)
    images, uniforms = _images(10, 16), _uniforms(view, 10)
    expected = images.float()
    apply, low, high = RANDAUGMENT[name]
    for slot in (-2, -1):
        expected = apply(expected.clone(), low + (high - low) * uniforms[:, slot]).floor()
    torch.testing.assert_close(view(images, uniforms), expected, rtol=0, atol=1e-3)


def test_cutout_hides_squares_of_every_side_with_the_mean_colour() -> None:
    view = StrongView(MEAN, STD, num_ops=0, flip=0, max_cutout=5)
    images = torch.full((4000, 3, 40, 40), 255, dtype=torch.uint8)
    hidden = view(images, _uniforms(view, 4000)) == 0
    assert torch.equal(hidden.all(dim=1), hidden.any(dim=1))
    square = hidden[:, 0]
    height, width = square.any(dim=2).sum(dim=1), square.any(dim=1).sum(dim=1)
    assert torch.equal(height * width, square.sum(dim=(1, 2)))
    counts = torch.bincount(height[height == width], minlength=6)[1:]
    assert len(counts) == 5
    assert counts.min() > 600  # 800 each, less those clipped at a border
    centre_rows = square.any(dim=2).float().mean(dim=0)
    assert float(centre_rows.min()) > 0.02  # reaches the borders too


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PlainView, {"mean": (0.5,)}, r"mean \(0.5,\) does not fit: it must be three numbers"),
        (PlainView, {"std": (1.0, 0.0, 1.0)}, "std .* must be three positive numbers"),
        (WeakView, {"padding": -1}, "padding -1 .* 0 pixels or more"),
        (WeakView, {"flip": 1.5}, "flip 1.5 .* a probability between 0 and 1"),
        (StrongView, {"num_ops": -1}, "num_ops -1 .* 0 or more"),
        (StrongView, {"max_cutout": -2}, "max_cutout -2"),
        (
            StrongView,
            {"operations": ["Invert"]},
            r"operations \['Invert'\] .* names among Identity",
        ),
        (StrongView, {"operations": []}, "operations .* at least one name; or set num_ops 0"),
        (MoCoView, {"min_scale": 0}, r"min_scale 0 .* an area share in \(0, 1\]"),
        (MoCoView, {"max_scale": 0.1}, "max_scale 0.1 .* an area share from min_scale, 0.2, to 1"),
        (MoCoView, {"side": 0}, "side 0 .* 1 pixel or more"),
        (PatchView, {"num_patches": 1}, "num_patches 1 .* 2 or more"),
        (MoCoView, {"ratio": (2, 1)}, r"ratio \(2, 1\)"),
        (MoCoView, {"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter .* hue at most 0.5"),
        (MoCoView, {"gray_prob": -0.1}, "gray_prob -0.1"),
        (MoCoView, {"blur_sigma": (0, 2)}, "blur_sigma"),
        (MoCoView, {"rotate_degrees": -5}, "rotate_degrees -5"),
        (MoCoView, {"shear": 90}, "shear 90"),
    ],
)
def test_wrong_settings_are_named(kind: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"mean": MEAN, "std": STD} | settings)


def test_wrong_inputs_are_named() -> None:
    view = WeakView(MEAN, STD)
    images = _images(2, 8)
    with pytest.raises(ValueError, match=r"images \(2, 3, 8, 6\) are not \(B, 3, S, S\)"):
        view(images[..., :6], _uniforms(view, 2))
    with pytest.raises(ValueError, match=r"images are torch.float32; views take uint8"):
        view(images.float(), _uniforms(view, 2))
    with pytest.raises(
        ValueError, match=r"uniforms \(2, 4\) do not fit 2 images; WeakView takes \(2, 3\)"
    ):
        view(images, torch.zeros(2, 4))
