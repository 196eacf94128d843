"""Exact nearest neighbours by cosine, in bounded memory.

Shapes: Q queries, N keys, D feature width, k neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES_PER_CHUNK = 2**26  # 256 MiB in float32


def unit_rows(features: Tensor) -> Tensor:
    """Scale rows to length one, in float32 or wider.

    Rows that are unit vectors already stay as they are, and a zero row stays zero.

    Args:
        features: (..., D), any floating type.

    Returns:
        Embeddings (..., D); half precision becomes float32.

    Examples:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def similarities(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of every row with every row, never in reduced precision.

    Args:
        left: (A, D).
        right: (B, D).

    Returns:
        (A, B); the cosine, where both are l2-normalised.
    """
    # bfloat16 has eight bits: under autocast most similarities near 1 would tie.
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.T  # (A, B)


def nearest_neighbors(
    queries: Tensor, keys: Tensor, k: int, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k keys with the largest cosine to each query.

    Args:
        queries: (Q, D); rows are l2-normalised here, so raw features are welcome.
        keys: (N, D), likewise.
        k: neighbours per query, 1 to N.
        chunk_size: queries at a time, so that memory grows with chunk_size * N and never Q * N;
            by default as many as keep a chunk at 2^26 similarities.

    Returns:
        Similarity (Q, k) in [-1, 1], nearest first, and index (Q, k) into the keys.

    Raises:
        ValueError: k or chunk_size out of range.

    Examples:
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
        >>> nearest_neighbors(torch.tensor([[0.0, 2.0]]), keys, k=2)
        (tensor([[1.0000, 0.8000]]), tensor([[1, 2]]))
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k {k} is not between 1 and the {len(keys)} keys; choose a k in there")
    if chunk_size is None:
        chunk_size = max(1, SIMILARITIES_PER_CHUNK // len(keys))
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} holds no query; raise it to at least 1")
    unit = unit_rows(keys)
    queries = unit if queries is keys else unit_rows(queries)  # no second copy of all features
    keys = unit
    chunks = [
        similarities(queries[start : start + chunk_size], keys).topk(k, dim=-1)  # (chunk_size, k)
        for start in range(0, max(1, len(queries)), chunk_size)
    ]
    values, indices = zip(*chunks, strict=True)
    return torch.cat(values), torch.cat(indices)  # (Q, k) each
