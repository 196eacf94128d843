"""Every option of every group composes, and every key of it is used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from tests.conftest import CONF, compose

from spice_pl.job.settings import ALLOWED_NAMES, ALLOWED_TARGETS, build
from spice_pl.job.trainer import OURS
from spice_pl.stages.base import Stage

STAGES = ("moco", "proto", "fixmatch")
FAMILY = (
    *("clusmatch", "freematch", "flexmatch", "softmatch", "supervised"),
    *("scan", "selflabel", "temi", "turtle", "kmeans"),
    *("empssl", "vicreg", "fastsiam", "cc", "propos", "cdc", "dcboost"),
)
GROUPS = {
    group.name: sorted(file.stem for file in group.glob("*.yaml"))
    for group in sorted(CONF.iterdir())
    if group.is_dir()
}
NEEDED = {
    name: (f"dataset.{place}=/images", "dataset.num_clusters=7")
    for name, place in (
        *(("folder", "root"), ("shards", "root"), ("hugging_face", "root")),
        ("array", "path"),
    )
} | {
    "timm": ("backbone.model_name=resnet10t",),
    "torchvision": ("backbone.name=shufflenet_v2_x0_5",),
    "checkpoint": ("backbone.path=/weights.pth",),
    "import": ("path=/weights.pth",),
}
# Read by run.py, stages and views, and not by the function that makes the data set.
DESCRIBED = {"num_clusters", "mean", "std", "classes", "imbalance", "limit"}


def command_lines(*groups: str) -> list[Any]:
    """Overrides that choose each option of some groups, with what it needs beside itself."""
    lines = []
    for group in groups:
        for name in GROUPS[group]:
            line = [f"{group}={name}", *NEEDED.get(name, ())]
            if group == "preset":
                line += [f"dataset={name}"]
            elif group == "experiment":
                line += ["dataset=folder", *NEEDED["folder"]]
            lines.append(pytest.param(line, id=line[0]))
    return lines


def test_groups_are_the_documented_ones() -> None:
    assert {"stage", "dataset", "backbone", "augment", "trainer", "logger"} <= GROUPS.keys()
    assert sum(map(len, GROUPS.values())) > 20


@pytest.mark.parametrize("overrides", command_lines(*GROUPS))
def test_every_option_composes_without_an_open_end(overrides: list[str]) -> None:
    cfg = compose(*overrides)
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    assert list(cfg.stages)
    assert all("upstream" in cfg[name] for name in cfg.stages)


@pytest.mark.parametrize("name", GROUPS["preset"])
def test_preset_of_a_data_set_comes_with_it(name: str) -> None:
    cfg = compose(f"dataset={name}", *NEEDED.get(name, ()))
    numbers = dict(flat(yaml.safe_load((CONF / "preset" / f"{name}.yaml").read_text())))
    assert numbers
    for key, value in numbers.items():
        if isinstance(value, str) and value.startswith("${"):
            chosen = numbers["defaults"][0]["/backbone@joint_backbone"]
            expected = yaml.safe_load((CONF / "backbone" / f"{chosen}.yaml").read_text())
            assert OmegaConf.to_container(cfg.fixmatch.module.backbone) == expected
        elif not key.startswith("defaults"):
            assert OmegaConf.select(cfg, key) == value, key
    # The command line still wins.
    assert compose(f"dataset={name}", *NEEDED.get(name, ()), "moco.epochs=7").moco.epochs == 7


@pytest.mark.parametrize("group", ["preset", "experiment"])
def test_numbers_begin_with_their_source(group: str) -> None:
    for name in GROUPS[group]:
        lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
        first = next(line for line in lines if not line.startswith("# @package"))
        assert first.startswith("# "), name
        assert len(first) > 20, name


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def targets(value: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a _target_, with its place."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield where, value
        for key, item in value.items():
            yield from targets(item, f"{where}.{key}")


def arguments(name: str) -> dict[str, inspect.Parameter]:
    """Arguments of what a _target_ names, with those that a class passes on to its bases."""
    target = get_object(name)
    found: dict[str, inspect.Parameter] = {}
    for each in target.__mro__ if inspect.isclass(target) else [target]:
        made = each.__dict__.get("__init__") if inspect.isclass(each) else each
        if made is None:
            continue
        own = inspect.signature(made).parameters
        found = {**own, **found}
        if not any("Unpack" in str(one.annotation) for one in own.values()):
            break
    return found


@pytest.mark.parametrize(
    "overrides",
    command_lines("dataset", "backbone", "augment", "trainer", "logger", "preset", "experiment"),
)
def test_every_key_is_an_argument_of_what_it_configures(overrides: list[str]) -> None:
    resolved = OmegaConf.to_container(compose(*overrides), resolve=True)
    assert isinstance(resolved, dict)
    found = list(targets(resolved))
    assert len(found) > 10
    for where, node in found:
        assert node["_target_"].startswith((*ALLOWED_TARGETS, *ALLOWED_NAMES)), where
        parameters = arguments(node["_target_"])
        keys = {key for key in node if not key.startswith("_")}
        if where == ".dataset":
            keys -= DESCRIBED
        if where == ".trainer":
            keys -= set(OURS)
        if any(
            each.kind is each.VAR_KEYWORD and "Unpack" not in str(each.annotation)
            for each in parameters.values()
        ):
            continue
        assert keys <= parameters.keys(), f"{where}: {keys - parameters.keys()}"


@pytest.mark.parametrize("backbone", sorted({*GROUPS["backbone"]} - {"checkpoint"}))
def test_every_backbone_is_built_and_maps_images_to_features(backbone: str) -> None:
    if backbone.startswith(("timm", "efficientnet")):
        pytest.importorskip("timm")
    cfg = compose(f"backbone={backbone}", *NEEDED.get(backbone, ()), "dataset=cifar10")
    network = build(cfg, cfg.backbone).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, network.num_features)


@pytest.mark.parametrize("augment", GROUPS["augment"])
def test_every_view_is_built_and_keeps_the_size(augment: str) -> None:
    cfg = compose(f"augment={augment}")
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert {"plain", "moco", "patches", "weak", "strong", "strong_joint"} <= set(cfg.augment)
    for name in cfg.augment:
        view = build(cfg, cfg.augment[name])
        made = view(images, torch.rand(2, view.num_uniforms))
        many = (cfg.augment[name].num_patches,) if name == "patches" else ()
        assert made.shape == (2, *many, 3, 16, 16), name


@pytest.mark.parametrize("dataset", ["digits", "mnist5k"])
@pytest.mark.parametrize("stage", [*STAGES, *FAMILY])
def test_every_stage_is_built_with_its_streams(dataset: str, stage: str) -> None:
    cfg = compose(f"dataset={dataset}")
    module = build(cfg, cfg[stage].module)
    assert isinstance(module, Stage)
    assert module.feature_dim == build(cfg, cfg.backbone).num_features
    for stream in cfg[stage].streams.values():
        assert build(cfg, stream).batch_size == stream.batch_size


def test_every_plain_setting_is_read_somewhere() -> None:
    files = [*(CONF.parent / "src").rglob("*.py"), *CONF.rglob("*.yaml")]
    sources = "\n".join(file.read_text() for file in files)
    cfg = compose()
    plain = {str(key) for key in cfg if not isinstance(cfg[key], DictConfig)}
    assert len(plain) > 8
    for key in plain:
        used = (f"cfg.{key}", f'"{key}"', "${" + key + "}")
        assert any(text in sources for text in used), key
    for key in {str(key) for stage in STAGES for key in cfg[stage]}:
        assert any(text in sources for text in (f"].{key}", f'"{key}"', f"..{key}}}")), key


ABLATIONS: dict[
    str, dict[str, Any]
] = {  # what each row of Tables VII and VIII changes, and nothing else
    "spice": {},
    "non_overlap": {"module.overlap": False},
    "joint_sh": {"module.joint": "single_head", "epochs": 1},
    "joint_mh": {"module.joint": "multi_head", "epochs": 1},
    "entropy": {"module.entropy": 1.0},
    "ce": {"module.loss": "ce"},
    "tce": {"module.loss": "tce"},
    "reference_bn": {"module.bn_mode": "reference"},
    "weak_weak": {"strong": "weak"},
    "strong_weak": {"weak": "strong", "strong": "weak"},
    "strong_strong": {"weak": "strong"},
}


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("proto/ablation/*.yaml")))
def test_a_row_of_the_ablation_tables_changes_what_it_says(name: str) -> None:
    changed, plain = compose(f"proto/ablation={name}").proto, compose()
    expected = OmegaConf.to_container(plain.proto, resolve=True)
    assert isinstance(expected, dict)
    for key, value in ABLATIONS[name].items():
        if key in ("weak", "strong"):
            views = expected["streams"]["images"]["views"]
            views[key] = OmegaConf.to_container(plain.augment[value], resolve=True)
        else:
            place, _, last = key.rpartition(".")
            (expected[place] if place else expected)[last] = value
    assert OmegaConf.to_container(changed, resolve=True) == expected


def test_shared_settings_reach_the_stage_that_reads_them() -> None:
    cfg = compose(
        "~preset",
        *("reliable.agreement=0.5", "reliable.confidence=0.6", "reliable.balance=cap"),
        *("reliable.num_neighbors=9", "seed=4", "dataset.num_clusters=6"),
        "proto.module.hidden_dim=33",
    )
    module = cfg.fixmatch.module
    reliable = module.selector
    assert (reliable.agreement, reliable.confidence, reliable.balance) == (0.5, 0.6, "cap")
    assert (reliable.num_neighbors, module.seed, module.num_clusters) == (9, 4, 6)
    assert module.hidden_dim == 33
    assert (cfg.proto.module.seed, cfg.proto.module.num_clusters) == (4, 6)
    assert cfg.run == "seed4"


SPEC = {  # of the paper: queue, epochs, buffer, epochs of stage 2, agreement, cutout, stage 3
    "stl10": (65536, 1000, 5000, 100, 0.90, 32, (37, 2)),
    "cifar10": (12800, 1000, 5000, 30, 0.99, 16, (28, 2)),
    "cifar20": (12800, 1000, 10000, 100, 0.99, 16, (28, 8)),
    "imagenet10": (12800, 5000, 5000, 100, 0.90, 32, None),
    "imagenet_dogs": (12800, 3000, 8000, 100, 0.90, 32, None),
    "tiny_imagenet": (12800, 1000, 5000, 100, 0.90, 16, None),
}


@pytest.mark.parametrize("name", SPEC)
def test_numbers_of_the_paper(name: str) -> None:
    cfg = compose(f"dataset={name}")
    joint = cfg.fixmatch.module.backbone
    assert SPEC[name] == (
        cfg.moco.module.queue_size,
        cfg.moco.epochs,
        cfg.proto.module.buffer_size,
        cfg.proto.epochs,
        cfg.fixmatch.module.selector.agreement,
        cfg.augment.strong.max_cutout,
        (joint.depth, joint.widen_factor) if "depth" in joint else None,
    )
    assert cfg.fixmatch.module.init == ("scratch" if "depth" in joint else "joint")
    assert cfg.dataset.protocol == "whole"
    assert cfg.proto.module.entropy == (0.03 if name == "tiny_imagenet" else 0.0)
    # 1 + the convolutions of the blocks: the paper's ResNet34
    assert list(cfg.backbone.blocks) == [3, 4, 6, 3]


@pytest.mark.parametrize("name", ["cifar10", "cifar20", "stl10"])
def test_split_protocol_has_one_network_for_all_stages(name: str) -> None:
    more = ["backbone=resnet18_pool"] if name == "stl10" else []
    cfg = compose("experiment=split", f"dataset={name}", *more)
    assert cfg.dataset.protocol == "split"
    assert list(cfg.backbone.blocks) == [2, 2, 2, 2]
    assert cfg.backbone.stem == ("conv3_pool" if more else "conv3")
    assert cfg.fixmatch.module.backbone == cfg.backbone
    assert cfg.fixmatch.module.init == "joint"


def test_folder_of_results_is_named_after_the_folder_of_images(tmp_path: Path) -> None:
    cfg = compose("dataset=folder", f"dataset.root={tmp_path}/my photos/", "dataset.num_clusters=2")
    assert cfg.dataset.name == "my photos"


def test_selector_of_the_family_is_one_word() -> None:
    cfg = compose("clusmatch.selector=reliable", "freematch.selector=oracle")
    assert cfg.clusmatch.module.selector == cfg.selectors.reliable
    assert cfg.clusmatch.title == "ClusMatch on reliable labels"
    assert cfg.freematch.title == "FreeMatch on oracle labels"  # marked wherever it is shown
    assert cfg.supervised.title == "Supervised on oracle_all labels"
    assert cfg.softmatch.module.selector == cfg.selectors.reliable


def test_fixmatch_is_one_setting_of_the_family() -> None:
    """It differs from FlexMatch by class and threshold alone, and so do its numbers."""
    cfg = OmegaConf.to_container(compose("~preset"), resolve=True)
    assert isinstance(cfg, dict)
    ours, other = (dict(flat(cfg[name])) for name in ("fixmatch", "flexmatch"))
    differ = {key for key in ours.keys() | other.keys() if ours.get(key) != other.get(key)}
    assert {key for key in differ if not key.startswith("module.threshold.")} == {
        "title",
        "module._target_",
    }


def test_the_family_shares_one_budget() -> None:
    cfg = compose("fixmatch.epochs=7", "fixmatch.module.steps_per_epoch=9")
    for name in ("freematch", "flexmatch", "softmatch", "supervised"):
        assert (cfg[name].epochs, cfg[name].module.steps_per_epoch) == (7, 9)
