"""Digests of a run's files: what has them, and that a changed file is refused where it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Finished
from tests.stages.small import image_set

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs import checked_files
from spice_pl.runs.clusters import read_table
from spice_pl.runs.edited import order_like, write_edited
from spice_pl.runs.edits import Edits
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.proto import ProtoHeadModule
from spice_pl.tasks.review import Answers

OF_STAGE_2 = {
    *("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy"),
    *("heads.safetensors", "clusters.csv", "model.spice"),
}


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def sort_backwards(folder: RunFolder) -> None:
    """Sort the rows of clusters.csv by name, the last first, as a spreadsheet does."""
    file = folder.path / "clusters.csv"
    header, *rows = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(header + b"".join(sorted(rows, reverse=True)))


def as_before(folder: RunFolder) -> None:
    """Leave only the digests that releases before 0.2 kept."""
    metrics = json.loads((folder.path / "metrics.json").read_bytes())
    metrics["digests"] = {name: metrics["digests"][name] for name in checked_files.HANDED_ON}
    folder.write_json("metrics.json", metrics)


def moving(folder: RunFolder, **more: int) -> Edits:
    metrics = folder.metrics
    return Edits("proto/seed0", metrics["fingerprint"], metrics["digest"], 3, move=more)


def test_every_file_that_is_read_later_has_a_digest(straight: Finished) -> None:
    folder = straight.folder("proto")
    digests = folder.metrics["digests"]
    assert digests.keys() == OF_STAGE_2
    for name, digest in digests.items():
        content = (folder.path / name).read_bytes()
        assert digest == hashlib.blake2b(content, digest_size=8).hexdigest(), name
    folder.check_digests(*digests)


def test_a_run_is_identified_as_before(straight: Finished) -> None:
    # The digest that stamps of later stages hold: of four files, in this order.
    for stage, names in {
        "moco": ("encoder.safetensors", "features.npy"),
        "proto": ("encoder.safetensors", "head.safetensors", "features.npy", "probs.npy"),
    }.items():
        metrics = straight.folder(stage).metrics
        handed_on = {name: metrics["digests"][name] for name in names}
        expected = hashlib.blake2b(repr(handed_on).encode(), digest_size=8).hexdigest()
        assert metrics["digest"] == straight.folder(stage).digest() == expected


@pytest.mark.parametrize("name", sorted(OF_STAGE_2))
@pytest.mark.parametrize("change", [flip, Path.unlink])
def test_a_changed_file_is_refused(
    finished: Finished, name: str, change: Callable[[Path], None]
) -> None:
    folder = finished.folder("proto")
    change(folder.path / name)
    what = "is missing" if change is Path.unlink else "has changed since it was written"
    with pytest.raises(UsageError, match=f"{name} {what}.*; put the original back"):
        folder.checked(name)
    readers: dict[str, Callable[[], object]] = {
        "features.npy": lambda: folder.features,
        "probs.npy": lambda: folder.probs,
        "clusters.csv": folder.read_clusters,
        "model.spice": lambda: folder.checked("model.spice"),
    }
    with pytest.raises(UsageError, match=f"{name} {what}"):
        readers.get(name, lambda: folder.read_weights(name))()


def test_a_large_file_is_compared_once_and_the_table_each_time(
    straight: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def count(file: Path, digest: Callable[[Path], str] = checked_files._digest) -> str:
        compared.append(file.name)
        return digest(file)

    monkeypatch.setattr(checked_files, "_digest", count)
    folder = straight.folder("proto")
    folder.check_digests()
    for _ in range(3):
        _ = folder.features, folder.probs
        folder.read_clusters()
    assert sorted(compared) == sorted([*checked_files.HANDED_ON, *["clusters.csv"] * 3])


@pytest.mark.parametrize("before", [False, True])
def test_a_sorted_table_is_refused_by_all_that_read_it(finished: Finished, before: bool) -> None:
    proto, fixmatch = finished.folder("proto"), finished.folder("fixmatch")
    for folder in (proto, fixmatch):
        if before:
            as_before(folder)
        folder.read_clusters()
        sort_backwards(folder)
    clusters = torch.from_numpy(read_table(proto.path / "clusters.csv").clusters)
    refused = pytest.raises(UsageError, match=r"clusters\.csv has changed since it was written")
    edited = RunFolder(finished.runs / "edited")
    with refused:
        write_edited(moving(proto, **{"000.png": 1}), proto, edited, 3)
    assert not edited.path.exists()
    with refused:
        Answers(proto, [], image_set()).page()
    with refused:
        run_stages(finished.job("stage=report"))
    with refused:
        run_stages(finished.job("stage=trust", "trust.task.num_nulls=2"))
    with refused:
        order_like(proto, clusters, ["000.png"], 3)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [("2", r"has changed .*do not fit .* probs\.npy"), ("99", "is damaged .*impossible values")],
)
def test_an_older_table_that_was_edited_is_refused(
    finished: Finished, cluster: str, message: str
) -> None:
    folder = finished.folder("proto")
    as_before(folder)
    file = folder.path / "clusters.csv"
    header, row, *rows = file.read_text().splitlines()
    image, was, *others = row.split(",")
    assert was != cluster
    file.write_text("\n".join([header, ",".join([image, cluster, *others]), *rows]))
    with pytest.raises(UsageError, match=rf"clusters\.csv {message}"):
        folder.read_clusters()


def test_the_way_out_writes_the_table_again_without_training(
    finished: Finished, straight: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.folder("proto")
    sort_backwards(folder)
    with pytest.raises(UsageError, match=r"metrics\.json and run its stage with resume=true"):
        folder.read_clusters()
    (folder.path / "metrics.json").unlink()

    def training_step(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ProtoHeadModule, "training_step", training_step)
    run_stages(finished.job("stage=proto", "resume=true"))
    assert folder.read_clusters().keys == straight.folder("proto").read_clusters().keys
    for name in sorted(OF_STAGE_2 - {"model.spice"}):
        first = straight.folder("proto").path / name
        assert (folder.path / name).read_bytes() == first.read_bytes(), name
    finished.folder("fixmatch").check_upstream(folder)  # what was made from it still holds


def test_images_moved_by_hand_have_a_digest(straight: Finished, tmp_path: Path) -> None:
    proto, target = straight.folder("proto"), RunFolder(tmp_path / "edited")
    write_edited(moving(proto, **{"004.png": 2}), proto, target, 3)
    assert np.flatnonzero(target.moved(90)).tolist() == [4]
    with pytest.raises(UsageError, match=r"moved\.npy is damaged \(90 values for 89 images\)"):
        target.moved(89)
    for change, what in ((flip, "has changed"), (Path.unlink, "is missing")):
        change(target.path / "moved.npy")
        with pytest.raises(UsageError, match=rf"moved\.npy {what}"):
            RunFolder(target.path).moved(90)


def test_files_that_change_later_have_no_digest(finished: Finished) -> None:
    folder = finished.folder("fixmatch")
    folder.write_json("names.json", {"0": "owls"})  # by the user
    (folder.path / "attention.npz").unlink()  # stage=report writes it again
    folder.check_digests(*folder.metrics["digests"])
    assert folder.names == {0: "owls"}
