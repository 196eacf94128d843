"""Moved to `spice_pl.runs.folder`; this path goes in release 0.3."""

import warnings

from spice_pl.runs.folder import *  # noqa: F403

warnings.warn("spice_pl.artifacts is now spice_pl.runs.folder", FutureWarning, stacklevel=2)
