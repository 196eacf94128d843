"""Where in an image its cluster is seen: cosines of places with the cluster's centre.

Shapes: B images, D features, h x w places of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_attention(maps: Tensor, centres: Tensor) -> Tensor:
    """Compare every place of a feature map with the centre of its image's cluster.

    Niu et al. 2022 (SPICE), Section IV-F1, Figure 5b.

    Args:
        maps: (B, D, h, w), what the backbone pools into raw features.
        centres: (B, D), of the clusters of these images, by Eqs. 2 and 3.

    Returns:
        Cosines (B, h, w) in [-1, 1]; 0 where a place or a centre is 0.

    Examples:
        >>> places = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # east, then north
        >>> cosine_attention(places, centres=torch.tensor([[0.0, 1.0]]))
        tensor([[[0., 1.]]])
    """
    unit = F.normalize(centres, dim=1)
    return torch.einsum("bdhw,bd->bhw", F.normalize(maps, dim=1), unit).clamp(-1, 1)


def stretched(attention: Tensor, least_range: float = 0.05) -> Tensor:
    """Scale each map so that its highest place is 1 and its lowest 0.

    Args:
        attention: (B, h, w), cosines.
        least_range: ours: a map whose cosines differ by less is not blown up to the full range;
            noise would look like a finding.

    Returns:
        (B, h, w) in [0, 1]; 1 everywhere where all places are alike.

    Examples:
        >>> stretched(torch.tensor([[[0.5, 0.25]], [[0.3, 0.3]]]))
        tensor([[[1., 0.]],
        <BLANKLINE>
                [[1., 1.]]])
    """
    highest, lowest = attention.amax((1, 2), keepdim=True), attention.amin((1, 2), keepdim=True)
    return 1 - (highest - attention) / (highest - lowest).clamp_min(least_range)
