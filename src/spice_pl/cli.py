"""The command: `python train.py` in a checkout, `spice` once installed, or `python -m spice_pl`."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from spice_pl.system import command
from spice_pl.system.command import quoted, version_of
from spice_pl.system.output import open_output
from spice_pl.usage import VERBS, conf_folder, usage, verb_usage

if TYPE_CHECKING:
    from spice_pl.job.job import Job

HUB = "hf://"  # begins a name of the Hugging Face Hub
WITH_VALUE = ("-c", "--c", "-p", "--p")  # --cfg, --config-dir and others; argparse takes beginnings
MODES = {"-m", "--multirun", "-c", "--cfg", "-i", "--info"}  # what Hydra does; one at a time
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # of --info
COMMANDS = {"spice": "spice", "__main__": "python -m spice_pl"}  # by the name of the script


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
        swept=sweep.swept_settings(),
    )
    with clear_errors(job), _log_of(job):
        objective = run_stages(job)
    sweep.note_folders(job.folder(name).path for name in job.stages)
    return objective


def _log_of(job: Job) -> AbstractContextManager[None]:
    """Return the context in which a job logs; a trial of a sweep has no file of its own."""
    from spice_pl.job.settings import missing
    from spice_pl.system.log import FILE_NAME, job_log

    if job.sweep or missing(job.cfg):  # the job names what is missing
        return nullcontext()
    log = Path(str(job.cfg.runs_dir), str(job.cfg.dataset.name), FILE_NAME)
    return job_log(log, job.command(), plain=job.plain)


def with_folder(arguments: list[str]) -> list[str]:
    """Return the command line with images, given as its first word, as settings.

    The word is a folder, or hf://owner/name for a data set of the Hugging Face Hub.

    >>> with_folder(["/", "seed=1"])
    ['dataset=folder', "dataset.root='/'", 'seed=1']
    """
    words, options = _split(arguments)
    first = words[0] if words else ""
    if first.startswith(HUB):
        kind = "hugging_face"
    elif first and Path(first).is_dir():
        kind = "folder"
    else:
        return [*words, *options]
    return [f"dataset={kind}", f"dataset.root={quoted(first)}", *words[1:], *options]


def with_verb(arguments: list[str]) -> list[str]:
    """Return the command line of a verb, such as `trust RUN`, as settings.

    Raises:
        SystemExit: with code 2, a word is missing or too many.

    >>> with_verb(["trust", "photos", "seed=1"])
    ['stage=trust', "of='photos'", 'seed=1']
    >>> with_verb(["predict", "hf://ann/birds", "/"])[1]
    "predict.model='hf://ann/birds'"
    """
    (verb, *rest), options = _split(arguments)
    about = VERBS[verb]
    words = _words(rest, len(about.words))
    others = [word for word in rest if word not in words] + options
    if len(words) != len(about.words):
        _say_words(verb, words)
    settings = [f"stage={about.stage}"]
    for name, word in zip(about.words, words, strict=True):
        if verb == "predict" and word.startswith(HUB):  # a model of the Hub has no run here
            settings.append(f"predict.model={quoted(word)}")
            continue
        if name in ("NEW", "DIR") and not Path(word).is_dir():
            state = "is a file, not a folder" if Path(word).exists() else "does not exist"
            _stop(f"{name}={word} {state}; give a folder of images")
        settings += [text.format(quoted(word)) for text in about.settings[name]]
    return [*settings, *others]


def _words(arguments: list[str], number: int) -> list[str]:
    """Return those of the arguments of a verb that are not settings.

    The folder of a run of a sweep has "=" in its name. Where one of the `number` words is missing,
    an argument that exists as a file or folder, or below the folder of runs, is taken as it.
    """
    given = [word for word in arguments if not word.startswith(("-", "+", "~"))]
    place = next((word[9:] for word in given if word.startswith("runs_dir=")), "runs")
    there = [word for word in given if "=" in word and _exists(word, place)]
    missing = max(number - sum("=" not in word for word in given), 0)
    return [word for word in given if "=" not in word or word in there[:missing]]


def _exists(word: str, runs_dir: str) -> bool:
    """Whether a word names a file or folder, as `runs.find.find_run` reads it."""
    return os.path.exists(os.path.expanduser(word)) or os.path.exists(os.path.join(runs_dir, word))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return words and settings, and the options of Hydra with their values.

    argparse takes the settings in one piece, so options come last, wherever they were.

    >>> _split(["stage=proto", "-m", "seed=1,2", "--config-dir", "conf", "--info"])
    (['stage=proto', 'seed=1,2'], ['-m', '--config-dir', 'conf', '--info'])
    """
    words: list[str] = []
    options: list[str] = []
    before = ""
    for word in arguments:
        is_value = before.startswith(WITH_VALUE) and "=" not in before
        is_value = is_value or (before.startswith(("-i", "--i")) and word in INFO)
        (options if word.startswith("-") or is_value else words).append(word)
        before = "" if is_value else word
    return words, options


def _say_words(verb: str, words: list[str]) -> None:
    line = " ".join([*command.command(), verb, *VERBS[verb].words])
    given = f"{len(words)} given: {' '.join(words)}" if words else "none given"
    folder = ""
    if not words and Path(verb).is_dir():
        folder = f". To cluster the images in the folder {verb}, write ./{verb}"
    _stop(f"{verb} takes {' and '.join(VERBS[verb].words)}, {given}; the form is\n  {line}{folder}")


def _check_first(word: str) -> None:
    """Refuse a first word that is neither a folder, a verb nor a setting.

    Raises:
        SystemExit: with code 2.
    """
    if not word or "=" in word or word in VERBS or word.startswith(HUB) or Path(word).is_dir():
        return
    if word.startswith("~") and "/" not in word:  # removes a setting
        return
    if Path(word).is_file():
        _stop(f"{word} is a file, not a folder; give the folder that holds the images")
    near = get_close_matches(word, VERBS, n=1)
    advice = f"; did you mean {near[0]}?" if near else "; --help lists the verbs"
    _stop(f"{word} is not a folder that exists, nor a verb or a setting key=value{advice}")


def _stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """Run the command line; see `system.output` for one whose output cannot be written."""
    open_output()
    try:
        run_words()
    finally:
        sys.stdout.flush()


def run_words() -> None:
    """Run the command line: help, a verb, or the job of its settings."""
    script = Path(sys.argv[0]).stem
    os.environ[command.NAME] = COMMANDS.get(script, "python train.py")
    words = sys.argv[1:]
    first = next(iter(_split(words)[0]), "")
    if {"-h", "--help"} & set(words):
        print(verb_usage(first, conf_folder()) if first in VERBS else usage(conf_folder()))
        return
    if "--version" in words:
        print(f"spice-pl {version_of('spice-pl')}")
        return
    if not words and script in COMMANDS:  # python train.py runs the demonstration
        print(usage(conf_folder()))
        return
    if any(word.startswith("--e") for word in words):  # argparse takes any beginning of it
        _stop("--experimental-rerun reads a pickle, which can hold code; give the settings")
    if words[:1] == ["compare"]:
        from spice_pl.runs.compare import main as compare

        compare(words[1:])
        return
    modes = [word for word in _split(words)[1] if word.partition("=")[0] in MODES]
    if len(modes) > 1:
        _stop(f"{' and '.join(modes)} exclude each other; give one of them")
    from spice_pl.errors import UsageError
    from spice_pl.job.loader import checked_settings
    from spice_pl.job.words import with_quotes

    settings = with_verb(words) if first in VERBS else with_folder(words)
    _check_first(first)
    try:
        sys.argv[1:] = with_quotes(settings)
    except UsageError as error:
        _stop(str(error))

    with checked_settings():
        run_job()
