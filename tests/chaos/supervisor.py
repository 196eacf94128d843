"""Kill a pipeline and resume it until it is finished; compare it with an undisturbed run.

`python -m tests.chaos.supervisor FOLDER SEED KILLS` prints one JSON object. Every part of a run is
a forked child, so that the slow imports happen once. A child is ended by a real signal or a full
disk, at a counted step (in the middle of a write, between two files, in a training step) or at any
moment. The supervisor needs its own process: torch's autograd must not have run before a fork.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.conftest import TINY, make_job, run_as_a_person_does, write_folder

from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.runs.folder import RunFolder
from spice_pl.stages import fixmatch, moco, proto
from spice_pl.system.interrupts import RESUME_CODE

# More epochs and batches than TINY, so that a run can stop inside many of them.
SETTINGS = (
    *TINY,
    "moco.epochs=3",
    "proto.epochs=3",
    "proto.module.repeats=1",
    "fixmatch.epochs=3",
    "fixmatch.module.steps_per_epoch=4",
)
STAGES = {
    "moco": moco.MoCoModule,
    "proto": proto.ProtoHeadModule,
    "fixmatch": fixmatch.ReliableFixMatchModule,
}
FILES = (
    *("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy"),
    *("clusters.csv", "metrics.csv", "dataset.json", "model.spice"),
)
STATE = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
VOLATILE = (
    *("seconds", "seconds_in_all", "peak_memory_mb", "overrides", "data_wait_fraction"),
    "machine",  # names the commit, which may move meanwhile
)


class Trap:
    """Counts the steps of a run and acts at the n-th, in the middle of a write."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.count, self.at, self.act = 0, at, act

    def step(self) -> None:
        """Count one."""
        self.count += 1
        if self.count == self.at:
            self.act()

    def install(self) -> None:
        """Count writes and training steps; only for a child process, as it patches modules."""
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (RunFolder, "write_rows"),
            (RunFolder, "create"),
        ):
            setattr(owner, name, self.before(getattr(owner, name)))
        self.install_in_training()
        write = Path.write_bytes

        def write_bytes(path: Path, content: Any) -> int:
            half = len(content) // 2
            with path.open("wb") as file:
                file.write(content[:half])
                file.flush()
                self.step()
            return write(path, content)

        Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]

    def install_in_training(self) -> None:
        """Count training steps."""
        for stage in STAGES.values():
            step = self.before(stage.training_step)  # type: ignore[attr-defined]
            stage.training_step = step  # type: ignore[attr-defined]

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a step counted before each call."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return counted


def fork(
    overrides: Sequence[str],
    log: Path,
    prepare: Callable[[], None],
    after_s: float | None,
    how: int,
) -> tuple[int, float]:
    """Run a job in a child, signal it after some seconds; return its exit code and duration."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                prepare()
                run_as_a_person_does(make_job(*overrides))
                code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if after_s is not None:
        while time.monotonic() - started < after_s:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), time.monotonic() - started
            time.sleep(0.01)
        os.kill(child, how)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def differences(one: Path, other: Path) -> list[str]:
    """Return what should be equal in two finished runs and is not."""
    found = []
    for stage in STAGES:
        folders = [RunFolder(path / "photos" / stage / "seed0") for path in (one, other)]
        for name in FILES:
            contents = [
                (folder.path / name).read_bytes() if (folder.path / name).exists() else b""
                for folder in folders
            ]
            if contents[0] != contents[1]:
                found.append(f"{stage}/{name}")
        states = [torch.load(folder.checkpoint, weights_only=True) for folder in folders]
        found += [
            f"{stage}/last.ckpt {key}" for key in STATE if not same(*(s[key] for s in states))
        ]
        metrics = [folder.metrics for folder in folders]
        for each in metrics:
            for row in each["rows"]:
                row.pop("seconds")
        keys = metrics[0].keys() | metrics[1].keys()
        found += [
            f"{stage}/metrics.json {key}"
            for key in sorted(keys)
            if key not in VOLATILE and metrics[0].get(key) != metrics[1].get(key)
        ]
        left = [path.name for path in folders[1].path.iterdir() if path.name.startswith(".")]
        found += [f"{stage}/{name} was left" for name in left if name != ".hydra"]
    return found


def same(left: Any, right: Any) -> bool:
    """Whether nested containers of tensors and numbers are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def _stopped_inside_an_epoch(runs: Path) -> bool:
    """Whether the unfinished stage will be resumed inside an epoch."""
    for path in runs.glob("photos/*/seed0"):
        folder = RunFolder(path)
        if not folder.finished and folder.checkpoint.is_file():
            saved = torch.load(folder.checkpoint, weights_only=True)
            return bool(saved["ViewsDataModule"]["batches_done"])
    return False


def disk_full() -> None:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def chaos(root: Path, seed: int, kills: int) -> dict[str, Any]:
    """Kill runs until there were `kills` kills; finish and compare each run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    draw = random.Random(seed)  # noqa: S311 - which step to end at
    base = [
        *("dataset=folder", f"dataset.root={write_folder(root / 'photos', classes=True)}"),
        *("dataset.labels=folders", f"cache_dir={root / 'cache'}", *SETTINGS),
    ]
    counted = root / "steps"
    trap = Trap(-1, lambda: None)

    def count() -> None:
        trap.install()
        original = trap.step

        def step() -> None:
            original()
            counted.write_text(str(trap.count))

        trap.step = step  # type: ignore[method-assign]

    straight = root / "straight"
    code, seconds = fork([*base, f"runs_dir={straight}"], root / "straight.log", count, None, 0)
    if code != 0:
        raise RuntimeError((root / "straight.log").read_text())
    steps = int(counted.read_text())
    hits: Counter[str] = Counter()
    wrong: list[str] = []
    compared = inside = 0
    while hits.total() < kills:
        runs, log = root / f"killed{compared}", root / f"killed{compared}.log"
        for part in range(100):
            # Later parts have fewer steps left, so a run may finish before the trap acts.
            at = draw.randint(1, steps // 2)
            how = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "full disk"])
            number = 0 if how == "full disk" else int(signal.Signals[how])
            anywhere = how != "full disk" and draw.random() < 0.3
            training = how != "full disk" and draw.random() < 0.6
            act = disk_full if how == "full disk" else partial(signal.raise_signal, number)
            save_each_batch = draw.random() < 0.5
            trap = Trap(-1 if anywhere else at, act)
            if training and not anywhere:  # few steps of all kinds are inside an epoch
                trap.at = draw.randint(2, 12)
            code, _ = fork(
                [
                    *base,
                    f"runs_dir={runs}",
                    f"checkpoint_minutes={0 if save_each_batch else 10}",
                    *(["resume=true"] if part else []),
                ],
                log,
                trap.install_in_training if training else trap.install,
                draw.uniform(0.2, 1.0) * seconds / 2 if anywhere else None,
                number,
            )
            if code == 0:
                break
            hits[how] += 1
            print(f"run {compared} part {part}: {how}, code {code}", file=sys.stderr)
            inside += _stopped_inside_an_epoch(runs)
            expected = [{"SIGKILL": -signal.SIGKILL, "full disk": 2}.get(how, RESUME_CODE)]
            if anywhere:  # before handlers are installed, a signal has its default effect
                expected += [-number, 1 if how == "SIGINT" else -number]
            if code not in expected:
                wrong.append(f"run {compared} part {part}: {how} ended with {code}: {log}")
                break
        else:
            wrong.append(f"run {compared} did not finish in 100 parts: {log}")
        if wrong:
            break
        wrong += [f"run {compared}: {each}" for each in differences(straight, runs)]
        compared += 1
    return {
        "steps": steps,
        "kills": dict(hits),
        "stopped_inside_an_epoch": inside,
        "runs_compared": compared,
        "wrong": wrong,
        "controls": controls(root, base, straight),
        "cpu_seconds": sum(os.times()[:4]),
    }


def controls(root: Path, base: Sequence[str], straight: Path) -> dict[str, list[str]]:
    """Return the differences found in two broken runs: a wrong batch, a flipped bit."""

    def forget_position() -> None:
        ViewsDataModule.load_state_dict = lambda *_: None  # type: ignore[method-assign]

    runs = root / "forgetful"
    settings = [*base, f"runs_dir={runs}"]
    trap = Trap(2, partial(signal.raise_signal, signal.SIGTERM))  # inside the first epoch
    fork(settings, root / "forgetful.log", trap.install_in_training, None, 0)
    fork([*settings, "resume=true"], root / "forgetful.log", forget_position, None, 0)
    found = {"batches taken twice": differences(straight, runs)}
    flipped = root / "flipped"
    fork([*base, f"runs_dir={flipped}"], root / "flipped.log", lambda: None, None, 0)
    if left := differences(straight, flipped):
        raise RuntimeError(f"a repeated run differs: {left}")
    file = flipped / "photos/fixmatch/seed0/probs.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found["one bit"] = differences(straight, flipped)
    return found


if __name__ == "__main__":
    print(json.dumps(chaos(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
