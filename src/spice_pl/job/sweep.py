"""Sweeps (`-m`): trials note their folders and failures in a file; the sweep ends in one table."""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from spice_pl.errors import UsageError
from spice_pl.job.settings import masked_override
from spice_pl.system.files import check_folder, check_temporary
from spice_pl.system.output import escaped, printable

SWEPT = "SPICE_PL_SWEPT"  # environment variable: the settings of the sweep as typed, as JSON
TRIALS = "SPICE_PL_TRIALS"  # environment variable: the file that every trial adds lines to


def note_folders(folders: Iterable[Path]) -> None:
    """Note the folders of a finished trial; does nothing outside a sweep."""
    if trials := os.environ.get(TRIALS):
        with Path(trials).open("a", encoding="utf-8") as file:
            file.writelines(f"{folder.absolute()}\n" for folder in folders)


def swept_settings() -> tuple[str, ...]:
    """Return the settings of the sweep as they were typed; () outside a sweep."""
    return tuple(json.loads(os.environ.get(SWEPT, "[]")))


def note_failure(overrides: Sequence[str], error: Exception) -> None:
    """Note a failed trial, to be reported when the sweep ends."""
    if trials := os.environ.get(TRIALS):
        given = " ".join(masked_override(text) for text in overrides)
        with _failures(Path(trials)).open("a", encoding="utf-8") as file:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            file.write(json.dumps([given, reason]) + "\n")


def _failures(trials: Path) -> Path:
    """Return the file with one line per failed trial: [settings, error] as JSON."""
    return trials.with_name(f"{trials.name}.failed")


class CompareTrials(Callback):
    """Print the table of a sweep's runs; write it as compare.* into the folder of sweeps."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the lists that trials write to; launchers hand the environment on."""
        try:  # before the trials, whose results stand there
            check_folder("hydra.sweep.dir", str(config.hydra.sweep.dir))
            check_temporary()
        except UsageError as error:  # Hydra takes any Exception of a callback for a warning
            print(escaped(f"\nerror: {error}"), file=sys.stderr)
            raise SystemExit(2) from error
        handle, name = tempfile.mkstemp(prefix="spice-pl-trials-")
        os.close(handle)
        os.environ[TRIALS] = name
        hydra = config.hydra
        drawn = (hydra.get("sweeper") or {}).get("params") or {}  # swept by a file of settings
        typed = hydra.get("overrides") or {}  # -m is kept there as hydra.mode=MULTIRUN
        own = [text for text in typed.get("hydra") or [] if not text.startswith("hydra.mode=")]
        given = [*own, *(typed.get("task") or []), *(f"{key}={drawn[key]}" for key in drawn)]
        os.environ[SWEPT] = json.dumps([masked_override(str(text)) for text in given])
        # Hydra ends a sweep with a failed trial by an exception, and calls no hook.
        atexit.register(self.on_multirun_end, config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare what the trials have named; report those that failed."""
        if TRIALS not in os.environ:  # done
            return
        os.environ.pop(SWEPT, None)
        file = Path(os.environ.pop(TRIALS))
        folders = sorted(set(file.read_text(encoding="utf-8").splitlines()))
        file.unlink()
        if folders:
            _show_table(folders, Path(str(config.hydra.sweep.dir)))
        failed = _failures(file)
        if failed.is_file():
            found = [json.loads(line) for line in failed.read_text(encoding="utf-8").splitlines()]
            failed.unlink()
            others = "the others are finished" if folders else "none is finished"
            print(
                f"\n{len(found)} of the trials failed, {others}; once it is mended, the same "
                "command with resume=true makes what is missing:",
                file=sys.stderr,
            )
            for overrides, reason in found:
                print(printable(f"  {overrides}: {reason}"), file=sys.stderr)


def _show_table(folders: Sequence[str], target: Path) -> None:
    """Show a table of the trials' clusters or logged values; lines for tasks without any."""
    from spice_pl.runs.compare import compare, finished_runs, show
    from spice_pl.runs.folder import RunFolder
    from spice_pl.runs.trials import logged_table, show_logged

    try:
        runs = [RunFolder(Path(folder)) for folder in folders]
        found = [run.metrics if run.finished else {} for run in runs]
        if any(metrics.get("rows") for metrics in found):
            show(compare(finished_runs(folders)), target)
            return
        if logged := logged_table([run for run in runs if run.finished]):
            show_logged(logged, target)
            return
        print("\nThese trials have no scores for a table:")
        for run, metrics in zip(runs, found, strict=True):
            said = metrics.get("verdict") or metrics.get("sentence") or "done"
            print(f"  {run.path}: {said}")
    except UsageError as error:
        print(escaped(f"no table of this sweep: {error}"), file=sys.stderr)
