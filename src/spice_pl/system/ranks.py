"""One process a device, started with the job's own resolved settings.

Hydra's command line is read once, by the parent: a sweep therefore hands each trial's settings to
all of its ranks, where a child that reads the command line again would draw its own.
The parent does not train. It waits, and ends every rank as soon as one has failed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from spice_pl.errors import UsageError
from spice_pl.system.interrupts import RESUME_CODE, Interrupts, Stopped

PARENT = "SPICE_PL_PARENT"  # process that launched the ranks


def in_rank() -> bool:
    """Whether this process is a rank already: ours, torchrun's or one of several tasks of srun."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def is_ours() -> bool:
    """Whether `launch_ranks` started this rank; its parent has checked folders and holds locks."""
    return PARENT in os.environ


def rank() -> int:
    """Return the number of this process among all ranks; 0 without ranks."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_first_rank() -> bool:
    """Whether this process writes what all ranks have made; true of a process without ranks."""
    return rank() == 0


def launch_ranks(
    num_ranks: int, job: str, locks: Sequence[int] = (), grace_s: float = 10.0
) -> None:
    """Run `python -m spice_pl.job.rank FILE` once a rank and wait for all of them.

    A signal that asks this process to stop is passed on to the ranks, which save and end. Should
    this process be killed, the ranks are asked to stop by the system.

    Args:
        num_ranks: processes on this machine.
        job: YAML that every rank reads.
        locks: open files that stay open as long as a rank lives.
        grace_s: seconds that a rank has to end after another has failed.

    Raises:
        UsageError: a rank stopped for a reason that a person can mend (exit code 2).
        Stopped: the ranks were asked to stop and have saved.
        RuntimeError: a rank failed otherwise; its own error stands above.
    """
    with tempfile.TemporaryDirectory(prefix="spice-pl-") as folder, Interrupts() as interrupts:
        interrupts.deferred = True
        file = Path(folder, "job.yaml")
        threads = max(1, (os.cpu_count() or 1) // num_ranks)
        file.write_text(job, encoding="utf-8")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        # Inside a task of SLURM, whose variables would make Lightning count its tasks as ranks.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(num_ranks):
                ranks.append(
                    subprocess.Popen(  # noqa: S603 - our own interpreter, our own file
                        [sys.executable, "-m", "spice_pl.job.rank", str(file)],
                        env=inherited
                        # More threads than cores starve each other.
                        | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
                        | address
                        | {
                            "LOCAL_RANK": str(rank),
                            "RANK": str(rank),
                            "NODE_RANK": "0",
                            "WORLD_SIZE": str(num_ranks),
                            PARENT: str(os.getpid()),
                        },
                        pass_fds=list(locks),
                        start_new_session=True,  # Ctrl-C reaches them through this process alone
                    )
                )
            _wait(ranks, grace_s, file, interrupts)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def end_with_parent() -> None:
    """Have the system send SIGTERM to this rank when the process that launched it has died."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before we asked
        raise SystemExit(RESUME_CODE)


def _wait(
    ranks: list[subprocess.Popen[bytes]], grace_s: float, job: Path, interrupts: Interrupts
) -> None:
    told = False
    while any(rank.poll() is None for rank in ranks):
        if interrupts.asked is not None and not told:
            told = True
            for rank in ranks:
                rank.send_signal(interrupts.asked)
        failed = [i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
        if failed:
            deadline = time.monotonic() + grace_s
            while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                time.sleep(0.1)
            break
        time.sleep(0.1)
    codes = [rank.poll() for rank in ranks]
    if 2 in codes:
        reasons = sorted(job.parent.glob(f"{job.name}.error*"))
        raise UsageError(
            reasons[0].read_text(encoding="utf-8") if reasons else "the ranks stopped; see above"
        )
    failed = [i for i, code in enumerate(codes) if code not in (None, 0)]  # None: it hangs
    # Asked before it listens, a rank ends by the signal itself; it had nothing to save yet.
    if told and all(codes[i] in (RESUME_CODE, -int(interrupts.asked or 0)) for i in failed):
        raise Stopped
    if failed:
        raise RuntimeError(
            f"rank {failed[0]} ended with code {codes[failed[0]]}; see its error above"
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
