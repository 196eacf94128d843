"""All stages of a job: what they write, and what is reused, refused, resumed and reported."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import HydraException
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import NUM_CLASSES, NUM_IMAGES, Finished, compose, make_job, write_folder
from torch import Tensor, nn

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Stage
from spice_pl.stages.fixmatch import ReliableFixMatchModule
from spice_pl.stages.moco import MoCoModule
from spice_pl.stages.proto import ProtoHeadModule

STAGES: dict[str, type[Stage]] = {
    "moco": MoCoModule,
    "proto": ProtoHeadModule,
    "fixmatch": ReliableFixMatchModule,
}


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def checkpoint(folder: RunFolder) -> dict[str, Any]:
    return dict(torch.load(folder.checkpoint, weights_only=True))


def saved_position(folder: RunFolder) -> tuple[int, int]:
    """Return the epoch of the checkpoint, and the number of its batches that were done."""
    saved = checkpoint(folder)
    return saved["epoch"], saved["ViewsDataModule"]["batches_done"]


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Check that nested containers of tensors and numbers are equal bit for bit."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}.{i}")
    else:
        assert left == right, where


def loss_curve(folder: RunFolder) -> dict[int, float]:
    curve: dict[int, float] = {}
    with (folder.path / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("train/loss"):
                assert int(row["epoch"]) not in curve
                curve[int(row["epoch"])] = float(row["train/loss"])
    return curve


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(pl.Trainer, "fit", fit)


def patch_step(
    monkeypatch: pytest.MonkeyPatch,
    stage: type[Stage],
    change: Callable[[Stage, Any, int], Any],
) -> None:
    """Replace the result of a training step by `change(module, result, batch_idx)`."""
    original = stage.training_step

    def training_step(self: Stage, batch: Any, batch_idx: int) -> Any:
        return change(self, original(self, batch, batch_idx), batch_idx)

    monkeypatch.setattr(stage, "training_step", training_step)


# What a run writes


def test_all_stages_write_their_artifacts(straight: Finished) -> None:
    common = {
        *("dataset.json", "encoder.safetensors", "features.npy", "last.ckpt"),
        *("metrics.csv", "metrics.json", ".hydra/config.yaml", ".hydra/overrides.yaml"),
    }
    clustered = {"clusters.csv", "head.safetensors", "probs.npy", "report.html", "table.md"}
    clustered |= {"model.spice", "attention.npz", "oddities.json"}
    for stage in STAGES:
        files = set(contents(straight.folder(stage).path))
        heads = {"heads.safetensors"} if stage == "proto" else set()
        assert files == common | heads | (clustered if stage != "moco" else set()), stage


def test_images_without_labels_have_clusters_and_no_truth(straight: Finished) -> None:
    for stage in ("proto", "fixmatch"):
        folder = straight.folder(stage)
        with (folder.path / "clusters.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == [f"{i:03}.png" for i in range(NUM_IMAGES)]
        assert [int(row["cluster"]) for row in rows] == folder.probs.argmax(axis=1).tolist()
        metrics = folder.metrics
        assert sum(metrics["cluster_sizes"]) == NUM_IMAGES
        assert all(row["acc"] is row["nmi"] is row["ari"] is None for row in metrics["rows"])
        assert not [key for key in metrics["logged"] if key.startswith("truth/")]
        assert "truth" not in (folder.path / "metrics.csv").read_text().splitlines()[0]


def test_metrics_say_how_results_were_obtained(straight: Finished) -> None:
    metrics = straight.folder("fixmatch").metrics
    assert (metrics["protocol"], metrics["seed"], metrics["devices"]) == ("whole", 0, 1)
    assert metrics["num_images"] == NUM_IMAGES
    assert metrics["num_clusters"] == NUM_CLASSES
    assert metrics["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert metrics["machine"].keys() == {"processor", "gpu", "threads", "deterministic", "commit"}
    assert metrics["machine"]["threads"] == torch.get_num_threads()
    commit = metrics["machine"]["commit"]
    assert commit is None or len(commit) == 40
    spent = [straight.folder(stage).metrics["seconds"] for stage in STAGES]
    assert metrics["seconds_in_all"] == pytest.approx(sum(spent))
    # Without labels there is no row of k-means, which would have no score.
    assert [row["name"] for row in metrics["rows"]] == ["SPICE stage 2", "SPICE stage 3"]


def test_frozen_encoder_and_features_pass_through_stage_2(straight: Finished) -> None:
    moco, proto = (straight.folder(stage).path for stage in ("moco", "proto"))
    before, after = (load_file(path / "encoder.safetensors") for path in (moco, proto))
    assert_same(before, after)
    assert (moco / "features.npy").read_bytes() == (proto / "features.npy").read_bytes()


# Reuse and refusal


def test_finished_stages_are_reused(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    before = contents(finished.runs)
    objective = run_stages(finished.job())
    assert objective == finished.folder("fixmatch").metrics["objective"]
    assert contents(finished.runs) == before


def test_only_what_is_missing_runs(finished: Finished, straight: Finished) -> None:
    shutil.rmtree(finished.folder("fixmatch").path)
    before = contents(finished.folder("proto").path)
    run_stages(finished.job())
    assert contents(finished.folder("proto").path) == before
    names = ("encoder.safetensors", "head.safetensors", "probs.npy", "clusters.csv")
    for name in names:  # a repeated run gives the same bits
        again, first = (each.folder("fixmatch").path / name for each in (finished, straight))
        assert again.read_bytes() == first.read_bytes(), name


def test_single_finished_stage_is_refused(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    with pytest.raises(UsageError, match=r"proto/seed0 is finished; overwrite=true .* resume=true"):
        run_stages(finished.job("stage=proto"))
    shown = run_stages(finished.job("stage=proto", "resume=true"))
    assert shown == finished.folder("proto").metrics["objective"]


def test_overwrite_runs_a_stage_again(finished: Finished, straight: Finished) -> None:
    moco = finished.folder("moco")
    moco.write_json("metrics.json", {"stale": True})
    run_stages(finished.job("stage=moco", "overwrite=true"))
    assert "stale" not in moco.metrics
    for name in ("encoder.safetensors", "features.npy"):
        first = straight.folder("moco").path / name
        assert (moco.path / name).read_bytes() == first.read_bytes(), name


def test_overwrite_and_resume_exclude_each_other(finished: Finished) -> None:
    with pytest.raises(UsageError, match="overwrite=true and resume=true exclude each other"):
        run_stages(finished.job("overwrite=true", "resume=true"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("proto.module.lr=1e-4", r"proto/seed0 .*\n  proto\.module\.lr: 0\.005 -> 0\.0001\n"),
        ("seed=1 run=seed0", r"moco/seed0 .*\n  (moco\.module\.seed.*\n  )?seed: 0 -> 1\n"),
        ("moco.epochs=7", r"moco/seed0 .*\n  moco\.epochs: 2 -> 7\n"),
        ("backbone.widths=[4]", r"moco/seed0 .*\n  backbone\.widths: \[8\] -> \[4\]\n"),
    ],
)
def test_changed_setting_is_refused_by_its_full_key(
    straight: Finished, override: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_stages(straight.job(*override.split()))


def test_settings_that_do_not_change_results_may_differ(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    run_stages(finished.job(f"cache_dir={tmp_path / 'elsewhere'}", "on_bad_image=raise"))


def test_stages_made_from_an_upstream_that_was_replaced_are_refused(
    finished: Finished,
) -> None:
    run_stages(finished.job("stage=moco", "overwrite=true", "moco.module.lr=0.001"))
    with pytest.raises(UsageError, match=r"proto/seed0 .*moco/seed0"):
        run_stages(finished.job("moco.module.lr=0.001"))


def test_unfinished_run_is_refused_without_resume(finished: Finished) -> None:
    (finished.folder("proto").path / "metrics.json").unlink()
    with pytest.raises(UsageError, match=r"proto/seed0 holds an unfinished run; resume=true"):
        run_stages(finished.job("stage=proto"))


# Upstream


@pytest.mark.parametrize(("stage", "before"), [("proto", "moco"), ("fixmatch", "proto")])
def test_missing_upstream_prints_the_command_that_runs_it(
    straight: Finished, tmp_path: Path, stage: str, before: str
) -> None:
    runs = tmp_path / "no runs"
    job = Finished(straight.overrides, runs).job(f"stage={stage}")
    with pytest.raises(UsageError, match=f"stage={stage} reads what stage={before}") as error:
        run_stages(job)
    command = next(
        line.strip() for line in str(error.value).splitlines() if "python train.py" in line
    )
    # A shell must parse it back to the same arguments: the path of the images has a space.
    assert shlex.split(command) == [
        *("python", "train.py", f"stage={before}"),
        *straight.overrides,
        f"runs_dir={runs}",
    ]
    assert not runs.exists()


def test_command_for_a_missing_upstream_of_a_sweep_makes_the_run_that_the_trial_reads(
    straight: Finished, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(UsageError, match=r"\n  python train\.py stage=moco 'run=seed0,"):
        run_stages(Finished(straight.overrides, runs).job("stage=proto", sweep=True))


def test_upstream_of_other_images_is_refused(finished: Finished, tmp_path: Path) -> None:
    shutil.rmtree(finished.folder("proto").path)
    others = write_folder(tmp_path / "my photos", classes=False, seed=1)
    with pytest.raises(UsageError, match="was made from other images or another order"):
        run_stages(finished.job("stage=proto", f"dataset.root={others}"))


def test_upstream_of_the_same_images_in_another_order_is_refused(
    finished: Finished, straight: Finished, tmp_path: Path
) -> None:
    shutil.rmtree(finished.folder("proto").path)
    root = next(text for text in straight.overrides if text.startswith("dataset.root="))
    others = tmp_path / "my photos"
    shutil.copytree(root.partition("=")[2], others)
    (others / "000.png").rename(others / "zzz.png")
    with pytest.raises(UsageError, match="was made from other images or another order"):
        run_stages(finished.job("stage=proto", f"dataset.root={others}"))


def test_encoder_of_another_architecture_is_reported_key_by_key(finished: Finished) -> None:
    shutil.rmtree(finished.folder("proto").path)
    with pytest.raises(UsageError, match="another architecture") as error:
        run_stages(finished.job("stage=proto", "backbone.widths=[4]"))
    assert "shape       conv1.weight is (8, 3, 3, 3), needed (4, 3, 3, 3)" in str(error.value)
    assert "shape       bn1.running_mean is (8,), needed (4,)" in str(error.value)


# Resume


@dataclass(frozen=True)
class Resumed:
    """A stage that was stopped in its second epoch and then resumed."""

    stage: str
    finished: Finished
    stopped_after: int
    resumed_steps: int


@pytest.fixture(scope="module", params=list(STAGES))
def resumed(
    request: pytest.FixtureRequest, straight: Finished, tmp_path_factory: pytest.TempPathFactory
) -> Resumed:
    stage = str(request.param)
    finished = straight.copy(tmp_path_factory.mktemp("resumed"), without=stage)
    with pytest.MonkeyPatch.context() as patch:
        patch_step(patch, STAGES[stage], power_cut)
        with pytest.raises(OSError, match="power cut"):
            run_stages(finished.job(f"stage={stage}"))
    assert not finished.folder(stage).finished
    stopped_after = checkpoint(finished.folder(stage))["epoch"]
    steps = []

    def count(module: Stage, result: Any, batch_idx: int) -> Any:
        steps.append(batch_idx)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch_step(patch, STAGES[stage], count)
        run_stages(finished.job(f"stage={stage}", "resume=true"))
    return Resumed(stage, finished, stopped_after, len(steps))


def power_cut(module: Stage, result: Any, batch_idx: int) -> Any:
    if (module.current_epoch, batch_idx) == (1, 1):
        raise OSError("power cut")
    return result


def test_a_resumed_run_equals_a_straight_run_bit_for_bit(
    straight: Finished, resumed: Resumed
) -> None:
    ended, expected = (
        checkpoint(each.folder(resumed.stage)) for each in (resumed.finished, straight)
    )
    for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ended[part], expected[part], part)
    made, wanted = (
        contents(each.folder(resumed.stage).path) for each in (resumed.finished, straight)
    )
    for name in ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy"):
        assert made.get(name) == wanted.get(name), name
    assert made.get("clusters.csv") == wanted.get("clusters.csv")


def test_resume_runs_only_the_epochs_that_were_missing(
    straight: Finished, resumed: Resumed
) -> None:
    assert resumed.stopped_after == 1  # saved between epochs 0 and 1
    progress = checkpoint(straight.folder(resumed.stage))["loops"]["fit_loop"]
    in_all = progress["epoch_loop.batch_progress"]["total"]["completed"]
    epochs = int(straight.job().cfg[resumed.stage].epochs)
    assert resumed.resumed_steps * epochs == (epochs - 1) * in_all


def test_resumed_run_keeps_the_log_of_the_epochs_before(
    straight: Finished, resumed: Resumed
) -> None:
    curves = [loss_curve(each.folder(resumed.stage)) for each in (resumed.finished, straight)]
    assert curves[0] == curves[1]
    assert len(curves[1]) == int(straight.job().cfg[resumed.stage].epochs)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_stopped_after_training_is_completed_by_resume(
    straight: Finished, finished: Finished, stage: str
) -> None:
    folder, expected = finished.folder(stage), straight.folder(stage)
    shutil.rmtree(folder.path)

    def predict(*args: Any, **kwargs: Any) -> None:
        raise OSError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "predict", predict)
        with pytest.raises(OSError, match="power cut"):
            run_stages(finished.job(f"stage={stage}"))
    assert not folder.finished
    run_stages(finished.job(f"stage={stage}", "resume=true"))
    made, wanted = contents(folder.path), contents(expected.path)
    for name in ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy"):
        assert made.get(name) == wanted.get(name), name
    assert folder.metrics["objective"] == expected.metrics["objective"]
    assert folder.metrics["logged"] == expected.metrics["logged"]
    assert loss_curve(folder) == loss_curve(expected)


def test_checkpoints_do_not_depend_on_watch_epochs(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = finished.folder("proto")
    shutil.rmtree(proto.path)
    patch_step(monkeypatch, ProtoHeadModule, power_cut)
    with pytest.raises(OSError, match="power cut"):
        run_stages(finished.job("stage=proto", "proto.watch_epochs=3"))
    assert saved_position(proto) == (1, 0)


# A loss that is not a number


def all_finite(state: Any) -> bool:
    if isinstance(state, Tensor):
        return bool(state.isfinite().all()) if state.is_floating_point() else True
    if isinstance(state, dict):
        return all(all_finite(value) for key, value in state.items() if key != "best_loss")
    return True


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("watch_epochs", [1, 2])
def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, stage: str, watch_epochs: int
) -> None:
    folder = finished.folder(stage)
    shutil.rmtree(folder.path)

    def spoil(module: Stage, loss: Any, batch_idx: int) -> Any:
        if module.current_epoch != 1 or loss is None:
            return loss
        if isinstance(module, ProtoHeadModule):  # its optimizer steps inside training_step
            torch.nn.init.constant_(module.heads.hidden_weight, torch.nan)
        return loss * torch.nan

    patch_step(monkeypatch, STAGES[stage], spoil)
    watch = f"{stage}.watch_epochs={watch_epochs}"
    with pytest.raises(UsageError, match=f"{stage}: the loss is not a number at epoch 1, batch"):
        run_stages(finished.job(f"stage={stage}", watch))
    assert not folder.finished
    assert saved_position(folder) == (1, 0)
    assert all_finite(checkpoint(folder)["state_dict"])


def test_weights_that_become_nan_in_the_last_batch_are_not_saved(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loss of that batch is still finite, but its gradient is NaN.
    folder = finished.folder("moco")
    shutil.rmtree(folder.path)

    def spoil(module: Stage, loss: Any, batch_idx: int) -> Any:
        if (module.current_epoch, batch_idx) == (1, 2):
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    patch_step(monkeypatch, MoCoModule, spoil)
    with pytest.raises(UsageError, match="not a number"):
        run_stages(finished.job("stage=moco"))
    assert saved_position(folder) == (1, 0)
    assert all_finite(checkpoint(folder)["state_dict"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_learning_rate_that_is_far_too_large_is_reported(finished: Finished, stage: str) -> None:
    shutil.rmtree(finished.folder(stage).path)
    with pytest.raises(UsageError, match=rf"{stage}: the loss is not a number at epoch \d, batch"):
        run_stages(finished.job(f"stage={stage}", f"{stage}.module.lr=1e30"))
    assert not finished.folder(stage).finished


# Settings that do not fit


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.num_clusters=91"], "dataset.num_clusters 91 is not between 2 and the 90"),
        (["dataset.num_clusters=1"], "dataset.num_clusters 1 is not between 2 and the 90"),
        (["moco.module.queue_size=91"], "moco.module.queue_size 91 exceeds the 90 training"),
        (["moco.streams.images.batch_size=61"], "batch_size 61 exceeds moco.module.queue_size 60"),
        (["backbone._target_=os.system"], "_target_ os.system lies outside spice_pl"),
        (["embeddings=smooth"], "embeddings=smooth is none of cosine, smoothed"),
        (["answer=automatic"], "answer=automatic is none of network, auto"),
        (["dataset.labels=files"], "dataset.labels 'files' is none of"),
        (["dataset.root=/nowhere/at/all"], "dataset.root=/nowhere/at/all does not exist"),
        (["moco.module.temperature=0"], "temperature 0 is not positive"),
        (["augment.moco.flip=2"], r"augment\.moco\.flip=2 is not a number from 0 to 1"),
        # Settings of later stages are checked before the first stage starts.
        (["proto.module.buffer_size=5"], r"a buffer of 5 images gives 1 .* to at least 6"),
        (["proto.module.head_batch_size=40"], r"head_batch_size 40 exceeds the 39 labelled slots"),
        (["fixmatch.module.init=both"], "fixmatch.module.init 'both' is none of"),
        (
            ["stages=[moco,proto,clusmatch]", "clusmatch.module.init=both"],
            "clusmatch.module.init 'both' is none of joint, encoder, scratch",
        ),
        (["fixmatch.module._target_=os.system"], "_target_ os.system lies outside spice_pl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused_before_work(
    straight: Finished, tmp_path: Path, overrides: list[str], message: str
) -> None:
    job = Finished(straight.overrides, tmp_path / "runs").job(*overrides)
    with pytest.raises(UsageError, match=message):
        run_stages(job)
    assert not (tmp_path / "runs").exists()


def test_missing_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no value for dataset\.root; give"):
        run_stages(make_job("dataset=folder", f"runs_dir={tmp_path / 'runs'}"))


@pytest.mark.parametrize("key", ["moco.module.lrr", "dataset.pixels", "reliable.balanced"])
def test_unknown_key_is_refused_by_its_full_name(key: str) -> None:
    with pytest.raises(HydraException, match=f"full_key: {key}|'{key}'"):
        compose(f"{key}=1")


def test_target_reached_through_an_allowed_package_is_refused(
    straight: Finished, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    job = Finished(straight.overrides, tmp_path / "runs").job(
        "~backbone.blocks",
        "~backbone.widths",
        "~backbone.stem",
        "backbone._target_=torch.os.mkdir",
        f"+backbone.path={trace}",
    )
    with pytest.raises((UsageError, HydraException)):
        run_stages(job)
    assert not trace.exists()


class OwnBackbone(nn.Module):
    """A backbone from outside the package that returns mean colours."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * self.scale


def test_target_of_an_allowed_package_is_built(straight: Finished, tmp_path: Path) -> None:
    job = Finished(straight.overrides, tmp_path / "runs").job("stage=moco", "allow_targets=[tests]")
    job.cfg.backbone = {"_target_": "tests.test_pipeline.OwnBackbone"}
    run_stages(job)
    weights = load_file(tmp_path / "runs/my photos/moco/seed0/encoder.safetensors")
    assert {key: tuple(value.shape) for key, value in weights.items()} == {"scale": (3,)}


def test_images_that_cannot_be_used_are_counted_in_the_results(
    straight: Finished, tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "my photos", classes=False)
    (root / "text.jpg").write_text("not an image")
    Image.new("RGB", (8, 8)).save(root / "last.png")
    (root / "empty.png").write_bytes(b"")
    job = Finished(straight.overrides, tmp_path / "runs").job(
        "stage=moco", f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}"
    )
    run_stages(job)
    metrics = json.loads((tmp_path / "runs/my photos/moco/seed0/metrics.json").read_text())
    assert (metrics["num_images"], metrics["num_skipped"]) == (NUM_IMAGES + 1, 2)


def test_any_name_of_a_file_reaches_the_results(straight: Finished, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "my photos", classes=False)
    names = [os.fsdecode(b"latin \xe9.png"), "<b>&amp;.png", 'comma, quote".png']
    for i, name in enumerate(names):
        (root / f"{i:03}.png").rename(root / name)
    job = Finished(straight.overrides, tmp_path / "runs").job(
        f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}"
    )
    run_stages(job)
    results = tmp_path / "runs/my photos/fixmatch/seed0"
    with (results / "clusters.csv").open(newline="", errors="surrogateescape") as file:
        assert set(names) <= {row["image"] for row in csv.DictReader(file)}
    assert (results / "report.html").is_file()
