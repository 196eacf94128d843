"""Refuse a training step that cannot fit into memory, instead of being killed by the system.

Shapes: B images of a batch, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from spice_pl.data.datamodule import Stream
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.stages.base import Stage
from spice_pl.system.files import size_text
from spice_pl.system.memory import free_memory

CPU = torch.device("cpu")


def check_memory(
    module: Stage,
    streams: Mapping[str, Stream],
    images: ImageSet,
    num_ranks: int,
    device: torch.device = CPU,
    precision: str = "32-true",
) -> None:
    """Refuse batches for which a step takes more memory of its device than there is.

    The estimate is a lower bound: pixels and views of all streams, and what the backward pass needs
    of one view of the largest stream, with all its patches. What it lets through may still not fit.

    Args:
        module: the stage; its encoder counts if it is trained.
        streams: streams by name.
        images: the data set.
        num_ranks: processes that share a batch.
        device: where the step runs.
        precision: precision of the trainer; below 32 bits the half of it is counted.

    Raises:
        UsageError: names the setting to change and the largest batch that fits.
    """
    free, size = free_on(device), images.images.shape[-1]
    if free is None or not streams:
        return
    width = 4 if precision.startswith(("32", "64")) else 2  # bytes per number, at least
    sizes = {name: -(-each.batch_size // num_ranks) for name, each in streams.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    shown = {name: _shown(each, size) for name, each in streams.items()}  # (patches, side)
    views = {
        name: 3 * (size**2 + width * sum(count * side**2 for count, side in each))
        for name, each in shown.items()
    }
    fixed = sum(views[name] * sizes[name] for name in sizes if name != largest)
    each = views[largest]
    if module.trains_encoder and any(one.requires_grad for one in module.encoder.parameters()):
        count, side = (shown[largest] or [(1, size)])[0]
        each += count * (saved_bytes(module.encoder, (4, 3, side, side)) // 4 * width // 4)
    need = fixed + each * sizes[largest]
    if need <= free:
        return
    fits = max((free - fixed) // (2 * each), 1) * num_ranks  # half: the estimate is a lower bound
    where = "" if device.type == "cpu" else f" of {device}"
    raise UsageError(
        f"{module.name}: a training step takes at least {size_text(need)} of memory{where} and "
        f"{size_text(free)} are free; lower {module.name}.streams.{largest}.batch_size="
        f"{streams[largest].batch_size}, for example to {fits}, or dataset.image_size={size}"
    )


def _shown(stream: Stream, size: int) -> list[tuple[int, int]]:
    """Return the number and the side of the patches of each view of a step; the most pixels first.

    Of views that are shown in turn it is the one with the most pixels.
    """
    views = [
        (int(getattr(view, "num_patches", 1)), getattr(view, "side", None) or size)
        for view in stream.views.values()
    ]
    views.sort(key=lambda view: view[0] * view[1] ** 2, reverse=True)
    return views[:1] if stream.turns else views


def free_on(device: torch.device) -> int | None:
    """Return the bytes of a device that this process may still take; None where it is not known."""
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch
    return int(free) + kept


def saved_bytes(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without its weights.

    Nothing is computed: all tensors are on the device "meta", which has no memory. 0 for a network
    that computes with the values of its tensors, which then has no estimate.

    Args:
        network: it and its buffers stay as they are.
        shape: of the input.

    Examples:
        >>> network = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())  # input and output are kept
        >>> saved_bytes(network, (10, 8))
        480
    """
    kept: dict[int, tuple[int, Tensor]] = {}
    state = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
        for name, value in network.state_dict(keep_vars=True).items()
    }
    own = {value.untyped_storage()._cdata for value in state.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    try:
        with torch.random.fork_rng(devices=[]), saved_tensors_hooks(keep, lambda each: each):
            functional_call(network, state, torch.empty(shape, device="meta"))
    except Exception:  # it runs the network's code, which may raise anything
        return 0
    return sum(size for key, (size, _) in kept.items() if key not in own)
