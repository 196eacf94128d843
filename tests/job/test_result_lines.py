"""What a user of `spice photos` reads at the end of a run."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import make_job

from spice_pl.job.finish import result_lines
from spice_pl.runs.folder import RunFolder


def lines(tmp_path: Path, **metrics: object) -> list[str]:
    folder = RunFolder(tmp_path / "my photos" / "proto" / "seed0")
    folder.path.mkdir(parents=True)
    about = {"cluster_sizes": [3, 0, 1200], "num_images": 1203, "odd": {"blurred": 2}}
    folder.write_json("metrics.json", {**about, **metrics})
    folder.path.parents[1].joinpath("log.txt").touch()
    return result_lines(folder)


def test_the_end_says_result_files_and_next_commands(tmp_path: Path) -> None:
    said = lines(tmp_path, not_sure=12, warnings=["One cluster is large."])
    assert said[0] == (
        "2 clusters of 3 to 1,200 images; not sure: 1.0% of the images; "
        "odd images: 2 blurred images"
    )
    assert said[1] == "note: One cluster is large."
    run = f"'{tmp_path / 'my photos' / 'proto' / 'seed0'}'"  # as the shell reads it
    for verb in ("review", "trust", "predict"):
        assert any(f" {verb} {run}" in line for line in said)
    assert said[-1].endswith(str(tmp_path / "my photos" / "log.txt"))
    assert len(said) <= 8


def test_a_run_of_an_earlier_release_has_no_share_that_is_not_sure(tmp_path: Path) -> None:
    assert lines(tmp_path)[0].startswith("2 clusters of 3 to 1,200 images; odd images")


def test_only_jobs_with_a_pretrained_network_are_plain(photo_folder: Path) -> None:
    root = f"dataset.root={photo_folder}"
    photos = make_job("dataset=folder", root, "recipe=pretrained", "dataset.num_clusters=3")
    assert photos.plain
    assert photos.part_name("proto") == "clusters"
    scratch = make_job("dataset=folder", root, "recipe=scratch", "dataset.num_clusters=3")
    assert not scratch.plain
    assert scratch.part_name("proto") == "proto"
    task = make_job("dataset=folder", root, "recipe=pretrained", "stage=trust")
    assert not task.plain
