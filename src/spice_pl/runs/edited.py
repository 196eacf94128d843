"""Make a run from edits, and keep the numbers and names of clusters from run to run.

Shapes: N images, K clusters before and L after.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spice_pl.errors import UsageError
from spice_pl.functional.assignment import count_table, match_clusters
from spice_pl.nn.edited_head import EditedHead
from spice_pl.runs.checked_files import identity
from spice_pl.runs.edits import Edits, check_reviewed, edited_probs, edited_rows
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.system.files import atomic

logger = logging.getLogger(__name__)


def edits_of(
    run: RunFolder,
    *,
    names: Mapping[int, str],
    merge: Sequence[Sequence[int]] = (),
    split: Mapping[int, int] | None = None,
    move: Mapping[str, int] | None = None,
) -> Edits:
    """Return edits of a run's clusters; names that they do not give are those of the run.

    Args:
        run: artifacts of the run, finished.
        names: name by cluster.
        merge: groups of clusters; each group becomes one cluster.
        split: number of parts by cluster.
        move: new cluster by key of the image.

    Raises:
        UsageError: the edits contradict each other or name clusters that do not exist.
    """
    metrics = run.metrics
    return Edits(
        reviewed=f"{run.path.parent.name}/{run.path.name}",
        fingerprint=metrics["fingerprint"],
        digest=metrics["digest"],
        num_clusters=int(metrics["num_clusters"]),
        names={**run.names, **names},
        merge=[list(map(int, group)) for group in merge],
        split=dict(split or {}),
        move={key: int(cluster) for key, cluster in (move or {}).items()},
    )


def write_edited(edits: Edits, reviewed: RunFolder, target: RunFolder, num_clusters: int) -> None:
    """Write the reviewed run after the user's edits, for the stage that trains on it.

    Encoder and features are copied. Probabilities are those of `edited_probs`. In the head's last
    layer, each cluster has the row of the largest cluster that it comes from; training on the new
    labels adapts it. moved.npy marks the images that the user moved: stage 3 labels them whether
    they are reliable or not.

    Args:
        edits: changes to the clusters of `reviewed`.
        reviewed: artifacts of the reviewed run.
        target: folder to write to.
        num_clusters: `dataset.num_clusters` of the stage that trains on the edited run.

    Raises:
        UsageError: the reviewed run is missing, was run again since, or has changed files; or the
            edits do not fit it or leave another number of clusters.
    """
    metrics, keys = _check_fits(edits, reviewed, num_clusters)
    before = as_tensor(reviewed.answer)
    probs, moved = edited_probs(edits, before, as_tensor(reviewed.features), keys)
    rows = edited_rows(edits, before)
    target.path.mkdir(parents=True, exist_ok=True)
    (target.path / "metrics.json").unlink(missing_ok=True)
    for name in ("encoder.safetensors", "features.npy"):
        with atomic(target.path / name) as temporary:
            temporary.write_bytes(reviewed.checked(name).read_bytes())
    _write_rows(reviewed.read_weights("head.safetensors"), rows, target)
    _write_array(target, "probs.npy", probs.numpy())
    target.write_answer(None)
    _write_array(target, "moved.npy", moved.numpy())
    target.write_json("names.json", {str(k): name for k, name in edits.names_after.items()})
    target.write_json("edits.json", edits.as_json())
    target.stamp(metrics["fingerprint"], metrics["num_images"], reviewed)
    digests = target.digests()
    more: Mapping[str, Any] = {
        "stage": "edits",
        "title": "edits",
        "num_clusters": num_clusters,
        "digest": identity(digests),
        "digests": digests,
        "seconds": 0.0,
    }
    target.write_json("metrics.json", {**metrics, **more})
    logger.info(
        "edits: %d clusters become %d; %d images moved by hand are labelled",
        edits.num_clusters,
        num_clusters,
        int(moved.sum()),
    )


def _check_fits(
    edits: Edits, reviewed: RunFolder, num_clusters: int
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Check edits against the reviewed run; return its metrics and the keys of its images."""
    if not reviewed.finished:
        raise UsageError(f"edits are of {reviewed.path}, where there is no finished run")
    metrics, keys = reviewed.metrics, reviewed.read_clusters().keys
    check_reviewed(edits, metrics["fingerprint"], metrics["digest"], metrics["num_clusters"], keys)
    if edits.num_clusters_after != num_clusters:
        raise UsageError(
            f"the edits leave {edits.num_clusters_after} clusters and dataset.num_clusters is "
            f"{num_clusters}; give dataset.num_clusters={edits.num_clusters_after}"
        )
    return metrics, keys


def order_like(earlier: RunFolder, clusters: Tensor, keys: Any, num_clusters: int) -> Tensor:
    """Return the order in which clusters have the numbers of an earlier run.

    Clusters are matched one to one, so that most images keep the number of their cluster (Kuhn
    1955).

    Args:
        earlier: artifacts of the earlier run, of which clusters.csv is read.
        clusters: (N,), new clusters.
        keys: (N,), keys of the images, by which both runs are compared.
        num_clusters: K.

    Returns:
        (K,) the new cluster that receives each number.

    Raises:
        UsageError: the runs share no image.
    """
    table = earlier.read_clusters()
    before = dict(zip(table.keys, table.clusters.tolist(), strict=True))
    shared = [i for i, key in enumerate(keys) if key in before]
    if not shared:
        raise UsageError(
            f"like={earlier.path} shares no image with this run; give a run of the same images"
        )
    then = torch.tensor([before[keys[i]] for i in shared])
    counts = count_table(clusters[shared], then, num_clusters, max(int(then.max()) + 1, 1))
    number = match_clusters(counts).tolist()  # number of each new cluster, or -1
    number = [n if n < num_clusters else -1 for n in number]
    free = iter(sorted(set(range(num_clusters)) - set(number)))
    number = [next(free) if n < 0 else n for n in number]
    order = torch.empty(num_clusters, dtype=torch.long)
    order[torch.tensor(number)] = torch.arange(num_clusters)
    same = int((torch.tensor(number)[clusters[shared]] == then).sum())
    logger.info("%d of %d images keep the number of their cluster", same, len(shared))
    return order


@torch.no_grad()
def renumber_(folder: RunFolder, head: nn.Module, order: Tensor) -> None:
    """Put the columns of probs.npy and the rows of a head's last layer into an order (K,)."""
    _write_array(folder, "probs.npy", np.ascontiguousarray(folder.probs[:, order.numpy()]))
    for parameter in list(head.parameters())[-2:]:  # weight and bias of the last layer
        parameter.copy_(parameter[order.to(parameter.device)])


def inherited_names(upstream: RunFolder | None, earlier: RunFolder | None) -> dict[int, str]:
    """Return the names of the run that numbers were taken from, or else of the upstream run."""
    names = {} if earlier is None else earlier.names
    return names or ({} if upstream is None else upstream.names)


def _write_rows(state: dict[str, Tensor], rows: list[int], target: RunFolder) -> None:
    """Write a head with these rows in its last layer; of an edited head, the trained one in it."""
    if "merge_0" in state:
        head = EditedHead.of_state(state)
        head.load_state_dict(state)
        rows = [head.base_clusters[row] for row in rows]
        state = dict(head.head.state_dict())
    last = [name for name in state if name in ("output.weight", "output.bias", "weight", "bias")]
    for name in last:
        state[name] = state[name][rows].contiguous()
    with atomic(target.path / "head.safetensors") as temporary:
        save_file(state, temporary)


def _write_array(folder: RunFolder, name: str, array: Any) -> None:
    with atomic(folder.path / name) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def reviewed_run(edits: Edits, runs: Any) -> RunFolder:
    """Return the reviewed run, in a folder below `runs`, which is runs/<dataset>.

    Raises:
        UsageError: `reviewed` is not <stage>/<run>, so that the path could lead elsewhere.
    """
    stage, _, run = edits.reviewed.partition("/")
    parts = (stage, run)
    if any(not part or part in (".", "..") or "/" in part or "\\" in part for part in parts):
        raise UsageError(f"edits are of {edits.reviewed!r}, which is not <stage>/<run>")
    return RunFolder(runs / stage / run)
