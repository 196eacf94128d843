"""Random numbers without state: each is a hash of its key, so the order of draws does not matter.

SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators") is used as a
counter-based hash. A view of image i in epoch e under seed s is therefore the same in any batch,
worker or rank, and a resumed run continues with the same views.

Shape letters: B images, n numbers per image.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the step of SplitMix64
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """Return the 64 bits of value, read as a signed integer."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """Apply one step of SplitMix64 to a Python integer."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def _shift_xor_(value: Tensor, bits: int) -> Tensor:
    """``value ^= value >> bits`` for unsigned bits: int64 shifts copy the sign, which is masked."""
    return value.bitwise_xor_((value >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _mix_tensor_(value: Tensor) -> Tensor:
    """Apply `_mix` to int64 in place; multiplication wraps around."""
    value.add_(_signed(_GAMMA))
    _shift_xor_(value, 30).mul_(_signed(_MULTIPLIERS[0]))
    _shift_xor_(value, 27).mul_(_signed(_MULTIPLIERS[1]))
    return _shift_xor_(value, 31)


def keyed_seed(seed: int, *keys: int) -> int:
    """Hash a seed and any number of keys; their order matters.

    Returns:
        A seed in [0, 2^63), suitable for ``torch.manual_seed``.

    >>> keyed_seed(0, 1, 2) == keyed_seed(0, 1, 2), keyed_seed(0, 1, 2) == keyed_seed(0, 2, 1)
    (True, False)
    """
    return _chain(seed, *keys) >> 1


def _chain(*keys: int) -> int:
    state = 0
    for key in keys:
        state = _mix(state ^ _mix(key & _MASK))
    return state


def keyed_generator(seed: int, *keys: int) -> torch.Generator:
    """Return a CPU generator for draws that need one (permutations), seeded by the same hash."""
    return torch.Generator().manual_seed(keyed_seed(seed, *keys))


def keyed_uniform(seed: int, epoch: int | Tensor, index: Tensor, stream: int, num: int) -> Tensor:
    """Draw uniform numbers that depend only on (seed, epoch, image, stream, position).

    Args:
        seed: seed of the run.
        epoch: epoch, or any counter of passes; one number, or (B,) int64 with one per image.
        index: (B,) int64, position of each image in its data set.
        stream: number that separates several draws for one image, such as the two views of MoCo.
        num: numbers per image.

    Returns:
        (B, num) float32 in [0, 1), multiples of 2^-24, on the device of ``index``.

    Raises:
        ValueError: index is not a vector of int64, or num is negative.

    >>> both = keyed_uniform(0, 0, torch.tensor([3, 7]), 0, 4)
    >>> bool((both[1:] == keyed_uniform(0, 0, torch.tensor([7]), 0, 4)).all())
    True
    """
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"index {tuple(index.shape)} {index.dtype} is not a vector of int64; "
            "pass one data set position per image"
        )
    if num < 0:
        raise ValueError(f"num {num} is negative; ask for 0 or more numbers per image")
    row = _mix_tensor_(index * _signed(_GAMMA) + _signed(_chain(seed, stream)))  # (B,)
    step = epoch * _signed(_GAMMA)
    row = _mix_tensor_(row + (_signed(step) if isinstance(step, int) else step))
    column = torch.arange(num, device=index.device) * _signed(_GAMMA)  # (n,)
    bits = _mix_tensor_(row[:, None] + column)  # (B, n)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
