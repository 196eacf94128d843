"""Memory that this process may still take before the system kills it."""

from __future__ import annotations

from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Return the bytes that can still be taken: of the machine with its swap, and of the container.

    None where the system does not say it in /proc, such as macOS.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    if "MemAvailable" not in found:
        return None
    free = found["MemAvailable"] + found.get("SwapFree", 0)
    try:  # version 2 of control groups; "max" is no limit
        limit, used = (GROUP.joinpath(f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
