"""Views: augmentations of a batch as pure functions of its images and of random numbers.

A view maps uint8 images and uniform numbers to normalised float images and has no state:
``view(images, keyed_uniform(seed, epoch, index, stream, view.num_uniforms))``. Each image has its
own parameters, which depend only on its own row of numbers.

Shape letters: B images, S side in pixels, U uniform numbers per image.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spice_pl.data import device_views as on_device
from spice_pl.data import operations as ops
from spice_pl.functional.device import to_device

RANDAUGMENT = ops.RANDAUGMENT
ALL_14 = tuple(RANDAUGMENT)
# 8 MB of float32 stay in a processor's cache. Larger buffers are fetched from the system and
# returned to it at every operation.
LEVELS_AT_ONCE = 2**21


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} {value} does not fit: it must be {rule}")


def _require_share(name: str, value: float) -> None:
    _require(0 <= value <= 1, name, value, "a probability between 0 and 1")


def _in_parts(view: Callable[[Tensor, Tensor], Tensor], images: Tensor, uniforms: Tensor) -> Tensor:
    """Make views of at most `LEVELS_AT_ONCE` levels at a time, in equal parts."""
    num_parts = math.ceil(images.numel() / LEVELS_AT_ONCE)
    if num_parts == 1:
        return view(images, uniforms)
    size = math.ceil(len(images) / num_parts)
    views = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    parts = (torch.split(each, size) for each in (images, uniforms, views))
    for part, numbers, result in zip(*parts, strict=True):
        result.copy_(view(part, numbers))
    return views


def _integers(uniform: Tensor, count: int) -> Tensor:
    """Return integers in 0..count-1; the product can round up to count, hence the clamp."""
    return (uniform * count).long().clamp_(max=count - 1)


class View(Protocol):
    """Interface of a view."""

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Map images (B, 3, S, S) uint8 and uniforms (B, U) to (B, 3, S, S) float32."""


@dataclass(frozen=True)
class PlainView:
    """The image itself, normalised. Features and scores are computed from it.

    Args:
        mean: three channel means, of levels in [0, 1].
        std: three channel standard deviations, of levels in [0, 1].

    Raises:
        ValueError: mean or std is not three numbers, or std is not positive.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        _require(len(self.mean) == 3, "mean", self.mean, "three numbers, one per channel")
        positive = len(self.std) == 3 and min(self.std) > 0
        _require(positive, "std", self.std, "three positive numbers, one per channel")

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""
        return 0

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Make one view of each image.

        Args:
            images: (B, 3, S, S) uint8; not modified.
            uniforms: (B, num_uniforms) in [0, 1), on the processor or on the device of the images;
                ignored if num_uniforms is 0.

        Returns:
            (B, 3, S, S) float32, normalised.

        Raises:
            ValueError: images are not square uint8 colour images, or the numbers do not fit them.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images {tuple(images.shape)} are not (B, 3, S, S); crop them square")
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; views take uint8, before normalisation")
        if self.num_uniforms and uniforms.shape != (len(images), self.num_uniforms):
            raise ValueError(
                f"uniforms {tuple(uniforms.shape)} do not fit {len(images)} images; "
                f"{type(self).__name__} takes ({len(images)}, {self.num_uniforms})"
            )
        if not images.shape[0]:
            return images.to(torch.float32)
        if images.device.type == "cpu" or not self._has_own_way:
            return self._view(images, uniforms.to(images.device))
        parameters = self._parameters(uniforms, images.shape[-1])
        return self._on_device(images, to_device(parameters, images.device))

    @property
    def _has_own_way(self) -> bool:
        """Whether `_on_device` is that of this view: a subclass may have changed `_view` alone."""
        names = ("_view", "_on_device")
        first = next(
            each for each in type(self).__mro__ if any(name in vars(each) for name in names)
        )
        return "_on_device" in vars(first)

    def _parameters(self, uniforms: Tensor, size: int) -> Tensor:
        """Return what `_on_device` needs for each image, (B, P) or (1, P)."""
        return on_device.normalisation(self.mean, self.std)[None]

    def _on_device(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Make the views on a GPU; equal to `_view` up to rounding."""
        return on_device.normalise(images, parameters)

    def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return self._normalise(images.to(torch.float32))

    def _normalise(self, images: Tensor) -> Tensor:
        """Normalise levels in [0, 255] by mean and std, in place."""
        mean, std = (images.new_tensor(tuple(x)).view(3, 1, 1) for x in (self.mean, self.std))
        return images.sub_(255 * mean).mul_(1 / (255 * std))


@dataclass(frozen=True)
class WeakView(PlainView):
    """Flip and crop after padding with black (He et al. 2016, section 4.2).

    Args:
        mean: as in `PlainView`.
        std: as in `PlainView`.
        padding: pixels added on each side; the crop's offset is uniform in 0..2*padding.
        flip: probability of a mirror image.

    Raises:
        ValueError: a setting is out of range.
    """

    padding: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.padding >= 0, "padding", self.padding, "0 pixels or more")
        _require_share("flip", self.flip)

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""
        return 3

    def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return self._normalise(self._shift_flip(images, uniforms).to(torch.float32))

    def _parameters(self, uniforms: Tensor, size: int) -> Tensor:
        normal = super()._parameters(uniforms, size).expand(len(uniforms), -1)
        return torch.cat((self._shift_parameters(uniforms, size), normal), dim=1)

    def _on_device(self, images: Tensor, parameters: Tensor) -> Tensor:
        shift, normal = parameters.split_with_sizes((3, 6), dim=1)
        return on_device.normalise(on_device.shifted(images, shift, self.padding), normal)

    def _shift_parameters(self, uniforms: Tensor, size: int) -> Tensor:
        top, left = _integers(uniforms[:, 1:3], 2 * self.padding + 1).unbind(1)
        flip = uniforms[:, 0] < self.flip
        return on_device.shift_parameters(flip, top, left, size, self.padding)

    def _shift_flip(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Flip and crop by uniforms (B, 3) for flip, top and left. Returns uint8."""
        images = ops.flip(images, uniforms[:, 0] < self.flip)
        if self.padding == 0:
            return images
        top, left = _integers(uniforms[:, 1:], 2 * self.padding + 1).unbind(1)
        return ops.shifted_crop(images, self.padding, top, left)


@dataclass(frozen=True)
class StrongView(WeakView):
    """RandAugment and cutout after a weak view.

    Cubuk et al. 2020 (RandAugment) in the form of Sohn et al. 2020 (FixMatch): each slot draws an
    operation with replacement and a magnitude uniform in its range. Levels are rounded down to
    integers after each operation, as in PIL. Cutout covers one square with the mean colour; its
    side is uniform in 1..max_cutout, its centre is uniform over the pixels, and it is clipped at
    the border. SPICE's second stage uses four operations and no crop, FixMatch two and a crop.

    Departure: the square has the mean colour, not FixMatch's fixed grey.

    Args:
        mean: as in `PlainView`.
        std: as in `PlainView`.
        padding: pixels added on each side before the crop; 0 turns the crop off.
        flip: probability of a mirror image.
        num_ops: number of operations applied to each image.
        operations: names of the operations to draw from, keys of `RANDAUGMENT`.
        max_cutout: largest side of the covered square in pixels; 0 turns cutout off.

    Raises:
        ValueError: a setting is out of range, or a name is unknown.
    """

    padding: int = 0
    num_ops: int = 4
    operations: Sequence[str] = ALL_14
    max_cutout: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.num_ops >= 0, "num_ops", self.num_ops, "0 or more")
        _require(self.max_cutout >= 0, "max_cutout", self.max_cutout, "0 pixels or more")
        unknown = [name for name in self.operations if name not in RANDAUGMENT]
        _require(not unknown, "operations", unknown, f"names among {', '.join(ALL_14)}")
        _require(len(self.operations) > 0, "operations", [], "at least one name; or set num_ops 0")

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""
        return 3 + 3 + 2 * self.num_ops

    def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return _in_parts(self._part, images, uniforms)

    def _part(self, images: Tensor, uniforms: Tensor) -> Tensor:
        weak, square, chosen, magnitude = uniforms.split_with_sizes(
            (3, 3, self.num_ops, self.num_ops), dim=1
        )
        images = self._shift_flip(images, weak).to(torch.float32)
        images = self._randaugment(images, _integers(chosen, len(self.operations)), magnitude)
        return self._cutout(self._normalise(images), square)

    def _parameters(self, uniforms: Tensor, size: int) -> Tensor:
        weak, square, chosen, magnitude = uniforms.split_with_sizes(
            (3, 3, self.num_ops, self.num_ops), dim=1
        )
        side = 1 + _integers(square[:, 0], self.max_cutout) if self.max_cutout else square[:, 0] * 0
        row, column = _integers(square[:, 1:], size).unbind(1)
        slots = on_device.slot_parameters(
            self.operations, _integers(chosen, len(self.operations)), magnitude, size
        )  # (B, R, SLOT)
        parts = (
            super()._parameters(weak, size),
            on_device.cutout_parameters(side.long(), row, column),
            slots.flatten(1),
        )
        return torch.cat(parts, dim=1)

    def _on_device(self, images: Tensor, parameters: Tensor) -> Tensor:
        shift, normal, square, slots = parameters.split_with_sizes(
            (3, 6, 4, self.num_ops * on_device.SLOT), dim=1
        )
        images = on_device.shifted(images, shift, self.padding).to(torch.float32)
        if self.num_ops:
            slots = slots.view(-1, self.num_ops, on_device.SLOT)
            images = on_device.randaugment(images, slots)
        images = on_device.normalise(images, normal)
        return on_device.cutout(images, square) if self.max_cutout else images

    def _randaugment(self, images: Tensor, chosen: Tensor, magnitude: Tensor) -> Tensor:
        """Apply operations number `chosen` at `magnitude` in [0, 1), both (B, num_ops)."""
        # Images stay sorted by their last operation, which saves copying each group back to its
        # rows: image i is at place[i].
        place = torch.arange(len(images), device=images.device)
        ranges = [RANDAUGMENT[name][1:] for name in self.operations]
        spans = magnitude.new_tensor([(low, high - low) for low, high in ranges])
        low, span = spans[chosen].unbind(-1)
        amounts = low + span * magnitude  # (B, num_ops)
        for operation, amount in zip(chosen.unbind(1), amounts.unbind(1), strict=True):
            counts = torch.bincount(operation, minlength=len(self.operations)).tolist()
            order = operation.argsort()
            rows = place[order].split_with_sizes(counts)
            parts = [
                RANDAUGMENT[name][0](images.index_select(0, part), strength).floor_()
                for name, part, strength in zip(
                    self.operations, rows, amount[order].split_with_sizes(counts), strict=True
                )
                if len(part)
            ]
            images = torch.cat(parts)
            place[order] = torch.arange(len(images), device=images.device)
        return images.index_select(0, place)

    def _cutout(self, images: Tensor, square: Tensor) -> Tensor:
        """Cover a square given by uniforms (B, 3) for side, row and column."""
        if self.max_cutout == 0:
            return images
        side = 1 + _integers(square[:, 0], self.max_cutout)
        row, column = _integers(square[:, 1:], images.shape[-1]).unbind(1)
        return ops.cutout_(images, side, row, column)


_ORDERS = tuple(itertools.permutations(range(3)))  # of brightness, contrast, saturation


@dataclass(frozen=True)
class MoCoView(PlainView):
    """Random resized crop, colour jitter, grey, blur, flip.

    Chen et al. 2020 (MoCo v2), section 3, after SimCLR. Equal to torchvision's per-image pipeline
    on float images: the jitter's four steps come in a random order per image.

    Departures: PIL rounds levels between the steps, this view does not; the blur is a Gaussian cut
    off at three sigma, where PIL repeats box filters.

    Args:
        mean: as in `PlainView`.
        std: as in `PlainView`.
        min_scale: smallest share of the image's area that a crop covers.
        max_scale: largest share of the image's area that a crop covers.
        side: s, side of the view in pixels; None makes it as large as the image.
        ratio: range of the crop's width / height, log-uniform.
        jitter: strengths of brightness, contrast, saturation (factor in 1 ± strength) and hue
            (shift in ± strength, share of the colour circle).
        jitter_prob: probability of colour jitter.
        gray_prob: probability of a grey image.
        blur_prob: probability of blur.
        blur_sigma: range of the blur's sigma in pixels; the kernel reaches to 3 times the largest.
        flip: probability of a mirror image.
        rotate_degrees: largest rotation before the crop; the angle is uniform in ± this value and
            the area outside the image is black.
        shear: largest shear along x before the crop, in degrees; uniform in ± this value.

    Raises:
        ValueError: a setting is out of range.
    """

    min_scale: float = 0.2
    max_scale: float = 1.0
    side: int | None = None
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1)
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: Sequence[float] = (0.1, 2.0)
    flip: float = 0.5
    rotate_degrees: float = 0.0
    shear: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.min_scale <= 1, "min_scale", self.min_scale, "an area share in (0, 1]")
        rule = f"an area share from min_scale, {self.min_scale}, to 1"
        _require(self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, rule)
        _require(self.side is None or self.side > 0, "side", self.side, "1 pixel or more")
        for name, pair in (("ratio", self.ratio), ("blur_sigma", self.blur_sigma)):
            _require(len(pair) == 2 and 0 < pair[0] <= pair[1], name, pair, "(low, high), above 0")
        _require(
            len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            "jitter",
            self.jitter,
            "four strengths (brightness, contrast, saturation, hue), 0 or more, hue at most 0.5",
        )
        for name in ("jitter_prob", "gray_prob", "blur_prob", "flip"):
            _require_share(name, getattr(self, name))
        _require(0 <= self.rotate_degrees <= 180, "rotate_degrees", self.rotate_degrees, "0 to 180")
        _require(0 <= self.shear < 90, "shear", self.shear, "an angle in degrees, 0 to below 90")

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""
        return 2 * ops.CROP_ATTEMPTS + 2 + 13

    def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return _in_parts(self._part, images, uniforms)

    def _part(self, images: Tensor, uniforms: Tensor) -> Tensor:
        # Position of the hue step among the four steps; 4 means no jitter. Images are sorted by
        # it, so that each step works on a slice.
        when, gate = uniforms[:, 0], uniforms[:, 1]
        place = torch.where(gate < self.jitter_prob, _integers(when, 4), 4)
        order = place.argsort()
        ends = torch.bincount(place, minlength=5).cumsum(0).tolist()
        steps, switch, warp, boxes = uniforms[order].split_with_sizes(
            (7, 4, 2, 2 * ops.CROP_ATTEMPTS + 2), dim=1
        )
        probabilities = switch.new_tensor((self.flip, self.gray_prob, self.blur_prob))
        flip, gray, blur = (switch[:, :3] < probabilities).unbind(1)
        box = self._boxes(boxes, images.shape[-1])
        images = images.index_select(0, order).to(torch.float32)
        views = ops.crop_resize(images, box, flip, self._warp_matrix(warp), self.side)
        self._jitter_(views, steps[:, 2:], ends)
        rows = gray.nonzero().squeeze(1)
        views.index_copy_(0, rows, ops.grayscale(views.index_select(0, rows)))
        rows = blur.nonzero().squeeze(1)
        low, high = self.blur_sigma
        radius = math.ceil(3 * high)  # the weight beyond three sigma is 0.3 %
        sigma = low + (high - low) * switch[rows, 3]
        blurred = ops.gaussian_blur(views.index_select(0, rows), sigma, radius)
        views.index_copy_(0, rows, blurred)
        return self._normalise(views.index_select(0, order.argsort()))

    def _parameters(self, uniforms: Tensor, size: int) -> Tensor:
        steps, switch, warp, boxes = uniforms.split_with_sizes(
            (7, 4, 2, 2 * ops.CROP_ATTEMPTS + 2), dim=1
        )
        when, gate, *_ = steps.unbind(1)
        flip, gray, blur, sharpness = switch.unbind(1)
        factors, shift, kinds = self._jitter(steps[:, 2:])
        low, high = self.blur_sigma
        return on_device.moco_parameters(
            place=torch.where(gate < self.jitter_prob, _integers(when, 4), 4),
            factor=factors.gather(1, kinds),
            kind=kinds,
            shift=shift,
            box=self._boxes(boxes, size),
            flip=flip < self.flip,
            gray=gray < self.gray_prob,
            sigma=torch.where(blur < self.blur_prob, low + (high - low) * sharpness, 0.0),
            normal=on_device.normalisation(self.mean, self.std),
            warp=self._warp_matrix(warp),
            size=size,
            radius=on_device.blur_radius(high, self.side or size),
        )

    def _on_device(self, images: Tensor, parameters: Tensor) -> Tensor:
        warped = self.rotate_degrees > 0 or self.shear > 0
        return on_device.moco(images, parameters, warped=warped, side=self.side)

    def _boxes(self, uniforms: Tensor, size: int) -> Tensor:
        return ops.random_boxes(uniforms, size, self.min_scale, self.ratio, self.max_scale)

    def _warp_matrix(self, uniforms: Tensor) -> Tensor | None:
        if self.rotate_degrees == 0 and self.shear == 0:
            return None
        angle, shear = (2 * uniforms - 1).unbind(1)
        return ops.rotation_matrix(angle * self.rotate_degrees, shear * self.shear)

    def _jitter_(self, images: Tensor, uniforms: Tensor, ends: list[int]) -> None:
        """Jitter sorted images in place; step p adjusts the hue of images ends[p-1]:ends[p].

        Uniforms (B, 5): brightness, contrast, saturation, hue, order of the first three.
        """
        factors, shift, kinds = self._jitter(uniforms)
        jittered = slice(0, ends[3])
        start = 0
        for step, end in enumerate(ends[:4]):
            ops.adjust_hue_(images[start:end], shift[start:end])
            start = end
            if step < 3:
                kind = kinds[jittered, step]
                factor = factors[jittered].gather(1, kind[:, None]).squeeze(1)
                ops.adjust_light_(images[jittered], factor, kind)

    def _jitter(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors (B, 3), shift (B,) of the hue, and the order (B, 3) of the factors."""
        strength = uniforms.new_tensor(tuple(self.jitter))
        low = torch.clamp(1 - strength[:3], min=0)
        factors = low + (1 + strength[:3] - low) * uniforms[:, :3]  # (B, 3)
        shift = strength[3] * (2 * uniforms[:, 3] - 1)
        orders = torch.tensor(_ORDERS, device=uniforms.device)
        kinds = orders[_integers(uniforms[:, 4], len(_ORDERS))]  # (B, 3)
        return factors, shift, kinds


@dataclass(frozen=True)
class PatchView(MoCoView):
    """Many crops of each image, each a view as `MoCoView` makes it.

    Tong et al. 2023 (EMP-SSL), Section 3, which crops a quarter of the area. Here a crop may keep
    its native size, so that it costs the network less than an image does.

    Args:
        mean: as in `PlainView`.
        std: as in `PlainView`.
        num_patches: n, number of crops per image.

    Raises:
        ValueError: a setting is out of range.
    """

    num_patches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.num_patches >= 2, "num_patches", self.num_patches, "2 or more")

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that the views of one image need."""
        return self.num_patches * super().num_uniforms

    def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
        patches = super()._view(self._repeated(images), self._per_patch(uniforms))  # (B n, 3, s, s)
        return patches.view(-1, self.num_patches, *patches.shape[1:])

    def _parameters(self, uniforms: Tensor, size: int) -> Tensor:
        return super()._parameters(self._per_patch(uniforms), size)  # (B n, P)

    def _on_device(self, images: Tensor, parameters: Tensor) -> Tensor:
        patches = super()._on_device(self._repeated(images), parameters)
        return patches.view(-1, self.num_patches, *patches.shape[1:])

    def _repeated(self, images: Tensor) -> Tensor:
        return images.repeat_interleave(self.num_patches, dim=0)  # (B n, 3, S, S)

    def _per_patch(self, uniforms: Tensor) -> Tensor:
        return uniforms.reshape(len(uniforms) * self.num_patches, -1)  # (B n, U / n)
