"""Moving average of one network's weights in another."""

import torch
from torch import Tensor, nn


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
    EmaPairs((target, source)).update_(momentum)


class EmaPairs:
    """Tensors of networks and of their moving averages, paired and checked once.

    `update_` does the same as `ema_update_`, without a walk through the networks. Make the pairs
    after the networks are on their device: they hold the tensors, not the networks.

    Args:
        pairs: (target, source) of each network.

    Raises:
        ValueError: the architectures differ.
    """

    def __init__(self, *pairs: tuple[nn.Module, nn.Module]) -> None:
        # By type: foreach is one kernel only for tensors of one type.
        self._averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        self._copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in pairs:
            for groups, tensors in (
                (self._averaged, [dict(each.named_parameters()) for each in (target, source)]),
                (self._copied, [dict(each.named_buffers()) for each in (target, source)]),
            ):
                _check_same(*tensors)
                for name, tensor in tensors[0].items():
                    targets, sources = groups.setdefault(tensor.dtype, ([], []))
                    targets.append(tensor)
                    sources.append(tensors[1][name])

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        """Move the targets as `ema_update_` does.

        Raises:
            ValueError: momentum is out of range.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum {momentum} is not between 0 and 1; MoCo uses 0.999")
        for targets, sources in self._averaged.values():
            torch._foreach_lerp_(targets, sources, 1 - momentum)
        for targets, sources in self._copied.values():
            torch._foreach_copy_(targets, sources)


def _check_same(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for name in [*target, *source]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (target, source)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[0]} in the target and {shapes[1]} in the source; "
                "make the target with copy.deepcopy(source)"
            )
