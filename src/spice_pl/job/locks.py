"""Locks of the folders that a job reads and writes.

| lock of a run's folder | held | meaning |
|---|---|---|
| `RunFolder.lock` | by the step that writes there, while it runs | one writer at a time |
| `RunFolder.used` | by jobs that read or write there, until they end | no result is removed |

All jobs lock folders in the order of their stages, so that no two wait for each other. The parent
of ranks holds the locks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from spice_pl.job.plan import Step
from spice_pl.system import ranks


def holds_locks() -> bool:
    """Whether this process locks the folders of its job."""
    return ranks.is_first_rank() and not ranks.is_ours()


def remove_replaced(steps: Sequence[Step]) -> None:
    """Remove the results that `overwrite=true` replaces, once no other job uses them."""
    if not holds_locks():
        return
    with ExitStack() as alone:
        for step in steps:
            if step.folder.path.is_dir():
                alone.enter_context(step.folder.used(alone=True))
        for step in steps:  # all of them first: an interrupted overwrite leaves no stale result
            step.folder.forget()


@contextmanager
def used_folders(step: Step) -> Iterator[None]:
    """Keep other jobs from removing what a step reads and writes."""
    with ExitStack() as held:
        if holds_locks():
            for folder in (*reversed(step.upstream), *step.more, step.folder):
                if folder == step.folder or folder.path.is_dir():
                    held.enter_context(folder.used())
        yield
