"""Apply edits of a reviewed run at once, without training.

Shapes: N images, K clusters before and L after.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.models import portable
from spice_pl.models.portable import PortableModel, portable_settings
from spice_pl.nn.edited_head import EditedHead
from spice_pl.nn.places import fine_feature_map
from spice_pl.reports.page import write_report
from spice_pl.reports.tables import ResultRow, results_markdown
from spice_pl.runs.attention import write_attention
from spice_pl.runs.checked_files import EMBEDDINGS, identity
from spice_pl.runs.choices import measure_edited
from spice_pl.runs.clusters import FILE_NAME, ClusterTable, ReliableRule, cluster_table, write_table
from spice_pl.runs.edits import AppliedEdits, Edits, apply_edits, check_reviewed, read_edits
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.runs.page_data import report_data
from spice_pl.runs.results import score_row
from spice_pl.system.files import atomic
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)


class Edit:
    """Write the edited run of the upstream run: runs/<dataset>/edits/<run>.

    Args:
        file: edits.json, as the report page saves it; None takes that of the run.
        reliable: which images count as reliable, see `ReliableRule`.
        allow_targets: names of your own packages that define the model's network.
    """

    def __init__(
        self,
        file: str | None,
        reliable: Mapping[str, Any],
        allow_targets: Sequence[str] = (),
    ) -> None:
        self.file, self.rule = file, ReliableRule(**reliable)
        self.allow_targets = allow_targets

    def __call__(self, context: Context) -> None:
        """Read and check the edits, then apply them.

        Raises:
            UsageError: the edits cannot be read or do not fit the run.
        """
        reviewed = context.upstream[0]
        file = Path(self.file).expanduser() if self.file else reviewed.path / "edits.json"
        made = write_applied(
            read_edits(file),
            reviewed,
            context.upstream[1:],
            context.images(),
            self.rule,
            self.allow_targets,
        )
        for name, what in (
            ("report.html", "look at the clusters"),
            ("clusters.csv", "one line per image, with names"),
            (portable.FILE_NAME, "clusters new images"),
        ):
            if (made.path / name).is_file():
                logger.info("%s  %s", made.path / name, what)


def edited_folder(reviewed: RunFolder) -> RunFolder:
    """Return the folder of a run's edited clusters; edits of these get the next number.

    >>> edited_folder(RunFolder(Path("runs/photos/proto/seed0"))).path.as_posix()
    'runs/photos/edits/proto-seed0'
    >>> edited_folder(RunFolder(Path("runs/photos/edits/proto-seed0"))).path.as_posix()
    'runs/photos/edits/proto-seed0-2'
    >>> edited_folder(RunFolder(Path("runs/photos/edits/proto-seed0-2"))).path.as_posix()
    'runs/photos/edits/proto-seed0-3'
    """
    stage, name = reviewed.path.parent.name, reviewed.path.name
    if stage != "edits":
        name = f"{stage}-{name}"
    else:
        first, _, number = name.rpartition("-")
        again = bool(first) and number.isdecimal()
        name = f"{first}-{int(number) + 1}" if again else f"{name}-2"
    return RunFolder(reviewed.path.parents[1] / "edits" / name, reviewed.similarity)


def write_applied(
    edits: Edits,
    reviewed: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    rule: ReliableRule,
    allow_targets: Sequence[str] = (),
) -> RunFolder:
    """Write the run after the edits, with clusters.csv, names.json, report.html and model.spice.

    Clusters keep their numbers, see `AppliedEdits`. The reviewed run is not changed.

    Args:
        edits: changes to the clusters of `reviewed`.
        reviewed: artifacts of the reviewed run.
        upstream: artifacts of the stages before it, the nearest first.
        images: the data set.
        rule: which images count as reliable.
        allow_targets: names of your own packages that define the model's network.

    Returns:
        Artifacts of the edited run.

    Raises:
        UsageError: the edits do not fit the run.
    """
    metrics, seed = reviewed.metrics, int(reviewed.metrics["seed"])
    check_reviewed(
        edits, metrics["fingerprint"], metrics["digest"], metrics["num_clusters"], images.keys
    )
    applied = apply_edits(
        edits, as_tensor(reviewed.answer), as_tensor(reviewed.features), images.keys
    )
    model = _edited_model(reviewed, applied, allow_targets)
    target = edited_folder(reviewed)
    target.path.mkdir(parents=True, exist_ok=True)
    (target.path / "metrics.json").unlink(missing_ok=True)
    _copy(reviewed, target)
    for name, array in (("probs.npy", applied.probs), ("moved.npy", applied.moved)):
        with atomic(target.path / name) as temporary, temporary.open("wb") as file:
            np.save(file, array.numpy())
    table = cluster_table(
        images.keys, target.embeddings(images.train_index), applied.probs.numpy(), rule, seed
    )
    write_table(table, target.path / FILE_NAME, applied.names)
    target.write_json("names.json", {str(k): name for k, name in applied.names.items()})
    target.write_json("edits.json", edits.as_json())
    _write_model(model, target, images, table, applied.names)
    target.stamp(metrics["fingerprint"], metrics["num_images"], reviewed)
    made = _metrics(reviewed, target, images, table, int(applied.probs.shape[1]))
    _write_pages(target, [reviewed, *upstream], images, table, made, model)
    target.write_json("metrics.json", made)
    sizes = (metrics["cluster_sizes"], made["cluster_sizes"])
    used = (sum(size > 0 for size in each) for each in sizes)
    logger.info(
        "edits applied: %s, %s, %s, %s moved by hand; %d clusters with images become %d; %s",
        *(_count(len(edits.names), "name"), _count(len(edits.merge), "merge")),
        *(_count(len(edits.split), "split"), _count(int(applied.moved.sum()), "image")),
        *(*used, target.path),
    )
    return target


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _copy(reviewed: RunFolder, target: RunFolder) -> None:
    """Copy what the edits leave as it is."""
    for name in ("encoder.safetensors", "features.npy", EMBEDDINGS):
        (target.path / name).unlink(missing_ok=True)
        if (reviewed.path / name).is_file():
            with atomic(target.path / name) as temporary:
                shutil.copyfile(reviewed.checked(name), temporary)
    (target.path / ".hydra").mkdir(exist_ok=True)
    for name in ("config.yaml", "overrides.yaml"):
        if (reviewed.path / ".hydra" / name).is_file():
            shutil.copyfile(reviewed.path / ".hydra" / name, target.path / ".hydra" / name)


def _edited_model(
    reviewed: RunFolder, applied: AppliedEdits, allow_targets: Sequence[str]
) -> PortableModel | None:
    """Return the run's model with the edits in its head; None if it has no model."""
    if not (reviewed.path / portable.FILE_NAME).is_file():
        return None
    model = portable.load(
        reviewed.checked(portable.FILE_NAME), device="cpu", allow_targets=allow_targets
    )
    try:
        model.network.head = EditedHead.after(
            model.network.head, applied.merge, applied.centres, applied.part_of, applied.part_is
        ).eval()
    except TypeError as error:
        raise UsageError(f"{reviewed.path} has a head of your own ({error})") from error
    return model


def _write_model(
    model: PortableModel | None,
    target: RunFolder,
    images: ImageSet,
    table: ClusterTable,
    names: Mapping[int, str],
) -> None:
    """Write model.spice and head.safetensors of the edited clusters."""
    for name in (portable.FILE_NAME, "head.safetensors"):
        (target.path / name).unlink(missing_ok=True)
    if model is None:
        return
    head = model.network.head
    target.write_weights("head.safetensors", head)
    described = portable_settings(model.settings["encoder"], head, model.settings["plain"])
    model.settings = described or model.settings
    num_clusters = head.num_clusters_after if isinstance(head, EditedHead) else len(names)
    model.names = [names.get(k, f"cluster {k}") for k in range(num_clusters)]
    model.about = {**model.about, "stage": "edits"}
    if model.known is not None:
        clusters = dict(zip(images.keys, table.clusters.tolist(), strict=True))
        known = [clusters[key] for key in model.known.keys]
        model.known = portable.Known(model.known.keys, model.known.embeddings, torch.tensor(known))
    model.save(target.path / portable.FILE_NAME)


def _metrics(
    reviewed: RunFolder, target: RunFolder, images: ImageSet, table: ClusterTable, num_clusters: int
) -> dict[str, Any]:
    """Return metrics.json of the edited run: that of the reviewed one with its own clusters."""
    before, digests = reviewed.metrics, target.digests()
    title = f"{before['title'].removesuffix(', edited')}, edited"
    more = {"seed": before["seed"], "oracle": any(row["oracle"] for row in before["rows"])}
    row = score_row(title, table.clusters, images, seconds=before["seconds_in_all"], **more)
    return {
        **before,
        "stage": "edits",
        "title": title,
        "num_clusters": num_clusters,
        "cluster_sizes": table.sizes(num_clusters).tolist(),
        "mean_confidence": float(table.confidence.mean()),
        "mean_agreement": float(table.agreement.mean()),
        "num_neighbors": table.num_neighbors,
        "reliable_fraction": float(table.reliable.mean()),
        "answer": None,
        "compared": [asdict(measure_edited(target, table, int(before["seed"]), title))],
        "seconds": 0.0,
        "digests": digests,
        "digest": identity(digests),
        "rows": [*before["rows"], asdict(row)],
    }


def _write_pages(
    target: RunFolder,
    upstream: Sequence[RunFolder],
    images: ImageSet,
    table: ClusterTable,
    metrics: Mapping[str, Any],
    model: PortableModel | None,
) -> None:
    rows = [ResultRow(**row) for row in metrics["rows"]]
    with atomic(target.path / "table.md") as temporary:
        temporary.write_text(results_markdown(rows), encoding="utf-8")
    if model is not None:

        def feature_map(pixels: torch.Tensor) -> torch.Tensor | None:
            plain = model.network.plain(pixels.to(model.device), torch.empty(0))
            return fine_feature_map(model.network.encoder, plain)

        write_attention(target, table, images, int(metrics["num_clusters"]), feature_map)
    data = report_data(target, upstream, images, metrics, table)
    write_report(data, target.path / "report.html")
