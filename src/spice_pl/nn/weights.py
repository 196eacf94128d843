"""State dicts: the part below a prefix, and loading that accepts only an exact fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spice_pl.errors import UsageError

MOST_LISTED = 200  # differences in a message; a file may hold any number of tensors


def below_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, with the prefix removed.

    Examples:
        >>> import torch
        >>> below_prefix({"head.bias": torch.zeros(1), "queue": torch.zeros(2)}, "head.")
        {'bias': tensor([0.])}
    """
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_strictly(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state dict whose names and shapes must be exactly those of the module.

    Args:
        module: network that receives the weights.
        state: tensors by name.
        source: file or object that the weights come from, for the error message.

    Raises:
        UsageError: tensors are missing, unexpected or of another shape; MOST_LISTED are listed.
    """
    own = module.state_dict()
    differences = [f"missing     {key} {tuple(own[key].shape)}" for key in own if key not in state]
    differences += [
        f"unexpected  {key} {tuple(state[key].shape)}" for key in state if key not in own
    ]
    differences += [
        f"shape       {key} is {tuple(state[key].shape)}, needed {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if more := differences[MOST_LISTED:]:
        differences = [*differences[:MOST_LISTED], f"and {len(more):,} more"]
    if differences:
        raise UsageError(
            f"{source} holds weights of another architecture; give the backbone and K it was "
            "made with, or make it again with overwrite=true:\n  " + "\n  ".join(differences)
        )
    module.load_state_dict(dict(state))
