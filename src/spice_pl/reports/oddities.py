"""What the report shows about odd images.

Shapes: n odd images of one kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RULES = {
    "exact copies": "equal to an earlier image in every pixel that the network sees",
    "outliers": "the fifth nearest image is farther away than is usual: more than 2.2 "
    "interquartile ranges above the upper quartile (l2-normalised features)",
    "blurred": "changes from pixel to pixel are less than half as sharp as in the median image, "
    "and below 0.45 (mean second difference over mean first difference)",
    "tiny": "the shorter side of the file is less than half of what the network sees and less than "
    "half of the median",
    "one colour": "the levels of no channel vary by more than 4 of 255 (standard deviation)",
}

NAMES = {  # of one image, and of several
    "exact copies": ("exact copy", "exact copies"),
    "outliers": ("outlier", "outliers"),
    "blurred": ("blurred image", "blurred images"),
    "tiny": ("tiny image", "tiny images"),
    "one colour": ("image of one colour", "images of one colour"),
}


@dataclass(frozen=True)
class Oddity:
    """Images that are odd in one way.

    Attributes:
        name: one of RULES.
        index: (n,) positions of the images, the oddest first. Exact copies come after the
            image that they equal.
        count: number of odd images; of exact copies the first of each group is not counted.
    """

    name: str
    index: NDArray[np.int64]
    count: int

    @property
    def label(self) -> str:
        """The name for the number of these images."""
        return NAMES[self.name][self.count != 1]

    @property
    def rule(self) -> str:
        """What decides, in one sentence."""
        return RULES[self.name]


def odd_line(counts: Mapping[str, int]) -> str:
    """Return a line with the number of odd images of each kind.

    >>> odd_line({"exact copies": 1, "blurred": 2}), odd_line({})
    ('odd images: 1 exact copy, 2 blurred images', 'odd images: none')
    """
    said = [f"{count:,} {NAMES[name][count != 1]}" for name, count in counts.items() if count]
    return f"odd images: {', '.join(said) or 'none'}"


def num_odd(oddities: Sequence[Oddity]) -> int:
    """Return the number of different images of all kinds, those that copies equal included."""
    return len(
        np.unique(np.concatenate([np.empty(0, np.int64), *(each.index for each in oddities)]))
    )
