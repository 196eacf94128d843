"""Optimizers whose step a CUDA graph can hold: one kernel, and no number of the processor in it.

On a processor they stay what they were, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sgd_settings(device: torch.device) -> dict[str, Any]:
    """Return how SGD is computed on a device, as arguments of `torch.optim.SGD`."""
    return {"foreach": True} if device.type == "cpu" else {"fused": True}


def adam_settings(device: torch.device, **on_processor: Any) -> dict[str, Any]:
    """Return how Adam is computed on a device, as arguments of `torch.optim.Adam`.

    Args:
        device: device of the parameters.
        on_processor: arguments that hold on a processor.
    """
    return on_processor if device.type == "cpu" else {"fused": True, "capturable": True}


def keep_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep learning rates that a schedule changes as tensors of a GPU, as numbers elsewhere.

    A schedule writes into the tensor, so that a graph reads the present rate at the same address.
    A checkpoint has them as the run that wrote it, so call this after it is loaded.
    """
    for group in optimizer.param_groups:
        rate = group["lr"]
        if device.type != "cpu":
            if not isinstance(rate, Tensor) or rate.device != device:
                group["lr"] = torch.full((), float(rate), device=device)
        elif isinstance(rate, Tensor):
            group["lr"] = float(rate)
