"""Cluster images without labels: `python train.py [stage=...] [dataset=...]`, see README.md."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the job; what is heavy is imported here, so that --help answers at once."""
    # How long OpenMP's idle threads spin. At its default one busy core makes a training step 13
    # times slower on two cores, at this 5 times; no spinning at all halves the speed of an idle
    # machine, and this does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    from spice_pl import run

    return run.main(cfg)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        from spice_pl.usage import usage

        print(usage(Path(__file__).parent / "conf"))
    else:
        main()
