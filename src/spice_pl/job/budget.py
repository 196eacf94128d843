"""minutes=N: lower views, then epochs, then steps, until a job fits into its time.

What is lowered is settled when a stage starts, by the time that is left then, and written to
minutes.json in its folder. A run that continues takes the numbers of that file.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.costs import Costs
from spice_pl.job.fit import is_named
from spice_pl.job.forecast import Part, stage_part
from spice_pl.job.job import Job
from spice_pl.job.plan import Step
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.small_files import parse_object, read_text

FILE_NAME = "minutes.json"
# What is lowered, in this order, and the least value. Keys are below the name of a stage.
LEVELS: Sequence[Mapping[str, int]] = (
    {"module.view_bank": 1},  # views
    {"epochs": 2},  # epochs
    {"module.repeats": 1, "module.steps_per_epoch": 8},  # steps
)
HALVINGS = 12
SLOWER = (1.0, 4.0)  # bounds of how much slower the machine is than when it was measured


@dataclass(frozen=True)
class Work:
    """A stage that is still to run.

    Attributes:
        step: the stage, with the settings that nothing has lowered.
        own: its settings, fitted to the data.
        costs: what its parts cost.
    """

    step: Step
    own: Mapping[str, Any]
    costs: Costs

    def part(self, images: ImageSet, num_clusters: int, values: Mapping[str, int]) -> Part:
        """Return its line of the plan, with some settings replaced, by full key."""
        own, before = copy.deepcopy(dict(self.own)), f"{self.step.name}."
        for key, value in values.items():
            if key.startswith(before):
                _put(own, key.removeprefix(before), value)
        step = replace(self.step, epochs=int(own.get("epochs", 0)))
        return stage_part(step, own, images, num_clusters, self.costs)

    def can_lower(self, given: Sequence[str]) -> list[dict[str, tuple[int, int]]]:
        """Return value and least value by full key, for each level."""
        found = []
        for level in LEVELS:
            keys = {}
            for key, least in level.items():
                value, name = look_up(self.own, key), f"{self.step.name}.{key}"
                if isinstance(value, int) and value > least and not is_named(name, given):
                    keys[name] = (value, least)
            found.append(keys)
        return found


@dataclass
class Budget:
    """The time that a job may take.

    Attributes:
        minutes: N; None without a limit.
        works: the stages that are still to run, by name.
        images: the data set; its pixels are not read.
        started: when the job started.
        slower: time of the last stage over what was foretold for it.
    """

    minutes: float | None = None
    works: dict[str, Work] = field(default_factory=dict)
    images: ImageSet | None = None
    started: float = field(default_factory=time.monotonic)
    slower: float = 1.0

    def lowered(
        self, job: Job, names: Sequence[str], num_clusters: int, other: float = 0.0
    ) -> dict[str, int]:
        """Return the settings that may be lowered, with values that fit, by full key.

        Args:
            job: the job.
            names: stages that are still to run. Those that have started keep their values.
            num_clusters: K, or a guess of it.
            other: seconds that everything beside these stages takes.
        """
        images, works = self.images, [self.works[name] for name in names if name in self.works]
        if self.minutes is None or images is None:
            return {}
        values: dict[str, int] = {}
        levels: list[dict[str, tuple[int, int]]] = [{} for _ in LEVELS]
        for work in works:
            earlier = None if job.cfg.overwrite else recorded(work.step.folder, self.minutes)
            if earlier is not None:
                values |= earlier
                continue
            for level, keys in zip(levels, work.can_lower(job.overrides), strict=True):
                level |= keys
        values |= {key: value for level in levels for key, (value, _) in level.items()}
        left = 60 * self.minutes - (time.monotonic() - self.started)

        def fits(some: Mapping[str, int]) -> bool:
            parts = [work.part(images, num_clusters, {**values, **some}) for work in works]
            return self.slower * (other + sum(part.seconds or 0.0 for part in parts)) <= left

        for level in levels:
            if not fits({}):
                values |= _largest(level, fits)
        return values

    def note(self, step: Step, seconds: float) -> None:
        """Compare the time that a stage took with what was foretold."""
        if step.name not in self.works or self.images is None:
            return
        values = {
            f"{step.name}.{key}": look_up(step.own, key)
            for level in LEVELS
            for key in level
            if isinstance(look_up(step.own, key), int)
        }
        foretold = self.works[step.name].part(self.images, max(step.num_clusters, 2), values)
        if foretold.seconds:
            low, high = SLOWER
            self.slower = min(max(seconds / foretold.seconds, low), high)


def recorded(folder: RunFolder, minutes: float | None) -> dict[str, int] | None:
    """Return what an earlier part of a run chose for the same minutes; None without a record.

    Raises:
        UsageError: minutes.json is damaged.
    """
    file = folder.path / FILE_NAME
    if not file.is_file():
        return None
    try:
        found = parse_object(read_text(file))
        if found["minutes"] != minutes:
            return None
        return {str(key): int(value) for key, value in found["settings"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is damaged ({error}); overwrite=true makes its run again"
        ) from error


def look_up(own: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if there is none.

    >>> look_up({"module": {"repeats": 8}}, "module.repeats")
    8
    """
    value: Any = own
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _put(own: dict[str, Any], key: str, value: int) -> None:
    *before, last = key.split(".")
    for name in before:
        own = own[name]
    own[last] = value


def _largest(
    level: Mapping[str, tuple[int, int]], fits: Callable[[Mapping[str, int]], bool]
) -> dict[str, int]:
    """Return the largest values of a level that fit, all lowered by one share; else the least."""

    def values(share: float) -> dict[str, int]:
        return {key: max(least, int(share * value)) for key, (value, least) in level.items()}

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(values(middle)) else (low, middle)
    return values(low)
