"""Settings of stage 2: which values are allowed, and what the words mean.

Shapes: B slots of a step, H heads, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.functional.losses import (
    double_softmax_cross_entropy_per_head,
    tempered_cross_entropy_per_head,
)
from spice_pl.stages.base import check_word

LOSSES = ("double_softmax", "ce", "tce")
BN_MODES = ("frozen", "reference")
JOINT = ("none", "single_head", "multi_head")
SELECTION = ("loss", "mutual_information")
PRIORS = ("uniform", "estimated")
STARTS = ("random", "kmeans")

HeadLosses = Callable[[Tensor, Tensor], Tensor]  # logits (H, B, K), label (B,) or (H, B) -> (H,)


def check_settings(
    *,
    loss: str,
    bn_mode: str,
    joint: str,
    selection: str,
    start: str,
    select_ratio: float,
    entropy: float,
    view_bank: int | None,
) -> None:
    """Check the settings that can be checked without data; they are those of `ProtoHeadModule`.

    Raises:
        UsageError: a word is unknown, a number out of its range, or two settings exclude each
            other.
    """
    check_word("proto.module.loss", loss, LOSSES)
    check_word("proto.module.bn_mode", bn_mode, BN_MODES)
    check_word("proto.module.joint", joint, JOINT)
    check_word("proto.module.selection", selection, SELECTION)
    check_word("proto.module.start", start, STARTS)
    if not 0 < select_ratio <= 1:  # above 1 the slots of Eq. 4 outnumber the images
        raise UsageError(f"proto.module.select_ratio {select_ratio} is not in (0, 1]")
    if entropy < 0:
        raise UsageError(f"proto.module.entropy {entropy} would empty clusters; use 0 or more")
    frozen = joint == "none" and bn_mode == "frozen"
    if view_bank is not None and (view_bank < 1 or not frozen):
        raise UsageError(
            f"proto.module.view_bank {view_bank} needs 1 or more views of a frozen encoder; "
            "use null for fresh views, or joint=none and bn_mode=frozen"
        )


def head_losses(loss: str, temperature: float) -> HeadLosses:
    """Return the loss of the M-step, one value for each head.

    Args:
        loss: "double_softmax" (Eq. 5), or "ce" or "tce" (Table VII).
        temperature: temperature of "tce".
    """

    def double_softmax(logits: Tensor, label: Tensor) -> Tensor:
        # Along the clusters of (H, K, B), which is contiguous: no copy, and vectors of B.
        return double_softmax_cross_entropy_per_head(logits.mT.softmax(dim=-2).mT, label)

    by_word: Mapping[str, HeadLosses] = {
        "double_softmax": double_softmax,
        "ce": tempered_cross_entropy_per_head,
        "tce": partial(tempered_cross_entropy_per_head, temperature=temperature),
    }
    return by_word[loss]


def initial_shares(prior: str | Sequence[float], num_clusters: int) -> Tensor | None:
    """Return the shares (K,) of the clusters that training starts with; None if they stay equal.

    Raises:
        UsageError: `prior` is not one of `PRIORS`, nor one share for each cluster.
    """
    if isinstance(prior, str):
        check_word("proto.module.prior", prior, PRIORS)
        return None if prior == "uniform" else torch.full((num_clusters,), 1 / num_clusters)
    shares = torch.tensor(prior, dtype=torch.float32)  # (K,)
    fits = shares.shape == (num_clusters,) and bool((shares >= 0).all())
    if not fits or not 0 < float(shares.sum()) < math.inf:
        raise UsageError(
            f"proto.module.prior {list(prior)} must hold one share for each of {num_clusters} "
            "clusters, none negative and not all 0; or give the word uniform or estimated"
        )
    return shares / shares.sum()
