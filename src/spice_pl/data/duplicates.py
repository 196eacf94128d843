"""Find copies and near-copies among images without comparing every pair.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

CHUNK = 4096  # images processed at once
SIDE = 16  # pixels of the small grey pictures that confirm a near-copy
BANDS = 4  # of 16 bits; two hashes that differ in at most 3 bits share a band
MAX_BITS = BANDS - 1
MAX_BUCKET = 256  # images per bucket compared in pairs; larger buckets hold empty pictures
MAX_DIFFERENCE = 4.0  # mean grey levels of 255 between two near-copies


def row_digests(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return (N,) digests of the pixels of each image (N, 3, S, S), 64 bits of BLAKE2b."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in images)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def num_copies(digests: NDArray[np.uint64]) -> int:
    """Count the images that equal an earlier one."""
    return len(digests) - len(np.unique(digests))


def few_distinct(images: NDArray[np.uint8], needed: int) -> int | None:
    """Count the distinct images (N, 3, S, S) if there are fewer than `needed`; else return None."""
    found: set[bytes] = set()
    for row in images:
        found.add(hashlib.blake2b(row.tobytes(), digest_size=8).digest())
        if len(found) >= needed:
            return None
    return len(found)


def copies(digests: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return the groups of equal images, in the order of the data set."""
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.diff(digests[order])) + 1
    groups = [group.astype(np.int64) for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def near_copies(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return pairs (n, 2) of images that look the same but are not equal.

    Candidates differ in at most 3 of the 64 bits of their difference hash (whether a pixel of a
    9 × 8 picture is brighter than its right neighbour); a pair is kept when small grey pictures
    of 16 × 16 differ by less than 4 levels on average. Pictures with hardly any contrast are left
    out, since their bits are noise.

    Returns:
        Pairs (n, 2) with i < j, sorted.
    """
    small, bits, usable = _small(images)
    candidates: set[tuple[int, int]] = set()
    for band in range(BANDS):
        part = np.packbits(bits[usable, 16 * band : 16 * band + 16], axis=1).view(np.uint16)[:, 0]
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order])) + 1
        for group in np.split(usable[order], starts):
            if 1 < len(group) <= MAX_BUCKET:
                far = (bits[group][:, None] != bits[group][None]).sum(-1)  # (g, g)
                first, second = np.nonzero(np.triu(far <= MAX_BITS, 1))
                candidates |= set(zip(group[first].tolist(), group[second].tolist(), strict=True))
    if not candidates:
        return np.empty((0, 2), dtype=np.int64)
    pairs = np.sort(np.array(sorted(candidates), dtype=np.int64), axis=1)
    pairs = np.unique(pairs, axis=0)
    difference = np.abs(small[pairs[:, 0]] - small[pairs[:, 1]]).mean(axis=1)
    equal = np.array([np.array_equal(images[i], images[j]) for i, j in pairs], dtype=bool)
    near: NDArray[np.int64] = pairs[(difference < MAX_DIFFERENCE) & ~equal]
    return near


def _small(
    images: NDArray[np.uint8],
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """Return grey pictures (N, 256), hashes (N, 64), and the images that have contrast."""
    small, bits = [], []
    for start in range(0, len(images), CHUNK):
        part = torch.from_numpy(np.array(images[start : start + CHUNK])).float()
        grey = (part * part.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1, keepdim=True)
        small.append(F.adaptive_avg_pool2d(grey, SIDE).flatten(1).numpy())
        hashed = F.adaptive_avg_pool2d(grey, (8, 9))  # (n, 1, 8, 9)
        bits.append((hashed[..., :-1] < hashed[..., 1:]).flatten(1).numpy())
    pictures = np.concatenate(small)
    return pictures, np.concatenate(bits), np.flatnonzero(pictures.std(axis=1) > MAX_DIFFERENCE)
