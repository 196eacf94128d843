"""A model.spice predicts as the run that wrote it, and a file that cannot be read is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import NUM_CLASSES, NUM_IMAGES, Finished, make_job, photographs

import spice_pl
from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.job.run import run_stages
from spice_pl.models.portable import (
    FORMAT,
    PortableModel,
    portable_settings,
)
from spice_pl.nn.heads import ClusterHead


def model_file(straight: Finished, stage: str = "fixmatch") -> Path:
    return straight.folder(stage).path / "model.spice"


@pytest.mark.parametrize("stage", ["proto", "fixmatch"])
def test_predictions_are_those_of_the_run_that_wrote_it(straight: Finished, stage: str) -> None:
    model = spice_pl.load(straight.folder(stage).path)
    found = model.predict(straight.runs.parent / "my photos")
    probs = straight.folder(stage).probs
    assert list(found.keys) == [f"{i:03}.png" for i in range(NUM_IMAGES)]
    assert found.clusters.tolist() == probs.argmax(axis=1).tolist()
    np.testing.assert_allclose(found.confidence, probs.max(axis=1), atol=1e-5)
    assert model.about["fingerprint"] == straight.folder(stage).metrics["fingerprint"]
    features = torch.tensor(straight.folder(stage).features)
    exact, _ = nearest_neighbors(features, features, 3)
    np.testing.assert_allclose(found.similarity, exact, atol=2e-3)  # known embeddings are float16
    assert (np.diff(found.similarity, axis=1) <= 0).all()
    number = {key: i for i, key in enumerate(found.keys)}
    for i, row in enumerate(found.nearest):
        cosines = torch.cosine_similarity(features[i], features[[number[key] for key in row]])
        np.testing.assert_allclose(cosines, exact[i], atol=2e-3)


def test_a_file_of_an_earlier_release_predicts_as_before() -> None:
    model = spice_pl.load(Path(__file__).parent / "files" / "before_the_rooms.spice")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    found = model.predict(images)
    assert found.clusters.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(
        found.confidence[:4],
        [0.134213, 0.131619, 0.139332, 0.135708],
        atol=1e-5,
    )
    assert list(found.nearest[0]) == ["982", "1070", "1152"]


def test_a_stage_without_clusters_has_no_model_file(straight: Finished) -> None:
    with pytest.raises(UsageError, match=r"not exist; give the model\.spice of a finished run"):
        spice_pl.load(straight.folder("moco").path)


def test_the_file_holds_weights_and_plain_json(straight: Finished) -> None:
    with safe_open(model_file(straight), "pt") as opened:
        header = json.loads(opened.metadata()["spice_pl"])
    assert header["format"] == FORMAT
    assert header["settings"]["encoder"]["_target_"] == "spice_pl.nn.resnet.ResNet"
    assert header["settings"]["plain"]["mean"] == [0.485, 0.456, 0.406]
    assert header["names"] == [f"cluster {k}" for k in range(NUM_CLASSES)]
    assert header["threshold"] == 0.2  # reliable.confidence of the run
    assert {"fingerprint", "versions", "stage", "seed"} <= header["about"].keys()


def test_images_of_every_kind_are_predicted_alike(straight: Finished, tmp_path: Path) -> None:
    model = spice_pl.load(model_file(straight))
    array = photographs()
    expected = model.predict(straight.runs.parent / "my photos").clusters.tolist()
    files = sorted((straight.runs.parent / "my photos").iterdir())
    for images in (
        array,
        array.transpose(0, 3, 1, 2),
        torch.from_numpy(array),
        [Image.fromarray(image) for image in array],
        files,
        [str(file) for file in files],
    ):
        assert model.predict(images, batch_size=32).clusters.tolist() == expected
    assert model.predict(array[0]).clusters.tolist() == expected[:1]
    assert model.predict(str(files[1])).clusters.tolist() == expected[1:2]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_images_of_any_size_and_mode_are_predicted(straight: Finished, mode: str) -> None:
    model = spice_pl.load(model_file(straight))
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 50), 40_000, dtype=np.uint16))
    else:
        image = Image.fromarray(photographs()[0]).resize((50, 30)).convert(mode)
    found = model.predict(image)
    assert len(found) == 1
    assert 1 / NUM_CLASSES <= found.confidence[0] <= 1


def test_images_at_or_below_the_threshold_are_not_sure(straight: Finished) -> None:
    model = spice_pl.load(model_file(straight))
    sure = model.predict(photographs()).confidence
    model.threshold = float(np.median(sure))
    found = model.predict(photographs())
    assert found.not_sure.tolist() == (sure <= np.median(sure)).tolist()
    assert 0 < found.not_sure.sum() < NUM_IMAGES


def test_undecodable_files_are_skipped_and_named(straight: Finished, tmp_path: Path) -> None:
    model = spice_pl.load(model_file(straight))
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(photographs()[0]).save(good)
    bad.write_bytes(b"no image")
    found = model.predict([good, bad, tmp_path / "c.png"], batch_size=1)
    assert list(found.keys) == [str(good)]
    assert [path for path, _ in found.skipped] == [str(bad), str(tmp_path / "c.png")]
    with pytest.raises(UsageError, match=r"no image to predict, 1 could not .* first: .*b\.png"):
        model.predict(bad)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4), np.uint8), np.zeros(8, np.uint8)]
)
def test_arrays_that_are_not_images_are_refused(straight: Finished, array: Any) -> None:
    with pytest.raises(UsageError, match="give uint8 levels 0 to 255 as"):
        spice_pl.load(model_file(straight)).predict(array)


def test_names_survive_saving(straight: Finished, tmp_path: Path) -> None:
    model = spice_pl.load(model_file(straight))
    model.names = ["cats", "dogs <b>", "ö"]
    model.save(tmp_path / "named.spice")
    again = spice_pl.load(tmp_path / "named.spice")
    one, other = model.predict(photographs()), again.predict(photographs())
    assert set(one.names) <= {"cats", "dogs <b>", "ö"}
    assert one.names == other.names
    np.testing.assert_array_equal(one.confidence, other.confidence)
    assert one.nearest == other.nearest


def test_names_given_in_a_review_are_used(finished: Finished) -> None:
    model_file(finished).with_name("names.json").write_text('{"1": "dogs"}')
    assert spice_pl.load(model_file(finished)).names == ["cluster 0", "dogs", "cluster 2"]


def test_a_model_can_be_pickled(straight: Finished) -> None:
    model: PortableModel = pickle.loads(pickle.dumps(spice_pl.load(model_file(straight))))  # noqa: S301
    assert len(model.predict(photographs())) == NUM_IMAGES


def test_a_model_without_known_images_predicts(finished: Finished) -> None:
    run_stages(finished.job("stage=fixmatch", "known_images=0", "overwrite=true"))
    found = spice_pl.load(model_file(finished)).predict(photographs())
    assert found.similarity.shape == (NUM_IMAGES, 0)
    assert found.nearest == [[]] * NUM_IMAGES


def damage(straight: Finished, tmp_path: Path, **changes: Any) -> Path:
    """Copy the file with some fields of its header changed."""
    with safe_open(model_file(straight), "pt") as opened:
        header = json.loads(opened.metadata()["spice_pl"])
    target = tmp_path / "changed.spice"
    tensors = load_file(model_file(straight))
    save_file(tensors, target, {"spice_pl": json.dumps(header | changes)})
    return target


def test_a_file_of_a_newer_release_is_refused(straight: Finished, tmp_path: Path) -> None:
    file = damage(straight, tmp_path, format=FORMAT + 1, settings=None)
    message = rf"written by a newer spice-pl \(format {FORMAT + 1}, this release reads up to 1\)"
    with pytest.raises(UsageError, match=message):
        spice_pl.load(file)


@pytest.mark.parametrize("content", [b"", b"no such file", b"\xff" * 200, None, "cut"])
def test_a_damaged_file_is_refused(
    straight: Finished, tmp_path: Path, content: bytes | str | None
) -> None:
    file = tmp_path / "damaged.spice"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "cut":
        file.write_bytes(model_file(straight).read_bytes()[:-100])
    else:  # safetensors of something else
        save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=r"is damaged or not a model\.spice"):
        spice_pl.load(file)


def test_a_header_that_lacks_a_field_is_a_damaged_file(straight: Finished, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is damaged or not a model\.spice"):
        spice_pl.load(damage(straight, tmp_path, settings={}))


@pytest.mark.parametrize(
    "target",
    ["os.system", "spice_pl.nn.heads.math.exp", "spice_pl.nn.resnet.nn", "torchvision.models.os"],
)
def test_a_file_can_only_build_networks(straight: Finished, tmp_path: Path, target: str) -> None:
    settings = {"encoder": {"_target_": target, "command": "true"}}
    with pytest.raises(UsageError, match=f"asks for {target}, which is none of spice_pl"):
        spice_pl.load(damage(straight, tmp_path, settings=settings))


def test_a_network_of_your_own_must_be_allowed(straight: Finished, tmp_path: Path) -> None:
    with safe_open(model_file(straight), "pt") as opened:
        settings = json.loads(opened.metadata()["spice_pl"])["settings"]
    settings["encoder"]["_target_"] = "tests.stages.small.SmallBackbone"
    file = damage(straight, tmp_path, settings=settings)
    with pytest.raises(UsageError, match=r"allow_targets=\[PACKAGE\]"):
        spice_pl.load(file)


def test_a_head_of_your_own_has_no_settings() -> None:
    assert portable_settings({}, torch.nn.Linear(2, 2), {}) is None
    described = portable_settings({}, ClusterHead(8, 4, 3), {})
    assert described is not None
    assert described["head"] == {
        "_target_": "spice_pl.nn.heads.ClusterHead",
        "feature_dim": 8,
        "hidden_dim": 4,
        "num_clusters": 3,
    }


def test_loading_leaves_random_numbers_as_they_were(straight: Finished) -> None:
    before = torch.random.get_rng_state()
    spice_pl.load(model_file(straight))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_folder_without_a_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        spice_pl.load(tmp_path)
    assert make_job().cfg.known_images == 10_000
