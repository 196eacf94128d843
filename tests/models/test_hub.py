"""The Hugging Face Hub: push and pull, on a fake of huggingface_hub; the Hub itself is not asked.

The fake has the two calls that push makes and the one that pull makes, with their arguments; the
last test holds their signatures against the package where it is installed.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.conftest import Finished, make_job, write_folder

import spice_pl
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.models.hub import card, pull
from spice_pl.models.portable import load

REPO = "ann/three-colours"


class Hub:
    """Repositories as folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.private, self.pulled = root, dict[str, bool](), list[tuple[str, ...]]()
        api = SimpleNamespace(create_repo=self.create_repo, upload_folder=self.upload_folder)
        self.module = SimpleNamespace(HfApi=lambda: api, hf_hub_download=self.hf_hub_download)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if repo_id.startswith("taken/"):
            raise OSError("403 Forbidden: you may not write here")
        self.private.setdefault(repo_id, private)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert commit_message
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        self.pulled.append((repo_id, filename, revision or "main"))
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404: no repository {repo_id}")
        return str(self.root / repo_id / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made.module)
    return made


def test_what_is_pushed_predicts_alike_and_names_no_training_file(
    finished: Finished, hub: Hub, tmp_path: Path
) -> None:
    run = finished.folder("proto")
    run.write_json("names.json", {"0": "red | left", "1": "<b>green</b>"})
    runs = ("recipe=scratch", f"runs_dir={tmp_path / 'other'}")
    run_stages(make_job("stage=export", f"export.model={run.path}", f"export.repo={REPO}", *runs))
    assert hub.private == {REPO: True}
    uploaded = {file.name: file.read_bytes() for file in (hub.root / REPO).iterdir()}
    assert set(uploaded) == {"model.spice", "README.md"}
    assert run.read_clusters().keys[7] == "007.png"
    for name, content in uploaded.items():
        assert b"007.png" not in content, name
        assert str(finished.runs).encode() not in content, name
    text = uploaded["README.md"].decode()
    sizes = run.metrics["cluster_sizes"]
    assert f"| 0 | red &#124; left | {sizes[0]} |" in text
    assert "<b>" not in text
    assert "SPICE stage 2" in text
    assert "No labels were given" in text
    assert f"spice predict hf://{REPO} new_photos" in text

    folder = write_folder(tmp_path / "new", classes=False, seed=1)
    images = ("dataset=folder", f"dataset.root={folder}")
    job = make_job("stage=predict", f"predict.model=hf://{REPO}@v2", *images, *runs)
    run_stages(job)
    assert hub.pulled == [(REPO, "model.spice", "v2")]
    rows = (job.folder("predict").path / "predictions.csv").read_text().splitlines()[1:]
    expected = load(run.path).predict(folder)
    assert [int(row.split(",")[1]) for row in rows] == expected.clusters.tolist()
    found = load(spice_pl.pull(REPO)).predict(folder)
    np.testing.assert_array_equal(found.not_sure, expected.not_sure)
    assert found.nearest[0][0].startswith("image ")


def test_scores_are_in_the_card_with_their_protocol(straight: Finished) -> None:
    model, metrics = load(straight.folder("proto").path), straight.folder("proto").metrics
    scored = {**metrics["rows"][-1], "acc": 0.5, "nmi": 0.25, "ari": 0.125, "protocol": "split"}
    text = card(model, {**metrics, "rows": [*metrics["rows"], scored]}, REPO)
    (line,) = [line for line in text.splitlines() if "0.500" in line]
    assert "0.250" in line
    assert "split" in line
    assert "No labels" not in text
    unknown = card(model, {}, REPO)  # a model.spice without its run
    assert "| made by | stage proto |" in unknown


def test_loading_opens_no_connection(hub: Hub) -> None:
    with pytest.raises(UsageError, match=r"load\(spice_pl\.pull\('hf://ann/three-colours'\)\)"):
        load(f"hf://{REPO}")
    assert hub.pulled == []


def test_mistakes_are_named(hub: Hub, straight: Finished, tmp_path: Path) -> None:
    for name in ("hf://ann", "ann/three/colours", "hf://../etc", "hf://ann/a b"):
        with pytest.raises(UsageError, match=r"does not name a repository .* give owner/name"):
            pull(name)
    assert hub.pulled == []
    with pytest.raises(UsageError, match=r"model\.spice of ann/none cannot be fetched: .* 404"):
        pull("ann/none")
    model = f"export.model={straight.folder('proto').path}"
    for repo, message in (("taken/name", "403 Forbidden.* hf auth login"), ("name", "owner/name")):
        with pytest.raises(UsageError, match=message):
            run_stages(
                make_job("stage=export", model, f"export.repo={repo}", f"runs_dir={tmp_path}")
            )


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'spice-pl\[hub\]'"):
        pull(REPO)


def test_the_package_takes_these_arguments() -> None:
    package = pytest.importorskip("huggingface_hub", reason="pip install 'spice-pl[hub]'")
    for call, arguments in (
        (package.HfApi.create_repo, {"repo_id", "private", "exist_ok"}),
        (package.HfApi.upload_folder, {"repo_id", "folder_path", "commit_message"}),
        (package.hf_hub_download, {"repo_id", "filename", "revision"}),
    ):
        assert arguments <= set(inspect.signature(call).parameters)
