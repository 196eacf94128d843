"""Cluster images without a single label: SPICE on PyTorch Lightning and Hydra."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spice_pl.clusterer import SpiceClusterer
    from spice_pl.models.hub import pull
    from spice_pl.models.portable import load

__version__ = "0.1.0"
__all__ = ["SpiceClusterer", "__version__", "load", "pull"]

_HOMES = {"SpiceClusterer": "clusterer", "load": "models.portable", "pull": "models.hub"}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and --help needs none of it."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"spice_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
