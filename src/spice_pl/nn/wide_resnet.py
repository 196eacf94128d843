"""Wide ResNets, the backbones of FixMatch and of SPICE's joint training.

Shapes: B images, S pixels a side, D features.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.1  # of LeakyReLU, as in FixMatch
_BN_MOMENTUM = 0.001  # torch's convention: share of the new batch; FixMatch writes 0.999


class WideResNet(nn.Module):
    """Wide ResNet of pre-activation blocks without a classifier.

    Zagoruyko and Komodakis 2016, Table 1, in the variant of FixMatch (Sohn et al. 2020). The
    depth counts the stem, two convolutions per block and one shortcut per group. Group g, counted
    from 0, has 16 · widen_factor · 2^g channels. WRN-28-2 and WRN-28-8 have the default strides;
    WRN-37-2 of SPICE for 96 pixels is
    `WideResNet(depth=37, widen_factor=2, strides=(2, 2, 2, 2))`.

    Args:
        depth: number of convolutions, 1 + groups · (2 · blocks per group + 1).
        widen_factor: number of channels of the first group divided by 16.
        strides: stride of the first block of each group.
        in_channels: number of channels of the images.

    Raises:
        ValueError: the depth is not a whole number of blocks per group.

    Examples:
        >>> import torch
        >>> backbone = WideResNet(depth=10, widen_factor=1)
        >>> backbone(torch.zeros(2, 3, 32, 32)).shape, backbone.num_features
        (torch.Size([2, 64]), 64)
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 2,
        strides: Sequence[int] = (1, 2, 2),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.num_groups = len(strides)
        num_blocks = (depth - 1 - self.num_groups) // (2 * self.num_groups) if strides else 0
        if num_blocks < 1 or depth != 1 + self.num_groups * (2 * num_blocks + 1):
            raise ValueError(
                f"depth {depth} does not divide into {self.num_groups} groups of blocks; choose a "
                f"depth of 1 + {self.num_groups}·(2n + 1), n ≥ 1 blocks per group"
            )
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        in_width = 16
        for group, stride in enumerate(strides):
            width = 16 * widen_factor * 2**group
            rest = [_Block(width, width, stride=1) for _ in range(num_blocks - 1)]
            layer = nn.Sequential(_Block(in_width, width, stride), *rest)
            self.add_module(f"layer{group + 1}", layer)
            in_width = width
        self.bn1 = nn.BatchNorm2d(in_width, momentum=_BN_MOMENTUM)
        self.num_features = in_width

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, _SLOPE, "fan_out", "leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return raw features (B, D) of images (B, in_channels, S, S), not normalised."""
        x = self.conv1(images)  # (B, 16, S, S)
        for group in range(1, self.num_groups + 1):
            x = self.get_submodule(f"layer{group}")(x)
        return _activate(self.bn1(x)).mean(dim=(2, 3))  # (B, D)


class _Block(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width, momentum=_BN_MOMENTUM)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, momentum=_BN_MOMENTUM)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_width != width:
            self.shortcut = nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = _activate(self.bn1(x))
        residual: Tensor = self.conv2(_activate(self.bn2(self.conv1(activated))))
        # A block that changes the width also feeds its shortcut the activated map.
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE, inplace=True)
