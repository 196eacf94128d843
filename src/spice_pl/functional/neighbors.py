"""Nearest neighbours by cosine, in bounded memory; exact unless there are very many keys.

Shapes: Q queries, b queries of a chunk, N keys, D feature width, k neighbours.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Search = Callable[[Tensor], tuple[Tensor, Tensor]]  # queries (b, D) -> similarity, index (b, k)

SIMILARITIES_PER_CHUNK = 2**26  # 256 MiB in float32
BLOCK = 64  # similarities whose maximum decides whether an exact search looks at each of them
EXACT_UP_TO = 200_000  # keys on a CPU; a product of 200,000 x 200,000 x 512 takes minutes
RECALL = 0.95  # share of the exact neighbours that an approximate search has to find
RERANKED = 8  # candidates per neighbour: quantised products choose, half-precision ones order
NUM_PROBES = 1000  # queries that are searched exactly too, to measure the recall


def unit_rows(features: Tensor) -> Tensor:
    """Scale rows to length one, in float32 or wider.

    Unit vectors stay as they are, and a zero row stays zero.

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


def similarities(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute the dot product of each left row with each right row, never in reduced precision.

    Args:
        left: (A, D).
        right: (B, D).
        out: memory (A, B) for the products, without gradient; new memory if None.

    Returns:
        Products (A, B); the cosines if both are l2-normalised.

    Examples:
        >>> similarities(torch.tensor([[0.6, 0.8]]), torch.eye(2))
        tensor([[0.6000, 0.8000]])
    """
    # bfloat16 has 8 bits of precision: under autocast most similarities near 1 would be equal.
    with torch.autocast(left.device.type, enabled=False), _without_tf32(left.device):
        if out is None:
            return left @ right.T  # (A, B)
        with torch.no_grad():
            return torch.mm(left, right.T, out=out)


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Multiply in float32 on a GPU, where TF32 keeps 11 bits of each factor."""
    if device.type == "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def nearest_neighbors(
    queries: Tensor, keys: Tensor, k: int, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k keys with the largest cosine to each query.

    Args:
        queries: (Q, D), embeddings or raw features; l2-normalised here.
        keys: (N, D), embeddings or raw features; l2-normalised here.
        k: neighbours per query, 1 to N.
        chunk_size: see `neighbor_chunks`.

    Returns:
        Similarity (Q, k) in [-1, 1], nearest first, and index (Q, k) into the keys.

    Raises:
        ValueError: k or chunk_size out of range.

    Examples:
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
        >>> nearest_neighbors(torch.tensor([[0.0, 2.0]]), keys, k=2)
        (tensor([[1.0000, 0.8000]]), tensor([[1, 2]]))
    """
    values, indices = zip(*neighbor_chunks(queries, keys, k, chunk_size), strict=True)
    return torch.cat(values), torch.cat(indices)  # (Q, k) each


def neighbor_chunks(
    queries: Tensor, keys: Tensor, k: int, chunk_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Find the k keys with the largest cosine to each query, for one chunk of queries at a time.

    The search is exact on a GPU, and on a CPU for up to 200,000 keys or queries. Beyond that it is
    approximate if the extra `ann` is installed: faiss searches as many cells of an inverted file as
    are needed to find 95 % of the exact neighbours of 1,000 keys, and the log gives the measured
    recall. Without the extra it stays exact, and the log warns that it takes long.

    Args:
        queries: (Q, D), embeddings or raw features; l2-normalised here.
        keys: (N, D), embeddings or raw features; l2-normalised here.
        k: neighbours per query, 1 to N.
        chunk_size: b, queries per chunk; memory grows with chunk_size * N, never with Q * N. By
            default an exact chunk has at most 2^26 similarities.

    Yields:
        Similarity (b, k) in [-1, 1], nearest first, and index (b, k) into the keys; one empty chunk
        if there are no queries.

    Raises:
        ValueError: k or chunk_size out of range.

    Examples:
        >>> keys = torch.eye(3)
        >>> [index.tolist() for _, index in neighbor_chunks(keys, keys, k=1, chunk_size=2)]
        [[[0], [1]], [[2]]]
    """
    if not 1 <= k <= len(keys):
        raise ValueError(
            f"k {k} is not between 1 and the {len(keys)} keys; choose one in that range"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} holds no query; raise it to at least 1")
    unit = unit_rows(keys)
    queries = unit if queries is keys else unit_rows(queries)  # no second copy of all features
    find, size = None, chunk_size or max(1, SIMILARITIES_PER_CHUNK // len(keys))
    if min(len(keys), len(queries)) > EXACT_UP_TO and keys.device.type == "cpu":
        if importlib.util.find_spec("faiss"):
            find, size = _approximate(unit, k), chunk_size or NUM_PROBES
        else:
            logger.warning(
                "the exact search for neighbours among %d samples compares each with each, which "
                "takes long; pip install 'spice-pl[ann]' for a much faster approximate search",
                len(keys),
            )
    find = find or _exact(unit, k, min(size, len(queries)))
    for start in range(0, max(1, len(queries)), size):
        yield find(queries[start : start + size])


def _exact(keys: Tensor, k: int, most_queries: int = 0) -> Search:
    """Search exactly; calls with up to `most_queries` queries share the memory of similarities."""
    # On a processor new memory takes longer than the product: the system clears its pages.
    shared = keys.new_empty(most_queries if keys.device.type == "cpu" else 0, len(keys))

    def find(queries: Tensor) -> tuple[Tensor, Tensor]:
        if len(queries) > len(shared):
            return _largest(similarities(queries, keys), k)
        return _largest(similarities(queries, keys, out=shared[: len(queries)]), k)

    return find


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest of each row, largest first, as topk does, with less sorting.

    The k blocks with the largest maxima hold the k largest values.
    """
    width = values.shape[1]
    if width < 4 * k * BLOCK:
        found = values.topk(k, dim=1)
        return found.values, found.indices
    whole = width // BLOCK * BLOCK
    blocks = values[:, :whole].view(-1, whole // BLOCK, BLOCK)  # (b, N / BLOCK, BLOCK)
    chosen = blocks.amax(dim=2).topk(k, dim=1).indices  # (b, k)
    near = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, BLOCK)).flatten(1)
    found = torch.cat([near, values[:, whole:]], dim=1).topk(k, dim=1)
    block, offset = found.indices // BLOCK, found.indices % BLOCK
    inside = chosen.gather(1, block.clamp_max(k - 1)) * BLOCK + offset
    beyond = whole + found.indices - k * BLOCK  # the last columns, which fill no block
    return found.values, torch.where(block < k, inside, beyond)


def _approximate(keys: Tensor, k: int) -> Search:
    """Build an inverted file and widen its search until the recall reaches RECALL."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, width, exact = keys.numpy(), keys.shape[1], _exact(keys, k)
    num_cells = round(4 * math.sqrt(len(keys)))
    # Codes with 4 bits per 4 numbers choose the candidates; a copy of all embeddings in half
    # precision, which takes half the memory of the original, puts the candidates in order.
    parts = width // math.gcd(width, 4)
    index: Any = faiss.index_factory(
        width, f"IVF{num_cells},PQ{parts}x4fs,Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT
    )
    index.k_factor, cells = RERANKED, faiss.extract_index_ivf(index)
    cells.cp.niter, cells.cp.max_points_per_centroid = 5, 64
    index.train(rows[:: max(1, len(rows) // (64 * num_cells))])
    index.add(rows)

    def find(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = index.search(queries.numpy(), k)
        values, indices = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        few = (indices < 0).any(dim=1)  # fewer than k samples in the searched cells
        if few.any():
            values[few], indices[few] = exact(queries[few])
        return values, indices

    probes = keys[:: max(1, len(keys) // NUM_PROBES)][:NUM_PROBES]
    wanted = exact(probes)[1]
    cells.nprobe, recall = 4, 0.0
    while recall < RECALL and cells.nprobe < num_cells:
        cells.nprobe, before = min(2 * cells.nprobe, num_cells), recall
        recall = _recall(find(probes)[1], wanted)
        if recall < min(RECALL, before + 0.01):  # more cells do not help: take more candidates
            index.k_factor *= 2
            recall = _recall(find(probes)[1], wanted)
    logger.info(
        "neighbours among %d samples by faiss: %d of %d cells searched, recall %.4f on %d exact "
        "queries",
        *(len(keys), cells.nprobe, num_cells, recall, len(probes)),
    )
    return find


def _recall(found: Tensor, wanted: Tensor) -> float:
    """Share of the wanted indices (Q, k) that were found for their query."""
    return float((found.unsqueeze(-1) == wanted.unsqueeze(1)).any(dim=1).float().mean())
