"""Another number of clusters within seconds: k-means on stored features and a linear head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import NUM_CLASSES, Finished
from tests.stages.small import K, N, backbone, fit, image_set, write_upstream

from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.models import portable
from spice_pl.runs.choices import kmeans
from spice_pl.stages.kmeans import KMeansModule


def trained(path: Path) -> KMeansModule:
    module = KMeansModule(backbone(1), K)
    fit(module, module.prepare(image_set(), write_upstream(path, backbone(0)), {}), epochs=1)
    return module


def test_the_head_gives_new_images_the_clusters_of_k_means(tmp_path: Path) -> None:
    module = trained(tmp_path)
    prediction = module.predict(Views(torch.arange(N), {}))
    assert prediction.probs is not None
    found = prediction.probs.argmax(dim=1)
    truth = np.arange(N) % NUM_CLASSES
    pairs = set(zip(found.tolist(), truth.tolist(), strict=True))
    assert len(pairs) == NUM_CLASSES  # the kinds of photograph, one to one
    raw = module.weights()["head"](prediction.features)  # it standardises by itself
    assert torch.equal(raw.argmax(dim=1), module.clusters_of_heads(torch.arange(N))[0])


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, match in (
        ({"steps": 0}, r"kmeans\.module\.steps 0 is not at least 1"),
        ({"weight_decay": -1.0}, r"kmeans\.module\.weight_decay -1\.0 is not at least 0"),
    ):
        with pytest.raises(UsageError, match=match):
            KMeansModule(backbone(1), K, **settings).check(image_set(), {})
    with pytest.raises(UsageError, match="images cannot be 1000 clusters"):
        KMeansModule(backbone(1), 1000).check(image_set(), {})


def test_another_number_of_clusters_keeps_the_result_and_reads_its_features(
    finished: Finished,
) -> None:
    with pytest.raises(UsageError, match=r"stage=kmeans dataset\.num_clusters=4 keeps it and"):
        run_stages(finished.job("stages=[moco,proto]", "dataset.num_clusters=4"))
    before = (finished.folder("proto").path / "clusters.csv").read_bytes()
    run_stages(finished.job("stage=kmeans", "dataset.num_clusters=4", "answer=network"))
    folder = finished.folder("kmeans")
    assert (finished.folder("proto").path / "clusters.csv").read_bytes() == before
    assert np.array_equal(folder.features, finished.folder("moco").features)
    assert folder.metrics["num_clusters"] == 4
    rows = finished.folder("moco").embeddings(np.arange(90)).numpy()
    previewed = kmeans(rows, 4, 0)[0]
    same = (folder.read_clusters().clusters == previewed).mean()
    assert same > 0.9  # the head has learned the clusters that a report previews
    model = portable.load(folder.path / "model.spice")
    made = model.network.head(torch.from_numpy(np.array(folder.features)))
    np.testing.assert_allclose(made.detach().numpy(), folder.probs, atol=1e-5)
