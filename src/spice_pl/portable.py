"""Moved to `spice_pl.models.portable`; this path goes in release 0.3."""

import warnings

from spice_pl.models.portable import *  # noqa: F403

warnings.warn("spice_pl.portable is now spice_pl.models.portable", FutureWarning, stacklevel=2)
