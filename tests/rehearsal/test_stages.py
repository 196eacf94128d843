"""Every stage as on one GPU, as on two, and resumed inside an epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import make_job
from tests.rehearsal.device import Rehearsal, rehearsal
from tests.rehearsal.machine import Step, pretended_gpu

from spice_pl.callbacks.checkpoints import Checkpoints
from spice_pl.job.run import run_stages
from spice_pl.system.interrupts import Stopped


def semi(name: str) -> tuple[str, ...]:
    """Settings of a semi-supervised stage that runs in a second."""
    return (
        *(f"{name}.epochs=2", f"{name}.module.steps_per_epoch=3", f"{name}.module.kmeans_steps=2"),
        *(f"{name}.streams.labelled.batch_size=2", f"{name}.streams.unlabelled.batch_size=10"),
    )


MORE = {
    "moco": ("moco.watch_epochs=1", "augment=photographs"),
    "simclr": ("simclr.epochs=2", "simclr.watch_epochs=1", "simclr.streams.images.batch_size=30"),
    "scan": ("scan.epochs=2", "scan.streams.images.batch_size=30", "scan.module.num_neighbors=5"),
    "selflabel": (
        *("selflabel.upstream=proto", "selflabel.epochs=2"),
        "selflabel.streams.images.batch_size=30",
    ),
    "proto": ("proto.module.prior=estimated", "augment=photographs"),
    **{name: semi(name) for name in ("flexmatch", "freematch", "softmatch", "clusmatch")},
}
FIRST: tuple[str, ...] = ("moco", "simclr", "embed")
STAGES: tuple[str, ...] = (*FIRST, "proto", "fixmatch", "scan", "selflabel")
STAGES += ("flexmatch", "freematch", "softmatch", "clusmatch", "supervised")


def runs_of(stage: str, request: pytest.FixtureRequest) -> Sequence[str]:
    """Overrides of a job of a stage, with the runs that it starts from."""
    overrides: Sequence[str] = request.getfixturevalue("fresh" if stage in FIRST else "upstream")
    replaces = ("overwrite=true",) if stage == "proto" else ()
    return (*overrides, f"stage={stage}", *MORE.get(stage, ()), *replaces)


TABLE = Path(__file__).with_name("per_step.json")


def kinds_of_steps(stage: str, steps: Sequence[Step]) -> dict[str, Step]:
    """Return a step, and of stage 2 a batch, the end of a cycle, and the choice of a head."""
    if not steps:  # a stage that trains nothing
        return {}
    kinds = {stage: min(steps, key=lambda step: step.launches.total())}
    if stage == "proto":
        kinds["proto, end of a cycle"] = steps[0]
        kinds["proto, end of a cycle and choice of a head"] = steps[2]
    if stage == "clusmatch":
        kinds["clusmatch, new k-means labels"] = max(steps, key=lambda step: step.waits.total())
    return kinds


def waits_of(stage: str, kind: str, steps: Sequence[Step]) -> dict[tuple[str, str], int]:
    """Return the waits of a step by what and where."""
    return dict(kinds_of_steps(stage, steps)[kind].waits)


def per_step(stage: str, steps: Sequence[Step]) -> dict[str, dict[str, int]]:
    """Return waits and launches of each kind of step."""
    return {
        kind: {
            "waits": step.waits.total(),
            "launches": step.launches.total(),
            "launches of views": step.view_launches,
        }
        for kind, step in kinds_of_steps(stage, steps).items()
    }


def rehearse(*overrides: str) -> Rehearsal:
    """Run a job inside a rehearsal; return its counts."""
    with rehearsal() as seen:
        run_stages(make_job(*overrides))
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_on_one_gpu_with_at_most_these_waits_and_launches(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table may only go down; UPDATE_PER_STEP=1 writes the numbers of this machine."""
    overrides = runs_of(stage, request)
    with pretended_gpu(monkeypatch) as steps:
        assert rehearse(*overrides).launches
    allowed = json.loads(TABLE.read_text())
    if "UPDATE_PER_STEP" in os.environ:
        allowed |= per_step(stage, steps.steps)
        TABLE.write_text(json.dumps(allowed, indent=1, sort_keys=True) + "\n")
    for kind, counts in per_step(stage, steps.steps).items():
        more = {what: n for what, n in counts.items() if n > allowed[kind][what]}
        places = sorted(waits_of(stage, kind, steps.steps).items())
        assert not more, f"{kind}: {more}, allowed {allowed[kind]}; waits at {places}"


@pytest.mark.filterwarnings("ignore:It is recommended to use")
@pytest.mark.parametrize("stage", ["moco", "simclr"])
def test_a_stage_runs_on_rank_0_of_two_gpus(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = runs_of(stage, request)
    with pretended_gpu(monkeypatch, 2):
        assert rehearse(*overrides).launches


@pytest.mark.parametrize("stage", ["moco", "proto", "fixmatch", "clusmatch"])
def test_a_stage_continues_inside_an_epoch(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = runs_of(stage, request)
    with pretended_gpu(monkeypatch):
        with monkeypatch.context() as patch:
            answers = iter([(False, False)] + [(True, True)] * 99)
            patch.setattr(Checkpoints, "_agreed", lambda *_, **__: next(answers))
            with pytest.raises(Stopped):
                rehearse(*overrides)
        kept = [each for each in overrides if each != "overwrite=true"]
        rehearse(*kept, "resume=true")
