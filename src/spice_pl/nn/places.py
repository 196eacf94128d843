"""The last feature map of a backbone, from which its features are pooled.

Shapes: B images, D features, S pixels a side, h x w positions of the feature map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SIDE = 7  # positions along a side of a feature map; coarser maps are refined by shifts


@torch.inference_mode()
def feature_map(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Return the last feature map of a backbone, from which its features are pooled.

    It is the last output of any module of the network that has D channels and more than one
    position. There is none if the network ends in tokens, such as a vision transformer, or flattens
    its feature map into more channels, such as VGG.

    Args:
        backbone: network (B, 3, S, S) -> (B, D) with `num_features`, in eval mode, from any
            library.
        images: (B, 3, S, S), normalised as the backbone expects.

    Returns:
        Feature map (B, D, h, w), float32, or None.
    """
    width = int(backbone.num_features)  # type: ignore[arg-type]
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if output.ndim == 3:  # tokens: earlier outputs are not the last feature map
            found.clear()
        elif output.ndim == 4 and output[0].numel() > width in (output.shape[1], output.shape[3]):
            found[:] = [output]  # not a copy, since a ReLU may change it in place

    handles = [module.register_forward_hook(keep) for module in backbone.modules()]
    try:
        backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    last = found[0].float()
    return last if last.shape[1] == width else last.permute(0, 3, 1, 2)  # Swin: channels last


@torch.inference_mode()
def fine_feature_map(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Return `feature_map` with at least 7 x 7 positions, refined by shifted images if needed.

    Long et al. 2015 (FCN), Section 3.2, "shift and stitch": images that are shifted by fractions of
    the network's stride give the positions in between. Shifted images are filled up by repeating
    the border.

    Args:
        backbone: as in `feature_map`.
        images: (B, 3, S, S), normalised as the backbone expects.

    Returns:
        Feature map (B, D, h, w), or None if `feature_map` gives None.
    """
    coarse = feature_map(backbone, images)
    if coarse is None or (times := -(-SMALLEST_SIDE // min(coarse.shape[2:]))) == 1:
        return coarse
    (height, width), side = coarse.shape[2:], images.shape[-1]
    stride = side / min(height, width)  # pixels
    shifts = [round((each - (times - 1) / 2) * stride / times) for each in range(times)]
    most = -min(shifts)
    padded = F.pad(images, [most] * 4, mode="replicate")
    fine = coarse.new_empty(*coarse.shape[:2], height * times, width * times)
    for row, down in enumerate(shifts):
        for column, right in enumerate(shifts):
            top, left = most + down, most + right
            moved = feature_map(backbone, padded[:, :, top : top + side, left : left + side])
            assert moved is not None  # noqa: S101 - it was there a moment ago
            fine[:, :, row::times, column::times] = moved
    return fine
