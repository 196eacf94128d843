"""Moved to `spice_pl.runs.compare`; this path goes in release 0.3."""

import warnings

from spice_pl.runs.compare import *  # noqa: F403
from spice_pl.runs.compare import main

warnings.warn("spice_pl.compare is now spice_pl.runs.compare", FutureWarning, stacklevel=2)
if __name__ == "__main__":
    main()
