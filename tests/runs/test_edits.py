"""Edits: what the file may hold, and the probabilities and runs that result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs.edited import order_like, renumber_, reviewed_run, write_edited
from spice_pl.runs.edits import Edits, edited_probs, parse_edits, read_edits
from spice_pl.runs.folder import RunFolder

KEYS = [f"{i}.png" for i in range(6)]
PROBS = torch.tensor(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.1, 0.6, 0.2, 0.1],
        [0.1, 0.2, 0.6, 0.1],
        [0.0, 0.1, 0.0, 0.9],
        [0.0, 0.0, 0.1, 0.9],
    ]
)
FEATURES = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1], [-1, -1]])


def edits(**changes: Any) -> Edits:
    return Edits("proto/seed0", "f", "d", 4, **changes)


def test_without_edits_probabilities_stay() -> None:
    probs, moved = edited_probs(edits(), PROBS, FEATURES, KEYS)
    assert torch.equal(probs, PROBS)
    assert not moved.any()


def test_merge_adds_probabilities_and_closes_the_gap() -> None:
    change = edits(merge=[[2, 1]], names={2: "owls", 3: "cats"})
    assert change.origins == [[0], [1, 2], [3]]
    probs, _ = edited_probs(change, PROBS, FEATURES, KEYS)
    torch.testing.assert_close(probs[2], torch.tensor([0.1, 0.8, 0.1]))
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(6))
    assert change.names_after == {1: "owls", 2: "cats"}


def test_moved_image_is_certain_of_its_cluster() -> None:
    probs, moved = edited_probs(edits(move={"1.png": 3}), PROBS, FEATURES, KEYS)
    assert probs[1].tolist() == [0, 0, 0, 1]
    assert moved.tolist() == [False, True, False, False, False, False]


def test_split_divides_by_features_and_appends() -> None:
    change = edits(split={3: 2}, names={3: "cats"})
    assert change.origins == [[0], [1], [2], [3], [3]]
    assert change.names_after == {3: "cats", 4: "cats 2"}
    probs, _ = edited_probs(change, PROBS, FEATURES, KEYS)
    assert {int(probs[4].argmax()), int(probs[5].argmax())} == {3, 4}
    torch.testing.assert_close(probs[:, 3] + probs[:, 4], PROBS[:, 3])


def test_moves_come_before_merges_and_splits() -> None:
    change = edits(move={"5.png": 1}, merge=[[1, 2]])
    probs, _ = edited_probs(change, PROBS, FEATURES, KEYS)
    assert probs[5].tolist() == [0, 1, 0]


def test_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    change = edits(names={0: "a<b"}, merge=[[1, 2]], split={3: 2}, move={"\udcff.png": 0})
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(change.as_json()))
    assert read_edits(file) == change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "spice-pl edits 2"}, "is not what the report saves"),
        ({"merge": [[0, 9]]}, "cluster 9, and there are 0 to 3"),
        ({"merge": [[0, 1], [1, 2]]}, "each cluster is in one group"),
        ({"merge": [[0]]}, "two clusters or more"),
        ({"split": {"1": 99}}, "into 99 parts; give 2 to 20"),
        ({"merge": [[0, 1]], "split": {"1": 2}}, "is merged into another"),
        ({"move": {"a": "0"}}, "has a value of another type"),
        ({"move": {"a": True}}, "has a value of another type"),
        ({"names": {"0": "  "}}, "empty name"),
        ({"names": ["cats"]}, "has a value of another type"),
        ({"num_clusters": None}, "has a value of another type"),
    ],
)
def test_edits_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_edits({**edits().as_json(), **change}, "edits=x.json")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("reviewed", r'lacks `reviewed`; give "<stage>/<run>"'),
        ("fingerprint", "lacks `fingerprint`; copy `fingerprint`, `digest` .* metrics.json"),
        ("digest", "lacks `digest`; copy .* from the metrics.json of the run"),
        ("num_clusters", "lacks `num_clusters`; copy .* from the metrics.json of the run"),
        ("names", r"lacks `names`; without names give \{\}"),
        ("merge", r"lacks `merge`; without merges give \[\]"),
        ("split", r"lacks `split`; without splits give \{\}"),
        ("move", r"lacks `move`; without moved images give \{\}"),
    ],
)
def test_a_field_that_a_file_lacks_is_named(field: str, message: str) -> None:
    content = edits().as_json()
    del content[field]
    with pytest.raises(UsageError, match=rf"^edits=x\.json {message}"):
        parse_edits(content, "edits=x.json")


def test_the_example_of_the_page_is_read() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "files.md"
    example = page.read_text(encoding="utf-8").split("## edits.json")[1].split("```")[1]
    found = parse_edits(json.loads(example.removeprefix("json")), "page")
    assert (found.reviewed, found.num_clusters) == ("proto/seed0", 12)
    assert (found.names, found.merge) == ({3: "cats"}, [[2, 5]])
    assert (found.split, found.move) == ({4: 2}, {"garden/7.jpg": 3})


@pytest.mark.parametrize("reviewed", ["proto", "../../etc", "proto/..", "/etc", "a/b/c", "a/b\\c"])
def test_file_cannot_point_outside_the_runs(reviewed: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not <stage>/<run>"):
        reviewed_run(Edits(reviewed, "f", "d", 4), tmp_path)


def of_run(folder: RunFolder, **changes: Any) -> Edits:
    metrics = folder.metrics
    reviewed = f"{folder.path.parent.name}/{folder.path.name}"
    return Edits(
        reviewed, metrics["fingerprint"], metrics["digest"], metrics["num_clusters"], **changes
    )


def test_edited_run_holds_edited_probs_rows_and_names(straight: Finished, tmp_path: Path) -> None:
    proto, target = straight.folder("proto"), RunFolder(tmp_path / "edited")
    change = of_run(proto, merge=[[0, 1]], names={1: "ab", 2: "c"}, move={"004.png": 2})
    write_edited(change, proto, target, 2)
    before = proto.probs
    expected = np.stack([before[:, 0] + before[:, 1], before[:, 2]], axis=1)
    expected[4] = [0, 1]
    np.testing.assert_allclose(target.probs, expected, rtol=1e-6)
    assert np.flatnonzero(target.moved(90)).tolist() == [4]
    assert target.names == {0: "ab", 1: "c"}
    larger = int(np.bincount(before.argmax(axis=1), minlength=3)[:2].argmax())
    heads = [load_file(each.path / "head.safetensors") for each in (proto, target)]
    assert torch.equal(heads[1]["output.weight"], heads[0]["output.weight"][[larger, 2]])
    assert torch.equal(heads[1]["hidden.weight"], heads[0]["hidden.weight"])
    with pytest.raises(UsageError, match=r"leave 2 clusters .* give dataset.num_clusters=2"):
        write_edited(change, proto, target, 3)
    stale = Edits(change.reviewed, change.fingerprint, "0", 3)
    with pytest.raises(UsageError, match="was run again since"):
        write_edited(stale, proto, target, 3)


@pytest.mark.slow
def test_stage_3_trains_on_edits(straight: Finished, tmp_path: Path) -> None:
    runs = straight.copy(tmp_path)
    file = tmp_path / "edits.json"
    change = of_run(
        runs.folder("proto"), merge=[[0, 2]], names={1: "green"}, move={"001.png": 1, "000.png": 0}
    )
    file.write_text(json.dumps(change.as_json()))
    more = ("stage=fixmatch", f"edits={file}", "dataset.num_clusters=2")
    with pytest.raises(UsageError, match="was made with other settings"):
        run_stages(runs.job(*more))
    run_stages(runs.job(*more, "run=reviewed"))
    made = RunFolder(runs.runs / "my photos" / "fixmatch" / "reviewed")
    assert made.probs.shape == (90, 2)
    assert made.names == {1: "green"}
    assert "green" in (made.path / "report.html").read_text(encoding="utf-8")


def test_numbers_follow_an_earlier_run(straight: Finished, tmp_path: Path) -> None:
    proto = straight.copy(tmp_path).folder("proto")
    clusters = torch.from_numpy(proto.read_clusters().clusters)
    swapped = torch.tensor([2, 0, 1])[clusters]  # 0 becomes 2, 1 becomes 0, 2 becomes 1
    keys = proto.read_clusters().keys
    order = order_like(proto, swapped, keys, 3)
    back = torch.empty(3, dtype=torch.long)
    back[order] = torch.arange(3)
    assert torch.equal(back[swapped], clusters)
    assert order_like(proto, clusters, keys, 3).tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="shares no image"):
        order_like(proto, clusters, ["other"] * 90, 3)


def test_renumbered_head_gives_the_renumbered_probabilities(
    straight: Finished, tmp_path: Path
) -> None:
    from spice_pl.nn.heads import ClusterHead

    proto = straight.copy(tmp_path).folder("proto")
    before = np.array(proto.probs)
    head = ClusterHead(8, 8, 3)
    proto.load_weights("head.safetensors", head)
    order = torch.tensor([1, 2, 0])
    renumber_(proto, head, order)
    np.testing.assert_array_equal(proto.probs, before[:, [1, 2, 0]])
    with torch.no_grad():
        probs = head(torch.from_numpy(np.array(proto.features)))
    np.testing.assert_allclose(probs.numpy(), proto.probs, atol=1e-5)


def test_moved_image_is_labelled_even_if_it_is_not_reliable(tmp_path: Path) -> None:
    from tests.stages.test_fixmatch import fixmatch
    from tests.stages.test_fixmatch import upstream as write_proto

    folder = write_proto(tmp_path)
    assert fixmatch(folder)[0].pseudo_labels[70] == -1  # its confidence is 0.4: not reliable
    moved = np.zeros(90, dtype=np.bool_)
    moved[70] = True
    np.save(folder.path / "moved.npy", moved)
    labels = fixmatch(folder)[0].pseudo_labels
    assert labels[70] == 0
    assert labels[71] == -1
