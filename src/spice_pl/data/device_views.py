"""Views on a GPU: few kernels for a whole batch, and nothing that the processor waits for.

On a processor `augment.py` sorts the images, so that each operation works only on the images that
drew it. On a GPU that costs hundreds of small kernels. Here the processor turns the uniform numbers
into parameters, one row per image. The device applies every operation to all images. An operation
that an image did not draw has the parameters that change nothing. Results are those of
`augment.py` up to rounding.

Shape letters: B images, S side in pixels, s side of a view, R slots of RandAugment, T taps of the
blur kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spice_pl.data import operations as ops

GRAY = (0.2989, 0.587, 0.114)  # as in `operations.luminance`


def normalisation(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return scale and offset that normalise levels in [0, 255], (6,)."""
    scale = [1 / (255 * each) for each in std]
    return torch.tensor([*scale, *(-m / s for m, s in zip(mean, std, strict=True))])


def normalise(images: Tensor, parameters: Tensor) -> Tensor:
    """Apply `normalisation` (B, 6) or (1, 6) to levels (B, 3, S, S)."""
    scale, offset = torch.split(parameters[:, :, None, None], 3, dim=1)  # (B, 3, 1, 1) each
    return torch.addcmul(offset, images.to(torch.float32), scale)


# The weak view.


def shift_parameters(flip: Tensor, top: Tensor, left: Tensor, size: int, padding: int) -> Tensor:
    """Return first column, step between columns and first row of each crop, (B, 3)."""
    # A flip comes before the crop: column j of the flipped image is column size - 1 - j.
    last = size - 1 + 2 * padding
    start = torch.where(flip, last - left, left)
    return torch.stack((start, 1 - 2 * flip.long(), top), dim=1).float()


def shifted(images: Tensor, parameters: Tensor, padding: int) -> Tensor:
    """Flip and crop after padding with black, by `shift_parameters`; uint8 as the images."""
    size = images.shape[-1]
    start, step, top = parameters.long()[:, :, None].unbind(1)  # (B, 1) each
    pixel = torch.arange(size, device=images.device)
    column = torch.addcmul(start, step, pixel)  # (B, S)
    row = (top + pixel).mul_(size + 2 * padding)  # (B, S)
    place = row[:, :, None] + column[:, None]  # (B, S, S)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    place = place.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.gather(2, place).view_as(images)


# Colour. A step is image -> matrix @ image + row @ mean of the image, per pixel.


def light_parameters(factor: Tensor, kind: Tensor, active: Tensor) -> Tensor:
    """Return matrix and row of a step of `operations.adjust_light_`.

    Args:
        factor: (...), strength.
        kind: (...), 0 for brightness, 1 for contrast, 2 for saturation.
        active: (...), bool; where it is false, the step changes nothing.

    Returns:
        (..., 12): a matrix of nine numbers, row by row, and a row of three.
    """
    gray = torch.tensor(GRAY)
    factor = torch.where(active, factor, 1.0)
    rest = 1 - factor
    same = factor[..., None, None] * torch.eye(3)
    blend = (rest * (kind == 2))[..., None, None] * gray.expand(3, 3)
    row = (rest * (kind == 1))[..., None] * gray
    return torch.cat(((same + blend).flatten(-2), row), dim=-1)


def adjust_light(images: Tensor, parameters: Tensor) -> Tensor:
    """Apply `light_parameters` (B, 12) to (B, 3, S, S); levels are not clipped."""
    flat = images.flatten(2)
    matrix, row = parameters.split_with_sizes((9, 3), dim=1)
    offset = torch.bmm(row[:, None], flat.mean(dim=2, keepdim=True))  # (B, 1, 1)
    return torch.baddbmm(offset, matrix.view(-1, 3, 3), flat).view_as(images)


def shift_hue(images: Tensor, sectors: Tensor) -> Tensor:
    """Shift the hue of HSV by a number (B,) of sixths of the colour circle."""
    high, brightest = images.max(dim=1, keepdim=True)  # (B, 1, S, S) each
    chroma = high - images.amin(dim=1, keepdim=True)
    # (green - blue, blue - red, red - green): the numerator of the hue where red, green or blue is
    # the highest.
    numerator = images.roll(-1, 1).sub_(images.roll(-2, 1)).gather(1, brightest)
    hue = numerator.div_(chroma.clamp_min(1e-6)).add_(brightest, alpha=2)
    first = torch.arange(5, -1, -2, device=images.device)[:, None, None]  # 5, 3, 1
    sector = (hue + (sectors[:, None, None, None] + first)).remainder_(6)  # (B, 3, S, S)
    share = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return torch.addcmul(high, chroma, share, value=-1)


# MoCo's view.


def moco_parameters(
    *,
    place: Tensor,
    factor: Tensor,
    kind: Tensor,
    shift: Tensor,
    box: Tensor,
    flip: Tensor,
    gray: Tensor,
    sigma: Tensor,
    normal: Tensor,
    warp: Tensor | None,
    size: int,
    radius: int,
) -> Tensor:
    """Return what `moco` needs for each image, (B, P).

    Args:
        place: (B,), position of the hue among the four steps of the jitter; 4 means no jitter.
        factor: (B, 3), strength of the three other steps in the order in which they come.
        kind: (B, 3), their kinds.
        shift: (B,), of the hue, as a share of the colour circle.
        box: (B, 4), integer pixels: top, left, height, width.
        flip: (B,) bool.
        gray: (B,) bool.
        sigma: (B,), of the blur; 0 for none.
        normal: (6,), `normalisation`.
        warp: (B, 2, 3), warp of the image before the crop.
        size: S.
        radius: reach of the blur in pixels.
    """
    step, jittered = torch.arange(3), (place < 4)[:, None]
    before = jittered & (step < place[:, None])  # (B, 3)
    after = jittered & (step >= place[:, None])
    light = torch.cat([light_parameters(factor, kind, each) for each in (before, after)], dim=1)
    sectors = torch.where(place < 4, 6 * shift, 0.0)
    start, side = torch.split(box, 2, dim=1)  # (B, 2) each, rows and columns
    sign = torch.stack((torch.ones_like(shift), 1 - 2 * flip.float()), dim=1)
    unit = 2 / size  # grid_sample's unit is half the image
    crop = torch.cat(
        (
            side * sign * unit,
            (side - 1) * (unit / 2),
            (side - 1) * unit,
            (start - (size - 1) / 2) * unit,
        ),
        dim=1,
    )  # (B, 8)
    mixed = torch.where(gray[:, None, None], torch.tensor(GRAY).expand(3, 3), torch.eye(3))
    colour = (mixed * normal[:3, None]).flatten(1)  # (B, 9)
    distance = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None]) ** 2)  # (B, T)
    taps = weight / weight.sum(1, keepdim=True)
    parts = [light.flatten(1), sectors[:, None], crop, colour, normal[3:].expand(len(box), 3), taps]
    if warp is not None:
        parts.append((warp * torch.tensor((1, 1, unit))).flatten(1))
    return torch.cat(parts, dim=1)


def moco(images: Tensor, parameters: Tensor, *, warped: bool, side: int | None = None) -> Tensor:
    """Make MoCo's view of uint8 images (B, 3, S, S) by `moco_parameters`; normalised.

    Args:
        images: (B, 3, S, S) uint8.
        parameters: (B, P), `moco_parameters`.
        warped: whether the parameters hold a warp.
        side: s, side of the views in pixels; S if None.

    Returns:
        (B, 3, s, s).
    """
    light, sectors, crop, colour, offset, taps, *warp = parameters.split_with_sizes(
        (72, 1, 8, 9, 3, parameters.shape[1] - 93 - 6 * warped, *([6] if warped else [])), dim=1
    )
    side = side or images.shape[-1]
    views = _crop_resize(images.to(torch.float32), crop, warp[0] if warp else None, side)
    steps = torch.split(light, 12, dim=1)
    for step in steps[:3]:
        views = adjust_light(views, step).clamp_(0, 255)
    views = shift_hue(views, sectors.squeeze(1))
    for step in steps[3:]:
        views = adjust_light(views, step).clamp_(0, 255)
    # Grey and the normalisation are one linear map; it may come before the blur, whose weights
    # sum to one.
    mixed = torch.baddbmm(offset[:, :, None], colour.view(-1, 3, 3), views.flatten(2))
    return _blur(mixed.view_as(views), taps)


def _crop_resize(images: Tensor, crop: Tensor, warp: Tensor | None, side: int) -> Tensor:
    width, middle, last, start = crop.view(-1, 4, 2, 1).unbind(1)  # (B, 2, 1) each
    centre = (torch.arange(side, device=images.device) - (side - 1) / 2) / side  # (s,)
    inside = torch.addcmul(middle, centre, width).clamp_min_(0)  # (B, 2, s)
    y, x = torch.minimum(inside, last).add_(start).unbind(1)  # (B, s) each
    if warp is None:
        both = (x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side))
        grid = torch.stack(both, dim=-1)  # (B, s, s, 2)
    else:
        a, b, c = torch.split(warp.view(-1, 2, 3), 1, dim=2)  # (B, 2, 1) each
        across, down = a * x[:, None], torch.addcmul(c, b, y[:, None])  # (B, 2, s) each
        grid = (across[:, :, None] + down[..., None]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blur(images: Tensor, taps: Tensor) -> Tensor:
    """Blur each image with its own taps (B, T), reflected at the borders."""
    num_images, channels, size, _ = images.shape
    radius, groups = taps.shape[1] // 2, num_images * channels
    weight = taps[:, None].expand(-1, channels, -1).reshape(groups, 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect").view(1, groups, *[size + 2 * radius] * 2)
    across = F.conv2d(padded, weight, groups=groups)
    return F.conv2d(across, weight.mT, groups=groups).view_as(images)


# RandAugment.

SLOT = 6 + 12 + 5  # parameters of a slot


def slot_parameters(names: Sequence[str], chosen: Tensor, magnitude: Tensor, size: int) -> Tensor:
    """Return what `slot` needs, for every image and slot, (B, R, SLOT).

    Args:
        names: names of the operations to draw from, of `operations.RANDAUGMENT`.
        chosen: (B, R), positions in `names`.
        magnitude: (B, R) in [0, 1).
        size: S.
    """
    low, high = (
        torch.tensor([ops.RANDAUGMENT[name][place] for name in names])[chosen] for place in (1, 2)
    )
    amount = low + (high - low) * magnitude  # (B, R)

    def draws(name: str) -> Tensor:
        found = [place for place, each in enumerate(names) if each == name]
        return torch.isin(chosen, torch.tensor(found, dtype=chosen.dtype))

    def where(name: str, value: Tensor | float, otherwise: float) -> Tensor:
        return torch.where(draws(name), value, otherwise)

    angle = torch.deg2rad(where("Rotate", amount, 0.0))
    cos, sin = angle.cos(), angle.sin()
    across, down = where("ShearX", amount, 0.0), where("ShearY", amount, 0.0)
    right = where("TranslateX", amount, 0.0) * size
    below = where("TranslateY", amount, 0.0) * size
    unit = 2 / size  # grid_sample's unit is half the image
    matrix = (
        *(cos * unit, (across - sin) * unit, (across * (size / 2) - right) * unit),
        *((sin + down) * unit, cos * unit, (down * (size / 2) - below) * unit),
    )
    kind = 2 * draws("Color").long() + draws("Contrast").long()  # else brightness
    coloured = draws("Color") | draws("Contrast") | draws("Brightness")
    others = (
        where("Sharpness", amount, 1.0),
        where("AutoContrast", 1.0, 0.0),
        where("Equalize", 1.0, 0.0),
        where("Solarize", amount, 256.0),
        torch.exp2(8 - where("Posterize", amount, 8.0).floor()),  # step between levels
    )
    light = light_parameters(amount, kind, coloured)
    return torch.cat((torch.stack(matrix, -1), light, torch.stack(others, -1)), dim=-1)


def randaugment(images: Tensor, parameters: Tensor) -> Tensor:
    """Apply R slots of operations, `slot_parameters` (B, R, SLOT), to levels (B, 3, S, S)."""
    size, level = images.shape[-1], torch.arange(256, device=images.device)
    levels = level.to(torch.float32)
    axis = torch.arange(size, device=images.device) - (size - 1) / 2
    smooth = images.new_ones(images.shape[1], 1, 3, 3)
    smooth[:, :, 1, 1] = 5
    threshold, step = parameters[..., 21:23, None].unbind(2)  # (B, R, 1) each
    solarized = torch.where(levels >= threshold, 255 - levels, levels)  # (B, R, 256)
    changed = torch.floor(solarized / step).mul_(step).sub_(levels)  # added to each level
    for slot, change in zip(parameters.unbind(1), changed.unbind(1), strict=True):
        matrix, light, sharpness, auto, equal, _ = slot.split_with_sizes((6, 12, 1, 1, 1, 2), dim=1)
        images = adjust_light(_affine(images, matrix, axis), light)
        images = _sharpen(images, sharpness[..., None, None], smooth)
        rounded = images.flatten(2).long()  # (B, 3, S·S)
        table = _table(rounded, auto[..., None] > 0, equal[..., None] > 0, level)
        images = table.add_(change[:, None]).gather(2, rounded).floor_().view_as(images)
    return images


def _affine(images: Tensor, matrix: Tensor, axis: Tensor) -> Tensor:
    a, b, c = torch.split(matrix.view(-1, 2, 3), 1, dim=2)  # (B, 2, 1) each
    across, down = torch.addcmul(c, a, axis), b * axis  # (B, 2, S) each
    grid = (across[:, :, None] + down[..., None]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _sharpen(images: Tensor, factor: Tensor, smooth: Tensor) -> Tensor:
    if images.shape[-1] < 3:
        return images
    smoothed = F.conv2d(images, smooth, groups=images.shape[1]).div_(13).round_()
    inner = images[..., 1:-1, 1:-1]
    inner.copy_(torch.lerp(smoothed, inner, factor).clamp_(0, 255))
    return images


def _table(rounded: Tensor, auto: Tensor, equal: Tensor, level: Tensor) -> Tensor:
    """Return the level that each level becomes by autocontrast or equalisation, (B, 3, 256)."""
    low, high = rounded.amin(dim=2, keepdim=True), rounded.amax(dim=2, keepdim=True)
    histogram = rounded.new_zeros(*rounded.shape[:2], 256)
    histogram.scatter_add_(2, rounded, rounded.new_ones(1).expand_as(rounded))
    step = rounded.shape[2] - histogram.gather(2, high)
    step = torch.div(step, 255, rounding_mode="floor")  # (B, 3, 1)
    below = histogram.cumsum(2) - histogram
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)  # (B, 3, 256)
    span = high - low
    stretched = (level - low) / (span * (1 / 255)).clamp_min(1e-6)
    table = torch.where(auto & (span > 0), stretched, level.to(stretched.dtype))
    return torch.where(equal & (step > 0), equalized.to(table.dtype), table)


# Cutout.


def cutout_parameters(side: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the first and the end row and column of each square, (B, 4)."""
    first = torch.stack((row, column), dim=1) - (side // 2)[:, None]  # (B, 2)
    return torch.cat((first, first + side[:, None]), dim=1).float()


def cutout(images: Tensor, parameters: Tensor) -> Tensor:
    """Set a square of each image to 0, by `cutout_parameters`."""
    pixel = torch.arange(images.shape[-1], device=images.device)
    first, end = torch.split(parameters[:, :, None], 2, dim=1)  # (B, 2, 1) each
    row, column = ((pixel >= first) & (pixel < end)).unbind(1)  # (B, S) each
    return images.masked_fill(row[:, None, :, None] & column[:, None, None], 0)


def blur_radius(largest_sigma: float, size: int) -> int:
    """Return the reach of the blur: three sigma, at most what can be reflected."""
    return min(math.ceil(3 * largest_sigma), size - 1)
