"""Networks of open_clip, which embed images and text in one space.

Shapes: B images, W texts, S pixels a side, E coordinates of an embedding.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.models.tensor_files import find_state_dict, read_file
from spice_pl.nn.weights import load_strictly

TEXTS = 256  # texts that pass the network at once


@dataclass(frozen=True)
class ImageText:
    """A network for images and text.

    Attributes:
        name: its name, with that of its weights.
        images: function from uint8 images (B, 3, S, S) of any S to embeddings (B, E), length one.
        texts: function from texts to embeddings (W, E), length one.
        scale: factor of the cosines in its softmax.
    """

    name: str
    images: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor]
    scale: float


def load_clip(network: str, weights: str, device: torch.device) -> ImageText:
    """Return a network of open_clip.

    Args:
        network: one of open_clip.list_models(), such as ViT-B-32.
        weights: file of its state dict, or one of open_clip's names of weights, which are fetched.
        device: where it runs.

    Raises:
        UsageError: open_clip is missing or does not know the network or the weights, or they
            cannot be fetched or do not fit.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(
            "names from words need the package open_clip; pip install 'spice-pl[clip]'"
        ) from error
    known = open_clip.list_models()
    if network not in known:
        near = difflib.get_close_matches(network, known, 3) or ["ViT-B-32"]
        raise UsageError(
            f"name.network={network} is not a network of open_clip; near are {', '.join(near)}"
        )
    file = Path(weights).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(network)
    if not file.is_file() and weights not in tags:
        raise UsageError(
            f"name.weights={weights} is neither a file nor weights that open_clip knows for "
            f"{network}; give a file of its state dict, or one of {', '.join(tags) or 'none'}"
        )
    try:
        model: Any  # open_clip has no types
        with _quiet(logging.WARNING if file.is_file() else logging.INFO):
            if file.is_file():
                model = _with_file(open_clip, network, file)
            else:
                model = open_clip.create_model(network, pretrained=weights)
            tokens = open_clip.get_tokenizer(network)
    except UsageError:
        raise
    except Exception as error:  # of the Hub, of transformers and of open_clip, of many types
        raise UsageError(
            f"{network} with weights {weights} cannot be made ({type(error).__name__}: "
            f"{_first_line(error)}); on a machine without network, give name.weights=FILE and a "
            "network whose tokenizer is inside open_clip, such as ViT-B-32"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    config = open_clip.get_model_preprocess_cfg(model)
    side = config["size"][0] if isinstance(config["size"], Sequence) else config["size"]
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    @torch.inference_mode()
    def images(pixels: Tensor) -> Tensor:
        given = pixels.to(device).float() / 255  # (B, 3, S, S)
        sized = F.interpolate(given, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(model.encode_image((sized - mean) / std).float(), dim=1)  # (B, E)

    @torch.inference_mode()
    def texts(given: Sequence[str]) -> Tensor:
        parts = [given[i : i + TEXTS] for i in range(0, len(given), TEXTS)]
        found = [model.encode_text(tokens(list(part)).to(device)) for part in parts]
        return F.normalize(torch.cat(found).float(), dim=1)  # (W, E)

    scale = float(model.logit_scale.exp())
    shown = file.name if file.is_file() else weights
    return ImageText(f"{network} of open_clip ({shown}, trained by text)", images, texts, scale)


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Hide log messages up to a level: open_clip warns of random weights before it has a file's."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def _with_file(open_clip: Any, network: str, file: Path) -> torch.nn.Module:
    """Return a network with the weights of a file, which is read without running code in it."""
    state, _ = find_state_dict(read_file(file), str(file))
    model: torch.nn.Module = open_clip.create_model(network, load_weights=False)
    own = model.state_dict().keys()
    # Numbers that follow from the settings; open_clip leaves them out or in, by its release.
    load_strictly(model, {key: value for key, value in state.items() if key in own}, str(file))
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
