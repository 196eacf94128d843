"""Encoders from elsewhere, end to end: embed, import, probe."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import NUM_IMAGES, Finished, authors_names, make_job, photographs
from tests.nn.test_pretrained import needs_weights

import spice_pl
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages


def test_an_imported_stage_2_gives_the_clusters_it_was_made_from(
    finished: Finished, tmp_path: Path
) -> None:
    proto = finished.folder("proto")
    torch.save(authors_names(proto), tmp_path / "self.pth")
    stage = ("stage=import", f"path={tmp_path / 'self.pth'}", "import.module.stem=conv3")
    run_stages(finished.job(*stage))
    imported = finished.folder("import")
    np.testing.assert_allclose(imported.features, proto.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(imported.probs, proto.probs, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        [(row["cluster"], row["reliable"]) for row in csv.DictReader(file.read_text().splitlines())]
        for file in (imported.path / "clusters.csv", proto.path / "clusters.csv")
    )
    assert len(ours) == NUM_IMAGES
    assert ours == theirs
    # The portable file holds the checkpoint's network, not the one in the settings.
    answer = spice_pl.load(imported.path / "model.spice").predict(photographs()[:5])
    np.testing.assert_array_equal(answer.clusters, imported.probs[:5].argmax(axis=1))
    # Stage 3 continues from it, with the network that the checkpoint describes.
    network = ("backbone=checkpoint", f"backbone.path={tmp_path / 'self.pth'}")
    overrides = [text for text in finished.overrides if not text.startswith("backbone")]
    job = make_job(
        *(*overrides, *network, "backbone.stem=conv3", f"runs_dir={finished.runs}"),
        *("stage=fixmatch", "fixmatch.upstream=import", "overwrite=true"),
    )
    run_stages(job)
    assert finished.folder("fixmatch").metrics["rows"][0]["name"] == "imported"


def test_a_checkpoint_with_other_clusters_is_refused(finished: Finished, tmp_path: Path) -> None:
    torch.save(authors_names(finished.folder("proto")), tmp_path / "self.pth")
    stage = ("stage=import", f"path={tmp_path / 'self.pth'}", "import.module.stem=conv3")
    with pytest.raises(UsageError, match=r"has 3 clusters and dataset\.num_clusters is 4"):
        run_stages(finished.job(*stage, "dataset.num_clusters=4"))


def test_embed_takes_a_local_file_and_stage_2_goes_on(finished: Finished) -> None:
    moco = finished.folder("moco")
    weights = f"embed.module.weights='{moco.path / 'encoder.safetensors'}'"
    run_stages(finished.job("stage=embed", weights))
    embed = finished.folder("embed")
    np.testing.assert_allclose(embed.features, moco.features, rtol=1e-4, atol=1e-5)
    assert embed.metrics["rows"] == []  # without labels k-means has no score
    origin = "ResNet (weights of encoder.safetensors)"
    run_stages(finished.job("stage=proto", "proto.upstream=embed", "run=seed0", "overwrite=true"))
    proto = finished.folder("proto")
    assert [row["name"] for row in proto.metrics["rows"]] == [f"SPICE stage 2 on {origin}"]
    proto.check_upstream(embed)


@needs_weights
def test_photographs_are_clustered_on_pretrained_features_alone(
    photo_folder: Path, tmp_path: Path
) -> None:
    job = make_job(
        *("experiment=photos_pretrained", "dataset=folder", f"dataset.root={photo_folder}"),
        *("dataset.num_clusters=3", "dataset.labels=folders", "dataset.image_size=32"),
        *(f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"),
        *("trainer.accelerator=cpu", "augment.weak.padding=4", "augment.strong.max_cutout=8"),
        *("proto.epochs=3", "proto.module.head_batch_size=30"),
    )
    run_stages(job)
    names = (
        "k-means on efficientnet_lite0 (ImageNet labels) features",
        "SPICE stage 2 on efficientnet_lite0 (ImageNet labels)",
    )
    rows = {row["name"]: row["acc"] for row in job.folder("proto").metrics["rows"]}
    assert rows[names[0]] > 0.9  # coloured halves: any features tell them apart
    assert rows[names[1]] > 0.9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embed.module.weights=nowhere.pth", r"embed\.module\.weights=nowhere\.pth is not a file"),
        ("backbone.widths=[9]", "does not fit ResNet whole"),
    ],
)
def test_embed_refuses_what_does_not_fit(finished: Finished, override: str, message: str) -> None:
    weights = finished.folder("moco").path / "encoder.safetensors"
    with pytest.raises(UsageError, match=message):
        run_stages(finished.job("stage=embed", f"embed.module.weights='{weights}'", override))


def test_linear_probe_reads_classes_out_of_features(tiny: Sequence[str]) -> None:
    job = make_job(*tiny, "stage=embed")
    run_stages(job)
    probe = make_job(*tiny, "stage=linear_probe", "linear_probe.upstream=embed")
    run_stages(probe)
    metrics = probe.folder("linear_probe").metrics
    assert metrics["protocol"] == "whole, 5 folds"
    # Classes are bright halves in three colours: a random convolution keeps them apart.
    assert metrics["truth/embed/linear_probe"] > 0.9
    assert metrics["truth/embed/knn_20"] > 0.9


def test_linear_probe_without_labels_says_so(finished: Finished) -> None:
    with pytest.raises(UsageError, match=r"my photos has none; .*dataset\.labels=folder"):
        run_stages(finished.job("stage=linear_probe"))
