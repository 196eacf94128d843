"""Where the weights of a network come from, for titles and rows of tables.

It is read from the settings that build the network. The wording of an experiment cannot say it:
another setting of the command line may have replaced the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spice_pl.job.job import upstream_names
from spice_pl.nn.encoders import trained_by

EMBED = "embed"


def titled(
    name: str,
    settings: Mapping[str, Any],
    recorded: str | None = None,
    more: Sequence[str] = (),
) -> str:
    """Return the title of a stage, with the origin of the pretrained network that it begins with.

    Args:
        name: name of the stage.
        settings: all settings of the job, resolved.
        recorded: title of the finished embed stage that is read, if another job made it.
        more: titles of the further stages that are read, where there are several.
    """
    title = str(settings[name]["title"])
    if name == EMBED:
        return origin(settings[EMBED]["module"])
    own = settings[name].get("module")
    if own is not None and own.get("init") != "scratch" and EMBED in _before(name, settings):
        first = recorded or origin(settings[EMBED]["module"])
        return f"{title} on {' and '.join([first, *more])}"
    return title


def _before(name: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the stages that a stage is made from, the nearest first."""
    found: list[str] = []
    before = upstream_names(settings[name].get("upstream"))[:1]
    while before and before[0] in settings and before[0] not in found:
        found += before
        before = upstream_names(settings[before[0]].get("upstream"))[:1]
    return found


def origin(module: Mapping[str, Any]) -> str:
    """Return the name of a pretrained network and what trained it, for the settings of `embed`.

    >>> origin({"backbone": {"_target_": "spice_pl.nn.resnet.ResNet"}, "weights": None})
    'ResNet (random weights)'
    >>> origin({"backbone": {"_target_": "spice_pl.nn.resnet.ResNet"}, "weights": "a/b.pth"})
    'ResNet (weights of b.pth)'
    """
    backbone = module["backbone"]
    target = str(backbone.get("_target_", "network")).rpartition(".")[2]
    name, source = target, "random weights"
    if module.get("weights"):
        source = f"weights of {Path(str(module['weights'])).name}"
    elif target == "load_encoder":
        name, source = "encoder", f"weights of {Path(str(backbone['path'])).name}"
    if target == "efficientnet_lite":
        name = f"efficientnet_lite{backbone.get('variant', 0)}"
        if backbone.get("pretrained", True) and not module.get("weights"):
            source = "ImageNet labels"
    elif target == "create_model":
        name = str(backbone["model_name"])
        if backbone.get("pretrained") and not module.get("weights"):
            source = trained_by(name)
    elif target == "torchvision_backbone":
        name = str(backbone["name"])
        if backbone.get("weights") and not module.get("weights"):
            source = "ImageNet labels"
    return f"{name} ({source})"
