"""A model.spice predicts as the run that wrote it, and a file that cannot be read is refused."""

from __future__ import annotations

import json
import pickle
import resource
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import NUM_CLASSES, NUM_IMAGES, Finished, make_job, photographs

import spice_pl
from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.job.run import run_stages
from spice_pl.job.settings import build
from spice_pl.models.portable import (
    FORMAT,
    ClusterNetwork,
    PortableModel,
    portable_settings,
)
from spice_pl.nn.heads import ClusterHead

INF, NAN = float("inf"), float("nan")


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


def test_without_known_images_those_at_or_below_the_threshold_are_not_sure(
    straight: Finished,
) -> None:
    model = spice_pl.load(model_file(straight))
    model.known = None
    sure = model.predict(photographs()).confidence
    model.threshold = float(np.median(sure))
    found = model.predict(photographs())
    assert found.not_sure.tolist() == (sure <= np.median(sure)).tolist()
    assert 0 < found.not_sure.sum() < NUM_IMAGES


def test_not_sure_means_few_known_neighbours_in_the_cluster(straight: Finished) -> None:
    model = spice_pl.load(model_file(straight))
    assert model.known is not None
    model.threshold = 1.0  # no confidence is above it
    assert not model.predict(photographs()).not_sure.all()
    clusters = model.known.clusters
    model.known = replace(model.known, clusters=(clusters + 1) % model.num_clusters)
    assert model.predict(photographs()).not_sure.all()


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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["cats", "dogs"],
            r"3 names are needed, one per cluster, and 2 are given: \['cats'",
        ),
        (["a", "b", "c", "d"], "3 names are needed, one per cluster, and 4 are given"),
        (["a", "b", 3], "give a list of one text per cluster"),
        (["a", "b", "c\nd"], "without control characters"),
        ("abc", "names is 'abc'; give a list"),
    ],
)
def test_names_that_could_not_be_read_again_are_refused(
    names: Any, message: str, straight: Finished, tmp_path: Path
) -> None:
    model = spice_pl.load(model_file(straight))
    model.names = names
    with pytest.raises(UsageError, match=message):
        model.save(tmp_path / "named.spice")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        model.predict(photographs())


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
    del header["digest"]  # who writes a hostile file writes no digest, or one that fits
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


# What a hostile or damaged file says


def header_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        header: dict[str, Any] = json.loads(opened.metadata()["spice_pl"])
    del header["digest"]
    return header


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any connection and any process."""

    def trap(*_: Any, **__: Any) -> None:
        pytest.fail("loading opened a connection or started a process")

    monkeypatch.setattr(socket, "socket", trap)
    monkeypatch.setattr(socket, "create_connection", trap)
    monkeypatch.setattr(subprocess, "Popen", trap)


PIXELS = "a whole number of pixels from 1 to 4,096"
NAMES = "a list of one text per cluster"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"format": value}, "format is .* a whole number of 1 or more")
            for value in (-1, 0, "x")
        ),
        *(({"format": value}, "format is .* a whole number") for value in (INF, NAN, True, None)),
        *(({"image_size": value}, f"image_size is .*{PIXELS}") for value in (0, -1, NAN, INF, 1.5)),
        *(({"image_size": value}, f"image_size is .*{PIXELS}") for value in (200_000, 10**9, "8")),
        *(({"threshold": value}, "threshold is .* from 0 to 1") for value in (NAN, -1, 1.5, INF)),
        *(({"threshold": value}, "threshold is .* from 0 to 1") for value in ("0.5", None, True)),
        ({"names": "abc"}, f"names is 'abc', and it must be {NAMES}"),
        ({"names": ["a", "b", 3]}, f"names is .*{NAMES}"),
        ({"names": ["a", "b", "\ud800"]}, r"names is .*\\ud800.*one text per cluster"),
        ({"names": ["a", "b", "\x1b[2J"]}, r"names is .*x1b.*without control characters"),
        ({"names": None}, f"names is None, and it must be {NAMES}"),
        ({"names": ["a"]}, "names has 1 entries for 3 clusters"),
        ({"names": ["a"] * 4}, "names has 4 entries for 3 clusters"),
        ({"about": "x"}, "about is 'x', and it must be a dictionary"),
        ({"known": {"a": 1}}, "known is .* null or a list of texts"),
        ({"known": [1, 2]}, "known is .* null or a list of texts"),
        ({"known": ["a"]}, r"known\.embeddings is \(90, 8\), and it must be \(1, 8\)"),
        ({"settings": [1]}, r"settings is \[1\], and it must be a dictionary"),
        ({"settings": {"encoder": {"a": 1}}}, r"settings\.encoder describe a dict, not a network"),
    ],
    ids=str,
)
def test_fields_that_are_not_what_they_must_be_are_named(
    straight: Finished, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = damage(straight, tmp_path, **changes)
    with pytest.raises(UsageError, match=rf"changed\.spice is damaged .*{message}.*overwrite=true"):
        spice_pl.load(file)


@pytest.mark.parametrize("field", ["format", "settings", "names", "threshold", "about", "known"])
def test_a_field_that_is_missing_is_named(straight: Finished, tmp_path: Path, field: str) -> None:
    header, file = header_of(model_file(straight)), tmp_path / "changed.spice"
    del header[field]
    save_file(load_file(model_file(straight)), file, {"spice_pl": json.dumps(header)})
    with pytest.raises(UsageError, match=f"its header has no {field}"):
        spice_pl.load(file)


@pytest.mark.parametrize(
    "header",
    ["[" * 100_000, "[]", "null", "7", '"x"', "{", '{"format": ' + "9" * 5000 + "}"],
    ids=range(7),
)
def test_a_header_that_is_no_dictionary_is_refused(tmp_path: Path, header: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.spice", {"spice_pl": header})
    with pytest.raises(UsageError, match=r"is damaged or not a model\.spice"):
        spice_pl.load(tmp_path / "x.spice")


def test_names_of_files_that_are_not_utf8_are_kept(straight: Finished, tmp_path: Path) -> None:
    keys = ["\udcff.png", *header_of(model_file(straight))["known"][1:]]
    model = spice_pl.load(damage(straight, tmp_path, known=keys))
    assert model.known is not None
    assert model.known.keys[0] == "\udcff.png"
    with pytest.raises(UsageError, match="known is"):
        spice_pl.load(damage(straight, tmp_path, known=["\ud800.png", *keys[1:]]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head.output.weight", lambda x: x * NAN, "holds numbers that are not finite"),
        ("head.output.weight", lambda x: x.double() * 1e300 + 1e300, "that are not finite"),
        ("encoder.conv1.weight", lambda x: x / 0, "holds numbers that are not finite"),
        (
            "head.output.weight",
            lambda x: x.int(),
            r"int32, and it must be like torch\.float32",
        ),
        (
            "head.output.weight",
            lambda x: x > 0,
            r"bool, and it must be like torch\.float32",
        ),
        ("encoder.bn1.num_batches_tracked", lambda x: x.float(), "and it must be like torch.int64"),
        ("head.output.weight", lambda x: x[:2], "shape       output.weight is"),
        ("head.output.more", lambda x: torch.zeros(1), "unexpected  more|unexpected  output.more"),
        ("other", lambda x: torch.zeros(1), "tensor 'other' belongs to neither encoder, head nor"),
        ("known.embeddings", lambda x: x * NAN, "known.embeddings holds numbers that are not"),
        ("known.embeddings", lambda x: x[:5], r"known.embeddings is \(5, 8\), and it must be \(90"),
        ("known.embeddings", lambda x: x[:, :5].contiguous(), r"is \(90, 5\), and it must be"),
        ("known.embeddings", lambda x: x.int(), "they must be floating and whole"),
        ("known.clusters", lambda x: x.float(), "they must be floating and whole"),
        ("known.clusters", lambda x: x[:5], r"torch.int32 \(5,\); they must be"),
        (
            "known.clusters",
            lambda x: x + 3,
            "known.clusters reach from 3 to",
        ),
        ("known.clusters", lambda x: x - 3, "known.clusters reach from -3 to"),
        ("known.more", lambda x: torch.zeros(1), "known has tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit_are_named(
    straight: Finished, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    tensors = load_file(model_file(straight))
    tensors[name] = change(tensors.get(name))
    file = tmp_path / "changed.spice"
    save_file(tensors, file, {"spice_pl": json.dumps(header_of(model_file(straight)))})
    with pytest.raises(UsageError, match=message):
        spice_pl.load(file)


def test_kinds_of_floats_may_differ(straight: Finished, tmp_path: Path) -> None:
    tensors = {
        key: value.double() if value.is_floating_point() else value.int()
        for key, value in load_file(model_file(straight)).items()
    }
    save_file(
        tensors, tmp_path / "x.spice", {"spice_pl": json.dumps(header_of(model_file(straight)))}
    )
    one, other = (spice_pl.load(each) for each in (model_file(straight), tmp_path / "x.spice"))
    np.testing.assert_array_equal(
        one.predict(photographs()).confidence, other.predict(photographs()).confidence
    )


RESNET = {"_target_": "spice_pl.nn.resnet.ResNet"}
HUGE = RESNET | {"blocks": [64] * 16, "widths": [2**20] * 16}
TIMM = {"_target_": "timm.create_model"}
TORCHVISION = {"_target_": "spice_pl.nn.pretrained.torchvision_backbone"}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (TIMM | {"model_name": "hf-hub:owner/x"}, "the plain name of a network of timm"),
        (TIMM | {"model_name": "hf_hub:owner/x"}, "the plain name of a network of timm"),
        (TIMM | {"model_name": "local-dir:/x"}, "the plain name of a network of timm"),
        (TIMM | {"model_name": "resnet10t", "cache_dir": "/x"}, "cache_dir='/x', and that must be"),
        (TIMM | {"model_name": "resnet10t", "pretrained_cfg": {"file": "x"}}, "must be left out"),
        (TIMM | {"model_name": "resnet10t", "num_classes": 10**9}, "from 0 to 100,000"),
        (TIMM | {"_args_": ["hf-hub:owner/x", True]}, "_args_=.*, and that must be left out"),
        (TIMM | {"_partial_": True, "model_name": "resnet10t"}, "_partial_=True, and that must be"),
        (TORCHVISION | {"name": "fcn_resnet50"}, "a classifier of torchvision.models"),
        (TORCHVISION | {"name": "maskrcnn_resnet50_fpn"}, "a classifier of torchvision.models"),
        (TORCHVISION | {"name": "resnet18", "weights_backbone": "DEFAULT"}, "must be left out"),
        (
            {"_target_": "torchvision.models.resnet18"},
            "asks for torchvision.models.resnet18",
        ),
        ({"_target_": "torchvision.models.segmentation.fcn_resnet50"}, "which is none of spice_pl"),
        ({"_target_": "torchvision.models.get_model", "name": "x"}, "which is none of spice_pl"),
        ({"_target_": "spice_pl.nn.heads.ClusterHead"}, "which is none of spice_pl.nn.resnet"),
        (
            {"_target_": "spice_pl.nn.resnet.ResNet", "blocks": [10**9]},
            "each a whole number",
        ),
        (RESNET | {"blocks": [1] * 99}, "a list of at most 16"),
        (
            {"_target_": "spice_pl.nn.resnet.ResNet", "stem": {"_target_": "os.system"}},
            "one of conv3",
        ),
        (HUGE, "holds weights of another architecture"),
        ([{"_target_": "torch.nn.Identity"}], "asks for torch.nn.Identity, which is none of"),
        ({"_target_": {"_target_": "x"}}, "_target_ is .*; give the dotted name"),
        (RESNET | {"blocks": [], "widths": []}, "describe 0 and 0"),
    ],
    ids=str,
)
def test_a_file_asks_for_nothing_outside_it(
    straight: Finished, tmp_path: Path, encoder: Any, message: str
) -> None:
    settings = header_of(model_file(straight))["settings"] | {"encoder": encoder}
    file = damage(straight, tmp_path, settings=settings)
    with pytest.raises(UsageError, match=message) as refused:
        spice_pl.load(file)
    assert str(file) in str(refused.value)


@pytest.mark.usefixtures("offline")
def test_the_largest_network_of_timm_takes_no_memory(straight: Finished, tmp_path: Path) -> None:
    """4 GB of weights, in a file that holds a small network."""
    encoder = TIMM | {"model_name": "vit_giant_patch14_224", "num_classes": 0}
    settings = header_of(model_file(straight))["settings"] | {"encoder": encoder}
    file = damage(straight, tmp_path, settings=settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"of another architecture") as refused:
        spice_pl.load(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert "more" in str(refused.value)
    assert len(str(refused.value)) < 20_000


@pytest.mark.usefixtures("offline")
def test_a_head_of_a_billion_units_takes_no_memory(straight: Finished, tmp_path: Path) -> None:
    settings = header_of(model_file(straight))["settings"]
    for size in (2**20, 10**9):
        head = settings["head"] | {"hidden_dim": size, "feature_dim": size}
        file = damage(straight, tmp_path, settings=settings | {"head": head})
        with pytest.raises(UsageError, match=r"of another architecture|a whole number from 1 to"):
            spice_pl.load(file)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("encoder", "pixels"),
    [
        (TORCHVISION | {"name": "shufflenet_v2_x0_5", "weights": "DEFAULT"}, 32),
        (TIMM | {"model_name": "resnet10t.c3_in1k", "num_classes": 0, "pretrained": True}, 32),
        ({"_target_": "spice_pl.nn.wide_resnet.WideResNet", "depth": 10, "widen_factor": 1}, 8),
        (
            {
                "_target_": "spice_pl.nn.resnet.ResNet",
                "blocks": [1],
                "widths": [8],
                "stem": "whitened",
            },
            8,
        ),
    ],
    ids=str,
)
def test_networks_of_others_come_from_the_file_alone(
    tmp_path: Path, encoder: dict[str, Any], pixels: int
) -> None:
    if encoder["_target_"].startswith("timm"):
        pytest.importorskip("timm")
    allowing = OmegaConf.create({"allow_targets": []})
    offline = {
        key: {"pretrained": False, "weights": None}.get(key, encoder[key]) for key in encoder
    }
    network = build(allowing, offline)
    head = ClusterHead(network.num_features, 4, 2)
    plain = {"_target_": "spice_pl.data.augment.PlainView", "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = portable_settings(encoder, head, plain)
    assert settings is not None
    made = ClusterNetwork(build(allowing, plain), network, head)
    model = PortableModel(made, settings, pixels, ["a", "b"], 0.5)
    model.save(tmp_path / "model.spice")
    images = np.random.default_rng(0).integers(0, 256, (4, pixels, pixels, 3), dtype=np.uint8)
    again = spice_pl.load(tmp_path, device="cpu").predict(images)
    np.testing.assert_allclose(again.confidence, model.predict(images).confidence, atol=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"[1]",
        b'{"0": 1}',
        b'{"01": "a"}',
        b'{"0": "\\ud800"}',
        b"[" * 100_000,
        b" " * 2**25,
    ],
)
def test_names_beside_a_model_are_checked(finished: Finished, content: bytes) -> None:
    model_file(finished).with_name("names.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"names\.json is damaged .*; its form is .*remove it"):
        spice_pl.load(model_file(finished))


def test_answers_that_are_not_numbers_are_refused(straight: Finished, tmp_path: Path) -> None:
    tensors = load_file(model_file(straight))
    tensors["head.output.weight"].fill_(3e38)  # finite; its products are not
    file = tmp_path / "x.spice"
    save_file(tensors, file, {"spice_pl": json.dumps(header_of(model_file(straight)))})
    with pytest.raises(UsageError, match=r"probabilities for 0 are not numbers"):
        spice_pl.load(file).predict(photographs())


@pytest.mark.parametrize(("given", "kept"), [(-1.0, 0.0), (1.5, 1.0), (0.3, 0.3)])
def test_a_threshold_outside_probabilities_says_the_same(
    straight: Finished, tmp_path: Path, given: float, kept: float
) -> None:
    model = spice_pl.load(model_file(straight))
    model.threshold = given
    model.save(tmp_path / "x.spice")
    again = spice_pl.load(tmp_path / "x.spice")
    assert again.threshold == kept
    one, other = model.predict(photographs()), again.predict(photographs())
    assert one.not_sure.tolist() == other.not_sure.tolist()


def test_loading_leaves_random_numbers_as_they_were(straight: Finished) -> None:
    before = torch.random.get_rng_state()
    spice_pl.load(model_file(straight))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_folder_without_a_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        spice_pl.load(tmp_path)
    assert make_job().cfg.known_images == 10_000


def test_known_images_vote_where_the_run_kept_other_clusters(
    straight: Finished, tmp_path: Path
) -> None:
    model = spice_pl.load(straight.folder("fixmatch").path)
    assert not model.known_vote  # the network's clusters were kept
    assert model.known is not None
    pixels = torch.randint(0, 256, (4, 3, model.image_size, model.image_size), dtype=torch.uint8)
    probs, embeddings = model.network(pixels)
    torch.testing.assert_close(model.outputs(pixels)[0], probs)
    model.known_vote = True
    model.save(tmp_path / "model.spice")
    votes = spice_pl.load(tmp_path / "model.spice").outputs(pixels)[0]
    shares = model.known.shares(embeddings, model.num_clusters)
    torch.testing.assert_close(votes, (probs + shares) / 2)


def test_a_device_that_is_not_there_is_named(straight: Finished) -> None:
    for device in ("foo", "xpu:7"):
        with pytest.raises(UsageError, match=f"device={device} cannot be used .*; give cpu, cuda"):
            spice_pl.load(straight.folder("proto").path, device=device)
