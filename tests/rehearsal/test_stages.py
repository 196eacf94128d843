"""Every stage as on one GPU, as on two, and resumed inside an epoch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import make_job
from tests.rehearsal.device import OnDevice, Rehearsal, rehearsal
from tests.rehearsal.machine import Step, pretended_gpu

from spice_pl.callbacks.checkpoints import Checkpoints
from spice_pl.data import transfer
from spice_pl.job import finish
from spice_pl.job.run import run_stages
from spice_pl.models.portable import load
from spice_pl.nn.places import fine_feature_map
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
    "empssl": (
        *("empssl.epochs=2", "empssl.watch_epochs=1", "empssl.streams.images.batch_size=30"),
        *("empssl.module.sizes=[8,8]", "augment=photographs"),
    ),
    **{
        name: (f"{name}.epochs=2", f"{name}.watch_epochs=1", f"{name}.streams.images.batch_size=30")
        for name in ("vicreg", "fastsiam")
    },
    "cc": ("cc.epochs=2", "cc.watch_epochs=1", "cc.streams.images.batch_size=30"),
    "propos": (
        *("propos.epochs=2", "propos.watch_epochs=1", "propos.streams.images.batch_size=30"),
        *("propos.module.warmup_epochs=0", "propos.module.hidden_dim=16"),
    ),
    "cdc": ("cdc.epochs=2", "cdc.streams.images.batch_size=30", "cdc.module.hidden_dim=16"),
    "dcboost": (
        *("dcboost.upstream=proto", "dcboost.epochs=2", "dcboost.watch_epochs=1"),
        *("dcboost.streams.images.batch_size=30", "dcboost.module.hidden_dim=16"),
        "dcboost.module.warmup_epochs=0",
    ),
    "scan": ("scan.epochs=2", "scan.streams.images.batch_size=30", "scan.module.num_neighbors=5"),
    "selflabel": (
        *("selflabel.upstream=proto", "selflabel.epochs=2"),
        "selflabel.streams.images.batch_size=30",
    ),
    "proto": ("proto.module.prior=estimated", "augment=photographs"),
    "proto, joint": ("proto.module.joint=multi_head",),
    "proto, view_bank": ("proto.module.view_bank=2",),
    **{name: semi(name) for name in ("flexmatch", "freematch", "softmatch", "clusmatch")},
}
FIRST: tuple[str, ...] = ("moco", "simclr", "empssl", "vicreg", "fastsiam")
FIRST += ("cc", "propos", "embed")
STAGES: tuple[str, ...] = (*FIRST, "cdc", "dcboost", "proto", "fixmatch", "scan", "selflabel")
STAGES += ("flexmatch", "freematch", "softmatch", "clusmatch", "supervised")
VARIANTS: tuple[str, ...] = ("proto, joint", "proto, view_bank")


def runs_of(stage: str, request: pytest.FixtureRequest) -> Sequence[str]:
    """Overrides of a job of a stage or variant, with the runs that it starts from."""
    overrides: Sequence[str] = request.getfixturevalue("fresh" if stage in FIRST else "upstream")
    name = stage.partition(",")[0]
    replaces = ("overwrite=true",) if name == "proto" else ()
    return (*overrides, f"stage={name}", *MORE.get(stage, ()), *replaces)


TABLE = Path(__file__).with_name("per_step.json")


def kinds_of_steps(stage: str, steps: Sequence[Step]) -> dict[str, Step]:
    """Return a step, and of stage 2 a batch, the end of a cycle, and the choice of a head."""
    if not steps:  # a stage that trains nothing
        return {}
    kinds = {stage: min(steps, key=lambda step: step.launches.total())}
    if stage.startswith("proto"):
        kinds[f"{stage}, end of a cycle"] = steps[0]
        kinds[f"{stage}, end of a cycle and choice of a head"] = steps[2]
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


def per_epoch(stage: str, epochs: Sequence[Counter[tuple[str, str]]]) -> dict[str, dict[str, int]]:
    """Return the waits of a whole epoch, validation included: ours, and those inside Lightning."""
    if not epochs:
        return {}
    theirs = sum(n for (_, place), n in epochs[0].items() if place.startswith("pytorch_lightning"))
    ours = epochs[0].total() - theirs
    return {f"{stage}, an epoch": {"waits": ours, "waits inside Lightning": theirs}}


def rehearse(*overrides: str) -> Rehearsal:
    """Run a job inside a rehearsal; return its counts."""
    with rehearsal() as seen:
        run_stages(make_job(*overrides))
    return seen


@pytest.mark.parametrize("stage", [*STAGES, *VARIANTS])
def test_a_stage_runs_on_one_gpu_with_at_most_these_waits_and_launches(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table may only go down; UPDATE_PER_STEP=1 writes the numbers of this machine."""
    overrides = runs_of(stage, request)
    monkeypatch.setattr(transfer, "free_memory", lambda _: 1e12)
    with pretended_gpu(monkeypatch) as steps:
        assert rehearse(*overrides).launches
    found = per_step(stage, steps.steps) | per_epoch(stage, steps.epochs)
    allowed = json.loads(TABLE.read_text())
    if "UPDATE_PER_STEP" in os.environ:
        allowed |= found
        TABLE.write_text(json.dumps(allowed, indent=1, sort_keys=True) + "\n")
    for kind, counts in found.items():
        more = {what: n for what, n in counts.items() if n > allowed[kind][what]}
        of_epoch = kind.endswith("an epoch")
        waits = steps.epochs[0] if of_epoch else waits_of(stage, kind, steps.steps)
        assert not more, f"{kind}: {more}, allowed {allowed[kind]}; waits {sorted(waits.items())}"


# Launches of views and random numbers in a step of release 0.2, with batches of conf/.
VIEWS_BEFORE = {"moco": 736, "simclr": 736, "proto": 983, "scan": 920, "selflabel": 970}
VIEWS_BEFORE |= dict.fromkeys(("fixmatch", "flexmatch", "freematch", "softmatch", "clusmatch"), 842)


def test_the_table_has_no_wait_in_a_step_and_a_quarter_of_the_launches_of_views() -> None:
    table = json.loads(TABLE.read_text())
    steps = [each for each in (*STAGES, *VARIANTS) if each != "embed"]  # which trains nothing
    assert {stage: table[stage]["waits"] for stage in steps} == dict.fromkeys(steps, 0)
    for stage, before in VIEWS_BEFORE.items():
        assert 4 * table[stage]["launches of views"] <= before, stage


@pytest.mark.parametrize("stage", ["moco", "propos", "flexmatch", "clusmatch", "scan"])
def test_nothing_that_lasts_moves_in_memory_and_rates_are_tensors(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph reads and writes the addresses that it was captured with."""
    overrides = runs_of(stage, request)
    with pretended_gpu(monkeypatch) as steps:
        rehearse(*overrides, f"{stage}.epochs=1")
    first, last = steps.addresses[1], steps.addresses[-1]
    assert len(steps.addresses) > 2
    assert first == last, {name for name in last if first.get(name) != last[name]}
    assert any(name.startswith("state ") for name in first)
    assert all(isinstance(each, OnDevice) for each in steps.rates)
    assert bool(steps.rates) is (stage != "scan")  # SCAN's rate is constant


@pytest.mark.filterwarnings("ignore:It is recommended to use")
@pytest.mark.parametrize(
    "stage",
    [
        *("moco", "simclr", "empssl", "vicreg", "fastsiam", "cc", "propos", "cdc", "dcboost"),
        *("proto", "fixmatch", "freematch", "scan"),
    ],
)
def test_a_stage_runs_on_rank_0_of_two_gpus(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = runs_of(stage, request)
    with pretended_gpu(monkeypatch, 2):
        assert rehearse(*overrides).launches


def test_stage_2_starts_at_kmeans_on_a_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = runs_of("proto", request)
    with pretended_gpu(monkeypatch):
        assert rehearse(*overrides, "proto.module.start=kmeans").launches


@pytest.mark.parametrize("stage", ["moco", "propos", "proto", "fixmatch", "clusmatch"])
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


@pytest.mark.parametrize("stage", ["moco", "fixmatch"])
def test_images_that_are_resident_and_images_that_are_streamed_give_the_same_bits(
    stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = runs_of(stage, request)
    monkeypatch.setattr(transfer, "free_memory", lambda _: 1e12)
    features: list[bytes] = []
    ahead: list[transfer.Ahead] = []
    original = transfer.Ahead.__iter__

    def noted(self: transfer.Ahead) -> Iterator[Any]:
        ahead.append(self)
        return original(self)

    monkeypatch.setattr(transfer.Ahead, "__iter__", noted)
    with pretended_gpu(monkeypatch):
        for mode in ("resident", "stream"):
            ahead.clear()
            rehearse(*overrides, f"trainer.data={mode}", "overwrite=true")
            folder = make_job(*overrides).folder(stage)
            features.append((folder.path / "features.npy").read_bytes())
            assert bool(ahead) is (mode == "stream")
    assert features[0] == features[1]


def test_a_model_predicts_and_names_similar_images_on_a_gpu(
    upstream: Sequence[str],
) -> None:
    file = make_job(*upstream).folder("proto").path / "model.spice"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    wanted = next(load(file, device="cpu").stream([("abcde", pixels)]))
    with rehearsal() as seen, torch.inference_mode():
        model = load(file, device="pretend")
        batches = [("abcde", pixels)] * 3
        found = [(each, seen.waits.total()) for each in model.stream(batches)][1:]
    assert found[0][0].nearest == wanted.nearest
    assert np.array_equal(found[0][0].clusters, wanted.clusters)
    assert found[1][1] - found[0][1] <= 7  # per batch: pixels, and six results


def test_attention_is_computed_on_the_gpu(
    upstream: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    original = fine_feature_map

    def noted(encoder: torch.nn.Module, images: torch.Tensor) -> Any:
        devices.append(images.device.type)
        return original(encoder, images)

    monkeypatch.setattr(finish, "fine_feature_map", noted)
    with pretended_gpu(monkeypatch):
        rehearse(*upstream, "stage=proto", "proto.epochs=1", "overwrite=true")
    assert set(devices) == {"pretend"}
