"""Start one process (rank) per device, with the resolved settings of the job.

Only the parent reads Hydra's command line. In a sweep all ranks of a trial therefore get the same
settings; a rank that read the command line again would draw settings of its own. The parent does
not train. It waits for the ranks, and ends all of them when one fails.
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
from spice_pl.system.files import check_temporary
from spice_pl.system.interrupts import RESUME_CODE, Interrupts, Stopped

PARENT = "SPICE_PL_PARENT"  # number of the process that launched the ranks


def in_rank() -> bool:
    """Whether this process is a rank: started here, by torchrun, or by srun with several tasks.

    SLURM_NTASKS is set by salloc and sbatch too, where one process runs; the number of tasks of the
    step is set by srun alone.
    """
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def is_ours() -> bool:
    """Whether `launch_ranks` started this rank; then its parent checked folders and holds locks."""
    return PARENT in os.environ


def rank() -> int:
    """Return the number of this process among all ranks; 0 without ranks."""
    if not in_rank():  # salloc and sbatch set SLURM_PROCID too
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_first_rank() -> bool:
    """Whether this process writes the results of all ranks; True where there are no ranks."""
    return rank() == 0


def launch_ranks(
    num_ranks: int, job: str, locks: Sequence[int] = (), grace_s: float = 10.0
) -> None:
    """Run `python -m spice_pl.job.rank FILE` once per rank and wait for all ranks.

    A signal that asks this process to stop is passed on to the ranks, which save and end. If this
    process is killed, the system sends them SIGTERM (`end_with_parent`).

    Args:
        num_ranks: number of processes, all on this machine.
        job: YAML that every rank reads.
        locks: descriptors of lock files, which stay open until the last rank has ended.
        grace_s: seconds that the other ranks get to end after one has failed.

    Raises:
        UsageError: a rank ended because of a mistake in the settings or data (exit code 2).
        Stopped: the ranks were asked to stop and have saved.
        RuntimeError: a rank failed in another way; its own error is in the output above.
    """
    check_temporary()
    with tempfile.TemporaryDirectory(prefix="spice-pl-") as folder, Interrupts() as interrupts:
        interrupts.deferred = True
        file = Path(folder, "job.yaml")
        threads = max(1, (os.cpu_count() or 1) // num_ranks)
        file.write_text(job, encoding="utf-8")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        # Inside a SLURM task, its variables would make Lightning count SLURM's tasks as ranks.
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
                        pass_fds=[each for each in locks if each >= 0],  # Windows passes none
                        start_new_session=True,  # only this process gets Ctrl-C, and passes it on
                    )
                )
            _wait(ranks, grace_s, file, interrupts)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def end_with_parent() -> None:
    """Have the system send SIGTERM to this rank when the process that launched it dies."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # the parent died before this call
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
    failed = [i for i, code in enumerate(codes) if code not in (None, 0)]  # None: still running
    # A rank that is signalled before its handler is installed dies with -signum; it had nothing
    # to save yet, so count it as stopped.
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
