"""The views of stage 1: random crops with changed colours, one or many per image.

Shape letters: B images, S side in pixels, s side of a view, n patches per image, U uniform numbers
per image.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spice_pl.data import device_views as on_device
from spice_pl.data import operations as ops
from spice_pl.data.augment import PlainView, integers, require, require_share

# 4 MB of float32 stay in a processor's cache. Larger buffers are fetched from the system and
# returned to it in every view.
LEVELS_AT_ONCE = 2**20
_ORDERS = tuple(itertools.permutations(range(3)))  # of brightness, contrast, saturation


def _in_parts(view: Callable[[Tensor, Tensor], Tensor], images: Tensor, uniforms: Tensor) -> Tensor:
    """Make views of at most `LEVELS_AT_ONCE` levels at a time, in equal parts."""
    num_parts = math.ceil(images.numel() / LEVELS_AT_ONCE)
    if num_parts == 1:
        return view(images, uniforms)
    size = math.ceil(len(images) / num_parts)
    first = view(images[:size], uniforms[:size])
    views = first.new_empty(len(images), *first.shape[1:])
    views[:size] = first
    parts = (torch.split(each[size:], size) for each in (images, uniforms, views))
    for part, numbers, result in zip(*parts, strict=True):
        result.copy_(view(part, numbers))
    return views


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
        require(0 < self.min_scale <= 1, "min_scale", self.min_scale, "an area share in (0, 1]")
        rule = f"an area share from min_scale, {self.min_scale}, to 1"
        require(self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, rule)
        require(self.side is None or self.side > 0, "side", self.side, "1 pixel or more")
        for name, pair in (("ratio", self.ratio), ("blur_sigma", self.blur_sigma)):
            require(len(pair) == 2 and 0 < pair[0] <= pair[1], name, pair, "(low, high), above 0")
        require(
            len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            "jitter",
            self.jitter,
            "four strengths (brightness, contrast, saturation, hue), 0 or more, hue at most 0.5",
        )
        for name in ("jitter_prob", "gray_prob", "blur_prob", "flip"):
            require_share(name, getattr(self, name))
        require(0 <= self.rotate_degrees <= 180, "rotate_degrees", self.rotate_degrees, "0 to 180")
        require(0 <= self.shear < 90, "shear", self.shear, "an angle in degrees, 0 to below 90")

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
        place = torch.where(gate < self.jitter_prob, integers(when, 4), 4)
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
            place=torch.where(gate < self.jitter_prob, integers(when, 4), 4),
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
        kinds = orders[integers(uniforms[:, 4], len(_ORDERS))]  # (B, 3)
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
        require(self.num_patches >= 2, "num_patches", self.num_patches, "2 or more")

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
