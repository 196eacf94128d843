"""Record what a result depends on besides its settings: versions, processor, commit."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("spice-pl", "torch", "torchvision", "pytorch-lightning", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that influence results."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """Return processor, GPU, threads, whether torch is deterministic, and this code's commit."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "commit": _commit(Path(__file__).parents[3]),  # of src/spice_pl/system/provenance.py
    }


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
