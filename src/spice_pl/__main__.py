"""`python -m spice_pl`, the same command as `spice`."""

from spice_pl.cli import main

if __name__ == "__main__":
    main()
