"""Record what a result depends on besides its settings: versions, processor, commit."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch

from spice_pl.system.command import version_of

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PACKAGES = ("spice-pl", "torch", "torchvision", "pytorch-lightning", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that influence results."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """Return processor, GPU, threads, whether torch is deterministic, and this code's commit."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "commit": _commit(Path(__file__).parents[3]),  # of src/spice_pl/system/provenance.py
    }


def peak_memory_mb() -> float:
    """Return the most memory that this process has held, in MB of 2^20 bytes."""
    if resource is None:
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit(root: Path) -> str | None:
    """Return the commit checked out in a folder; None if it is not a repository."""
    head = root / ".git"
    try:
        if head.is_file():  # in a worktree .git is a file that names the folder
            head = Path(head.read_text(encoding="utf-8").partition(":")[2].strip())
        text = (head / "HEAD").read_text(encoding="utf-8").strip()
        if not text.startswith("ref: "):
            return text
        name, common = text.removeprefix("ref: "), head / "commondir"
        if common.is_file():
            head = head / common.read_text(encoding="utf-8").strip()
        if (head / name).is_file():
            return (head / name).read_text(encoding="utf-8").strip()
        packed = (head / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return None
