"""Cluster images without labels: `python train.py [stage=...] [dataset=...]`, see README.md.

The function with @hydra.main is in spice_pl.cli. Shells look for that word in this file before they
complete groups and settings with the tab key.
"""

from spice_pl.cli import main

if __name__ == "__main__":
    main()
