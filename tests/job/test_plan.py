"""What a job says before its work, and what `minutes` makes of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Finished, make_job
from tests.process import train

from spice_pl.data.images import ImageSet
from spice_pl.data.listing import Found, _Scan
from spice_pl.data.sources.survey import survey
from spice_pl.errors import UsageError
from spice_pl.job import outlook
from spice_pl.job.budget import FILE_NAME, Budget, Work
from spice_pl.job.costs import Costs, Watch
from spice_pl.job.forecast import stage_part
from spice_pl.job.job import Job
from spice_pl.job.outlook import planned, span
from spice_pl.job.parts import JobImages
from spice_pl.job.plan import plan
from spice_pl.job.run import run_stages

VIEWS = dict.fromkeys(("plain", "weak", "strong", "query", "key", "patches"), 0.0)
FREE = Costs(encode=0, train=0, views=VIEWS, head_step=0, head_row=0, rows=(0, 0))


def images(number: int) -> ImageSet:
    return ImageSet("some", np.zeros((number, 3, 8, 8), np.uint8), [""] * number, "0")


def work(costs: Costs, *overrides: str) -> tuple[Job, Work]:
    job = make_job("dataset=digits", "dataset.num_clusters=10", *overrides)
    (step,) = plan(job)
    return job, Work(step, step.own, costs)


def told(costs: Costs, *overrides: str, number: int = 1000) -> float:
    _, made = work(costs, *overrides)
    found = made.part(images(number), 10, {}).seconds
    nothing = replace(made, costs=FREE).part(images(number), 10, {}).seconds
    assert found is not None
    assert nothing is not None
    return found - nothing


def test_an_epoch_of_moco_is_forward_and_backward_of_each_image() -> None:
    costs = replace(FREE, train=1.0)
    sizes = ("stage=moco", "moco.streams.images.batch_size=100")
    # 1050 images: 10 whole batches of 100, in 7 epochs.
    assert told(costs, *sizes, "moco.epochs=7", number=1050) == 7 * 1000
    assert told(costs, *sizes, "moco.epochs=7", "moco.module.symmetric=true") == 2 * 7 * 1000


def test_an_epoch_of_empssl_is_all_patches_at_their_size() -> None:
    costs = replace(FREE, train=1.0, views=VIEWS | {"patches": 6.0})
    sizes = ("stage=empssl", "empssl.epochs=7", "empssl.streams.images.batch_size=100")
    patches = "augment.patches.num_patches=5"
    assert told(costs, *sizes, patches, number=1050) == 7 * 1000 * (5 + 6)
    # The images have 8 pixels a side: half of the epochs at a quarter of the cost.
    found = told(costs, *sizes, patches, "empssl.module.sizes=[4,8]")
    assert found == 7 * 1000 * (5 + 6) * (0.25 + 1) / 2


def test_a_bank_embeds_its_views_once_and_fresh_views_each_epoch() -> None:
    costs = replace(FREE, views=VIEWS | {"weak": 1.0, "strong": 10.0})
    assert told(costs, "stage=proto", "proto.module.view_bank=3", "proto.epochs=9") == 3 * 11_000
    assert told(costs, "stage=proto", "proto.epochs=9") == 9 * 11_000


def test_steps_of_the_heads() -> None:
    costs = replace(FREE, head_step=1.0)
    sizes = ("proto.module.buffer_size=500", "proto.module.repeats=4", "proto.epochs=3")
    # 2 cycles of 500 slots, 4 passes over 5 batches of 100 in each.
    assert told(costs, "stage=proto", *sizes, "proto.module.head_batch_size=100") == 3 * 2 * 4 * 5


def test_stage_3_takes_its_steps_whatever_the_number_of_images() -> None:
    costs = replace(FREE, train=1.0)
    sizes = ("fixmatch.epochs=2", "fixmatch.module.steps_per_epoch=5")
    batches = ("fixmatch.streams.labelled.batch_size=3", "fixmatch.streams.unlabelled.batch_size=7")
    for number in (100, 100_000):
        found = told(costs, "stage=fixmatch", *sizes, *batches, number=number)
        assert found == 2 * 5 * (3 + 2 * 7)


def test_a_stage_of_your_own_has_no_known_time() -> None:
    job, made = work(FREE, "stage=moco")
    own = dict(made.own) | {"module": dict(made.own["module"]) | {"_target_": "mine.Stage"}}
    assert stage_part(made.step, own, images(10), 2, FREE).seconds is None
    assert span(None) == "not known"
    assert job.stages == ["moco"]


BANK = (
    *("stage=proto", "proto.module.view_bank=2", "proto.epochs=10", "proto.module.repeats=8"),
    *("proto.module.buffer_size=1000", "proto.module.head_batch_size=100", "answer=network"),
)
COSTS = replace(FREE, encode=0.5, head_step=1.0)


def lowered(made: Work, job: Job, left: float) -> dict[str, int]:
    """Return what is chosen where the views and heads of the stage may take `left` seconds."""
    nothing = made.part(images(1000), 10, {}).seconds
    assert nothing is not None
    rest = nothing - 2 * 1000 - 10 * 8 * 10  # prediction and report
    return Budget((rest + left) / 60, {"proto": made}, images(1000)).lowered(job, ["proto"], 10)


@pytest.mark.parametrize(
    ("left", "view_bank", "epochs", "repeats"),
    [
        (2805, 2, 10, 8),  # two views take 2000 s, ten epochs of 8 passes over 10 batches 800 s
        (1805, 1, 10, 8),  # 1000 s and 800 s
        (1605, 1, 7, 8),  # 605 s for epochs of 80 s
        (1105, 1, 2, 5),  # two epochs of five passes take 100 s, of six 120 s
        (10, 1, 2, 1),  # nothing fits: the least
    ],
)
def test_views_go_first_then_epochs_then_steps(
    left: float, view_bank: int, epochs: int, repeats: int
) -> None:
    job, made = work(COSTS, *BANK)
    assert lowered(made, replace(job, overrides=()), left) == {
        "proto.module.view_bank": view_bank,
        "proto.epochs": epochs,
        "proto.module.repeats": repeats,
    }


def test_what_the_command_line_names_stays() -> None:
    job, made = work(COSTS, *BANK)
    job = replace(job, overrides=BANK)
    assert lowered(made, job, 10) == {}
    free = tuple(text for text in BANK if not text.startswith("proto.epochs"))
    assert lowered(made, replace(job, overrides=free), 10) == {"proto.epochs": 2}


def test_a_slow_machine_gets_less() -> None:
    job, made = work(COSTS, *BANK)
    budget = Budget(60.0, {"proto": made}, images(1000))
    free = replace(job, overrides=())
    assert budget.lowered(free, ["proto"], 10)["proto.epochs"] == 10
    budget.note(made.step, 1e9)  # the stage took far longer than was foretold
    assert budget.slower == 4.0
    assert budget.lowered(free, ["proto"], 10)["proto.epochs"] < 10


def test_time_is_the_mean_without_the_first_call() -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(0.1 if not calls else 0.01)
        time.sleep(calls[-1])

    assert 0.01 <= Watch().seconds(call) < 0.1
    assert len(calls) > 2


def test_a_busy_machine_gets_a_range_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spice_pl.job.costs.load", lambda: 0.0)
    watch, calls = Watch(), iter([0.0, 0.01, 0.03])
    watch.seconds(lambda: time.sleep(next(calls, 0.02)))
    assert 0.2 < watch.idle() < 0.8  # the quickest call took 0.01 s, all 0.02 s on average
    calm = watch.idle()
    monkeypatch.setattr("spice_pl.job.costs.load", lambda: 4.0)  # four programs for each core
    assert watch.idle() == pytest.approx(calm / 4)


def test_the_plan_comes_before_the_work(
    tiny: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(*tiny, "stages=[moco,proto]")
    with caplog.at_level(logging.INFO):
        run_stages(job)
    block = next(text for text in caplog.messages if text.startswith("plan: photos"))
    assert caplog.messages.index(block) < next(
        i for i, text in enumerate(caplog.messages) if text.startswith("moco: starts in")
    )
    for words in ("images     90 used, 0 left out", "encoder    trained here from random weights"):
        assert words in block
    assert "clusters   3" in block
    for words in ("moco    2 epochs of training", "proto   views, cluster heads, report", "in all"):
        assert words in block
    assert str(job.folder("proto").path) in block
    caplog.clear()
    run_stages(make_job(*tiny, "stages=[moco,proto]"))  # all is there: nothing to plan
    assert not any(text.startswith("plan:") for text in caplog.messages)


def test_showing_settings_makes_no_plan(tmp_path: Path) -> None:
    shown = train("--cfg", "job", "dataset=digits", f"runs_dir={tmp_path}")
    assert shown.returncode == 0
    assert "minutes: null" in shown.stdout
    assert "plan:" not in shown.stdout + shown.stderr
    assert not list(tmp_path.iterdir())


def test_files_left_out_and_undecoded_images_are_in_the_plan(
    tiny: Sequence[str],
    photo_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (photo_folder / "notes.txt").write_text("hello")
    monkeypatch.setattr(outlook, "DECODED_FIRST_S", -1.0)  # as if decoding took long
    with caplog.at_level(logging.INFO):
        planned(make_job(*tiny, "stages=[moco,proto]"), Budget(), JobImages())
    block = next(text for text in caplog.messages if text.startswith("plan: photos"))
    assert "90 found, to be decoded; 1 other files left out (1 not an image)" in block
    assert "images  decoding" in block
    assert not any(text.startswith("decoding") for text in caplog.messages)


def test_a_survey_knows_what_is_decoded(tiny: Sequence[str]) -> None:
    job = make_job(*tiny)
    before = survey(job.cfg.dataset)
    assert before is not None
    assert before.num_images == 90
    assert before.seconds > 0
    planned(job, Budget(), JobImages())
    after = survey(job.cfg.dataset)
    assert after is not None
    assert after.seconds == 0


def test_hours_from_random_weights_name_the_short_way(
    tiny: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        planned(make_job(*tiny, "moco.epochs=10000000"), Budget(), JobImages())
    block = next(text for text in caplog.messages if text.startswith("plan: photos"))
    assert "recipe=pretrained" in block
    assert "minutes=N" in block
    assert "moco.epochs=10 fixmatch.epochs=10" in block


def test_minutes_are_kept_by_a_resumed_run(tiny: Sequence[str]) -> None:
    more = [text for text in tiny if not text.startswith(("proto.epochs", "proto.module.repeats"))]
    less = (*more, "stages=[moco,proto]", "minutes=0.001")
    job = make_job(*less)
    run_stages(job)
    file = job.folder("proto").path / FILE_NAME
    chosen = json.loads(file.read_text())
    # moco.epochs is named on the command line; nothing fits into 0.06 s, so the rest is least.
    assert chosen == {
        "minutes": 0.001,
        "settings": {"proto.epochs": 2, "proto.module.repeats": 1},
    }
    assert job.folder("proto").metrics["settings"]["proto.epochs"] == "2"
    assert not (job.folder("moco").path / FILE_NAME).exists()
    # The same minutes choose the same again, although this run had more time.
    file.write_text(json.dumps(chosen | {"minutes": 600.0}))
    run_stages(make_job(*less[:-1], "minutes=600", "resume=true"))
    # Without minutes it is another run, and the message says so.
    with pytest.raises(UsageError, match=r"minutes: 0\.001 -> None"):
        run_stages(make_job(*less[:-1]))


def test_an_estimated_job_that_stopped_after_its_features_continues(tiny: Sequence[str]) -> None:
    more = (*tiny, "dataset.num_clusters=auto", "chain=[moco,proto]", "estimate_k.task.largest=4")
    run_stages(make_job(*more, "stages=[moco]"))
    run_stages(make_job(*more))
    assert make_job(*more).folder("proto").finished


def test_a_run_of_another_name_shows_the_estimate_of_its_features(finished: Finished) -> None:
    more = ("chain=[embed,proto]", "stage=all", "embed.streams={}", "proto.upstream=embed")
    auto = (*more, "dataset.num_clusters=auto", "estimate_k.task.largest=4")
    run_stages(finished.job(*auto, "run=first"))
    estimate = finished.job(*auto, "run=first").folder("estimate_k").metrics["k_estimate"]
    two = finished.job(*more, "dataset.num_clusters=2", "run=two")
    run_stages(two)
    assert two.folder("proto").metrics["k_estimate"]["scores"] == estimate["scores"]
    seed = finished.job(*more, "dataset.num_clusters=2", "run=seed1", "seed=1")
    run_stages(seed)  # other features
    assert seed.folder("proto").metrics["k_estimate"] is None


def test_another_k_takes_the_estimate_along(finished: Finished) -> None:
    run_stages(finished.job("stage=estimate_k", "estimate_k.task.largest=4"))
    run_stages(finished.job("dataset.num_clusters=4", "stage=proto", "overwrite=true"))
    found = finished.folder("proto").metrics
    assert found["num_clusters"] == 4
    assert found["k_estimate"]["candidates"] == [2, 3, 4]
    # Of features that were made again since, it says nothing.
    run_stages(finished.job("stage=moco", "overwrite=true", "moco.epochs=1"))
    run_stages(finished.job("stage=proto", "overwrite=true"))
    assert finished.folder("proto").metrics["k_estimate"] is None


@pytest.mark.parametrize("minutes", ["0", "-1", "soon"])
def test_minutes_must_be_a_positive_number(tiny: Sequence[str], minutes: str) -> None:
    with pytest.raises(UsageError, match=f"minutes={minutes} is not a positive number; give one"):
        run_stages(make_job(*tiny, f"minutes={minutes}"))


def test_a_job_searches_opens_and_names_its_images_once(
    tiny: Sequence[str],
    photo_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (photo_folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (photo_folder / "notes.txt").write_text("hello")
    searched, original = [], _Scan.found

    def found(scan: _Scan) -> Found:
        searched.append(scan)
        return original(scan)

    monkeypatch.setattr(_Scan, "found", found)
    job = make_job(*tiny, "dataset.num_clusters=auto", "stages=[moco,proto]")
    with caplog.at_level(logging.INFO):
        run_stages(job)
    assert job.folder("proto").finished
    assert len(searched) == 1
    for line in ("photos: of 92 files 90 are used", "skipped 1 images", "photos: 90 images of"):
        assert sum(text.startswith(line) for text in caplog.messages) == 1, line
    skipped = job.folder("proto").metrics
    assert skipped["num_images"] + skipped["num_skipped"] == 92


def test_a_run_whose_numbers_are_kept_is_looked_for_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"like=nowhere is not the folder of a run with clusters"):
        run_stages(make_job("like=nowhere", f"runs_dir={tmp_path}"))
    assert not list(tmp_path.iterdir())
