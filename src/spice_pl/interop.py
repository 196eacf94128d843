"""Moved to `spice_pl.models.interop`; this path goes in release 0.3."""

import warnings

from spice_pl.models.interop import *  # noqa: F403

warnings.warn("spice_pl.interop is now spice_pl.models.interop", FutureWarning, stacklevel=2)
