"""Hand the clusters of a run to annotation tools: as files, and as a data set of FiftyOne.

Shapes: N images, d numbers of an embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from spice_pl.data.decode import quiet_warnings
from spice_pl.data.formats import open_bytes, open_image
from spice_pl.errors import UsageError
from spice_pl.runs.checked_files import EMBEDDINGS
from spice_pl.runs.find import find_run
from spice_pl.runs.folder import RunFolder
from spice_pl.system.files import atomic


def write_labels(run: RunFolder, folder: Path) -> list[Path]:
    """Write label_studio.json, fiftyone.json and cvat.xml about the images of a run.

    Args:
        run: finished run with clusters, of images that are files.
        folder: where to write.

    Returns:
        Paths of the files; empty if the images of the run are not files.
    """
    root = _root(run)
    if root is None:
        return []
    made = {
        "label_studio.json": json.dumps(label_studio(run, root), indent=1),
        "fiftyone.json": json.dumps(fiftyone(run), indent=1),
        "cvat.xml": cvat(run, root),
    }
    for name, content in made.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [folder / name for name in made]


def _root(run: RunFolder) -> Path | None:
    root = run.metrics.get("settings", {}).get("dataset.root")
    return None if root is None or not Path(root).is_dir() else Path(root)


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


def cvat(run: RunFolder, root: Path) -> str:
    """Return a file in the format "CVAT for images 1.1", with one tag per image.

    The images of the task must have the names of the run, below the same root. The task needs the
    labels that the file lists, of the type tag.
    """
    table, names = run.read_clusters(), run.names
    top = ElementTree.Element("annotations")
    ElementTree.SubElement(top, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(top, "meta"), "task")
    labels = ElementTree.SubElement(task, "labels")
    for cluster in range(int(run.metrics["num_clusters"])):
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = _xml(_name(names, cluster))
        ElementTree.SubElement(label, "type").text = "tag"
        ElementTree.SubElement(label, "attributes")
    for i, (key, cluster) in enumerate(zip(table.keys, table.clusters, strict=True)):
        width, height = _size(root / key)
        facts = {"id": str(i), "name": _xml(key), "width": str(width), "height": str(height)}
        image = ElementTree.SubElement(top, "image", facts)
        tag = {"label": _xml(_name(names, int(cluster))), "source": "auto"}
        ElementTree.SubElement(image, "tag", tag)
    ElementTree.indent(top, " ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(top, "unicode")


def fiftyone_dataset(run: str | os.PathLike[str], name: str | None = None) -> Any:
    """Return a data set of FiftyOne with the images, clusters and embeddings of a run.

    Each sample has the fields cluster (a Classification with the confidence), agreement, reliable
    and embedding (d,), which `fiftyone.brain.compute_visualization(dataset,
    embeddings="embedding")` draws.

    Args:
        run: folder of a finished run, or what the verbs of the command line take.
        name: name of the data set; None is "<dataset>-<stage>-<run>".

    Raises:
        UsageError: fiftyone is missing, or the images of the run are not files.
    """
    try:
        import fiftyone
    except ImportError as error:
        raise UsageError(
            "a data set of FiftyOne needs the package fiftyone; pip install 'spice-pl[fiftyone]'"
        ) from error
    path = find_run(str(run))
    folder = RunFolder(path, "smoothed" if (path / EMBEDDINGS).is_file() else "cosine")
    root = _root(folder)
    if root is None:
        raise UsageError(f"the images of {path} are not files that are still there")
    table, names = folder.read_clusters(), folder.names
    embeddings = folder.embeddings(np.arange(len(table.keys))).numpy()
    dataset = fiftyone.Dataset(name or "-".join(path.absolute().parts[-3:]))
    samples = (
        fiftyone.Sample(
            filepath=str((root / key).absolute()),
            cluster=fiftyone.Classification(
                label=_name(names, int(table.clusters[i])), confidence=float(table.confidence[i])
            ),
            agreement=float(table.agreement[i]),
            reliable=bool(table.reliable[i]),
            embedding=embeddings[i],
        )
        for i, key in enumerate(table.keys)
    )
    dataset.add_samples(samples)
    return dataset


def _size(file: Path) -> tuple[int, int]:
    """Return width and height, or 0, 0 of a file that cannot be opened any more."""
    try:
        with quiet_warnings(), open_bytes(file) as data, open_image(data) as opened:
            return opened.size
    except (OSError, ValueError):  # the clusters are known, whatever became of the file
        return 0, 0


def _xml(text: str) -> str:
    """Return text with U+FFFD in place of the characters that XML 1.0 does not have."""
    return "".join(
        c
        if c in "\t\n\r" or "\x20" <= c < "\ud800" or "\ue000" <= c < "\ufffe" or c > "\uffff"
        else "\ufffd"
        for c in text
    )


def _name(names: Mapping[int, str], cluster: int) -> str:
    return names.get(cluster, f"cluster {cluster}")
