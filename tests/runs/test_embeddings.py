"""Which images are alike: cosine of features as in the paper, or smoothed over neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tests.conftest import Finished, make_job
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.functional.embeddings import smoothed_embeddings
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder

EVERY = np.arange(40)


def folder(path: Path, similarity: str, seed: int = 0) -> RunFolder:
    features = np.random.default_rng(seed).normal(size=(40, 6)).astype(np.float32)
    made = RunFolder(path, similarity)
    made.create("features.npy", features.shape)
    made.write_rows("features.npy", EVERY, features)
    made.publish("features.npy")
    return made


def test_cosine_is_that_of_the_features_and_leaves_no_file(tmp_path: Path) -> None:
    run = folder(tmp_path, "cosine")
    expected = F.normalize(torch.from_numpy(np.array(run.features)))
    assert torch.equal(run.embeddings(EVERY), expected)
    run.write_embeddings(EVERY, None)
    assert not (tmp_path / "embeddings.npy").exists()


def test_smoothed_embeddings_are_written_once_and_read(tmp_path: Path) -> None:
    run = folder(tmp_path, "smoothed")
    expected = smoothed_embeddings(torch.from_numpy(np.array(run.features)))
    assert torch.equal(run.embeddings(EVERY), expected)  # before there is a file
    run.write_embeddings(EVERY, None)
    assert torch.equal(run.embeddings(EVERY), expected)
    assert np.load(tmp_path / "embeddings.npy").dtype == np.float32


def test_images_outside_of_training_change_no_embedding_of_the_others(tmp_path: Path) -> None:
    train = np.arange(30)
    one, other = folder(tmp_path / "a", "smoothed"), folder(tmp_path / "b", "smoothed")
    other.create("features.npy", (40, 6))
    changed = np.array(one.features)
    changed[30:] += 1
    other.write_rows("features.npy", EVERY, changed)
    other.publish("features.npy")
    assert torch.equal(one.embeddings(train)[:30], other.embeddings(train)[:30])
    assert not torch.equal(one.embeddings(EVERY)[:30], other.embeddings(EVERY)[:30])


def test_a_frozen_stage_takes_the_embeddings_of_its_upstream(tmp_path: Path) -> None:
    upstream, run = folder(tmp_path / "embed", "smoothed"), folder(tmp_path / "proto", "smoothed")
    marked = np.zeros((40, 2), np.float32)
    np.save(upstream.path / "embeddings.npy", marked)
    run.write_embeddings(EVERY, upstream)
    assert np.array_equal(np.load(run.path / "embeddings.npy"), marked)
    moved = folder(tmp_path / "moved", "smoothed", seed=1)  # other features
    moved.write_embeddings(EVERY, upstream)
    assert np.load(moved.path / "embeddings.npy").shape == (40, 64)


def test_all_stages_read_smoothed_embeddings(tiny: Sequence[str]) -> None:
    job = make_job(*tiny, "embeddings=smoothed")
    run_stages(job)
    for stage in ("moco", "proto", "fixmatch"):
        run = job.folder(stage)
        features = torch.from_numpy(np.array(run.features))
        expected = smoothed_embeddings(features).numpy()
        np.testing.assert_allclose(np.load(run.path / "embeddings.npy"), expected, atol=1e-6)


def test_a_finished_run_keeps_its_similarity(finished: Finished) -> None:
    with pytest.raises(UsageError, match=r"proto(.|\n)*embeddings: cosine -> smoothed"):
        run_stages(finished.job("stage=proto", "embeddings=smoothed", "resume=true"))


def test_settings_of_before_the_modules_moved_are_the_same_settings(finished: Finished) -> None:
    saved = finished.folder("moco").path / ".hydra" / "config.yaml"
    text = saved.read_text().replace("data.sources.folder.folder", "data.folder.folder")
    settings = OmegaConf.create(text)
    assert isinstance(settings, DictConfig)
    del settings["embeddings"]
    OmegaConf.save(settings, saved)
    assert "spice_pl.data.folder.folder" in saved.read_text()
    run_stages(finished.job("stage=moco", "resume=true"))
