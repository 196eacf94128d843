"""Image operations on batches, with one parameter per image.

Images are float32 levels in [0, 255], integers or not, and stay in that range. For one image and
one parameter each operation does the same as the function of that name in
torchvision.transforms.v2.functional; the tests give the tolerance of each. Names that end in an
underscore work in place. Selection is by arithmetic instead of ``torch.where`` for speed: on a CPU
``where`` takes as long as twenty additions.

Shape letters: B images, S side in pixels, T taps on one side of the blur kernel.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_image(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1, 1)  # (B, 1, 1, 1)


# Geometry. Coordinates are pixels from the centre of the image; matrices map output to source.


def _axis(images: Tensor) -> Tensor:
    size = images.shape[-1]
    return torch.arange(size, device=images.device, dtype=torch.float32) - (size - 1) / 2  # (S,)


def _sample(images: Tensor, matrix: Tensor, x: Tensor, y: Tensor, mode: str) -> Tensor:
    """Sample images at matrix (B, 2, 3) times (x, y, 1); outside the image is black.

    Args:
        images: (B, 3, S, S).
        matrix: (B, 2, 3), output to source.
        x: (B, s) or (1, s), x coordinates, the same in every row.
        y: (B, s) or (1, s), y coordinates, the same in every column.
        mode: interpolation, "nearest" or "bilinear".

    Returns:
        (B, 3, s, s).
    """
    matrix = matrix * (2 / images.shape[-1])  # grid_sample's unit is half the image
    across = matrix[:, :, 0:1] * x[:, None] + matrix[:, :, 2:3]  # (B, 2, s)
    down = matrix[:, :, 1:2] * y[:, None]  # (B, 2, s)
    # The planes of x and y are added apart and read as (B, s, s, 2): one loop over contiguous rows.
    grid = (across[:, :, None] + down[..., None]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Warp with inverse matrices (B, 2, 3); nearest neighbour, black outside, as PIL does."""
    axis = _axis(images)[None]
    return _sample(images, matrix, axis, axis, "nearest")


def rotation_matrix(degrees: Tensor, shear_degrees: Tensor) -> Tensor:
    """Return the inverse of RandomAffine's matrix: shear along x, then rotation. (B, 2, 3)."""
    angle, shear = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear_degrees))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = (cos - sin * shear, cos * shear + sin, zero, -sin, cos, zero)
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def _shift_matrix(images: Tensor, position: int, magnitude: Tensor) -> Tensor:
    """Return the identity with one entry of the row-major 2x3 matrix replaced. (B, 2, 3)."""
    matrix = images.new_tensor((1, 0, 0, 0, 1, 0)).repeat(len(images), 1)
    matrix[:, position] = magnitude
    return matrix.view(-1, 2, 3)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre."""
    return affine(images, rotation_matrix(-degrees, torch.zeros_like(degrees)))


def shear_x(images: Tensor, slope: Tensor) -> Tensor:
    """Shift each row by slope times its distance from the top edge."""
    matrix = _shift_matrix(images, 1, slope)
    matrix[:, 0, 2] = slope * (images.shape[-1] / 2)
    return affine(images, matrix)


def shear_y(images: Tensor, slope: Tensor) -> Tensor:
    """Shift each column by slope times its distance from the left edge."""
    matrix = _shift_matrix(images, 3, slope)
    matrix[:, 1, 2] = slope * (images.shape[-1] / 2)
    return affine(images, matrix)


def translate_x(images: Tensor, fraction: Tensor) -> Tensor:
    """Shift right by a fraction of the width."""
    return affine(images, _shift_matrix(images, 2, -fraction * images.shape[-1]))


def translate_y(images: Tensor, fraction: Tensor) -> Tensor:
    """Shift down by a fraction of the height."""
    return affine(images, _shift_matrix(images, 5, -fraction * images.shape[-1]))


CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop


def random_boxes(
    uniforms: Tensor, size: int, min_scale: float, ratio: Sequence[float], max_scale: float = 1.0
) -> Tensor:
    """Choose boxes as torchvision's RandomResizedCrop.get_params does.

    Args:
        uniforms: (B, 22) in [0, 1): ten areas, ten ratios, two positions.
        size: side S of the image in pixels.
        min_scale: smallest area, as a share of the image's.
        ratio: range of width / height, log-uniform.
        max_scale: largest area, as a share of the image's.

    Returns:
        (B, 4) float32, integer pixels: top, left, height, width.
    """
    areas, ratios, position = uniforms.split_with_sizes((CROP_ATTEMPTS, CROP_ATTEMPTS, 2), dim=1)
    root_area = size * (min_scale + (max_scale - min_scale) * areas).sqrt()
    low, high = (math.log(bound) for bound in ratio)
    root_ratio = torch.exp(0.5 * (low + (high - low) * ratios))
    sides = torch.stack((root_area / root_ratio, root_area * root_ratio), dim=2).round_()
    fits = ((sides > 0) & (sides <= size)).all(dim=2)  # (B, 10)
    first = fits.to(torch.uint8).argmax(dim=1)[:, None, None].expand(-1, 1, 2)
    # If no attempt fits: the largest centred box of an allowed ratio.
    nearest = min(max(1.0, ratio[0]), ratio[1])
    largest = (round(size * min(1.0, 1 / nearest)), round(size * min(1.0, nearest)))
    fitting = fits.any(dim=1, keepdim=True)
    side = torch.where(fitting, sides.gather(1, first)[:, 0], sides.new_tensor(largest))  # (B, 2)
    free = size - side
    start = torch.where(fitting, (position * (free + 1)).floor().minimum(free), (free / 2).floor())
    return torch.cat((start, side), dim=1)


def crop_resize(
    images: Tensor,
    box: Tensor,
    flip: Tensor | None = None,
    matrix: Tensor | None = None,
    side: int | None = None,
) -> Tensor:
    """Crop a box from each image and scale it to a square, bilinear, without antialiasing.

    A box is never larger than the image, so at the size of the image, the default, antialiasing
    would change nothing. It would change little down to half of that size.

    Args:
        images: (B, 3, S, S).
        box: (B, 4), integer pixels: top, left, height, width.
        flip: (B,) bool, whether to mirror the result left to right.
        matrix: (B, 2, 3), warp of the image before the crop, within the same interpolation.
        side: s, side of the result in pixels; S if None.

    Returns:
        (B, 3, s, s).
    """
    size = images.shape[-1]
    side = side or size
    top, left, height, width = box[:, :, None].unbind(1)  # (B, 1) each
    centre = (torch.arange(side, device=images.device) + 0.5) / side  # (s,)
    # Outside the outermost pixel centres of the box its edge is repeated, not its surroundings.
    zero = torch.zeros_like(width)
    x = torch.clamp(centre * width - 0.5, zero, width - 1) + left - (size - 1) / 2  # (B, s)
    y = torch.clamp(centre * height - 0.5, zero, height - 1) + top - (size - 1) / 2  # (B, s)
    if flip is not None:
        x = torch.where(flip[:, None], x.flip(1), x)
    if matrix is None:
        matrix = images.new_tensor(((1, 0, 0), (0, 1, 0))).expand(len(images), 2, 3)
    return _sample(images, matrix, x, y, "bilinear")


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images chosen by mask (B,) left to right."""
    rows = torch.arange(len(images), device=images.device).add_(mask, alpha=len(images))
    return torch.cat((images, images.flip(-1))).index_select(0, rows)  # copies whole images


def shifted_crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad with black and crop to the original size, at offsets (B,) in 0..2*padding."""
    padded = F.pad(images, (padding,) * 4)
    by_image, *strides = padded.stride()
    row = torch.arange(len(images), device=images.device)
    starts = row.mul_(by_image).add_(top, alpha=strides[1]).add_(left).tolist()
    # A window is read in place: indexing by (image, top, left) takes four times as long.
    shape = images.shape[1:]
    return torch.stack([padded.as_strided(shape, strides, start) for start in starts])


# Colour.


def luminance(images: Tensor) -> Tensor:
    """Return the grey level of each pixel, ITU-R 601. (B, 1, S, S)."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(images: Tensor) -> Tensor:
    """Replace all three channels by the luminance."""
    return luminance(images).expand_as(images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from other (factor 0) to images (factor 1), or extrapolate."""
    return torch.lerp(other, images, factor).clamp_(0, 255)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (images * _per_image(factor)).clamp_(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luminance."""
    gray = luminance(images)
    # lerp is vectorised where one of its two ends is a full plane.
    gray.copy_(gray.mean(dim=(1, 2, 3), keepdim=True).expand_as(gray))
    return _blend(images, gray, _per_image(factor))


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(images, luminance(images), _per_image(factor))


def adjust_light_(images: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """Adjust brightness (kind 0), contrast (1) or saturation (2); kind (B,) is per image."""
    rest = 1 - factor
    gray = luminance(images)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    other = gray.mul_(_per_image(rest * (kind == 2))).add_(mean * _per_image(rest * (kind == 1)))
    return images.mul_(_per_image(factor)).add_(other).clamp_(0, 255)


def adjust_hue_(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of HSV by a share of the colour circle, in [-0.5, 0.5]."""
    red, green, blue = images.unbind(1)  # (B, S, S) each
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    below_red, below_green = (high - red).sign_(), (high - green).sign_()  # 0 where highest, else 1
    if_red = green - blue
    if_green = (blue - red).add_(chroma, alpha=2)
    if_blue = (red - green).add_(chroma, alpha=4)
    hue = if_green.addcmul_(below_green, if_blue.sub_(if_green))
    hue = if_red.addcmul_(below_red, hue.sub_(if_red))  # chroma times the sector 0..6
    hue.div_((chroma * 6).clamp_min_(1e-6)).add_(1 + shift.view(-1, 1, 1)).frac_().mul_(6)
    for channel, (base, sign, opposite) in enumerate(((low, 1, 3), (high, -1, 2), (high, -1, 4))):
        share = (hue - opposite).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(base, chroma, share, value=sign, out=images[:, channel])
    return images


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed image (3x3, centre weight 5 of 13, rounded); the border stays."""
    if images.shape[-1] < 3:
        return images.clone()
    # Sums of shifted flat images: loops over whole images are faster than over the rows of a
    # window. Sums that reach over an edge are wrong; those pixels keep the image's levels.
    size, flat = images.shape[-1], images.flatten(1)  # (B, 3·S·S)
    rows = flat[:, : -2 * size] + flat[:, size:-size]
    rows += flat[:, 2 * size :]
    inner = flat[:, size + 1 : -size - 1]
    smooth = rows[:, :-2] + rows[:, 1:-1]
    smooth.add_(rows[:, 2:]).add_(inner, alpha=4).div_(13).round_()
    output = torch.empty_like(images)
    torch.lerp(smooth, inner, factor[:, None], out=output.flatten(1)[:, size + 1 : -size - 1])
    output.clamp_(0, 255)
    for edge in (0, -1):
        output[..., edge, :] = images[..., edge, :]
        output[..., edge] = images[..., edge]
    return output


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels that are at least the threshold."""
    inverted = torch.ge(images, _per_image(threshold), out=torch.empty_like(images))  # 0 or 1
    return torch.sub(255, images, alpha=2).mul_(inverted).add_(images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits of each level; the number of bits is rounded down."""
    step = torch.exp2(8 - _per_image(bits).floor())
    return (images / step).floor_().mul_(step)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the full range; a channel of one level stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    scale = ((high - low) * (1 / 255)).masked_fill_(flat, 1)
    return (images - low.masked_fill(flat, 0)).div_(scale).clamp_(0, 255)


def equalize(images: Tensor) -> Tensor:
    """Equalise the histogram of each channel as PIL does; levels are rounded down first."""
    level = images.flatten(2).long()  # (B, 3, S*S)
    histogram = level.new_zeros(*level.shape[:2], 256, dtype=torch.int32)
    histogram.scatter_add_(2, level, histogram.new_ones(1).expand_as(level))
    count = histogram.cumsum(2)  # (B, 3, 256)
    brightest = histogram.gather(2, level.amax(dim=2, keepdim=True))
    step = torch.div(level.shape[2] - brightest, 255, rounding_mode="floor")  # (B, 3, 1)
    table = (count - histogram + step // 2) // step.clamp(min=1)
    identity = torch.arange(256, device=images.device)
    table = torch.where(step > 0, table.clamp_(0, 255), identity).to(images.dtype)
    return table.gather(2, level).view_as(images)


BLUR_BLOCK = 16  # pixels of the blurred image per matrix product


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur with a Gaussian of sigma (B,) pixels, cut off at radius pixels, reflected at borders.

    One matrix per axis holds kernel and reflection, so per-image kernels are matrix products.
    A radius of S or more cannot be reflected; S - 1 is used instead.
    """
    num_images, channels, size, _ = images.shape
    radius = min(radius, size - 1)
    distance = torch.arange(radius + 1, device=images.device)  # (T,)
    weight = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (B, T)
    weight = weight / (2 * weight.sum(1, keepdim=True) - weight[:, :1])
    position = torch.arange(size, device=images.device)
    offset = torch.arange(-radius, radius + 1, device=images.device)
    source = (position[:, None] + offset).abs()  # (S, 2T-1)
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    band = images.new_zeros(num_images, size, size)
    taps = weight[:, offset.abs()][:, None].expand(-1, size, -1)  # (B, S, 2T-1)
    band.scatter_add_(2, source.expand_as(taps), taps)  # (B, S, S)
    # Outside a diagonal band the matrices are 0, so that 16 pixels of the result need only those
    # within the radius. Small images are one product: cutting them up would save nothing.
    length = size if size <= 3 * BLUR_BLOCK else BLUR_BLOCK
    blocks = [
        (slice(start, start + length), slice(max(start - radius, 0), start + length + radius))
        for start in range(0, size, length)
    ]
    flat = images.reshape(num_images, channels * size, size)
    parts = [torch.bmm(flat[:, :, near], band[:, block, near].mT) for block, near in blocks]
    across = torch.cat(parts, dim=2).view(-1, size, size)  # (3B, S, S)
    stacked = band.repeat_interleave(channels, dim=0)  # (3B, S, S)
    parts = [torch.bmm(stacked[:, block, near], across[:, near]) for block, near in blocks]
    return torch.cat(parts, dim=1).view_as(images)


def cutout_(images: Tensor, side: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Set a square of side (B,) pixels around a centre pixel to 0, clipped at the border."""
    pixel = torch.arange(images.shape[-1], device=images.device)  # (S,)
    start = (torch.stack((row, column), dim=1) - (side // 2)[:, None])[..., None]  # (B, 2, 1)
    hidden = ((pixel >= start) & (pixel < start + side[:, None, None])).to(images.dtype)
    row_hidden, column_hidden = hidden.unbind(1)  # (B, S) each
    kept = 1 - row_hidden[:, :, None] * column_hidden[:, None]  # (B, S, S)
    return images.mul_(kept[:, None])  # masked_fill_ takes four times as long


# (operation, lowest, highest magnitude), Sohn et al. 2020 (FixMatch), Table 12, with the ranges
# of the SPICE authors' code. Symmetric ranges include the random sign.
RANDAUGMENT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "Identity": (lambda images, _: images, 0.0, 0.0),
    "AutoContrast": (lambda images, _: autocontrast(images), 0.0, 0.0),
    "Equalize": (lambda images, _: equalize(images), 0.0, 0.0),
    "Rotate": (rotate, -30.0, 30.0),  # degrees
    "Solarize": (solarize, 0.0, 256.0),  # level from which pixels are inverted
    "Color": (adjust_saturation, 0.05, 0.95),  # weight of the image, the rest is grey
    "Contrast": (adjust_contrast, 0.05, 0.95),
    "Brightness": (adjust_brightness, 0.05, 0.95),
    "Sharpness": (adjust_sharpness, 0.05, 0.95),
    "ShearX": (shear_x, -0.1, 0.1),  # slope
    "ShearY": (shear_y, -0.1, 0.1),
    "TranslateX": (translate_x, -0.1, 0.1),  # share of the side
    "TranslateY": (translate_y, -0.1, 0.1),
    "Posterize": (posterize, 4.0, 8.0),  # bits kept, rounded down: 4, 5, 6 or 7
}
