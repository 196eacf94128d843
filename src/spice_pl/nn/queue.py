"""The queue of negatives of MoCo.

Shapes: B keys of a batch, D features, Q keys in the queue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """The latest Q keys of the momentum encoder, first in, first out.

    He et al. 2020 (MoCo), Section 3.2. The queue starts with random unit vectors.

    Args:
        feature_dim: width D of the keys.
        size: number of keys Q.

    Examples:
        >>> queue = Queue(feature_dim=2, size=3)
        >>> queue.enqueue(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> queue.keys[:, :2]
        tensor([[1., 0.],
                [0., 1.]])
        >>> int(queue.pointer)  # position of the oldest key, which is replaced next
        2
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, feature_dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(feature_dim, size), dim=0))  # (D, Q)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest B keys, in place.

        Call it after the backward pass of a loss that reads `keys`: that pass needs the old ones.

        Args:
            keys: (B, D), l2-normalised, gathered from all ranks.

        Raises:
            ValueError: keys is not (B, D), or B exceeds Q.
        """
        feature_dim, size = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != feature_dim:
            raise ValueError(
                f"keys {tuple(keys.shape)} is not (B, D) with D = {feature_dim}; "
                "build the queue with the width of the projection"
            )
        if len(keys) > size:
            raise ValueError(
                f"{len(keys)} keys do not fit into a queue of size {size}; raise the size to at "
                f"least {len(keys)} or lower the batch size summed over ranks to at most {size}"
            )
        index = (self.pointer + torch.arange(len(keys), device=keys.device)) % size  # (B,)
        self.keys.index_copy_(1, index, keys.T.to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(size)
