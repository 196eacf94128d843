"""Views: augmentations of a batch as pure functions of its images and of random numbers.

A view maps uint8 images and uniform numbers to normalised float images and has no state:
``view(images, keyed_uniform(seed, epoch, index, stream, view.num_uniforms))``. Each image has its
own parameters, which depend only on its own row of numbers.

Shape letters: B images, S side in pixels, U uniform numbers per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spice_pl.data import device_views as on_device
from spice_pl.data import operations as ops
from spice_pl.functional.device import to_device

RANDAUGMENT = ops.RANDAUGMENT
ALL_14 = tuple(RANDAUGMENT)


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Check an argument of a view.

    Raises:
        ValueError: it does not fit.
    """
    if not holds:
        raise ValueError(f"{name} {value} does not fit: it must be {rule}")


def require_share(name: str, value: float) -> None:
    """Check a probability, as `require`."""
    require(0 <= value <= 1, name, value, "a probability between 0 and 1")


def integers(uniform: Tensor, count: int) -> Tensor:
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
        require(len(self.mean) == 3, "mean", self.mean, "three numbers, one per channel")
        positive = len(self.std) == 3 and min(self.std) > 0
        require(positive, "std", self.std, "three positive numbers, one per channel")

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""
        return 0

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Make one view of each image.

        Args:
            images: (B, 3, S, S) uint8; not modified.
            uniforms: (B, num_uniforms) in [0, 1), on the processor, where the parameters of a view
                are drawn; a view that has only `_view` takes them on either device. Ignored if
                num_uniforms is 0.

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
        require(self.padding >= 0, "padding", self.padding, "0 pixels or more")
        require_share("flip", self.flip)

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
        top, left = integers(uniforms[:, 1:3], 2 * self.padding + 1).unbind(1)
        flip = uniforms[:, 0] < self.flip
        return on_device.shift_parameters(flip, top, left, size, self.padding)

    def _shift_flip(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Flip and crop by uniforms (B, 3) for flip, top and left. Returns uint8."""
        images = ops.flip(images, uniforms[:, 0] < self.flip)
        if self.padding == 0:
            return images
        top, left = integers(uniforms[:, 1:], 2 * self.padding + 1).unbind(1)
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
        require(self.num_ops >= 0, "num_ops", self.num_ops, "0 or more")
        require(self.max_cutout >= 0, "max_cutout", self.max_cutout, "0 pixels or more")
        unknown = [name for name in self.operations if name not in RANDAUGMENT]
        require(not unknown, "operations", unknown, f"names among {', '.join(ALL_14)}")
        require(len(self.operations) > 0, "operations", [], "at least one name; or set num_ops 0")

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers that one view of one image needs."""
        return 3 + 3 + 2 * self.num_ops

    def _view(self, images: Tensor, uniforms: Tensor) -> Tensor:
        weak, square, chosen, magnitude = uniforms.split_with_sizes(
            (3, 3, self.num_ops, self.num_ops), dim=1
        )
        images = self._shift_flip(images, weak)
        images = self._randaugment(images, integers(chosen, len(self.operations)), magnitude)
        return self._cutout(self._normalise(images.to(torch.float32)), square)

    def _parameters(self, uniforms: Tensor, size: int) -> Tensor:
        weak, square, chosen, magnitude = uniforms.split_with_sizes(
            (3, 3, self.num_ops, self.num_ops), dim=1
        )
        side = 1 + integers(square[:, 0], self.max_cutout) if self.max_cutout else square[:, 0] * 0
        row, column = integers(square[:, 1:], size).unbind(1)
        slots = on_device.slot_parameters(
            self.operations, integers(chosen, len(self.operations)), magnitude, size
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
        """Apply operations number `chosen` at `magnitude` in [0, 1), both (B, num_ops).

        Images and result are uint8: between two operations levels are integers. The images stay
        sorted by their last operation, which saves copying each group back to its rows.
        """
        # Image i is at place[i].
        place, result = torch.arange(len(images), device=images.device), torch.empty_like(images)
        ranges = [RANDAUGMENT[name][1:] for name in self.operations]
        spans = magnitude.new_tensor([(low, high - low) for low, high in ranges])
        low, span = spans[chosen].unbind(-1)
        amounts = low + span * magnitude  # (B, num_ops)
        for operation, amount in zip(chosen.unbind(1), amounts.unbind(1), strict=True):
            counts = torch.bincount(operation, minlength=len(self.operations)).tolist()
            order = operation.argsort()
            groups = (place[order], amount[order], result)
            parts = (each.split_with_sizes(counts) for each in groups)
            for name, rows, strength, sorted_images in zip(self.operations, *parts, strict=True):
                if len(rows):
                    levels = images.index_select(0, rows).to(strength.dtype)
                    changed = RANDAUGMENT[name][0](levels, strength)
                    # Rounded down. Via int16, as the direct way to uint8 takes three times as long.
                    sorted_images.copy_(changed.to(torch.int16))
            images, result = result, images
            place[order] = torch.arange(len(images), device=images.device)
        return torch.index_select(images, 0, place, out=result)

    def _cutout(self, images: Tensor, square: Tensor) -> Tensor:
        """Cover a square given by uniforms (B, 3) for side, row and column."""
        if self.max_cutout == 0:
            return images
        side = 1 + integers(square[:, 0], self.max_cutout)
        row, column = integers(square[:, 1:], images.shape[-1]).unbind(1)
        return ops.cutout_(images, side, row, column)
