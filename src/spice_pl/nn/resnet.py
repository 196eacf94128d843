"""ResNets for small and large images: one class with a choice of stems.

Shapes: B images, S pixels a side, W channels of the stem, D features.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Stem = Literal[
    "conv3", "conv3_stride2", "conv3_pool", "conv7", "whitened", "conv3_pad2", "conv3_linear"
]
Block = Literal["basic", "bottleneck"]
_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """ResNet without a classifier.

    He et al. 2016, Table 1; `conv3` and `conv3_pool` are SPICE's (Niu et al. 2022). The stages have
    strides 1, 2, 2, ... and torchvision's parameter names, so that torchvision's state dicts can be
    loaded without their `fc.*`.

    | network | blocks | stem |
    |---|---|---|
    | ResNet18 for 32 pixels | 2, 2, 2, 2 | conv3 |
    | ResNet18 for 96 pixels | 2, 2, 2, 2 | conv3_pool |
    | SPICE's clustering ResNet34 | 3, 4, 6, 3 | conv3_pool |
    | ResNet34 for 224 pixels | 3, 4, 6, 3 | conv7 |

    Args:
        blocks: numbers of blocks per stage.
        widths: channels of the 3×3 convolutions per stage; the first is also the width of the
            stem, the last is D, or D/4 with bottlenecks.
        stem: first layers. `conv3` keeps the resolution, `conv3_pool` and `conv3_stride2` halve it,
            `conv7` (ImageNet) quarters it. On 32 pixels a network with `conv3_stride2` trains 1.5
            times as fast as with `conv3_pool`, whose padding makes all later maps one pixel larger.
            `whitened` halves the resolution by `WhitenedPatches`, which `fit_stem` fits to images.
            For checkpoints of other libraries, `conv3_pad2` pads by 2 (solo-learn on CIFAR) and
            `conv3_linear` has no ReLU (lightly's ResNets in a Sequential).
        in_channels: number of channels of the images.
        block: `basic` (two 3×3), or `bottleneck` (1×1, 3×3, 1×1 to four times the width).

    Raises:
        ValueError: blocks and widths differ in length, or are empty, or stem or block is unknown.

    Examples:
        >>> import torch
        >>> backbone = ResNet(blocks=(1, 1, 1), widths=(8, 16, 32))
        >>> backbone(torch.zeros(2, 3, 32, 32)).shape, backbone.num_features
        (torch.Size([2, 32]), 32)
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Stem = "conv3",
        in_channels: int = 3,
        block: Block = "basic",
    ) -> None:
        super().__init__()
        if not blocks or len(blocks) != len(widths):
            raise ValueError(
                f"blocks {list(blocks)} and widths {list(widths)} describe {len(blocks)} and "
                f"{len(widths)} stages; give one number of blocks and one width per stage"
            )
        if stem not in get_args(Stem):
            raise ValueError(f"stem {stem!r} is unknown; choose one of {', '.join(get_args(Stem))}")
        if block not in _BLOCKS:
            raise ValueError(f"block {block!r} is unknown; choose one of {', '.join(_BLOCKS)}")

        kernel = 7 if stem == "conv7" else 3
        stride = 2 if stem in ("conv3_stride2", "conv7") else 1
        padding = 2 if stem == "conv3_pad2" else kernel // 2
        in_width = widths[0]
        self.conv1: nn.Conv2d | WhitenedPatches
        if stem == "whitened":
            self.conv1 = WhitenedPatches(in_channels)
            in_width = self.conv1.num_features
        else:
            self.conv1 = nn.Conv2d(
                in_channels, in_width, kernel, stride, padding=padding, bias=False
            )
        self.bn1 = nn.BatchNorm2d(in_width)
        self.relu = nn.Identity() if stem == "conv3_linear" else nn.ReLU(inplace=True)
        self.maxpool = _stem_pool(stem)

        self.num_stages = len(blocks)
        for stage, (num_blocks, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            layer = _stage(_BLOCKS[block], in_width, width, num_blocks, stride)
            self.add_module(f"layer{stage}", layer)
            in_width = width * _BLOCKS[block].expansion
        self.num_features = in_width

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def fit_stem(self, images: Tensor) -> None:
        """Fit the stem `whitened` to n sample images (n, in_channels, S, S); others need no fit."""
        if isinstance(self.conv1, WhitenedPatches):
            self.conv1.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return raw features (B, D) of images (B, in_channels, S, S), not normalised."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (B, W, s, s)
        for stage in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        features: Tensor = x.mean(dim=(2, 3))  # (B, D)
        return features


class WhitenedPatches(nn.Module):
    """Whiten 3×3 patches with stride 2: a convolution whose weights are fitted and not trained.

    Coates and Ng 2012 ("Learning feature representations with k-means"), Section 2: patches are
    projected onto the eigenvectors of their covariance and scaled to unit variance. Each projection
    is given with both signs, so that a ReLU loses no information (Jordan 2024, "94% on CIFAR-10 in
    3.29 seconds", Section 3.2, with 2×2 patches).

    Args:
        in_channels: number of channels C of the images; the output has 18 C.
        epsilon: number added to the variance of each direction.
    """

    weight: Tensor

    def __init__(self, in_channels: int = 3, epsilon: float = 0.05) -> None:
        super().__init__()
        width = 9 * in_channels
        self.num_features, self.epsilon = 2 * width, epsilon
        identity = torch.eye(width).view(width, in_channels, 3, 3)
        self.register_buffer("weight", torch.cat([identity, -identity]))  # (18 C, C, 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, S, S) to (B, 18 C, S/2, S/2)."""
        return F.conv2d(images, self.weight, stride=2, padding=1)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the weights from all patches of sample images (n, C, S, S)."""
        patches = F.unfold(images.float(), 3).transpose(1, 2).flatten(0, 1)  # (n (S - 2)^2, 9 C)
        covariance = patches.T @ patches / len(patches)
        variance, direction = torch.linalg.eigh(covariance)
        whitening = (direction / (variance + self.epsilon).sqrt()).T.reshape(
            -1, *self.weight.shape[1:]
        )
        self.weight.copy_(torch.cat([whitening, -whitening]))


def _stem_pool(stem: Stem) -> nn.Module:
    if stem == "conv7":
        return nn.MaxPool2d(3, stride=2, padding=1)
    if stem == "conv3_pool":
        # The padding of SPICE's code: 96 pixels become 49, and the last map is 7×7.
        return nn.MaxPool2d(2, stride=2, padding=1)
    return nn.Identity()


def _stage(
    block: type[BasicBlock | Bottleneck], in_width: int, width: int, num_blocks: int, stride: int
) -> nn.Sequential:
    out_width, downsample = width * block.expansion, None
    if stride != 1 or in_width != out_width:
        downsample = nn.Sequential(
            nn.Conv2d(in_width, out_width, 1, stride, bias=False), nn.BatchNorm2d(out_width)
        )
    rest = [block(out_width, width) for _ in range(num_blocks - 1)]
    return nn.Sequential(block(in_width, width, stride, downsample), *rest)
