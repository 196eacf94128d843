"""stage=name: words for clusters, by networks whose answers are known."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import NUM_CLASSES, Finished, photographs
from torch import Tensor
from torch.nn import functional as F

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.models.clip import ImageText, load_clip
from spice_pl.runs.suggestions import FILE_NAME, read_suggestions
from spice_pl.tasks import name as task
from spice_pl.tasks.name import Name, drawn, read_words

COLOURS = ("red", "green", "blue")


def colours(network: str, weights: str, device: torch.device) -> ImageText:
    """A network that knows three colours: an image is its mean level above the darkest channel."""
    if weights != "colours":
        raise UsageError("there are no weights")

    def images(pixels: Tensor) -> Tensor:
        levels = pixels.float().mean(dim=(2, 3))
        return F.normalize(levels - levels.min(dim=1, keepdim=True).values, dim=1)

    def texts(given: Sequence[str]) -> Tensor:
        which = [next(i for i, each in enumerate(COLOURS) if each in text) for text in given]
        return torch.eye(3)[which]

    return ImageText("colours", images, texts, 100.0)


def test_each_cluster_gets_the_word_of_its_images(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "load_clip", colours)
    words = tmp_path / "words.txt"
    words.write_text("\ufeffblue\nred\n\ngreen\nred\n")
    given = (
        "name.upstream=proto",
        f"name.words={words}",
        "name.weights=colours",
        "name.num_images=90",
    )
    proto = finished.folder("proto")
    proto.write_json("names.json", {"1": "mine"})
    before = {file.name: file.read_bytes() for file in proto.path.iterdir() if file.is_file()}
    job = finished.job("stage=name", *given)
    run_stages(job)
    after = {file.name: file.read_bytes() for file in proto.path.iterdir() if file.is_file()}
    assert after == before  # suggestions rename nothing
    with (job.folder("name").path / "words.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clusters = proto.read_clusters().clusters
    kinds = np.arange(len(clusters)) % NUM_CLASSES  # image i is of colour i % 3
    for cluster in np.unique(clusters):
        listed = [row for row in rows if row["cluster"] == str(cluster)]
        shares = np.bincount(kinds[clusters == cluster], minlength=3) / (clusters == cluster).sum()
        assert [row["rank"] for row in listed] == ["1", "2", "3"]
        assert {int(row["images"]) for row in listed} == {int((clusters == cluster).sum())}
        found = {row["word"]: float(row["score"]) for row in listed}
        # The colours are far apart at this scale, so that scores are the shares of the images.
        assert [found[each] for each in COLOURS] == pytest.approx(shares.tolist(), abs=1e-3)
    edits = json.loads((job.folder("name").path / "edits.json").read_text())
    best = {row["cluster"]: row for row in rows if row["rank"] == "1"}
    likely = {key: row["word"] for key, row in best.items() if float(row["score"]) > 0.5}
    assert edits["names"] == likely | {"1": "mine"}
    suggested = read_suggestions(finished.folder("proto"))
    assert {key: word for key, (word, _) in suggested.items()} == {
        int(key): row["word"] for key, row in best.items()
    }
    for cluster, (_, score) in suggested.items():
        assert score == pytest.approx(float(best[str(cluster)]["score"]), abs=1e-4)
    run_stages(finished.job("stage=report", "report.upstream=proto"))
    page = (proto.path / "report.html").read_text()
    for key, row in best.items():
        shown = f"Suggested from your words: “{row['word']}”, score {float(row['score']):.2f}."
        section = page.partition(f'id="cluster-{key}"')[2].partition("</header>")[0]
        assert shown in section
    assert page.count(">suggested (") == len(best) - ("1" in best)  # not where it has a name
    proto.write_json("metrics.json", proto.metrics | {"digest": "of the run made again"})
    assert read_suggestions(finished.folder("proto")) == {}
    proto.write_json("metrics.json", proto.metrics | {"digest": edits["digest"]})
    edited = finished.job(
        "stage=edit", "edit.upstream=proto", f"edit.file={job.folder('name').path / 'edits.json'}"
    )
    run_stages(edited)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"digest": "x", "network": "y"}', "it lacks clusters"),
        (
            '{"digest": "x", "network": "y", "clusters": {"0": {"word": "a\\nb", "score": 1}}}',
            "not",
        ),
        (
            '{"digest": "x", "network": "y", "clusters": {"-1": {"word": "a", "score": 1}}}',
            "'-1' is not the number of a cluster",
        ),
    ],
)
def test_a_damaged_file_of_suggestions_is_named(
    content: str, message: str, finished: Finished
) -> None:
    proto = finished.folder("proto")
    (proto.path / "name").mkdir()
    (proto.path / "name" / FILE_NAME).write_text(content)
    with pytest.raises(UsageError, match=rf"suggested\.json .*{message}.*; delete it, or run"):
        read_suggestions(proto)


def test_images_are_drawn_from_each_cluster() -> None:
    clusters = np.array([0] * 50 + [2] * 3 + [1] * 20)
    chosen = drawn(clusters, 10, seed=3)
    assert np.bincount(clusters[chosen]).tolist() == [10, 10, 3]
    assert (np.diff(chosen) > 0).all()
    other = drawn(np.array([2, 0, 1])[clusters], 10, seed=3)  # numbers of clusters do not matter
    np.testing.assert_array_equal(chosen, other)
    assert drawn(clusters, 10, seed=4).tolist() != chosen.tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, r"needs words; give name\.words=FILE"),
        ("cat", "cat is neither a file nor words with commas"),
        (["cat", "cat "], "holds 1 different words; give 2 to 20,000"),
        (["cat", "a\x1b[31m"], "which cannot be a name"),
        (["cat", "a" * 201], "at most 200 characters"),
    ],
)
def test_words_that_cannot_be_used_are_refused(words: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_words(words)


def test_settings_and_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name\.prompt=a photo has no \{\}"):
        Name("cat,dog", prompt="a photo")
    with pytest.raises(UsageError, match=r"name\.num_images=0 is not at least 1"):
        Name("cat,dog", num_images=0)
    (tmp_path / "words").write_bytes(b"\xff\xfe\x00cat")
    with pytest.raises(UsageError, match="words cannot be read: "):
        read_words(str(tmp_path / "words"))


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UsageError, match=r"need the package open_clip; pip install 'spice-pl\[cl"):
        load_clip("ViT-B-32", "laion2b_s34b_b79k", torch.device("cpu"))


def test_a_network_of_open_clip_with_weights_of_a_file(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    cpu = torch.device("cpu")
    with pytest.raises(UsageError, match=r"ViT-B-23 is not a network .*; near are .*ViT-B-32"):
        load_clip("ViT-B-23", "openai", cpu)
    with pytest.raises(UsageError, match=r"weights=nowhere\.pt is neither a file nor weights"):
        load_clip("ViT-S-32", "nowhere.pt", cpu)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    loaded = load_clip("ViT-S-32", str(tmp_path / "clip.safetensors"), cpu)
    assert loaded.name == "ViT-S-32 of open_clip (clip.safetensors, trained by text)"
    images = torch.from_numpy(photographs()[:2].transpose(0, 3, 1, 2).copy())
    images = F.interpolate(images, (224, 224))
    mean, std = (
        torch.tensor(each).view(3, 1, 1)
        for each in (model.visual.image_mean, model.visual.image_std)
    )
    with torch.inference_mode():
        wanted = model.encode_image((images / 255 - mean) / std, normalize=True)
        words = model.encode_text(open_clip.tokenize(["a cat", "a dog"]), normalize=True)
    torch.testing.assert_close(loaded.images(images), wanted, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(loaded.texts(["a cat", "a dog"]), words, atol=1e-5, rtol=1e-4)
    assert loaded.scale == pytest.approx(1 / 0.07, rel=1e-5)  # CLIP's first temperature
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"other\.safetensors holds weights of another arch"):
        load_clip("ViT-S-32", str(tmp_path / "other.safetensors"), cpu)
