"""What is run for your own images, and K that is estimated on the way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.conftest import Finished, compose, make_job

from spice_pl.job.run import run_stages

OWN = ("folder", "array", "shards", "hugging_face")
PLACE = {"array": "path"}


@pytest.mark.parametrize("dataset", OWN)
def test_own_images_are_clustered_on_pretrained_features(dataset: str) -> None:
    pytest.importorskip("timm")
    cfg = compose(f"dataset={dataset}", f"dataset.{PLACE.get(dataset, 'root')}=/images")
    assert list(cfg.stages) == ["embed", "proto"]
    assert cfg.dataset.num_clusters == "auto"
    assert {cfg[name].upstream for name in ("proto", "temi", "turtle", "kmeans")} == {"embed"}
    assert cfg.embed.module.backbone == cfg.proto.module.backbone
    assert list(cfg.dataset.mean) == list(cfg.augment.plain.mean)
    assert {cfg[name].upstream for name in ("trust", "review", "report")} == {"proto"}


@pytest.mark.parametrize("dataset", OWN)
def test_one_word_trains_from_random_weights(dataset: str) -> None:
    cfg = compose(
        f"dataset={dataset}", f"dataset.{PLACE.get(dataset, 'root')}=/images", "recipe=scratch"
    )
    assert list(cfg.stages) == ["moco", "proto", "fixmatch"]
    assert cfg.proto.upstream == "moco"
    assert cfg.proto.module.backbone == cfg.backbone


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "stl10"])
def test_published_sets_keep_the_stages_of_the_paper(dataset: str) -> None:
    assert list(compose(f"dataset={dataset}").stages) == ["moco", "proto", "fixmatch"]
    assert list(compose(f"dataset={dataset}", "recipe=pretrained").stages) == ["embed", "proto"]


def test_an_experiment_brings_its_own_recipe() -> None:
    cfg = compose("experiment=cifar10_quick", "dataset=folder", "dataset.root=/images")
    assert list(cfg.stages) == ["simclr", "proto", "fixmatch"]
    assert cfg.dataset.image_size == 32
    assert cfg.proto.module.backbone == cfg.backbone


@pytest.mark.parametrize("experiment", ["cifar10_2cores", "cifar10_gpu"])
def test_stage_3_of_a_small_budget_continues_with_the_network_of_stage_1(experiment: str) -> None:
    """And not with the new network that the preset of CIFAR-10 has."""
    cfg = compose(f"experiment={experiment}", "dataset=cifar10", "dataset.root=/images")
    assert list(cfg.stages) == ["simclr", "proto", "fixmatch"]
    assert cfg.fixmatch.module.backbone == cfg.backbone
    assert cfg.fixmatch.module.init == "joint"


def test_k_is_estimated_once_and_then_that_of_the_run(tiny: Sequence[str]) -> None:
    more = ("dataset.num_clusters=auto", "chain=[moco,proto]", "estimate_k.task.largest=4")
    job = make_job(*tiny, *more)
    run_stages(job)
    estimate = job.folder("estimate_k").metrics
    assert estimate["read"] == "moco/seed0"
    found = job.folder("proto").metrics
    assert found["num_clusters"] == estimate["estimated_num_clusters"]
    shown = found["k_estimate"]
    assert shown["num_clusters"] == estimate["estimated_num_clusters"]
    assert (shown["clear"], shown["sentence"]) == (estimate["clear"], estimate["sentence"])
    assert shown["candidates"] == [2, 3, 4]
    assert shown["scores"] == estimate["k_estimate"]["scores"]
    assert job.folder("moco").metrics["num_clusters"] == 0  # its features are the same for any K
    begun = job.folder("estimate_k").path.joinpath("metrics.json").stat().st_mtime_ns
    run_stages(make_job(*tiny, *more, "resume=true"))
    later = job.folder("estimate_k").path.joinpath("metrics.json").stat().st_mtime_ns
    assert later == begun
    # A task on the finished run takes its K.
    run_stages(make_job(*tiny, *more, "stage=report", "report.upstream=proto"))
    # Another K reuses the features, and k-means beside it has that K too.
    run_stages(
        make_job(*tiny, *more[1:], "dataset.num_clusters=2", "stage=proto", "overwrite=true")
    )
    again = job.folder("proto").metrics
    names = [row["name"] for row in again["rows"]]
    assert again["num_clusters"] == 2
    assert again["k_estimate"] == shown  # the features are the same
    assert names == ["k-means on pixels", "k-means on MoCo features", "SPICE stage 2"]
    assert all(row["acc"] <= 2 / 3 for row in again["rows"])  # three classes in two clusters
    assert job.folder("moco").metrics["rows"] == []


def test_features_made_with_one_k_serve_another(finished: Finished) -> None:
    made = finished.folder("moco").path.joinpath("features.npy").stat().st_mtime_ns
    run_stages(finished.job("dataset.num_clusters=4", "stage=proto", "overwrite=true"))
    # The whole chain finds nothing changed in stage 1.
    run_stages(finished.job("dataset.num_clusters=4", "stages=[moco,proto]"))
    assert finished.folder("moco").path.joinpath("features.npy").stat().st_mtime_ns == made
    assert finished.folder("proto").metrics["num_clusters"] == 4


def test_features_are_made_once_for_runs_of_other_names(
    finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    """`run=NAME` with another K copies the features; another seed or network makes its own."""
    caplog.set_level("INFO")
    embed = ("stage=embed", "embed.streams={}")
    run_stages(finished.job(*embed, "run=first"))
    first = finished.job(*embed, "run=first").folder("embed")
    other = finished.job(*embed, "run=other", "dataset.num_clusters=4")
    run_stages(other)
    assert f"embed: the features are those of {first.path}" in caplog.text
    assert other.folder("embed").metrics["digest"] == first.metrics["digest"]
    assert other.folder("embed").metrics["seconds"] >= first.metrics["seconds"]
    caplog.clear()
    run_stages(finished.job(*embed, "run=seed1", "seed=1"))  # random weights
    assert "the features are those of" not in caplog.text
