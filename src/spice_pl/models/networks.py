"""What a `model.spice` may build: networks and a view, each with the arguments that it may give.

None of them opens a connection or reads another file. Their size is bounded: they must have the
shapes of the tensors in the file. A few of torchvision and timm cannot be made without memory
first, and take at most that of the largest of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from torchvision import models

from spice_pl.errors import UsageError
from spice_pl.nn.resnet import Block, Stem
from spice_pl.system.building import Rule, locate

Argument = tuple[str, Callable[[Any], bool]]  # what it must be, and whether a value is that


def _whole(least: int, most: int) -> Argument:
    return (
        f"a whole number from {least} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _number(least: float, most: float) -> Argument:
    return (
        f"a number from {least:g} to {most:g}",
        lambda value: type(value) in (int, float) and least <= value <= most,
    )


def _several(one: Argument, most: int) -> Argument:
    rule, holds = one
    return (
        f"a list of at most {most}, each {rule}",
        lambda value: type(value) is list and len(value) <= most and all(map(holds, value)),
    )


def _one_of(*allowed: Any) -> Argument:
    return (
        f"one of {', '.join(map(str, allowed))}",
        lambda value: any(type(value) is type(each) and value == each for each in allowed),
    )


def _text(pattern: str, rule: str) -> Argument:
    return rule, lambda value: type(value) is str and re.fullmatch(pattern, value) is not None


_LARGE = 2**20
_ANY: Argument = ("anything", lambda value: True)  # replaced, see WITHOUT_WEIGHTS

# Weights come from the file alone.
WITHOUT_WEIGHTS = {"pretrained": False, "weights": None, "checkpoint_path": None}
ARGUMENTS: dict[str, dict[str, dict[str, Argument]]] = {
    "encoder": {
        "spice_pl.nn.resnet.ResNet": {
            "blocks": _several(_whole(1, 64), 16),
            "widths": _several(_whole(1, _LARGE), 16),
            "stem": _one_of(*get_args(Stem)),
            "in_channels": _whole(1, 64),
            "block": _one_of(*get_args(Block)),
        },
        "spice_pl.nn.wide_resnet.WideResNet": {
            "depth": _whole(1, 1024),
            "widen_factor": _whole(1, 1024),
            "strides": _several(_whole(1, 64), 16),
            "in_channels": _whole(1, 64),
        },
        "spice_pl.nn.pretrained.torchvision_backbone": {
            "name": (
                "a classifier of torchvision.models",
                lambda value: (
                    type(value) is str and value.lower() in models.list_models(module=models)
                ),
            ),
            "weights": _ANY,
        },
        "spice_pl.nn.pretrained.efficientnet_lite": {
            "variant": _one_of(0, 2),
            "pretrained": _ANY,
        },
        "timm.create_model": {
            # hf-hub:NAME and local-dir:PATH would be read from there.
            "model_name": _text(r"[A-Za-z0-9_.]{1,100}", "the plain name of a network of timm"),
            "pretrained": _ANY,
            "checkpoint_path": _ANY,
            "num_classes": _whole(0, 100_000),
            "in_chans": _whole(1, 64),
            "img_size": _whole(1, 1024),
            "global_pool": _text(r"\w{0,20}", "a word"),
            "drop_rate": _number(0, 1),
            "drop_path_rate": _number(0, 1),
            "dynamic_img_size": _one_of(True, False),
            "output_stride": _one_of(8, 16, 32),
        },
    },
    "head": {
        "spice_pl.nn.heads.ClusterHead": {
            "feature_dim": _whole(1, _LARGE),
            "hidden_dim": _whole(1, _LARGE),
            "num_clusters": _whole(1, _LARGE),
        },
        "spice_pl.nn.heads.LinearHead": {
            "in_features": _whole(1, _LARGE),
            "out_features": _whole(1, _LARGE),
        },
        "spice_pl.nn.edited_head.EditedHead": {
            "feature_dim": _whole(1, _LARGE),
            "hidden_dim": _whole(0, _LARGE),
            "num_clusters": _whole(1, _LARGE),
            "rounds": _several(_several(_whole(0, _LARGE), 2), 1000),
        },
    },
    "plain": {
        "spice_pl.data.augment.PlainView": {
            "mean": _several(_number(-100, 100), 3),
            "std": _several(_number(1e-6, 100), 3),
        },
    },
}
# Ours: made without memory first, compared with the tensors in the file, and then filled.
WITHOUT_MEMORY = (
    *("spice_pl.nn.resnet.ResNet", "spice_pl.nn.wide_resnet.WideResNet"),
    *ARGUMENTS["head"],
)


def rule_for(part: str, file: Path, allow_targets: Sequence[str]) -> Rule:
    """Return what may be called for a part of a `model.spice`: encoder, head or plain.

    Args:
        part: key of `ARGUMENTS`.
        file: named in messages.
        allow_targets: packages whose classes and functions may be called with any arguments.
    """
    trusted = tuple(f"{name}." for name in allow_targets)
    known = ARGUMENTS[part]

    def rule(target: str, given: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
        try:
            found = locate(target, trusted)
            if found is None and target in known:
                found = locate(target, (), tuple(known))
                _check_arguments(file, target, given, known[target])
        except (ImportError, AttributeError):
            found = None
        if found is None:
            raise UsageError(
                f"{file} asks for {target}, which is none of {', '.join(known)} or not installed; "
                "if you trust the file, load it with allow_targets=[PACKAGE]"
            )
        return found, {key: WITHOUT_WEIGHTS.get(key, value) for key, value in given.items()}

    return rule


def _check_arguments(
    file: Path, target: str, given: dict[str, Any], known: dict[str, Argument]
) -> None:
    for key, value in given.items():
        if key not in known:
            rule = f"left out; {target} may have {', '.join(known)}"
        elif known[key][1](value):
            continue
        else:
            rule = known[key][0]
        raise UsageError(
            f"{file} asks for {target} with {key}={value!r:.80}, and that must be {rule}; if you "
            f"trust the file, load it with allow_targets=[{target.partition('.')[0]}]"
        )
