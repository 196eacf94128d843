"""Which parts of the prototypes resemble their cluster, as in SPICE, Figure 5(b).

Shapes: N images, n shown prototypes, h x w positions of a feature map, D features, K clusters.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.attention import cosine_attention, stretched
from spice_pl.functional.prototypes import prototype_means, select_confident
from spice_pl.reports.page import shown_wall
from spice_pl.reports.shading import Attention
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder
from spice_pl.system.files import atomic
from spice_pl.system.schema import MAX_BYTES

logger = logging.getLogger(__name__)

ATTENTION_FILE = "attention.npz"
ATTENTION_BATCH = 64  # images per batch

# uint8 images (B, 3, S, S) -> the map (B, D, h, w) from which features are pooled, or None
FeatureMap = Callable[[Tensor], Tensor | None]


def write_attention(
    folder: RunFolder,
    table: ClusterTable,
    images: ImageSet,
    num_clusters: int,
    feature_map: FeatureMap,
) -> None:
    """Write which parts of the prototypes on the page resemble their cluster, without labels.

    attention.npz holds index (n,) and maps (n, h, w) uint8, with n = 0 if the backbone has no
    feature map. It is not written if no cluster has a prototype. stage=report replaces it.

    Args:
        folder: artifacts of the run, of which features and probabilities are read.
        table: clusters of the run.
        images: the data set.
        num_clusters: K.
        feature_map: function that returns the feature maps of images.
    """
    wall = shown_wall(
        *(table.confidence, table.agreement, table.clusters, num_clusters, table.num_neighbors)
    )
    index = np.concatenate([chosen.prototypes for chosen in wall.clusters]).astype(np.int64)  # (n,)
    (folder.path / ATTENTION_FILE).unlink(missing_ok=True)
    if not len(index):  # all images are "not sure"
        return
    confident = max(1, len(images) // (2 * num_clusters))  # half of an equal share, as in stage 2
    centres = prototype_means(
        F.normalize(torch.from_numpy(np.array(folder.features))),
        select_confident(torch.from_numpy(np.array(folder.probs)), confident),
    )  # (K, D), Eqs. 2 and 3
    parts = []
    for batch in np.split(index, range(ATTENTION_BATCH, len(index), ATTENTION_BATCH)):
        maps = feature_map(torch.from_numpy(np.array(images.images[batch])))
        if maps is None:
            logger.info("the backbone has no feature map; the page shows no attention")
            index = index[:0]
            break
        attention = stretched(cosine_attention(maps.cpu(), centres[table.clusters[batch]]))
        parts.append((255 * attention).round().to(torch.uint8).numpy())
    shown = np.concatenate(parts) if len(index) else np.zeros((0, 1, 1), np.uint8)
    with atomic(folder.path / ATTENTION_FILE) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, index=index, maps=shown)


def read_attention(folder: RunFolder) -> Attention | None:
    """Read what `write_attention` wrote; None without that file.

    Raises:
        UsageError: the file is damaged.
    """
    file = folder.path / ATTENTION_FILE
    if not file.is_file():
        return None
    try:
        with zipfile.ZipFile(file) as parts:  # it compares a checksum of each part
            if sum(each.file_size for each in parts.infolist()) > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES // 1_000_000} MB")
        with np.load(file, allow_pickle=False) as held:
            index, maps = held["index"], held["maps"]
        if (index.dtype, index.ndim, maps.dtype, maps.ndim) != (np.int64, 1, np.uint8, 3):
            raise ValueError("its arrays have other types or dimensions than those written")
        if len(index) != len(maps) or ((index < 0) | (index >= len(folder.features))).any():
            raise ValueError("its maps belong to no images of the run")
        return Attention(index, maps)
    # A damaged archive can cause any exception in the readers of numpy and zlib.
    except Exception as error:
        raise UsageError(
            f"{file} is damaged ({error}); stage=report writes it and the page again"
        ) from error
