"""k-means on stored features, and a linear head that learns its clusters: a result within seconds.

Shapes: N images, n of them for training, D features, d dimensions of an embedding, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spice_pl.data.datamodule import Stream
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.nn.heads import LinearHead
from spice_pl.runs.choices import kmeans
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import width_of
from spice_pl.stages.stored import StoredFeaturesStage

NUM_LEARNED = 10_000  # evenly spaced training images that the head learns from


class KMeansModule(StoredFeaturesStage):
    """Cluster embeddings by k-means, then fit a linear head that gives new images these clusters.

    The clusters are those that the report of another stage previews for this K. The head minimises
    the cross-entropy with an L2 penalty by L-BFGS, in one step of one epoch.

    Args:
        backbone: (B, 3, S, S) -> (B, D), with `num_features`.
        num_clusters: K.
        steps: iterations of L-BFGS, at most.
        weight_decay: weight of the squared norm of the head's weights.
        seed: seed of k-means.
    """

    name = "kmeans"
    labels: Tensor  # (n,)

    def __init__(
        self,
        backbone: nn.Module,
        num_clusters: int,
        *,
        steps: int = 50,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, num_clusters, num_heads=1, batch_size=1, steps_per_epoch=1, seed=seed
        )
        self.steps, self.weight_decay = steps, weight_decay
        self.selected = LinearHead(width_of(backbone), num_clusters).requires_grad_(False)
        self.learner = LinearHead(width_of(backbone), num_clusters)  # reads standardised features
        nn.init.zeros_(self.learner.weight)
        nn.init.zeros_(self.learner.bias)

    def check(self, images: ImageSet, streams: Mapping[str, Stream]) -> None:
        """Check the numbers of the method, and that there are enough images."""
        self.check_number("steps", self.steps >= 1, "at least 1")
        self.check_number("weight_decay", self.weight_decay >= 0, "at least 0")
        if len(images.train_index) < self.num_clusters:
            raise UsageError(
                f"{len(images.train_index)} training images cannot be {self.num_clusters} clusters;"
                " lower dataset.num_clusters or give more images"
            )

    def prepare_heads(self, images: ImageSet, upstream: RunFolder) -> None:
        """Cluster the embeddings of all training images."""
        rows = upstream.embeddings(images.train_index)[self.train_index].numpy()
        self.labels = torch.from_numpy(kmeans(rows, self.num_clusters, self.seed)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return L-BFGS with a line search."""
        return torch.optim.LBFGS(
            self.learner.parameters(), max_iter=self.steps, line_search_fn="strong_wolfe"
        )

    def train_epoch(self, drawn: Tensor) -> Tensor:
        """Fit the head; return its loss (1,)."""
        places = torch.arange(0, len(self.labels), -(-len(self.labels) // NUM_LEARNED))
        inputs = self.inputs[self.train_index[places].to(self.device)]
        labels = self.labels[places].to(self.device)
        optimizer = self.optimizers()

        def loss() -> Tensor:
            fit = F.cross_entropy(self.learner.logits(inputs), labels)
            return fit + self.weight_decay * self.learner.weight.square().sum()

        def closure() -> Tensor:
            optimizer.zero_grad()  # type: ignore[union-attr]
            found = loss()
            self.manual_backward(found)
            return found

        optimizer.step(closure)  # type: ignore[union-attr]
        return loss().detach()[None]

    def clusters_of_heads(self, index: Tensor) -> Tensor:
        """Return the clusters (1, b) of images (b,)."""
        probs: Tensor = self.learner(self.inputs[index.to(self.device)])
        return probs.argmax(dim=-1)[None]

    def state_of_head(self, head: int) -> Mapping[str, Tensor]:
        """Return the head that reads raw features: it standardises them."""
        weight = self.learner.weight.detach() / self.scale  # (K, D)
        return {"weight": weight, "bias": self.learner.bias.detach() - weight @ self.mean}
