"""Two processes on this machine do what one does. They are real: gloo, `python train.py`."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import NUM_IMAGES, TINY, make_job, write_folder
from tests.process import ROOT, train

from spice_pl.callbacks.checkpoints import read_checkpoint
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder
from spice_pl.system.interrupts import RESUME_CODE

pytestmark = pytest.mark.slow
TWO = ("trainer=ddp_cpu", "trainer.devices=2")
DUMPING = (
    "allow_targets=[tests]",
    "moco.module._target_=tests.ranks.DumpingMoCo",
    "proto.module._target_=tests.ranks.DumpingProto",
    "fixmatch.module._target_=tests.ranks.DumpingFixMatch",
)


@dataclass(frozen=True)
class Runs:
    """Runs on two ranks and on one: all stages; stage 1; stage 2 after the two ranks' stage 1."""

    two: Path
    single: Path
    one: Path
    dumps: Path
    overrides: Sequence[str]

    def dump(self, stage: str, ranks: int, rank: int) -> dict[str, Any]:
        state = torch.load(self.dumps / f"{stage}-{ranks}-{rank}.pt", weights_only=True)
        return dict(state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("ddp")
    write_folder(root / "photos", classes=True)
    (root / "dumps").mkdir()
    overrides = (
        *("dataset=folder", f"dataset.root={root / 'photos'}", "dataset.labels=folders"),
        f"cache_dir={root / 'cache'}",
        *TINY,
        *DUMPING,
        "moco.module.bn_groups=2",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK_DUMPS", str(root / "dumps"))
        done = train(*overrides, f"runs_dir={root / 'two'}", *TWO)
        assert done.returncode == 0, done.stderr
        shutil.copytree(root / "two/photos/moco", root / "one/photos/moco")
        run_stages(make_job(*overrides, f"runs_dir={root / 'one'}", "stage=proto"))
        run_stages(make_job(*overrides, f"runs_dir={root / 'single'}", "stage=moco"))
    two, single, one = (root / each / "photos" for each in ("two", "single", "one"))
    return Runs(two, single, one, root / "dumps", overrides)


@pytest.mark.parametrize("stage", ["moco", "proto", "fixmatch"])
def test_all_stages_finish_on_two_ranks(runs: Runs, stage: str) -> None:
    folder = RunFolder(runs.two / stage / "seed0")
    assert folder.finished
    assert folder.metrics["devices"] == 2
    assert np.isfinite(folder.features).all()


@pytest.mark.parametrize("stage", ["proto", "fixmatch"])
def test_every_image_is_predicted_exactly_once(runs: Runs, stage: str) -> None:
    folder = RunFolder(runs.two / stage / "seed0")
    with (folder.path / "clusters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted(f"class {i % 3}/{i:03}.png" for i in range(NUM_IMAGES))
    assert [row["image"] for row in rows] == names
    np.testing.assert_allclose(folder.probs.sum(axis=1), 1, atol=1e-5)
    assert sum(folder.metrics["cluster_sizes"]) == NUM_IMAGES


@pytest.mark.parametrize("stage", ["moco", "proto", "fixmatch"])
def test_ranks_end_with_equal_state(runs: Runs, stage: str) -> None:
    """Weights and buffers: queue, heads, head choice, reliable images, running statistics."""
    first, second = (runs.dump(stage, 2, rank) for rank in range(2))
    assert first.keys() == second.keys()
    needed = {
        "moco": ("queue.keys", "queue.pointer", "key_encoder.conv1.weight"),
        "proto": ("best_head", "best_epoch", "best_loss", "heads.hidden_weight"),
        "fixmatch": ("reliable", "pseudo_labels", "ema_encoder.bn1.running_var"),
    }
    assert set(needed[stage]) <= first.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_queue_holds_the_keys_of_both_ranks(runs: Runs) -> None:
    queue = runs.dump("moco", 2, 0)["queue.keys"]
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(60))
    # 2 epochs of 3 batches of 30 keys pass through 60 places three times.
    assert int(runs.dump("moco", 2, 0)["queue.pointer"]) == 0
    assert len({tuple(key) for key in queue.T.tolist()}) == 60


def test_stage_1_on_two_ranks_equals_one_rank_with_two_groups(runs: Runs) -> None:
    two, one = runs.dump("moco", 2, 0), runs.dump("moco", 1, 0)
    assert two.keys() == one.keys()
    for key, value in one.items():
        if value.is_floating_point() and "running_" not in key:  # these are local to ranks
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)


MORE = {  # settings beside epochs and batch size
    "SimCLR": ("module.lr=0.05",),
    "EmpSSL": ("module.lr=0.05",),
    "VICReg": ("module.lr=0.01",),
    "FastSiam": ("module.lr=0.05",),
    "CC": (),
    "ProPos": ("module.warmup_epochs=1", "module.hidden_dim=16", "module.momentum=0.9"),
}


@pytest.mark.parametrize("name", MORE)
def test_a_loss_of_the_whole_batch_on_two_ranks_equals_one_rank(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and clusters of all ranks are contrasted, and their gradient comes back."""
    stage = name.lower()
    monkeypatch.setenv("RANK_DUMPS", str(tmp_path))
    root = write_folder(tmp_path / "photos", classes=False)
    overrides = (
        *(f"stage={stage}", "dataset=folder", f"dataset.root={root}"),
        *(f"cache_dir={tmp_path / 'cache'}", *TINY, "allow_targets=[tests]"),
        *(f"{stage}.module._target_=tests.ranks.Dumping{name}", f"{stage}.epochs=2"),
        *(f"{stage}.streams.images.batch_size=30", *(f"{stage}.{more}" for more in MORE[name])),
    )
    done = train(*overrides, f"runs_dir={tmp_path / 'two'}", *TWO)
    assert done.returncode == 0, done.stderr
    run_stages(make_job(*overrides, f"runs_dir={tmp_path / 'one'}"))
    two, one = (torch.load(tmp_path / f"{stage}-{n}-0.pt", weights_only=True) for n in (2, 1))
    assert two.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)


AFTER = {  # of methods that continue from stage 1
    "Cdc": ("upstream=simclr", "module.hidden_dim=16"),
    "DCBoost": ("upstream=simclr", "module.warmup_epochs=1", "module.hidden_dim=16"),
}


@pytest.mark.parametrize("name", AFTER)
def test_a_method_after_stage_1_on_two_ranks_equals_one_rank(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = name.lower()
    monkeypatch.setenv("RANK_DUMPS", str(tmp_path))
    root = write_folder(tmp_path / "photos", classes=False)
    overrides = (
        *("dataset=folder", f"dataset.root={root}", f"cache_dir={tmp_path / 'cache'}", *TINY),
        *("allow_targets=[tests]", "simclr.module._target_=tests.ranks.DumpingSimCLR"),
        *("simclr.epochs=1", "simclr.streams.images.batch_size=30", "simclr.module.lr=0.05"),
        *(f"{stage}.module._target_=tests.ranks.Dumping{name}", f"{stage}.epochs=2"),
        *(f"{stage}.streams.images.batch_size=30", *(f"{stage}.{more}" for more in AFTER[name])),
    )
    run_stages(make_job(*overrides, "stage=simclr", f"runs_dir={tmp_path / 'one'}"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    done = train(*overrides, f"stage={stage}", f"runs_dir={tmp_path / 'two'}", *TWO)
    assert done.returncode == 0, done.stderr
    run_stages(make_job(*overrides, f"stage={stage}", f"runs_dir={tmp_path / 'one'}"))
    two, one = (torch.load(tmp_path / f"{stage}-{n}-0.pt", weights_only=True) for n in (2, 1))
    assert two.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_scan_trains_on_two_ranks_with_the_neighbours_that_the_first_found(
    runs: Runs, tmp_path: Path
) -> None:
    shutil.copytree(runs.two, tmp_path / "photos")
    small = ("scan.epochs=1", "scan.streams.images.batch_size=30", "scan.module.num_neighbors=5")
    done = train(*runs.overrides, f"runs_dir={tmp_path}", "stage=scan", *small, *TWO)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    folder = RunFolder(tmp_path / "photos/scan/seed0")
    assert folder.metrics["devices"] == 2
    assert np.isfinite(folder.probs).all()


def test_stage_2_on_two_ranks_equals_one_rank(runs: Runs) -> None:
    two, one = runs.dump("proto", 2, 0), runs.dump("proto", 1, 0)
    for key in ("best_head", "best_epoch"):
        assert torch.equal(two[key], one[key]), key
    for key, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)
    folders = [RunFolder(path / "proto/seed0") for path in (runs.two, runs.one)]
    clusters = [folder.probs.argmax(axis=1) for folder in folders]
    assert np.array_equal(clusters[0], clusters[1])
    np.testing.assert_allclose(folders[0].probs, folders[1].probs, atol=1e-4)
    scores = [folder.metrics["logged"] for folder in folders]
    assert scores[0].keys() == scores[1].keys()
    for key, value in scores[1].items():
        assert scores[0][key] == pytest.approx(value, abs=1e-3), key


@pytest.mark.parametrize("stage", ["temi", "turtle"])
def test_heads_on_stored_features_on_two_ranks_equal_one_rank(
    runs: Runs, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank takes the same steps, so weights are equal bit for bit."""
    monkeypatch.setenv("RANK_DUMPS", str(tmp_path))
    overrides = (
        *(*runs.overrides, f"stage={stage}", f"{stage}.epochs=2"),
        *(f"{stage}.module._target_=tests.ranks.Dumping{stage.title()}",),
        *(f"{stage}.module.steps_per_epoch=3", f"{stage}.module.batch_size=20"),
    )
    for name in ("two", "one"):
        shutil.copytree(runs.two / "moco", tmp_path / name / "photos/moco")
    done = train(*overrides, f"runs_dir={tmp_path / 'two'}", *TWO)
    assert done.returncode == 0, done.stderr
    run_stages(make_job(*overrides, f"runs_dir={tmp_path / 'one'}"))
    one, first, second = (
        torch.load(tmp_path / f"{stage}-{ranks}-{rank}.pt", weights_only=True)
        for ranks, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert "kept" in one
    for key, value in one.items():
        assert torch.equal(first[key], value), key
        assert torch.equal(second[key], value), key
    two, single = (
        RunFolder(tmp_path / each / "photos" / stage / "seed0") for each in ("two", "one")
    )
    assert np.array_equal(two.probs, single.probs)


def test_clusmatch_on_two_ranks_equals_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selection, thresholds, k-means labels and weights; without upstream weights."""
    monkeypatch.setenv("RANK_DUMPS", str(tmp_path))
    root = write_folder(tmp_path / "photos", classes=True)
    guess = np.full((NUM_IMAGES, 3), 0.05, dtype=np.float32)
    guess[np.arange(NUM_IMAGES), np.arange(NUM_IMAGES) // 30] = 0.9  # paths sort by class
    np.save(tmp_path / "probs.npy", guess)
    overrides = (
        *("stage=clusmatch", "dataset=folder", f"dataset.root={root}"),
        *(f"cache_dir={tmp_path / 'cache'}", *TINY, "allow_targets=[tests]"),
        *("clusmatch.module._target_=tests.ranks.DumpingSemi", "clusmatch.upstream=null"),
        *("clusmatch.module.init=scratch", f"clusmatch.module.probs_file={tmp_path}/probs.npy"),
        *("clusmatch.epochs=2", "clusmatch.module.steps_per_epoch=4"),
        # fairness compares a rank's own batch with all ranks' shares: not linear in the batch
        *("clusmatch.module.kmeans_steps=3", "clusmatch.module.losses.fairness=0"),
        *("clusmatch.streams.labelled.batch_size=4", "clusmatch.streams.unlabelled.batch_size=10"),
        "~clusmatch.module.backbone",
        "+clusmatch.module.backbone={_target_:tests.ranks.Flat,num_pixels:192,num_features:6}",
    )
    done = train(*overrides, f"runs_dir={tmp_path / 'two'}", *TWO)
    assert done.returncode == 0, done.stderr
    run_stages(make_job(*overrides, f"runs_dir={tmp_path / 'one'}"))
    one, first, second = (
        torch.load(tmp_path / f"clusmatch-{ranks}-{rank}.pt", weights_only=True)
        for ranks, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert {"threshold.matrix", "kmeans_labels", "reliable", "ema_head.weight"} <= one.keys()
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4, msg=key)


def assert_same_stage_1(one: Path, other: Path) -> None:
    """Compare two runs of stage 1 bit for bit."""
    for name in ("encoder.safetensors", "features.npy", "metrics.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [read_checkpoint(each / "last.ckpt")["state_dict"] for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_two_ranks_that_were_stopped_inside_an_epoch_end_as_if_they_had_not_been(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK_DUMPS", str(tmp_path))
    overrides = (*runs.overrides, f"runs_dir={tmp_path}", *TWO, "stage=moco")
    stopping = "moco.module._target_=tests.ranks.StoppingMoCo"
    done = train(*overrides, stopping)
    assert done.returncode == RESUME_CODE, done.stderr
    made = tmp_path / "photos/moco/seed0"
    saved = read_checkpoint(made / "last.ckpt")
    assert (saved["epoch"], saved["ViewsDataModule"]["batches_done"]) == (0, 1)
    assert saved["epoch_sums"]["train/loss"].shape == (2, 2)  # those of each rank
    done = train(*overrides, stopping, "resume=true")
    assert done.returncode == 0, done.stderr
    assert_same_stage_1(made, runs.two / "moco/seed0")


def test_two_devices_are_two_ranks_without_naming_a_strategy(runs: Runs, tmp_path: Path) -> None:
    """`trainer.devices=2` with the strategy auto: it used to wait for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK_DUMPS", str(tmp_path))
        done = train(
            *(*runs.overrides, f"runs_dir={tmp_path}", "stage=moco"),
            *("trainer.accelerator=cpu", "trainer.devices=2"),
        )
    assert done.returncode == 0, done.stderr
    assert RunFolder(tmp_path / "photos/moco/seed0").metrics["devices"] == 2
    assert_same_stage_1(tmp_path / "photos/moco/seed0", runs.two / "moco/seed0")


def torchrun(*options: str, command: Sequence[str]) -> subprocess.Popen[str]:
    """Start `torchrun OPTIONS train.py COMMAND`."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter and script
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(*options, str(ROOT / "train.py"), *command),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_does_what_our_own_launch_does(
    runs: Runs, tmp_path: Path, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one agent, and one process of each of two that meet on this machine."""
    monkeypatch.setenv("RANK_DUMPS", str(tmp_path))
    command = [*runs.overrides, f"runs_dir={tmp_path}", "trainer=ddp_cpu", "stage=moco"]
    command += [f"trainer.devices={2 // nodes}", f"+trainer.num_nodes={nodes}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        torchrun(
            *("--nnodes", str(nodes), "--node-rank", str(node)),
            *("--nproc-per-node", str(2 // nodes)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            command=command,
        )
        for node in range(nodes)
    ]
    try:
        for agent in agents:
            _, said = agent.communicate(timeout=240)
            assert agent.returncode == 0, said
    finally:
        for agent in agents:
            agent.kill()
    folder = tmp_path / "photos/moco/seed0"
    assert RunFolder(folder).metrics["devices"] == 2
    assert_same_stage_1(folder, runs.two / "moco/seed0")


def test_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    done = train(
        *("stage=moco", "dataset=folder", f"dataset.root={root}"),
        *(f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"),
        *TINY,
        *TWO,
        "allow_targets=[tests]",
        "moco.module._target_=tests.ranks.BrokenMoCo",
    )
    assert done.returncode not in (0, 2)
    assert "the second device is broken" in done.stderr
    assert not (tmp_path / "runs/photos/moco/seed0/metrics.json").exists()


def test_a_mistake_is_said_once_on_two_ranks(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    done = train(
        *("stage=moco", "dataset=folder", f"dataset.root={root}"),
        *(f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"),
        *TINY,
        *TWO,
        "moco.streams.images.batch_size=15",
    )
    assert done.returncode == 2
    message = "batch_size 15 cannot be shared evenly by 2 devices; choose a multiple of 2"
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
