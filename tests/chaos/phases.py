"""Kill the command in each of its phases and give it again; compare with one that was not killed.

`python -m tests.chaos.phases FOLDER [PHASE...]` prints one JSON object: phase to what is wrong, an
empty list if nothing is. Each command line runs in a forked child, as `tests.chaos.supervisor`
explains.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.conftest import TINY, write_folder

from spice_pl import cli
from spice_pl.system.interrupts import RESUME_CODE

for _name in ("spice_pl.job.run", "spice_pl.job.stage", "scipy.optimize"):
    importlib.import_module(_name)  # once, for all children

# Of a run; pages and measurements hold times.
KEPT = (
    *("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy", "answer.npy"),
    *("embeddings.npy", "clusters.csv", "dataset.json", "model.spice", "predictions.csv"),
)
SHORT = ("stages=[moco,proto]", "proto.module.view_bank=2", "embeddings=smoothed")


@dataclass(frozen=True)
class Phase:
    """A moment to end a command at.

    Attributes:
        command: key of COMMANDS.
        module: module of what is patched.
        name: dotted name in it.
        at: number of the call to end at.
        after: whether the call is finished first; a write in a file is half done before.
    """

    command: str
    module: str
    name: str
    at: int = 1
    after: bool = False


FOLDER, PORTABLE = "spice_pl.runs.folder", "spice_pl.models.portable"
PHASES = {
    "decoding": Phase("train", "spice_pl.data.store_files", "Journal.append"),
    "half a step of decoding": Phase("train", "spice_pl.data.store_files", "_append", 2, True),
    "names of the store": Phase("train", "spice_pl.data.store_files", "save_array", 1, True),
    "before the store has its name": Phase("train", "os", "rename"),
    "the store has its name": Phase("train", "os", "rename", 1, True),
    "half a checkpoint": Phase("train", "pathlib", "Path.write_bytes", 2, True),
    "views of the banks": Phase("train", "spice_pl.nn.frozen", "Frozen.__call__", 3),
    "half of the features": Phase("train", FOLDER, "RunFolder.write_rows", 2),
    "before features have their name": Phase("train", FOLDER, "RunFolder.publish"),
    "features have their name": Phase("train", FOLDER, "RunFolder.publish", 1, True),
    "before the embeddings": Phase("train", FOLDER, "RunFolder.write_embeddings", 2),
    "half of the embeddings": Phase("train", "numpy", "save", 3, True),
    "the embeddings are written": Phase("train", FOLDER, "RunFolder.write_embeddings", 2, True),
    "the table is written": Phase("train", FOLDER, "RunFolder.write_clusters", 1, True),
    "half of model.spice": Phase("train", PORTABLE, "save_file", 1, True),
    "model.spice is written": Phase("train", PORTABLE, "PortableModel.save", 1, True),
    "before the report": Phase("train", "spice_pl.job.finish", "write_report"),
    "the report is written": Phase("train", "spice_pl.job.finish", "write_report", 1, True),
    "results": Phase("train", "spice_pl.job.finish", "stage_metrics", 2, True),
    "first predictions": Phase("predict", PORTABLE, "PortableModel.stream"),
    "half a file of predictions": Phase("predict", "shutil", "copyfile", 7, True),
    "before predictions have their name": Phase("predict", "os", "replace", 3),
    "predictions have their name": Phase("predict", "os", "replace", 3, True),
    "before folders of predictions": Phase("predict", "spice_pl.runs.sorting", "Sorter.finish"),
    "half a file of sort": Phase("sort", "shutil", "copyfile", 40, True),
    "before folders of sort": Phase("sort", "spice_pl.runs.sorting", "Sorter.finish"),
    "half of attention.npz": Phase("report", "numpy", "savez_compressed", 1, True),
    "half of a report": Phase("report", "pathlib", "Path.write_text", 1, True),
}
SWEEP = Phase("sweep", "spice_pl.stages.moco", "MoCoModule.training_step", 9)  # of the 2nd trial
SWEEP_ENDS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": RESUME_CODE, "SIGHUP": RESUME_CODE}


def run(arguments: Sequence[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command line in a child; return its exit code, negative after a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["train.py", *arguments]
        prepare()
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_at(phase: Phase, how: signal.Signals = signal.SIGKILL) -> None:
    """End this process at a phase; only for a child, as it patches modules."""
    holder: Any = importlib.import_module(phase.module)
    *owners, name = phase.name.split(".")
    for each in owners:
        holder = getattr(holder, each)
    original, calls = getattr(holder, name), []

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) != phase.at:
            return original(*args, **more)
        result = original(*args, **more) if phase.after else None
        if phase.after:
            halve(*args)
        os.kill(os.getpid(), how)
        return result if phase.after else original(*args, **more)  # stopped at the next moment

    setattr(holder, name, counted)


def halve(*args: Any) -> None:
    """Cut the file that a call has written in half, as if it were still being written."""
    files = [each for each in args if isinstance(each, Path) and each.is_file()]
    if files and any(part.startswith(".") for part in files[-1].parts):  # a temporary name
        os.truncate(files[-1], files[-1].stat().st_size // 2)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return what must be the same: arrays, tables and sorted files, and that a page has an end."""
    found: dict[str, bytes | None] = {}
    for path in sorted((folder / "runs").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.startswith(".") and path.name != ".hydra":
            found[f"{name} was left"] = None
        elif path.is_file() and (path.name in KEPT or "sorted" in path.parts):
            found[name] = path.read_bytes()
        elif path.name == "report.html":
            found[name] = path.read_bytes()[-8:]
    return found


def phases(root: Path, only: Sequence[str] = ()) -> dict[str, list[str]]:
    """End each command in each of its phases, give it again, and compare the folders of runs."""
    photos = write_folder(root / "photos", classes=False)
    straight, done = root / "straight", root / "done"
    log = root / "straight.log"

    def line(command: str, place: Path) -> list[str]:
        model = f"predict.model={done / 'runs/photos/proto/seed0/model.spice'}"
        more = {
            "train": [*TINY, *SHORT, "checkpoint_minutes=0"],
            "predict": [*TINY, "stage=predict", model, "predict.sort=copy"],
            "sort": [*TINY, "stage=sort", "sort.upstream=proto"],
            "report": [*TINY, "stage=report", "report.upstream=proto"],
            "sweep": [*TINY, "stages=[moco]", "seed=0,1", f"hydra.sweep.dir={place / 'sweep'}"],
        }[command]
        places = [f"runs_dir={place / 'runs'}", f"cache_dir={place / 'cache'}"]
        return [str(photos), *places, *more, *(["-m"] if command == "sweep" else [])]

    def must(command: str, place: Path) -> None:
        if code := run(line(command, place), log):
            raise RuntimeError(f"{command} ends with {code}: {log.read_text()[-2000:]}")

    must("train", done)
    whole = {}
    for command in ("train", "predict", "sort", "report", "sweep"):
        place = straight / command
        if command not in ("train", "sweep"):
            shutil.copytree(done, place)
        must(command, place)
        whole[command] = contents(place)
    cases = [(name, phase, signal.SIGKILL, -signal.SIGKILL) for name, phase in PHASES.items()]
    cases += [
        (f"{name} of a sweep", SWEEP, signal.Signals[name], code)
        for name, code in SWEEP_ENDS.items()
    ]
    wrong: dict[str, list[str]] = {}
    for number, (name, phase, how, expected) in enumerate(cases):
        if only and name not in only:
            continue
        place, log = root / f"killed{number}", root / f"killed{number}.log"
        if phase.command not in ("train", "sweep"):
            shutil.copytree(done, place)
        arguments = line(phase.command, place)
        more = ["resume=true"] if phase.command in ("train", "sweep") else []
        codes = run(arguments, log, partial(kill_at, phase, how)), run([*arguments, *more], log)
        found, right = contents(place), whole[phase.command]
        wrong[name] = [f"{key} differs" for key in right if found.get(key) != right[key]]
        wrong[name] += [f"{key} should not be there" for key in found if key not in right]
        if codes != (expected, 0):
            wrong[name] += [f"codes {codes}, not {(expected, 0)}", log.read_text()[-2000:]]
    return wrong


if __name__ == "__main__":
    print(json.dumps(phases(Path(sys.argv[1]), sys.argv[2:])))
