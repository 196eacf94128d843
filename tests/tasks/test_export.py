"""stage=export: the exported files give the model's answers, for any number of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Finished, make_job, photographs

import spice_pl
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.models.portable import ClusterNetwork
from spice_pl.tasks.export import FORMATS


def export(straight: Finished, tmp_path: Path, name: str) -> Path:
    folder = straight.folder("fixmatch").path
    job = make_job(
        *("stage=export", f"export.model={folder}", f"export.task.formats=[{name}]"),
        f"runs_dir={tmp_path}",
    )
    run_stages(job)
    return job.folder("export").path


def test_torch_export_answers_as_the_model(straight: Finished, tmp_path: Path) -> None:
    program = torch.export.load(export(straight, tmp_path, "torch") / "model.pt2").module()
    for count in (1, 7):
        images = torch.from_numpy(photographs()[:count]).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode():
            probs, embeddings = program(images)
        expected = straight.folder("fixmatch").probs[:count]
        np.testing.assert_allclose(probs.numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(embeddings.norm(dim=1).numpy(), 1, atol=1e-5)


@pytest.mark.slow
def test_onnx_answers_as_the_model(straight: Finished, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'spice-pl[export]'")
    import onnxruntime

    file = export(straight, tmp_path, "onnx") / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 7):
        images = np.ascontiguousarray(photographs()[:count].transpose(0, 3, 1, 2))
        probs, _ = session.run(["probs", "embeddings"], {"images": images})
        np.testing.assert_allclose(probs, straight.folder("fixmatch").probs[:count], atol=1e-5)


def test_an_export_with_other_answers_is_refused(
    straight: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spice_pl.load(straight.folder("fixmatch").path)

    def write(network: ClusterNetwork, images: torch.Tensor, path: Path) -> None:
        path.touch()

    def answer(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
        return [each + 0.1 for each in model.network(images)]

    monkeypatch.setitem(FORMATS, "torch", ("pt2", write, answer))
    with pytest.raises(RuntimeError, match=r"the export torch differs from the model by 1\.0e-01"):
        export(straight, tmp_path, "torch")
    assert not list(tmp_path.rglob("*.pt2"))


def test_a_run_whose_images_are_gone_has_no_files_for_annotation_tools(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished.folder("fixmatch")
    settings = run.metrics["settings"] | {"dataset.root": str(tmp_path / "gone")}
    run.write_json("metrics.json", run.metrics | {"settings": settings})
    with caplog.at_level("INFO"):
        folder = export(finished, tmp_path, "torch")
    assert "no files for annotation tools: the images of" in caplog.text
    assert not (folder / "cvat.xml").exists()


def test_mistakes_are_named(straight: Finished, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"export\.task\.formats \['tflite'\] must be one"):
        export(straight, tmp_path, "tflite")
    with pytest.raises(UsageError, match=r"give export\.model=FILE"):
        run_stages(make_job("stage=export", f"runs_dir={tmp_path}"))
    assert spice_pl.load(straight.folder("proto").path).num_clusters == 3
