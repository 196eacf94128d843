"""Smoothed embeddings: half-whitened principal components, averaged over near neighbours.

Two samples are alike if their smoothed embeddings have a large cosine.

Shapes: N samples, M new samples, D feature width, d components, k neighbours, t steps.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from spice_pl.functional.neighbors import nearest_neighbors, similarities, unit_rows

Whitening = Literal["none", "half", "full"]

POWERS = {"none": 0.0, "half": 0.5, "full": 1.0}  # of a component's deviation, which divides it
RANK_TOLERANCE = 1e-6  # smallest deviation of a component; float32 rounds unit rows by some 1e-7
ROWS_PER_CHUNK = 2**14  # so that memory beyond the features does not grow with N * D


class Projection(NamedTuple):
    """A linear map from l2-normalised features to principal components.

    Attributes:
        mean: (D,), mean of the l2-normalised features.
        components: (D, d), each principal direction divided by a power of its deviation.
    """

    mean: Tensor
    components: Tensor


class Walk(NamedTuple):
    """A lazy random walk on the neighbour graph, with what new samples need to join it.

    Attributes:
        starts: x_0, (N, d), l2-normalised; new samples look for their neighbours here.
        passed: z = Σ_{s=1..t} 2^-s x_{t-s}, (N, d); what a sample adds to its neighbours.
        ends: x_t, (N, d), l2-normalised.
        num_neighbors: k.
        num_steps: t.
    """

    starts: Tensor
    passed: Tensor
    ends: Tensor
    num_neighbors: int
    num_steps: int


def smoothed_embeddings(
    features: Tensor,
    *,
    num_components: int = 64,
    num_neighbors: int = 10,
    num_steps: int = 3,
    whitening: Whitening = "half",
    fit_index: Tensor | None = None,
) -> Tensor:
    """Embed samples so that those of one group come close together.

    Ours, from known parts: `fit_projection`, `project`, `neighbor_walk`. With `fit_index` these see
    the samples it names only, and every other sample is projected and joins the walk
    (`join_walk`), so that no sample outside changes the embedding of another.

    Args:
        features: (N, D), any floating type; N is at least 1.
        num_components: d, at least 1.
        num_neighbors: k, at least 1.
        num_steps: t, at least 0; 0 gives the projection alone.
        whitening: see `fit_projection`.
        fit_index: ids of the samples to fit on, each at most once; all if None.

    Returns:
        Embeddings (N, d), float32, l2-normalised. Features that tell no samples apart give zeros.

    Raises:
        ValueError: a feature is not finite, an argument is out of range, or fit_index is empty or
            names a sample twice.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
        >>> smooth = smoothed_embeddings(rows, num_components=2, num_neighbors=1)
        >>> (smooth @ smooth.T).round(decimals=2)
        tensor([[ 1.,  1., -1., -1.],
                [ 1.,  1., -1., -1.],
                [-1., -1.,  1.,  1.],
                [-1., -1.,  1.,  1.]])
    """
    if fit_index is None:
        projection = fit_projection(features, num_components, whitening)
        return neighbor_walk(project(features, projection), num_neighbors, num_steps).ends
    other = torch.ones(len(features), dtype=torch.bool, device=features.device)
    other[fit_index] = False
    num_fitted = len(features) - int(other.sum())
    if num_fitted != len(fit_index) or not num_fitted:
        raise ValueError(
            f"fit_index names {num_fitted} samples with {len(fit_index)} ids; name at least one, "
            "and none twice"
        )
    projection = fit_projection(features[fit_index], num_components, whitening)
    projected = project(features, projection)  # (N, d)
    walk = neighbor_walk(projected[fit_index], num_neighbors, num_steps)
    projected[other] = join_walk(projected[other], walk)
    projected[fit_index] = walk.ends
    return projected


def fit_projection(
    features: Tensor, num_components: int = 64, whitening: Whitening = "half"
) -> Projection:
    """Fit principal components of l2-normalised features, half-whitened.

    u = f/‖f‖; Σ = mean of (u − μ)(u − μ)ᵀ = V diag(σ²) Vᵀ; component i is v_i / σ_i^p, with p = ½
    for half-whitening, 1 for whitening, 0 for plain principal components. σ_i is the i-th singular
    value of the centred rows over √N, and a common factor does not change `project`.

    Half-whitening gives directions of little variance, which hold much of what tells groups apart,
    more weight without raising noise as whitening does. Memory: D² in float64.

    Args:
        features: (N, D), any floating type.
        num_components: d; components beyond the rank of the centred features are zero columns.
        whitening: none, half or full.

    Returns:
        The map, in float32.

    Raises:
        ValueError: a feature is not finite, there are none, or an argument is out of range.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.25], [0.0, -0.25]])
        >>> fit_projection(rows, num_components=2, whitening="none").components.abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    if num_components < 1:
        raise ValueError(f"num_components {num_components} is not positive; use at least 1")
    if whitening not in POWERS:
        raise ValueError(f"whitening {whitening!r} is unknown; choose none, half or full")
    if not features.numel():
        raise ValueError(f"features {tuple(features.shape)} are empty; give at least one sample")
    width = features.shape[1]
    total = torch.zeros(width, dtype=torch.float64, device=features.device)
    products = total.new_zeros(width, width)
    for rows in torch.split(features, ROWS_PER_CHUNK):
        unit = unit_rows(rows).double()
        total += unit.sum(dim=0)
        products += similarities(unit.T, unit.T)
    mean = total / len(features)
    covariance = products / len(features) - mean.outer(mean)
    if not bool(covariance.isfinite().all()):
        raise ValueError(_not_finite(features))
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    kept = min(num_components, width)
    deviations = values.flip(0)[:kept].clamp_min(0).sqrt()
    directions = vectors.flip(1)[:, :kept]
    # An eigenvector has no sign of its own: make its largest entry positive.
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    scales = deviations.clamp_min(RANK_TOLERANCE) ** -POWERS[whitening]
    scales = torch.where(deviations > RANK_TOLERANCE, scales, 0) * largest.sign()
    components = total.new_zeros(width, num_components)
    components[:, :kept] = directions * scales
    return Projection(mean.float(), components.float())


def project(features: Tensor, projection: Projection) -> Tensor:
    """Map features to l2-normalised principal components, those of new samples too.

    Args:
        features: (N, D), any floating type.
        projection: from `fit_projection` on the same width D.

    Returns:
        Embeddings (N, d), float32, l2-normalised; zero for a sample equal to the mean.

    Raises:
        ValueError: a feature is not finite.
    """
    return unit_rows(coordinates(features, projection))


def coordinates(features: Tensor, projection: Projection) -> Tensor:
    """Return (N, d) as `project` does, but not divided by their length.

    Raises:
        ValueError: a feature is not finite.
    """
    mean, components = projection
    parts = [
        similarities(unit_rows(rows).float() - mean, components.T)
        for rows in torch.split(features, ROWS_PER_CHUNK)
    ]
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        raise ValueError(_not_finite(features))
    return found


def smooth(embeddings: Tensor, num_neighbors: int = 10, num_steps: int = 3) -> Tensor:
    """Average embeddings over their neighbours: `neighbor_walk` without what new samples need."""
    return neighbor_walk(embeddings, num_neighbors, num_steps).ends


def neighbor_walk(embeddings: Tensor, num_neighbors: int = 10, num_steps: int = 3) -> Walk:
    """Average embeddings t times over the graph of their nearest neighbours.

    A holds 1/k for the k nearest other samples by cosine; W = D⁻¹(A + Aᵀ)/2, rows of sum one;
    x_{s+1} = ½ x_s + ½ W x_s, a lazy random walk, and x_t is l2-normalised. It is label
    propagation (Zhou et al. 2004) of the embeddings themselves and the filter of SGC (Wu et al.
    2019): what varies quickly over the graph is damped, as in spectral clustering.

    The graph is exact up to the limit of `neighbor_chunks` and found by faiss above it. It is
    sparse: memory grows with N k. Groups that no edge connects do not mix. More than k exact copies
    of a sample have copies as neighbours only, and move only if other samples have them as theirs.

    Args:
        embeddings: (N, d), l2-normalised.
        num_neighbors: k, at least 1; all others where N ≤ k, and a single sample has none.
        num_steps: t, at least 0; 0 gives the embeddings back.

    Returns:
        The walk, in float32, on the device of the embeddings.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors {num_neighbors} is not positive; use at least 1")
    if num_steps < 0:
        raise ValueError(f"num_steps {num_steps} is negative; use 0 for the projection alone")
    starts = embeddings.float()
    if not num_steps:
        return Walk(starts, torch.zeros_like(starts), starts, num_neighbors, num_steps)
    states = walk_states(starts, neighbor_graph(starts, num_neighbors))
    current = next(states)
    passed = np.zeros_like(current)
    for _ in range(num_steps):
        passed = 0.5 * (passed + current)
        current = next(states)
    ends, device = unit_rows(torch.from_numpy(current)), starts.device
    return Walk(
        starts, torch.from_numpy(passed).to(device), ends.to(device), num_neighbors, num_steps
    )


def walk_states(starts: Tensor, graph: sparse.csr_array) -> Iterator[NDArray[np.float32]]:
    """Yield x_0, x_1, x_2, ... of `neighbor_walk` without end, not normalised.

    Args:
        starts: x_0, (N, d).
        graph: symmetric weights (N, N), every row with a positive sum.

    Yields:
        x_s, (N, d), float32; x_0 may share its memory with `starts`.
    """
    current: NDArray[np.float32] = starts.float().cpu().numpy()
    # scipy's sparse product adds in the same order every time, a GPU's does not.
    transitions = sparse.diags_array(1 / graph.sum(axis=1), dtype=np.float32) @ graph
    while True:
        yield current
        current = 0.5 * (current + transitions @ current)


def join_walk(embeddings: Tensor, walk: Walk) -> Tensor:
    """Smooth new samples by a walk that they are not part of.

    A new sample y_0 takes the same steps, and its k nearest walkers are its neighbours:
    y_{s+1} = ½ y_s + ½ mean_j x_{s,j}. Unrolled, y_t = 2^-t y_0 + mean_j z_j, with z of `Walk`;
    y_t is l2-normalised. A copy of a walker has that walker among its neighbours and comes out
    close to where the walker does; no new sample changes another.

    Args:
        embeddings: (M, d), l2-normalised, from the projection that the walk began with.
        walk: from `neighbor_walk`, of N samples; where N < k all are neighbours.

    Returns:
        Embeddings (M, d), float32, l2-normalised.
    """
    own = embeddings.float()
    if not walk.num_steps:
        return own
    num_neighbors = min(walk.num_neighbors, len(walk.starts))
    found = nearest_neighbors(own, walk.starts, num_neighbors)[1]  # (M, k)
    parts = [walk.passed[index].mean(dim=1) for index in torch.split(found, ROWS_PER_CHUNK)]
    return unit_rows(own / 2**walk.num_steps + torch.cat(parts))


def neighbor_graph(embeddings: Tensor, num_neighbors: int = 10) -> sparse.csr_array:
    """Connect samples to their nearest others by cosine: (A + Aᵀ)/2, with 1/k per neighbour.

    Args:
        embeddings: (N, d); rows are l2-normalised here.
        num_neighbors: k; all others where N ≤ k. A single sample gets an edge to itself.

    Returns:
        Symmetric weights (N, N), float32, at most 2 N k of them; every row has a positive sum.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3]])
        >>> neighbor_graph(rows, 1).toarray()
        array([[0. , 1. , 0. ],
               [1. , 0. , 0.5],
               [0. , 0.5, 0. ]], dtype=float32)
    """
    num_samples = len(embeddings)
    if num_samples == 1:
        return sparse.eye_array(1, dtype=np.float32, format="csr")
    others = nearest_others(embeddings, num_neighbors).cpu()  # (N, k)
    k = others.shape[1]
    weights = np.full(num_samples * k, 1 / k, dtype=np.float32)
    columns, starts = others.flatten().int().numpy(), np.arange(0, num_samples * k + 1, k)
    directed = sparse.csr_array((weights, columns, starts), shape=(num_samples, num_samples))
    return ((directed + directed.T) * np.float32(0.5)).tocsr()  # / 2 would give float64


def nearest_others(embeddings: Tensor, num_neighbors: int) -> Tensor:
    """Find the k nearest other samples of each by cosine, in memory that grows with N k.

    Args:
        embeddings: (N, d); rows are l2-normalised here.
        num_neighbors: k; all others where N ≤ k.

    Returns:
        Index (N, k), nearest first, never the sample itself; its exact copies count as others.
    """
    num_samples = len(embeddings)
    k = min(num_neighbors, num_samples - 1)
    found = nearest_neighbors(embeddings, embeddings, k + 1)[1]  # (N, k + 1)
    own = found == torch.arange(num_samples, device=found.device).unsqueeze(1)
    own[~own.any(dim=1), -1] = True  # copies of a sample can push the sample itself out
    return found[~own].view(num_samples, k)


def _not_finite(features: Tensor) -> str:
    finite = [rows.isfinite().all(dim=1) for rows in torch.split(features, ROWS_PER_CHUNK)]
    bad = (~torch.cat(finite)).nonzero()[:, 0].tolist()
    return (
        f"{len(bad)} samples have a feature that is NaN or infinite, the first at {bad[:5]}; train "
        "or encode them again"
    )
