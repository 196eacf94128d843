"""Weights that must fit a module exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spice_pl.errors import UsageError


def load_strictly(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        UsageError: keys are missing, unexpected or of another shape; all are listed.
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
    if differences:
        raise UsageError(
            f"{source} holds weights of another architecture; give the backbone and K it was "
            "made with, or make it anew with overwrite=true:\n  " + "\n  ".join(differences)
        )
    module.load_state_dict(dict(state))
