"""Bring images to a GPU: all of them once, or each batch while the step before it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

MODES = ("auto", "resident", "stream")
SHARE = 0.25  # of the free memory of a GPU that images may take with `auto`
CHUNK = 2**26  # bytes that are copied at once


class Movable(Protocol):
    """A batch that can be moved to a device."""

    def to(self, device: torch.device) -> Any:
        """Return the batch on the device."""


def check_mode(mode: str) -> None:
    """Check the word for where images are kept.

    Raises:
        UsageError: it is none of `MODES`.
    """
    if mode not in MODES:
        raise UsageError(f"trainer.data={mode} is none of {', '.join(MODES)}")


def resident_store(
    images: ImageSet, device: torch.device, mode: str, *, extra: bool
) -> Tensor | None:
    """Copy all images to a GPU, extra ones last; None where batches are to be streamed.

    With `auto` they are copied if they take at most a quarter of its free memory, with `resident`
    if they fit at all. The log says which it is.

    Args:
        images: the data set.
        device: device of the training; on a processor nothing is copied.
        mode: one of `MODES`.
        extra: whether the extra images are needed too.

    Returns:
        (N, 3, S, S) uint8 on the device, or None.
    """
    if device.type == "cpu" or mode == "stream":
        return None
    parts = [images.images]
    if extra and images.extra is not None:
        parts.append(images.extra)
    needed, free = sum(each.nbytes for each in parts), free_memory(device)
    size, room = f"{needed / 2**30:.2f} GiB", f"{free / 2**30:.2f} GiB free"
    if not keeps(needed, device, mode):
        logger.info("images: %s do not fit on the GPU beside training (%s); streamed", size, room)
        return None
    try:
        store = _copied(parts, device)
    except torch.OutOfMemoryError:
        logger.warning("images: %s did not fit on the GPU (%s); streamed instead", size, room)
        return None
    logger.info("images: %s on the GPU (%s before)", size, room)
    return store


def keeps(num_bytes: int, device: torch.device, mode: str) -> bool:
    """Return whether data is to be kept on a device: by `mode`, and by the free memory of a GPU."""
    if device.type == "cpu" or mode == "stream":
        return False
    free = free_memory(device)
    return num_bytes <= (free if mode == "resident" else SHARE * free)


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU; 0 where they are unknown."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0.0


def _copied(parts: list[Any], device: torch.device) -> Tensor:
    count, shape = sum(len(each) for each in parts), parts[0].shape[1:]
    store = torch.empty((count, *shape), dtype=torch.uint8, device=device)
    start, rows = 0, max(1, CHUNK // int(np.prod(shape)))
    for part in parts:
        for first in range(0, len(part), rows):
            chunk = torch.from_numpy(np.array(part[first : first + rows]))
            store[start : start + len(chunk)] = chunk.to(device)
            start += len(chunk)
    return store


class Ahead:
    """A loader that copies one batch to a GPU while the step of the batch before it runs.

    Args:
        loader: loader of batches on the processor.
        device: the GPU.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.sampler = loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches on the device, in the order of the loader."""
        stream: Any = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        earlier = None
        for batch in self.loader:
            copied = self._copy(batch, stream)
            if earlier is not None:
                yield self._ready(*earlier)
            earlier = copied
        if earlier is not None:
            yield self._ready(*earlier)

    def _copy(self, batch: Movable, stream: Any) -> tuple[Any, Any]:
        """Start the copy; return the batch and the event of its end."""
        if stream is None:
            return batch.to(self.device), None
        with torch.cuda.stream(stream):
            moved = batch.to(self.device)
            return moved, stream.record_event()

    def _ready(self, batch: Any, event: Any) -> Any:
        """Let the stream of the training wait for the copy; the processor does not wait."""
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            batch.images.record_stream(current)  # its memory is of the other stream
        return batch
