"""Cluster images without a single label: SPICE on PyTorch Lightning and Hydra."""

__version__ = "0.1.0"
