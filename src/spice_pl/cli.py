"""The command: `python train.py` in a checkout, `spice` once installed."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from spice_pl.system import command
from spice_pl.usage import conf_folder, usage


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def run_job(cfg: DictConfig) -> float | None:
    """Run the job; what is heavy is imported here, so that --help answers at once."""
    # How long OpenMP's idle threads spin. At its default one busy core makes a training step 13
    # times slower on two cores, at this 5 times; no spinning at all halves the speed of an idle
    # machine, and this does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    from spice_pl.job import run

    return run.main(cfg)


def main() -> None:
    """Answer --help, or run the job that the command line describes."""
    os.environ[command.NAME] = "spice" if Path(sys.argv[0]).stem == "spice" else "python train.py"
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(conf_folder()))
        return
    if any(word.startswith("--e") for word in sys.argv[1:]):  # argparse takes any beginning of it
        print(
            "error: --experimental-rerun reads a pickle, which can hold code; give the settings",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from spice_pl.job.guard import checked_hydra

    with checked_hydra():
        run_job()
