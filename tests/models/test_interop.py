"""Published checkpoints give the right network and output; one that does not fit is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from tests.nn.formula import fill_by_formula, formula_images
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from spice_pl.errors import UsageError
from spice_pl.models.interop import (
    load_backbone_weights,
    load_encoder,
    load_reference_checkpoint,
    read_reference,
)
from spice_pl.nn import ClusterHead, ResNet, WideResNet

State = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


def randomised(module: Network, seed: int = 0) -> Network:
    """Give every tensor its own values, running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            is_scale = name.endswith("running_var") or (tensor.ndim == 1 and "weight" in name)
            tensor.add_(noise.abs() if is_scale else noise)
    return module.eval()


def named(module: nn.Module, prefix: str, *renames: tuple[str, str]) -> State:
    state = {}
    for key, value in module.state_dict().items():
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        state[prefix + key] = value.clone()
    return state


SHORTCUT = (".downsample.", ".shortcut.")
PROJECTION = (("hidden.", "fc.0."), ("output.", "fc.2."))
HEAD = (("hidden.", "lin1."), ("output.", "lin2."))


def wide_names(network: WideResNet) -> State:
    state = named(network, "", (".shortcut.", ".convShortcut."))
    return {
        key.replace("layer", "block", 1).replace(".", ".layer.", 1)
        if key.startswith("layer")
        else key: value
        for key, value in state.items()
    }


def moco(network: nn.Module, projection: nn.Module, *renames: tuple[str, str]) -> State:
    queue = {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1)}
    branches: State = {}
    for branch, fill in (("encoder_q", 1.0), ("encoder_k", 0.0)):
        both = named(network, f"module.{branch}.", *renames)
        both |= named(projection, f"module.{branch}.", *PROJECTION)
        branches |= {key: value * fill for key, value in both.items()}
    return queue | branches


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_stage_1_gives_the_projection_that_the_authors_network_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, projection = ResNet().eval(), ClusterHead(512, 512, 128)
    fill_by_formula(network, projection, first=2)  # the authors' queue and pointer are 0 and 1
    state = moco(network, projection, SHORTCUT)
    content = {"epoch": 9, "arch": "resnet18_cifar", "state_dict": state, "optimizer": {"lr": 1.0}}
    model = load_reference_checkpoint(saved(content, tmp_path / "moco.pth.tar"))
    with torch.no_grad():
        output = model(formula_images(2, 32))
    # First image, first five outputs of the authors' network for the same weights.
    expected = torch.tensor([-0.7292205, 10.7538, 13.40316, 5.02898, -7.444777])
    torch.testing.assert_close(output[0, :5], expected, rtol=1e-4, atol=1e-3)
    assert output.shape == (2, 128)
    assert not model.training
    said = capsys.readouterr().out
    for text in ("stage 1 of SPICE", "512 -> 512 -> 128", "matched: 104 of 104 tensors"):
        assert text in said
    assert "not needed: queue, queue_ptr, encoder_k.* (124)" in said


@pytest.mark.parametrize(
    ("blocks", "widths", "num_clusters"), [((1, 2), (4, 8), 3), ((2, 1, 3, 1), (8, 8, 16, 24), 20)]
)
def test_stage_2_gives_probabilities_for_any_width_depth_and_k(
    tmp_path: Path, blocks: Sequence[int], widths: Sequence[int], num_clusters: int
) -> None:
    network = randomised(ResNet(blocks, widths, "conv3_pool"))
    head = randomised(ClusterHead(widths[-1], 5, num_clusters))
    state = named(network, "module.feature_module.")
    state |= named(head, "module.head.head_0.classifier.", *HEAD)
    state |= named(head, "module.head.head_3.classifier.", *HEAD)  # the chosen one is head_0
    images = formula_images(3, 40)
    with torch.no_grad():
        output = load_reference_checkpoint(saved(state, tmp_path / "self.pth"), pixels=40)(images)
        assert torch.equal(output, head(network(images)))
    assert torch.allclose(output.sum(dim=1), torch.ones(3))
    assert read_reference(tmp_path / "self.pth").num_clusters == num_clusters


@pytest.mark.parametrize("wrapper", ["eval_model", "ema_model"])
@pytest.mark.parametrize(
    ("depth", "widen_factor", "strides", "pixels"),
    [(10, 1, (1, 2, 2), 32), (16, 3, (1, 2, 2), 32), (21, 2, (2, 2, 2, 2), 96)],
)
def test_stage_3_gives_logits_of_the_average(
    tmp_path: Path, wrapper: str, depth: int, widen_factor: int, strides: Any, pixels: int
) -> None:
    network = randomised(WideResNet(depth, widen_factor, strides))
    classifier = randomised(nn.Linear(network.num_features, 7))
    state = wide_names(network) | named(classifier, "fc.")
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    content = {"train_model": other, wrapper: state, "optimizer": {}, "scheduler": {}, "it": 3}
    images = formula_images(2, pixels)
    with torch.no_grad():
        output = load_reference_checkpoint(saved(content, tmp_path / "semi.pth"), pixels)(images)
        torch.testing.assert_close(output, classifier(network(images)))
    assert read_reference(tmp_path / "semi.pth", pixels).num_clusters == 7


@pytest.mark.parametrize(
    ("arch", "pixels", "stem"),
    [
        (None, 32, "conv3"),
        (None, 96, "conv3_pool"),  # their ResNet18 for STL-10 has the same names, and a pool
        ("resnet18_cifar", 64, "conv3"),
    ],
)
def test_image_size_and_arch_decide_on_the_pool_if_names_do_not(
    tmp_path: Path, arch: str | None, pixels: int, stem: Any
) -> None:
    network, projection = ResNet((1, 1), (4, 8), stem), ClusterHead(8, 8, 6)
    randomised(network), randomised(projection)
    content = {"state_dict": moco(network, projection, SHORTCUT)} | ({"arch": arch} if arch else {})
    images = formula_images(2, pixels)
    with torch.no_grad():
        output = load_reference_checkpoint(saved(content, tmp_path / "m.pth"), pixels)(images)
        assert torch.equal(output, projection.logits(network(images)))
        other = load_encoder(tmp_path / "m.pth", pixels, stem="conv3").eval()
        assert torch.equal(other(images), network(images)) == (stem == "conv3")


def torchvision_like(block: Any = BasicBlock, num_classes: int = 5) -> TorchvisionResNet:
    with torch.device("cpu"):
        network = TorchvisionResNet(block, [1, 2, 1, 1], num_classes=num_classes)
    randomised(network)
    return network


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_torchvision_state_dicts_give_their_logits(tmp_path: Path, block: Any) -> None:
    network = torchvision_like(block)
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    images = formula_images(2, 64)
    with torch.no_grad():
        model = load_reference_checkpoint(tmp_path / "resnet.safetensors", pixels=64)
        torch.testing.assert_close(model(images), network(images))
    found = read_reference(tmp_path / "resnet.safetensors", 64)
    assert found.num_clusters is None  # classes of a classifier are not clusters
    assert found.encoder.num_features == 512 * block.expansion


def cifar_stem(network: TorchvisionResNet, padding: int) -> TorchvisionResNet:
    network.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network


def test_solo_learn_checkpoints_pad_the_stem_by_two(tmp_path: Path) -> None:
    network = cifar_stem(torchvision_like(), padding=2)
    state = named(network, "backbone.") | named(network, "momentum_backbone.")
    state |= {"projector.0.weight": torch.zeros(4, 512), "classifier.weight": torch.zeros(10, 512)}
    content = {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.3), "epoch": 4}
    images = formula_images(2, 32)
    with torch.no_grad():
        output = load_reference_checkpoint(saved(content, tmp_path / "solo.ckpt"))(images)
        torch.testing.assert_close(output, network(images))


def test_lightly_checkpoints_in_a_sequential(tmp_path: Path) -> None:
    whole = cifar_stem(torchvision_like(), padding=1)
    # As its examples build it from its own ResNet, whose stem applies ReLU as a function.
    layers = (whole.layer1, whole.layer2, whole.layer3, whole.layer4)
    backbone = nn.Sequential(whole.conv1, whole.bn1, *layers, nn.AdaptiveAvgPool2d(1))
    state = named(backbone, "backbone.", SHORTCUT) | named(backbone, "backbone_momentum.")
    split = torch.stack([state["backbone.1.running_mean"] + i for i in (-1, 1)])  # two splits
    state["backbone.1.running_mean"] = split.flatten()
    state["projection_head.layers.0.weight"] = torch.zeros(4, 512)
    path = saved({"state_dict": state, "pytorch-lightning_version": "2"}, tmp_path / "l.ckpt")
    images = formula_images(2, 32)
    with torch.no_grad():
        output = load_reference_checkpoint(path)(images)
        torch.testing.assert_close(output, backbone(images).flatten(1), rtol=1e-3, atol=1e-3)


def without(name: str) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        del state[name]

    return spoil


def wider(state: State) -> None:
    state["module.encoder_q.layer2.0.bn1.bias"] = torch.zeros(9)


def another(state: State) -> None:
    state["module.encoder_q.layer2.0.se.weight"] = torch.zeros(9)


def stranger(state: State) -> None:
    state["module.teacher.weight"] = torch.zeros(9)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("module.encoder_q.layer2.0.bn2.weight"), r"missing     encoder\.layer2\.0\.bn2\."),
        (without("module.encoder_q.layer1.0.conv2.weight"), r"missing     encoder\.layer1\.0\.con"),
        (without("module.encoder_q.fc.2.bias"), r"missing     head\.output\.bias \(6,\)"),
        (wider, r"shape       encoder\.layer2\.0\.bn1\.bias is \(9,\), needed \(8,\)"),
        (another, r"unexpected  encoder\.layer2\.0\.se\.weight"),
        (stranger, r"unexpected  teacher\.weight"),
    ],
)
def test_a_partial_match_is_refused_without_partial(
    tmp_path: Path, spoil: Callable[[State], None], message: str
) -> None:
    state = moco(ResNet((1, 1), (4, 8), "conv3"), ClusterHead(8, 8, 6), SHORTCUT)
    spoil(state)
    path = saved({"state_dict": state}, tmp_path / "m.pth")
    with pytest.raises(UsageError, match=f"does not fit(.|\n)*{message}"):
        load_reference_checkpoint(path)
    model = read_reference(path, partial=True)
    assert "matched: " in model.summary
    kept = state["module.encoder_q.conv1.weight"]
    assert torch.equal(model.encoder.state_dict()["conv1.weight"], kept)


def test_a_file_without_a_whole_layer_is_not_taken_for_a_smaller_network(tmp_path: Path) -> None:
    state = moco(ResNet((1, 1), (4, 8), "conv3"), ClusterHead(8, 8, 6), SHORTCUT)
    cut = {key: value for key, value in state.items() if "q.layer2" not in key}
    with pytest.raises(UsageError, match="takes 8 features and the encoder gives 4"):
        load_reference_checkpoint(saved(cut, tmp_path / "m.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, "has none of these layouts: stage 1 of SPICE"),
        ({"epoch": 3}, "holds no tensors by name, only epoch"),
        (torch.zeros(3), "holds a Tensor; a state dict is needed"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_reference_checkpoint(saved(content, tmp_path / "x.pth"))


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q.", "backbone.", "model."])
def test_any_backbone_loads_a_local_file(tmp_path: Path, prefix: str) -> None:
    source, backbone = randomised(ResNet((1, 1), (4, 8))), ResNet((1, 1), (4, 8))
    state = named(source, prefix, SHORTCUT) | {f"{prefix}fc.weight": torch.zeros(3, 8)}
    said = load_backbone_weights(backbone, saved({"state_dict": state}, tmp_path / "w.pth"))
    assert "fc" in said.rpartition("not needed: ")[2]
    for key, value in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key


def test_a_deeper_networks_file_does_not_fit_a_backbone(tmp_path: Path) -> None:
    path = saved(ResNet((2, 1), (4, 8)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"unexpected  layer1\.1\.conv1\.weight"):
        load_backbone_weights(ResNet((1, 1), (4, 8)), path)
    assert "matched: " in load_backbone_weights(ResNet((1, 1), (4, 8)), path, partial=True)
