"""Fast inference with frozen networks.

Shapes: B images, S pixels a side, D features.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

PART = 256 * 32 * 32  # pixels of a part, so that its feature maps fit into the caches of a CPU


class Frozen:
    """A fast copy of a network whose weights no longer change.

    Each BatchNorm that directly follows a convolution is folded into it: with fixed statistics it
    is a linear map (Ioffe and Szegedy 2015, Section 3.1). On a CPU a batch is processed in parts.
    Outputs are those of the network in eval mode up to rounding, 1e-6 of the largest. This is not
    an nn.Module, so that the copy is not in a state dict and cannot be put into train mode.

    Args:
        network: backbone, (B, 3, S, S) -> (B, D). It stays as it is, and later changes to it do not
            change the copy.

    Examples:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        >>> frozen = Frozen(backbone)
        >>> frozen(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 288])
        >>> frozen.network[1]
        Identity()
    """

    def __init__(self, network: nn.Module) -> None:
        # The first call may be in a prediction; the weights are ordinary tensors there too.
        with torch.inference_mode(False):
            network = copy.deepcopy(network).to(memory_format=torch.channels_last)
            self.network = _folded(network.eval().requires_grad_(False))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, D) of images (B, 3, S, S)."""
        return torch.cat([self.network(part) for part in in_parts(images)])


def in_parts(images: Tensor) -> Sequence[Tensor]:
    """Split images (B, 3, S, S) into parts of a size that a network processes fast.

    On a GPU this is one part. On a CPU a part has 256 images of 32 pixels, 10 of 160 or 5 of 224:
    EfficientNet at 160 pixels is 2.5 times as fast with parts of 10 as with 256. Not for networks
    with BatchNorm in train mode, whose outputs depend on the other images of a part.
    """
    if images.device.type != "cpu":
        return (images,)
    return torch.split(images, max(1, PART // images.shape[-1] ** 2))


class _Tracer(fx.Tracer):
    """Trace the calls between layers, but not inside them (timm's convolutions pad inside)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at convolutions and BatchNorms, also at classes derived from torch's."""
        layer = isinstance(m, nn.Conv2d | nn.BatchNorm2d)
        return layer or super().is_leaf_module(m, module_qualified_name)


def _folded(network: nn.Module) -> nn.Module:
    """Fold BatchNorms in place; a network that cannot be traced keeps them."""
    try:
        nodes = _Tracer().trace(network).nodes
    except Exception:  # tracing runs the network's code, which may raise anything
        return network
    modules = dict(network.named_modules())
    calls = [node for node in nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    for node in calls:
        before, name = next(iter(node.args), None), str(node.target)
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = modules[str(before.target)], modules[name]
        if times[name] == times[str(before.target)] == 1 and _linear(convolution, norm):
            network.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(name, getattr(norm, "act", nn.Identity()))
    return network


def _linear(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether the two layers compute what torch's do; classes derived from them may do more."""
    return (
        (type(convolution) is nn.Conv2d or type(convolution).__name__ == "Conv2dSame")  # timm's
        and (type(norm) is nn.BatchNorm2d or type(norm).__name__ == "BatchNormAct2d")  # timm's
        and norm.running_mean is not None
    )
