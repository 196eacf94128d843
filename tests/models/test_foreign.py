"""Checkpoints of other code bases: their encoder is read, or one message says how (row 15)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tests.models.test_interop import named, randomised, saved, torchvision_like
from tests.nn.formula import formula_images
from torch import Tensor, nn

from spice_pl.errors import UsageError
from spice_pl.models.interop import load_backbone_weights, read_reference

State = dict[str, Tensor]
ZEROS = torch.zeros(4, 4)


def encoder() -> nn.Module:
    network: nn.Module = torchvision_like()
    network.fc = nn.Identity()
    return network


def scan(state: State) -> dict[str, object]:
    heads = {
        f"cluster_head.{h}.{key}": torch.full(size, float(h))
        for h in (0, 1)
        for key, size in (("weight", (5, 512)), ("bias", (5,)))
    }
    return {"model": named_state(state, "module.backbone.") | heads, "head": 1}


def named_state(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def spoiled(state: State, prefix: str) -> State:
    """Another copy of the network, which must not be taken."""
    return {prefix + key: value * 0 for key, value in state.items()}


KINDS = {
    "SCAN": scan,
    "SCAN, pretext": lambda s: named_state(s, "backbone.") | {"contrastive_head.0.weight": ZEROS},
    "SimSiam": lambda s: {
        "arch": "resnet18",
        "state_dict": named_state(s, "module.encoder.")
        | {"module.encoder.fc.0.weight": ZEROS, "module.predictor.0.weight": ZEROS},
    },
    "SupCon": lambda s: {"model": named_state(s, "encoder.") | {"head.0.weight": ZEROS}},
    "SwAV": lambda s: (
        named_state(s, "module.")
        | {"module.projection_head.0.weight": ZEROS, "module.prototypes.weight": ZEROS}
    ),
    "MoCo v3": lambda s: {
        "state_dict": spoiled(s, "module.momentum_encoder.")
        | named_state(s, "module.base_encoder.")
        | {"module.base_encoder.fc.0.weight": ZEROS, "module.predictor.0.weight": ZEROS}
    },
    "DINO": lambda s: {
        "student": spoiled(s, "module.backbone.") | {"module.head.mlp.0.weight": ZEROS},
        "teacher": named_state(s, "backbone.") | {"head.last_layer.weight_g": ZEROS},
        "epoch": 3,
    },
    "BYOL": lambda s: (
        named_state(s, "online_encoder.net.")
        | {"online_encoder.projector.net.0.weight": ZEROS, "online_predictor.net.0.weight": ZEROS}
        | spoiled(s, "target_encoder.net.")
    ),
    "VICReg": lambda s: {
        "model": named_state(s, "module.backbone.") | {"module.projector.0.weight": ZEROS}
    },
    "mmselfsup": lambda s: {"state_dict": named_state(s, "backbone.") | {"neck.fc0.weight": ZEROS}},
    "compiled": lambda s: named_state(s, "_orig_mod."),
    "compiled in data parallel": lambda s: {"model": named_state(s, "module._orig_mod.")},
    "data parallel in compiled": lambda s: {"model": named_state(s, "_orig_mod.module.")},
    "compiled part": lambda s: {"model": named_state(s, "backbone._orig_mod.")},
    "unknown code": lambda s: named_state(s, "net.trunk.") | {"net.top.weight": ZEROS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_of_other_code_gives_its_features(tmp_path: Path, kind: str) -> None:
    network = encoder()
    path = saved(KINDS[kind](dict(network.state_dict())), tmp_path / "w.pth")  # type: ignore[no-untyped-call]
    images = formula_images(2, 64)
    with torch.no_grad():
        found = read_reference(path, 64)
        torch.testing.assert_close(found.encoder(images), network(images))
        other = randomised(encoder(), seed=7)
        load_backbone_weights(other, path)
        torch.testing.assert_close(other.eval()(images), network(images))
    assert found.num_clusters == (5 if kind == "SCAN" else None)
    if kind == "SCAN":  # the head that the file says was selected
        assert found.head is not None
        assert bool((found.head.state_dict()["weight"] == 1).all())


@pytest.mark.parametrize("prefix", ["", "module.base_encoder.", "_orig_mod.backbone.", "teacher"])
def test_a_transformer_is_read_with_the_command_of_the_message(tmp_path: Path, prefix: str) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    state = named(network, "backbone." if prefix == "teacher" else prefix)
    path = saved({prefix: state} if prefix == "teacher" else state, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match="none of these layouts") as error:
        read_reference(path, 32)
    words = shlex.split(str(error.value).splitlines()[-1])
    settings = dict(word.split("=", 1) for word in words)
    assert settings["stage"] == "embed"
    assert settings["backbone.model_name"] == "vit_tiny_patch16_224"
    assert settings["dataset.image_size"] == "32"
    other = timm.create_model(settings["backbone.model_name"], num_classes=0, img_size=32)
    load_backbone_weights(other, settings["embed.module.weights"])
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_advice_about_a_partial_fit_is_given_only_if_something_fits(tmp_path: Path) -> None:
    state = dict(encoder().state_dict())
    del state["layer1.0.bn1.weight"]
    with pytest.raises(UsageError, match="does not fit") as error:
        read_reference(saved(state, tmp_path / "w.pth"), 64)
    assert "import.module.partial=true" in str(error.value)
    assert "matched" in read_reference(tmp_path / "w.pth", 64, partial=True).summary
    with pytest.raises(UsageError, match="does not fit") as error:
        load_backbone_weights(nn.Linear(3, 3), tmp_path / "w.pth")
    assert not re.search("partial=", str(error.value))
