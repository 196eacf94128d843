"""What a finished stage adds to W&B and TensorBoard: pictures, tables, artifacts with lineage.

Shapes: N images, K clusters, S pixels a side.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import count_table
from spice_pl.reports.wall import choose_wall
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder

MAX_CLUSTERS = 100  # with pictures; W&B takes 108 of a step
MAX_ROWS = 10_000  # of the table of assignments
PICTURES = 12  # a cluster
LEAST_PIXELS = 32  # smaller pictures are magnified


def run_id(folder: Path, *, keep: bool) -> str:
    """Return the id of a stage's W&B run: the earlier one to go on with, or another."""
    file = folder / "wandb_id.txt"
    if not keep or not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()


def log_results(
    logger: Logger,
    folder: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    step: int,
) -> None:
    """Add the results of a finished stage.

    Args:
        logger: W&B or TensorBoard; others are left alone.
        folder: of the run, finished.
        upstream: artifacts of the stages before it, the nearest first.
        images: the data set.
        step: optimizer steps so far.
    """
    if not isinstance(logger, WandbLogger | TensorBoardLogger):
        return
    metrics = folder.metrics
    last = metrics["rows"][-1] if metrics["rows"] else {}  # none of features without a K
    scores = {f"truth/final_{name}": last.get(name) for name in ("acc", "nmi", "ari")}
    logger.log_metrics({key: value for key, value in scores.items() if value is not None}, step)
    if (folder.path / "clusters.csv").is_file():
        table = folder.read_clusters()
        pictures = cluster_pictures(table, images, int(metrics["num_clusters"]))
        names = {k: folder.names.get(k, f"cluster {k}") for k, _, _ in pictures}
        if isinstance(logger, TensorBoardLogger):
            for k, _, picture in pictures:
                tag = f"clusters/{k:03} {names[k]}"
                logger.experiment.add_image(tag, picture, step, dataformats="HWC")
        else:
            captions = [f"{names[k]}: {size} images" for k, size, _ in pictures]
            logger.log_image("clusters", [picture for *_, picture in pictures], caption=captions)
            logger.log_table("assignments", *assignments(table))
            if images.labels is not None and images.labels.max() >= 0:
                logger.log_table("truth/confusion", *confusion(table, images, metrics))
    if isinstance(logger, WandbLogger):
        log_artifact(logger, folder, upstream)


def log_artifact(logger: WandbLogger, folder: RunFolder, upstream: Sequence[RunFolder]) -> None:
    """Add the model as an artifact, and say which artifact it was made from.

    An offline run cannot point to another's artifact; the config then names it
    (`upstream_artifact`), under the alias that is the digest of its content.
    """
    run = logger.experiment
    files = [folder.path / name for name in ("model.spice", "encoder.safetensors")]
    file = next((each for each in files if each.is_file()), None)
    if upstream:
        used = f"{artifact_name(upstream[0])}:{upstream[0].metrics['digest']}"
        run.config.update({"upstream_artifact": used}, allow_val_change=True)
        if not run.offline:
            run.use_artifact(used)
    if file is not None:
        aliases = ["latest", folder.metrics["digest"]]
        run.log_artifact(str(file), name=artifact_name(folder), type="model", aliases=aliases)


def artifact_name(folder: RunFolder) -> str:
    """Name of a stage's artifact: data set, stage and run.

    >>> artifact_name(RunFolder(Path("runs/my photos/proto/seed0,proto.module.lr=0.1")))
    'my_photos-proto-seed0_proto.module.lr_0.1'
    """
    return re.sub(r"[^\w.-]", "_", "-".join(folder.path.parts[-3:]), flags=re.ASCII)[:128]


def cluster_pictures(
    table: ClusterTable, images: ImageSet, num_clusters: int
) -> list[tuple[int, int, NDArray[np.uint8]]]:
    """Return (id, size, picture) of the largest clusters; its best pictures side by side."""
    wall = choose_wall(table.confidence, table.agreement, table.clusters, num_clusters, PICTURES)
    filled = sorted(
        (each for each in wall.clusters if each.size), key=lambda each: (-each.size, each.cluster)
    )
    made = []
    for each in filled[:MAX_CLUSTERS]:
        pixels = images.images[each.shown[:PICTURES]]  # (n, 3, S, S)
        times = -(-LEAST_PIXELS // pixels.shape[-1])
        pixels = pixels.repeat(times, axis=2).repeat(times, axis=3)
        sheet = pixels.transpose(2, 0, 3, 1).reshape(pixels.shape[2], -1, 3)  # (S, n·S, 3)
        made.append((each.cluster, each.size, np.ascontiguousarray(sheet)))
    return sorted(made, key=lambda each: each[0])


def assignments(table: ClusterTable) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of assignments, evenly spaced where there are too many."""
    columns = ["image", "cluster", "confidence", "agreement", "reliable"]
    rows = range(0, len(table.keys), max(1, -(-len(table.keys) // MAX_ROWS)))
    return columns, [
        [
            table.keys[i].encode("utf-8", "replace").decode(),
            int(table.clusters[i]),
            float(table.confidence[i]),
            float(table.agreement[i]),
            bool(table.reliable[i]),
        ]
        for i in rows
    ]


def confusion(
    table: ClusterTable, images: ImageSet, metrics: dict[str, Any]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of clusters against true classes, counted over the scored images."""
    labels = np.asarray(images.labels)
    names = images.class_names or [str(label) for label in range(int(labels.max()) + 1)]
    index = images.score_index
    counts = count_table(
        torch.from_numpy(table.clusters[index]),
        torch.from_numpy(labels[index]),
        int(metrics["num_clusters"]),
        len(names),
    )  # (K, C)
    return ["cluster", *names], [[k, *row] for k, row in enumerate(counts.tolist())]
