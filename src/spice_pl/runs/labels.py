"""Write the clusters of a run for annotation tools, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spice_pl.runs.folder import RunFolder
from spice_pl.system.files import atomic


def write_labels(run: RunFolder, folder: Path) -> list[Path]:
    """Write label_studio.json and fiftyone.json about the images of a run.

    Args:
        run: finished run with clusters, of images that are files.
        folder: where to write.

    Returns:
        Paths of both files; empty if the images of the run are not files.
    """
    root = run.metrics.get("settings", {}).get("dataset.root")
    if root is None or not Path(root).is_dir():
        return []
    made = {"label_studio.json": label_studio(run, Path(root)), "fiftyone.json": fiftyone(run)}
    for name, content in made.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return [folder / name for name in made]


def label_studio(run: RunFolder, root: Path) -> list[dict[str, Any]]:
    """Return tasks with a predicted choice per image.

    The paths are those of Label Studio's local files; its document root for them must be /. The
    labelling configuration needs <Image name="image" value="$image"/> and
    <Choices name="cluster" toName="image">.
    """
    table, tasks = run.read_clusters(), []
    for key, cluster, sure in zip(table.keys, table.clusters, table.confidence, strict=True):
        path = (root / key).absolute().as_posix().lstrip("/")
        choice = {
            "from_name": "cluster",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": [_name(run.names, int(cluster))]},
        }
        tasks.append(
            {
                "data": {"image": f"/data/local-files/?d={quote(path, errors='surrogateescape')}"},
                "predictions": [
                    {"model_version": "spice-pl", "score": float(sure), "result": [choice]}
                ],
            }
        )
    return tasks


def fiftyone(run: RunFolder) -> dict[str, Any]:
    """Return the labels of a FiftyOneImageClassificationDataset, by path without its ending."""
    table, names = run.read_clusters(), run.names
    num_clusters = int(run.metrics["num_clusters"])
    return {
        "classes": [_name(names, cluster) for cluster in range(num_clusters)],
        "labels": {
            str(Path(key).with_suffix("")): int(cluster)
            for key, cluster in zip(table.keys, table.clusters, strict=True)
        },
    }


def _name(names: Mapping[int, str], cluster: int) -> str:
    return names.get(cluster, f"cluster {cluster}")
