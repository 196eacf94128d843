from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.duplicates import copies, near_copies, num_copies, row_digests


def pictures(count: int, side: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random pictures, as photographs are."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 3, 8, 8))
    return coarse.repeat(side // 8, 2).repeat(side // 8, 3).astype(np.uint8)


def test_copies_are_grouped_in_order() -> None:
    images = pictures(7)
    images[[4, 6]] = images[1]
    images[5] = images[0]
    digests = row_digests(images)
    assert [group.tolist() for group in copies(digests)] == [[0, 5], [1, 4, 6]]
    assert num_copies(digests) == 3
    assert copies(row_digests(pictures(3))) == []


def test_near_copies_are_found_and_others_are_not() -> None:
    images = pictures(300)
    noise = np.random.default_rng(1).integers(-3, 4, images[0].shape)
    images[200] = np.clip(images[10].astype(int) + noise, 0, 255)  # saved again, say
    images[201] = np.clip(images[20].astype(int) + 2, 0, 255)  # a little brighter
    images[202] = images[30]  # equal, so no near-copy
    images[203] = images[40][..., ::-1]  # a mirror image is another picture
    assert near_copies(images).tolist() == [[10, 200], [20, 201]]


def test_empty_pictures_are_not_alike() -> None:
    generator = np.random.default_rng(0)
    images = (100 + generator.integers(0, 3, (50, 3, 32, 32))).astype(np.uint8)
    assert len(near_copies(images)) == 0
    assert near_copies(pictures(1)).shape == (0, 2)


def test_pictures_smaller_than_the_hash() -> None:
    images = pictures(20, side=8)
    images[7] = images[3] ^ 1
    assert near_copies(images).tolist() == [[3, 7]]
