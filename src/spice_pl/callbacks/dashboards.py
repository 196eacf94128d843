"""Add scores, pictures, tables and artifacts of a finished stage to W&B, TensorBoard and MLflow.

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
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import count_table
from spice_pl.reports.wall import choose_wall
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder

MAX_CLUSTERS = 100  # clusters with pictures; W&B takes 108 pictures per step
MAX_ROWS = 10_000  # rows of the table of assignments
PICTURES = 12  # images per cluster
LEAST_PIXELS = 32  # side below which images are magnified


def run_id(folder: Path, *, keep: bool) -> str:
    """Return the id of a stage's W&B run: that of the run to resume, or a new one."""
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
        logger: W&B or TensorBoard; MLflow gets the final scores alone, another one nothing.
        folder: folder of the finished run.
        upstream: folders of the stages before it, the nearest first.
        images: data set.
        step: optimizer steps so far.
    """
    if not isinstance(logger, WandbLogger | TensorBoardLogger | MLFlowLogger):
        return
    metrics = folder.metrics
    last = metrics["rows"][-1] if metrics["rows"] else {}  # no rows where K is unknown
    scores = {f"truth/final_{name}": last.get(name) for name in ("acc", "nmi", "ari")}
    logger.log_metrics({key: value for key, value in scores.items() if value is not None}, step)
    if isinstance(logger, MLFlowLogger):
        return
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
    """Add the model as an artifact, and name the artifact that it was made from.

    The config entry `upstream_artifact` holds that name, with the digest of the content as alias.
    An online run is linked to the artifact as well, which an offline run cannot be.
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
    """Return the name of the artifact of a run: data set, stage and run.

    >>> artifact_name(RunFolder(Path("runs/my photos/proto/seed0,proto.module.lr=0.1")))
    'my_photos-proto-seed0_proto.module.lr_0.1'
    """
    return re.sub(r"[^\w.-]", "_", "-".join(folder.path.parts[-3:]), flags=re.ASCII)[:128]


def cluster_pictures(
    table: ClusterTable, images: ImageSet, num_clusters: int
) -> list[tuple[int, int, NDArray[np.uint8]]]:
    """Return (id, size, picture) of the largest clusters; a picture is a row of typical images."""
    values = (table.confidence, table.agreement, table.clusters, num_clusters)
    wall = choose_wall(*values, PICTURES, num_neighbors=table.num_neighbors)
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
    """Return columns and rows of the table of assignments; of too many images every nth."""
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
    """Return columns and rows of clusters against true classes, counted over the scored images."""
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
