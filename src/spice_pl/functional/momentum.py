"""Moving average of one network's weights in another."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update_(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Move the target's parameters towards the source's, in place.

    He et al. 2020 (MoCo), Eq. 2: target = momentum * target + (1 - momentum) * source.
    Buffers (BatchNorm statistics and counters) are copied, because they are averages already.

    Args:
        target: network to update; its parameters remain the same objects.
        source: network of the same architecture, which stays as it is.
        momentum: m, share of the target that stays, from 0 (copy the source) to 1 (no change).

    Raises:
        ValueError: momentum is out of range or the architectures differ.

    Examples:
        >>> follower, leader = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(follower.weight), nn.init.ones_(leader.weight)
        >>> ema_update_(follower, leader, momentum=0.75)
        >>> follower.weight.item()
        0.25
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum {momentum} is not between 0 and 1; MoCo uses 0.999")
    _check_same(dict(target.named_parameters()), dict(source.named_parameters()))
    _check_same(dict(target.named_buffers()), dict(source.named_buffers()))
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = list(source.parameters())
    if targets:  # foreach refuses empty lists
        torch._foreach_lerp_(targets, sources, 1 - momentum)
    for copy, buffer in zip(target.buffers(), source.buffers(), strict=True):
        copy.copy_(buffer)


def _check_same(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for name in [*target, *source]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (target, source)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[0]} in the target and {shapes[1]} in the source; "
                "make the target with copy.deepcopy(source)"
            )
