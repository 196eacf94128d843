"""Recognise who wrote a checkpoint and rename its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.nn.weights import below_prefix

State = Mapping[str, Tensor]
Output = Literal["features", "logits", "probs"]


@dataclass(frozen=True)
class Layout:
    """Names that one code base gives to its tensors.

    Attributes:
        layout: name of the code base, and of the stage where it has several.
        prefix: beginning of the names of the encoder's tensors.
        mark: regular expression that a name must match where the prefix alone does not tell.
        head: regular expression for the names of the top layers that are kept.
        unused: regular expression for the names that are known and left out.
        top: description of the top layers that are kept.
        output: what the authors' network returns.
        clusters: whether its outputs are clusters.
    """

    layout: str
    prefix: str
    mark: str = ""
    head: str = r"$^"
    unused: str = r"$^"
    top: str = ""
    output: Output = "logits"
    clusters: bool = False


LAYOUTS = (
    Layout(
        "stage 1 of SPICE, or MoCo",
        "encoder_q.",
        head=r"encoder_q\.(fc|mlp)\.",
        unused=r"encoder_k\.|queue",
        top="projection",
    ),
    Layout(
        "stage 2 of SPICE",
        "feature_module.",
        head=r"head\.head_0\.classifier\.",
        unused=r"head\.head_[1-9]\d*\.",  # the authors store the selected head as head_0
        top="cluster head",
        output="probs",
        clusters=True,
    ),
    Layout("MoCo v3", "base_encoder.", unused=r"base_encoder\.fc\.|momentum_encoder\.|predictor\."),
    Layout("BYOL", "online_encoder.net.", unused=r"online_(?!encoder\.net)|target_|net\."),
    Layout(
        "SCAN",
        "backbone.",
        mark=r"cluster_head\.|contrastive_head\.",
        head=r"cluster_head\.0\.",  # read_reference puts the selected head there
        unused=r"cluster_head\.[1-9]|contrastive_head\.",
        top="cluster head",
        clusters=True,
    ),
    Layout("DINO", "backbone.", mark=r"head\.(mlp|last_layer)", unused=r"head\."),
    Layout(
        "lightly",
        "backbone.",
        unused=r"projection_head|prediction_head|backbone_momentum|criterion|memory_bank|"
        r"online_classifier|head|student|teacher|neck|data_preprocessor",
    ),
    Layout(
        "solo-learn",
        "backbone.",
        unused=r"momentum_|projector|predictor|classifier|prototypes|queue",
    ),
    Layout(
        "SimSiam or SupCon",
        "encoder.",
        mark=r"encoder\.fc\.|head\.",
        unused=r"encoder\.fc\.|predictor\.|head\.",
    ),
    Layout(
        "solo-learn before 1.0.5",
        "encoder.",
        unused=r"momentum_|projector|predictor|classifier|prototypes|queue",
    ),
    Layout(
        "SwAV", "", mark=r"projection_head\.|prototypes\.", unused=r"projection_head|prototypes"
    ),
    Layout("state dict of a classifier", "", head=r"fc\.", top="classifier"),
)


@dataclass(frozen=True)
class Parts:
    """The parts of a state dict, with the names of our modules.

    Attributes:
        layout: name of the layout that was recognised.
        encoder: tensors of the encoder.
        head: tensors of the top layers: hidden.* and output.*, or weight and bias.
        unused: original names that are known and left out.
        unknown: original names that the layout does not have.
        naming: facts that only the original names tell: "shortcut", "numbered", "stem without
            relu".
        top: description of the head.
        output: what the authors' network returns.
        clusters: whether its outputs are clusters.
    """

    layout: str
    encoder: State
    head: State
    unused: list[str]
    unknown: list[str]
    naming: frozenset[str]
    top: str
    output: Output
    clusters: bool


def split(state: State, wrapper: str, path: str) -> Parts:
    """Recognise the layout of a state dict and split it into encoder, head and the rest.

    Args:
        state: tensors by name, without the prefix `module.`.
        wrapper: key that the state dict had in the file, "" for none.
        path: path of the file, for the error message.

    Raises:
        UsageError: no layout fits.
    """
    layout = next(each for each in LAYOUTS if _fits(each, state))
    if layout.layout == "lightly" and any(
        re.match(r"projector|classifier|momentum_", key) for key in state
    ):
        layout = next(each for each in LAYOUTS if each.layout == "solo-learn")
    elsewhere = _prefix_of_resnet(state)
    if elsewhere is not None and f"{layout.prefix}conv1.weight" not in state:
        layout = _not_listed(elsewhere)
    on_top = {key: value for key, value in state.items() if re.match(layout.head, key)}
    unused = {key for key in state if key not in on_top and re.match(layout.unused, key)}
    rest = {key: value for key, value in state.items() if key not in (*on_top, *unused)}
    below = below_prefix(rest, layout.prefix)
    unknown = [key for key in rest if not key.startswith(layout.prefix)]
    joined = "\n".join(below)
    marks = {"shortcut": r"\.shortcut\.\d", "numbered": r"^\d+\."}
    naming = {name for name, text in marks.items() if re.search(text, joined, re.MULTILINE)}
    if "numbered" in naming:
        below, naming = _named(below, naming)
    encoder = fold_splits({our_name(key): value for key, value in below.items()})
    if not {"conv1.weight", "layer1.0.conv1.weight"} <= encoder.keys():
        raise UsageError(
            f"{path} has none of these layouts: {', '.join(each.layout for each in LAYOUTS)}; "
            f"it begins with {', '.join(key[:99] for key in list(state)[:4])}. "
            f"Another network is read by\n  {command_for(state, path)}"
        )
    clusters = layout.clusters or wrapper in ("eval_model", "ema_model", "train_model")
    head = {_head_name(key): value for key, value in on_top.items()}
    if head and not any(key.startswith("output.") for key in head):  # one layer, numbered 0
        head = {key.removeprefix("hidden."): value for key, value in head.items()}
    if layout.prefix == "" and clusters:
        layout = Layout(f"stage 3 of SPICE (FixMatch), {wrapper}", "", top="classifier")
    return Parts(
        layout.layout,
        encoder,
        head,
        unused=[key for key in state if key in unused],
        unknown=unknown,
        naming=frozenset(naming),
        top=layout.top,
        output=layout.output,
        clusters=clusters,
    )


def _fits(layout: Layout, state: State) -> bool:
    if not any(key.startswith(layout.prefix) for key in state):
        return False
    if layout.mark and not layout.prefix and "conv1.weight" not in state:
        return False
    return not layout.mark or any(re.match(layout.mark, key) for key in state)


def _prefix_of_resnet(state: State) -> str | None:
    """Return what stands before the names of a ResNet, in a file of any code; None without one."""
    ends = [key.removesuffix("conv1.weight") for key in state if key.endswith("conv1.weight")]
    return next((each for each in ends if f"{each}layer1.0.conv1.weight" in state), None)


def _not_listed(prefix: str) -> Layout:
    """Return the layout of a code that is not listed: all but the ResNet is left out."""
    own = re.escape(prefix)
    return Layout("a ResNet in other code", prefix, unused=rf"(?!{own})|{own}(fc|head|projector)\.")


def command_for(state: State, path: str) -> str:
    """Return the settings with which stage=embed reads the weights of a network by its names."""
    patches = next((k for k in state if k.endswith("patch_embed.proj.weight")), None)
    name, more = "NAME", ""
    if patches is not None and state[patches].ndim == 4:
        prefix, (width, _, patch, _) = (
            patches.removesuffix("patch_embed.proj.weight"),
            state[patches].shape,
        )
        size = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(width, "SIZE")
        scaled = f"{prefix}blocks.0.ls1.gamma" in state
        name = f"vit_{size}_patch{patch}_{'dinov2' if scaled else '224'}"
        places = state.get(f"{prefix}pos_embed")
        if places is not None and places.ndim > 1:
            more = f" dataset.image_size={math.isqrt(places.shape[1]) * patch}"
        if prefix == "base_encoder." and size == "small":
            more += " +backbone.num_heads=12"  # of MoCo v3
    return (
        f"recipe=scratch stage=embed backbone=timm backbone.model_name={name} "
        f"embed.module.weights={path}{more}"
    )


def our_name(key: str) -> str:
    """Rename a tensor of an encoder to torchvision's names, which are ours.

    Examples:
        >>> our_name("block1.layer.0.convShortcut.weight")
        'layer1.0.shortcut.weight'
    """
    for pattern, ours in (
        (r"\.shortcut\.(?=\d)", ".downsample."),
        (r"^block(\d+)\.layer\.", r"layer\1."),
        (r"\.convShortcut\.", ".shortcut."),
    ):
        key = re.sub(pattern, ours, key)
    return key


def _head_name(key: str) -> str:
    name = key.rpartition(".")[2]  # weight, bias
    for pattern, ours in ((r"(lin1|\b0)\.\w+$", "hidden"), (r"(lin2|\b2)\.\w+$", "output")):
        if re.search(pattern, key):
            return f"{ours}.{name}"
    return name


def _named(below: State, naming: set[str]) -> tuple[dict[str, Tensor], set[str]]:
    """Name the numbered children of a ResNet in `nn.Sequential`, as in lightly's examples."""
    blocks = [int(m[1]) for key in below if (m := re.match(r"(\d+)\.\d+\.conv1\.weight$", key))]
    first = min(blocks, default=4)
    # lightly's own ResNets apply the stem's ReLU as a function, so Sequential leaves it out.
    naming = naming | ({"stem without relu"} if first == 2 else set())
    names = {0: "conv1", 1: "bn1"} | {first + i: f"layer{i + 1}" for i in range(10)}
    renamed = {}
    for key, value in below.items():
        number, _, rest = key.partition(".")
        known = number.isdigit() and int(number) in names
        renamed[f"{names[int(number)]}.{rest}" if known else key] = value
    return renamed, naming


def fold_splits(state: State) -> dict[str, Tensor]:
    """Average the running statistics of lightly's split BatchNorm, which has one set per split."""
    folded = dict(state)
    for key, value in state.items():
        base, _, name = key.rpartition(".")
        weight = state.get(f"{base}.weight")
        statistics = name in ("running_mean", "running_var")
        if statistics and weight is not None and value.ndim == weight.ndim == 1:
            splits = len(value) // max(1, len(weight))
            if splits > 1 and len(value) == splits * len(weight):
                folded[key] = value.view(splits, -1).mean(dim=0)
    return folded
