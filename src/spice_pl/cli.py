"""The command: `python train.py` in a checkout, `spice` once installed."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from spice_pl.system import command
from spice_pl.system.command import quoted
from spice_pl.usage import conf_folder, usage


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def run_job(cfg: DictConfig) -> float | None:
    """Run the job that Hydra composed; return the label-free objective for sweeps.

    The slow imports are inside, so that --help answers at once.
    """
    # How long idle threads of OpenMP spin. With the default, another program on one of two cores
    # makes a training step 13 times slower, with this value 5 times. Without spinning a step takes
    # twice as long on an idle machine; with this value it does not.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    from spice_pl.job import sweep
    from spice_pl.job.errors import clear_errors
    from spice_pl.job.job import Job
    from spice_pl.job.run import run_stages

    composed = HydraConfig.get()
    preset = str(composed.runtime.choices.get("preset"))
    known = GlobalHydra.instance().config_loader().get_group_options("preset")
    job = Job(
        cfg=cfg,
        overrides=tuple(composed.overrides.task),
        preset=preset if preset in known else "none",
        sweep=composed.mode == RunMode.MULTIRUN,
    )
    with clear_errors(job):
        objective = run_stages(job)
    sweep.note_folders(job.folder(name).path for name in job.stages)
    return objective


def with_folder(arguments: list[str]) -> list[str]:
    """Return the command line with a folder of images, given as its first word, as settings.

    >>> with_folder(["/", "seed=1"])
    ['dataset=folder', "dataset.root='/'", 'seed=1']
    """
    first = arguments[0] if arguments else "-"
    if first.startswith("-") or not Path(first).is_dir():
        return arguments
    # argparse takes settings in one piece only, and -m has no value.
    rest = sorted(arguments[1:], key=lambda word: word in ("-m", "--multirun"))
    return ["dataset=folder", f"dataset.root={quoted(first)}", *rest]


def main() -> None:
    """Print the help text for --help; otherwise run the job of the command line."""
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
    from spice_pl.errors import UsageError
    from spice_pl.job.guard import checked_hydra
    from spice_pl.job.words import with_quotes

    try:
        sys.argv[1:] = with_quotes(with_folder(sys.argv[1:]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error

    with checked_hydra():
        run_job()
