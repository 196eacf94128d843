"""Load published weights: recognise the network in a file and check that all of it fits.

| written by | encoder | top layers |
|---|---|---|
| SPICE stage 1, MoCo v2 | `module.encoder_q.*` | projection `fc.0`, `fc.2` |
| SPICE stage 2 | `module.feature_module.*` | head `module.head.head_0.classifier.lin{1,2}` |
| SPICE stage 3, FixMatch | `eval_model` (the average): `block{g}.layer.{i}.*` or a ResNet | `fc` |
| SCAN | `backbone.*` | `cluster_head.*`, the selected one |
| MoCo v3, SimSiam, SupCon, BYOL, SwAV, DINO, solo-learn, lightly | by their names | left out |
| torchvision | no prefix | `fc` |

Widths, depth and K follow from the tensors, and so does the stem where names and shapes tell it. No
code in a file is run.

Shapes: B images, S pixels a side, D features, K clusters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spice_pl.errors import UsageError
from spice_pl.models.layouts import Output, Parts, State, fold_splits, our_name, split
from spice_pl.models.tensor_files import check_numbers, find_state_dict, read_file
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.nn.resnet import ResNet, Stem
from spice_pl.nn.weights import below_prefix
from spice_pl.nn.wide_resnet import WideResNet
from spice_pl.system.output import printable

# What may stand before the names of a network; of several copies the first is taken.
PREFIXES = (
    *("", "base_encoder.", "encoder_q.", "online_encoder.net.", "teacher.backbone.", "teacher."),
    *("feature_module.", "backbone.", "encoder.", "model.", "student.backbone.", "student."),
)


class ReferenceModel(nn.Module):
    """A published encoder and its top layers; `forward` returns what the authors' network returns.

    Args:
        encoder: backbone, (B, 3, S, S) -> (B, D), with `num_features`.
        head: projection, cluster head or classifier, or None.
        output: result of `forward`: the encoder's features, or the head's logits or probabilities.
        num_clusters: K if the outputs of the head are clusters, else None.
        summary: text for the user: what was read and what matched.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: ClusterHead | LinearHead | None,
        output: Output,
        num_clusters: int | None,
        summary: str,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.output = encoder, head, output
        self.num_clusters, self.summary = num_clusters, summary

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D), logits or probabilities (B, K) of images (B, 3, S, S)."""
        features: Tensor = self.encoder(images)
        if self.head is None:
            return features
        result: Tensor = (
            self.head(features) if self.output == "probs" else self.head.logits(features)
        )
        return result


def load_reference_checkpoint(
    path: str | Path, pixels: int = 32, *, stem: Stem | None = None, partial: bool = False
) -> nn.Module:
    """Load a published checkpoint and print what matched.

    Args:
        path: checkpoint, .pth, .pt, .tar, .ckpt or .safetensors.
        pixels: S of the images that it was trained on. SPICE's ResNet18 has the same tensor names
            with and without pooling in its stem: up to 32 means without, more means with.
        stem: stem of the ResNet, such as `conv3`, `conv3_pool` or `conv7`; by default it follows
            from the file and `pixels`.
        partial: load the tensors that fit and leave the others at random values.

    Returns:
        The network in eval mode. Its `forward` returns the projection of stage 1 (not normalised),
        the probabilities of stage 2, or the logits of stage 3 or of a classifier; the features
        for all other files.

    Raises:
        UsageError: the file does not exist, has none of the layouts above, or does not fit.
    """
    model = read_reference(path, pixels, stem=stem, partial=partial)
    print(model.summary)
    return model


def load_encoder(
    path: str | Path, pixels: int = 32, *, stem: Stem | None = None, partial: bool = False
) -> nn.Module:
    """Return the encoder alone, for `backbone=checkpoint backbone.path=FILE`.

    Its attribute `settings` describes how to build it without the file. Arguments and errors are
    those of `load_reference_checkpoint`.
    """
    # In train mode, as every backbone that was just built: a stage that freezes it does so itself.
    return read_reference(path, pixels, stem=stem, partial=partial).encoder.train()


def read_reference(
    path: str | Path, pixels: int = 32, *, stem: Stem | None = None, partial: bool = False
) -> ReferenceModel:
    """Load a published checkpoint as `load_reference_checkpoint` does, without printing.

    The attribute `summary` of the result says what matched.
    """
    content = read_file(path)
    state, wrapper = find_state_dict(content, str(path))
    _check_layers(state, str(path))
    parts = split(_selected_head(state, content.get("head")), wrapper, str(path))
    _check_dimensions(parts, str(path))
    if any(key.endswith(".shortcut.weight") for key in parts.encoder):
        settings = _wide_resnet(parts.encoder)
    else:
        settings = _resnet(parts, stem or _stem(parts, pixels, str(content.get("arch", ""))))
    network = WideResNet if "depth" in settings else ResNet
    encoder: nn.Module = network(**{k: v for k, v in settings.items() if k != "_target_"})
    encoder.settings = settings  # type: ignore[assignment]
    head = _head(parts)
    if head is not None and (reads := _head_widths(parts.head)[0]) != encoder.num_features:
        raise UsageError(
            f"{path}: its {parts.top} takes {reads} features and the encoder gives "
            f"{encoder.num_features}; layers are missing in the file"
        )
    model = nn.ModuleDict({"encoder": encoder} | ({} if head is None else {"head": head}))
    given = {f"encoder.{key}": value for key, value in parts.encoder.items()}
    given |= {f"head.{key}": value for key, value in parts.head.items()}
    lines = [f"{path}: {parts.layout}"]
    lines += [f"encoder: {_describe(encoder)}"]
    if head is not None:
        lines += [f"{parts.top}: {' -> '.join(str(width) for width in _head_widths(parts.head))}"]
    lines += _fit(model, given, parts.unknown, str(path), partial=partial)
    if parts.unused:
        lines += [f"not needed: {_families(parts.unused)}"]
    model.eval()
    _try(encoder, pixels, str(path))
    clusters = _head_widths(parts.head)[-1] if parts.clusters and head is not None else None
    output: Output = "features" if head is None else parts.output
    return ReferenceModel(encoder, head, output, clusters, "\n  ".join(lines)).eval()


def _check_layers(state: State, path: str) -> None:
    """Refuse numbers of layers that a network of these tensors cannot have.

    Raises:
        UsageError: names the tensor.
    """
    for key in state:
        found = re.search(r"(?:layer|block)(\d+)\.(?:layer\.)?(\d+)\.", key)
        numbers = found.groups() if found else ()
        if any(len(number) > 6 or int(number) > len(state) for number in numbers):
            raise UsageError(
                f"{path}: {printable(key[:99])} has the number of a layer that cannot be; the file "
                "is damaged"
            )


def _check_dimensions(parts: Parts, path: str) -> None:
    """Refuse weights of convolutions and linear layers from which no width can be read.

    Raises:
        UsageError: names the tensor.
    """
    convolutions = {key: value for key, value in parts.encoder.items() if "conv" in key}
    for tensors, needed in ((convolutions, 4), (parts.head, 2)):
        for key, value in tensors.items():
            if key.rpartition(".")[2] == "weight" and value.ndim != needed:
                raise UsageError(
                    f"{path}: {printable(key[:99])} has {value.ndim} dimensions, not {needed}; the "
                    "file is damaged"
                )


def _selected_head(state: State, number: object) -> State:
    """Return the tensors with the cluster head that SCAN selected as its first one."""
    chosen = f"cluster_head.{number}."
    if not any(key.startswith(chosen) for key in state):
        return state
    others = {key: value for key, value in state.items() if not key.startswith("cluster_head.")}
    head = below_prefix(state, chosen)
    return others | {f"cluster_head.0.{key}": value for key, value in head.items()}


def load_backbone_weights(backbone: nn.Module, path: str | Path, *, partial: bool = False) -> str:
    """Load the weights of any backbone from a local file.

    Of all prefixes in the names, the one is removed that makes most names match; of several, the
    first in `PREFIXES`. Tensors whose top-level name the backbone does not have (a classifier, a
    projection) are left out and listed.

    Args:
        backbone: network that receives the weights.
        path: checkpoint, .pth, .pt, .tar, .ckpt or .safetensors.
        partial: load the tensors that fit and leave the others as they are.

    Returns:
        Text for the user: what matched.

    Raises:
        UsageError: a tensor of the backbone is missing or has another shape, or the file has more
            tensors for a part of the backbone, and `partial` is false.
    """
    state, _ = find_state_dict(read_file(path), str(path))
    own = backbone.state_dict()
    found = {"", *(f"{key.rpartition('.')[0]}." for key in state)}
    found |= {f"{'.'.join(key.split('.')[:depth])}." for key in state for depth in (1, 2)}
    order = sorted(found, key=lambda each: (_place(each), len(each), each))
    candidates = [
        {rename(key): value for key, value in below_prefix(state, prefix).items()}
        for prefix in order
        for rename in (str, our_name)
    ]
    given = max(candidates, key=lambda each: sum(key in own for key in each))
    top = {key.partition(".")[0] for key in own}
    extra = [key for key in given if key not in own and key.partition(".")[0] in top]
    left = [key for key in given if key.partition(".")[0] not in top]
    fitting = {key: value for key, value in given.items() if key in own}
    lines = [f"{path}: {type(backbone).__name__}"]
    lines += _fit(backbone, fold_splits(fitting), extra, str(path), partial=partial)
    left += [key for key in state if not any(key.endswith(each) for each in given)]
    if left:
        lines += [f"not needed: {_families(left)}"]
    return "\n  ".join(lines)


def _place(prefix: str) -> int:
    """Return the place of a prefix in `PREFIXES`; others come last."""
    return PREFIXES.index(prefix) if prefix in PREFIXES else len(PREFIXES)


def _stem(parts: Parts, pixels: int, arch: str) -> Stem:
    if parts.encoder["conv1.weight"].shape[-1] == 7:
        return "conv7"
    if parts.layout.startswith("solo-learn"):
        return "conv3_pad2"  # solo-learn's stem for CIFAR
    if parts.layout.startswith("lightly"):
        return "conv3_linear" if "stem without relu" in parts.naming else "conv3"
    if "shortcut" not in parts.naming:
        return "conv3_pool"  # SPICE's clustering ResNet34
    if arch.endswith("_cifar"):
        return "conv3"
    return "conv3" if pixels <= 32 else "conv3_pool"


def _resnet(parts: Parts, stem: Stem) -> dict[str, Any]:
    state = parts.encoder
    blocks: dict[int, int] = {}
    widths: dict[int, int] = {}
    for key, value in state.items():
        if found := re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", key):
            layer, block = int(found[1]), int(found[2])
            blocks[layer] = max(blocks.get(layer, 0), block + 1)
            widths[layer] = len(value)
    layers = range(1, max(blocks) + 1)
    return {
        "_target_": "spice_pl.nn.resnet.ResNet",
        "blocks": [blocks.get(layer, 1) for layer in layers],
        "widths": [widths.get(layer, 1) for layer in layers],
        "stem": stem,
        "in_channels": state["conv1.weight"].shape[1],
        "block": "bottleneck" if "layer1.0.conv3.weight" in state else "basic",
    }


def _wide_resnet(state: State) -> dict[str, Any]:
    numbers = [re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", key) for key in state]
    groups = max(int(each[1]) for each in numbers if each)
    blocks = 1 + max(int(each[2]) for each in numbers if each)
    return {
        "_target_": "spice_pl.nn.wide_resnet.WideResNet",
        "depth": 1 + groups * (2 * blocks + 1),
        "widen_factor": len(state["layer1.0.conv1.weight"]) // 16,
        # Three groups are for 32 pixels; with a fourth, for 96, the first group has stride 2 too.
        "strides": [1, 2, 2] if groups == 3 else [2] * groups,
        "in_channels": state["conv1.weight"].shape[1],
    }


def _head(parts: Parts) -> ClusterHead | LinearHead | None:
    widths = _head_widths(parts.head)
    if len(widths) == 3:
        return ClusterHead(*widths)
    return LinearHead(*widths) if len(widths) == 2 else None


def _head_widths(head: State) -> tuple[int, ...]:
    """Widths from D on: two for a linear layer, three with a hidden layer, none without a head."""
    if {"hidden.weight", "output.weight"} <= head.keys():
        hidden, output = head["hidden.weight"], head["output.weight"]
        return hidden.shape[1], len(hidden), len(output)
    if "weight" in head:
        return head["weight"].shape[1], len(head["weight"])
    return ()


def _fit(
    module: nn.Module, given: State, unknown: list[str], path: str, *, partial: bool
) -> list[str]:
    """Load tensors by name; return lines of text that say what matched.

    Raises:
        UsageError: something does not fit and `partial` is false (up to 20 tensors are listed), or
            nothing fits.
    """
    own = module.state_dict()
    fitting = {key: value for key, value in given.items() if _same_shape(own.get(key), value)}
    # Files from before torch 1.0 lack `num_batches_tracked`, which eval mode does not read.
    absent = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    differences = [f"missing     {key} {tuple(own[key].shape)}" for key in absent]
    differences += [f"unexpected  {key}" for key in [*unknown, *(k for k in given if k not in own)]]
    differences += [
        f"shape       {key} is {tuple(value.shape)}, needed {tuple(own[key].shape)}"
        for key, value in given.items()
        if key in own and key not in fitting
    ]
    if differences and not partial:
        shown = differences[:20] + [f"and {len(differences) - 20} more"] * (len(differences) > 20)
        way = "give the network and the size of the images it was made with"
        if fitting:
            way += (
                ", or load what fits: import.module.partial=true, backbone.partial=true or "
                "embed.module.partial=true, by what reads it (partial=True in Python)"
            )
        raise UsageError(
            f"{path} does not fit {type(module).__name__} whole; {way}:\n  " + "\n  ".join(shown)
        )
    if not fitting:
        raise UsageError(
            f"{path}: none of its {len(given)} tensors fits {type(module).__name__}, so there is "
            "nothing to load with partial=True either; give the network it was made with"
        )
    check_numbers(fitting, path)
    module.load_state_dict(fitting, strict=False)
    total = sum(not key.endswith("num_batches_tracked") for key in own)
    matched = sum(not key.endswith("num_batches_tracked") for key in fitting)
    return [f"matched: {matched} of {total} tensors", *differences]


def _same_shape(own: Tensor | None, given: Tensor) -> bool:
    return own is not None and own.shape == given.shape


def _try(encoder: nn.Module, pixels: int, path: str) -> None:
    """Check by one forward pass that images of this size are large enough for the network."""
    channels = encoder.get_submodule("conv1").in_channels
    try:
        with torch.no_grad():
            encoder(torch.zeros(1, int(channels), pixels, pixels))  # type: ignore[arg-type]
    except RuntimeError as error:
        raise UsageError(
            f"{path} does not take images of {pixels} pixels ({str(error).splitlines()[0]}); give "
            "the size of the images it was made with"
        ) from error


def _describe(encoder: nn.Module) -> str:
    layers = [layer for name, layer in encoder.named_children() if name.startswith("layer")]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in encoder.modules())
    stem = encoder.get_submodule("conv1")
    return (
        f"{type(encoder).__name__}, blocks {[len(list(layer.children())) for layer in layers]}, "
        f"{convolutions} convolutions, stem {tuple(stem.weight.shape[-2:])}"  # type: ignore[index]
        f"{' with pooling' if isinstance(getattr(encoder, 'maxpool', None), nn.MaxPool2d) else ''}"
        f", {encoder.num_features} features"
    )


def _families(keys: list[str]) -> str:
    """List the names before the first dot with their counts: `encoder_k.* (122), queue`."""
    tops = [key.partition(".")[0] + (".*" if "." in key else "") for key in keys]
    return ", ".join(
        f"{top} ({tops.count(top)})" if tops.count(top) > 1 else top for top in dict.fromkeys(tops)
    )
