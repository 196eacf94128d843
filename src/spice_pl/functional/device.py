"""Operations that do not make the processor wait for a GPU, as their usual forms do."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it; CUDA needs pinned memory for that."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given, so that a time measures the work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def cluster_sizes(clusters: Tensor, num_clusters: int) -> Tensor:
    """Count the samples of each cluster; `torch.bincount` waits for the largest id.

    Args:
        clusters: int64 of any shape, ids 0 to K - 1.
        num_clusters: K.

    Returns:
        Sizes (K,), int64.

    Examples:
        >>> cluster_sizes(torch.tensor([2, 0, 2]), num_clusters=4)
        tensor([1, 0, 2, 0])
    """
    flat = clusters.flatten()
    return flat.new_zeros(num_clusters).scatter_add_(0, flat, torch.ones_like(flat))
