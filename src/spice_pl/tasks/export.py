"""Write a trained model for programs that do not have this package.

The exported model takes uint8 images (B, 3, S, S) and returns probabilities (B, K) and embeddings
(B, D). It normalises the pixels itself.

Shapes: B images, K clusters, D features, S pixels a side.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.models.hub import check_repo, push
from spice_pl.models.portable import FILE_NAME, ClusterNetwork, load
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.labels import write_labels
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest difference of a probability or of a coordinate of an embedding


class Export:
    """Write model.pt2 (torch.export) or model.onnx and check that it gives the model's answers.

    For the folder of a run, its clusters are written for annotation tools too (`runs.labels`).

    Args:
        model: path of a `model.spice`, or of the folder of a run that has one.
        formats: "torch", "onnx" or both.
        allow_targets: names of your own packages that define the model's network.
        repo: repository of the Hugging Face Hub, owner/name, that gets the model and a card; None
            sends nothing.
        private: whether a repository that is made for it is private.
    """

    def __init__(
        self,
        model: str | None,
        formats: Sequence[str] = ("torch",),
        allow_targets: Sequence[str] = (),
        repo: str | None = None,
        private: bool = True,
    ) -> None:
        if repo is not None:
            check_repo(repo, f"export.repo={repo}")
        if not formats or not set(formats) <= set(FORMATS):
            raise UsageError(
                f"export.task.formats {list(formats)} must be one or more of {list(FORMATS)}"
            )
        self.model, self.formats, self.allow_targets = model, formats, allow_targets
        self.repo, self.private = repo, private

    def __call__(self, context: Context) -> None:
        """Export the model in every format.

        Raises:
            UsageError: no model is given, a package is missing, or the Hub refuses.
            RuntimeError: an exported model gives other answers than the model.
        """
        if self.model is None:
            raise UsageError(
                "stage=export needs a trained model; give export.model=FILE, a model.spice or the "
                "folder of a run that has one"
            )
        model = load(self.model, device="cpu", allow_targets=self.allow_targets)
        model.network.to(memory_format=torch.contiguous_format)
        generator = torch.Generator().manual_seed(context.seed)
        shape = (5, 3, model.image_size, model.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            expected = model.network(images)
        for name in self.formats:
            suffix, write, answer = FORMATS[name]
            path = context.folder.path / f"model.{suffix}"
            with tempfile.TemporaryDirectory(dir=context.folder.path) as temporary:
                part = Path(temporary, path.name)
                write(model.network, images[:2], part)
                difference = max(
                    float((one - other).abs().max())
                    for one, other in zip(expected, answer(part, images), strict=True)
                )
                if difference > TOLERANCE:
                    raise RuntimeError(
                        f"the export {name} differs from the model by {difference:.1e} "
                        f"(at most {TOLERANCE:.0e} is allowed)"
                    )
                part.replace(path)
            logger.info(
                "%s  written; its answers differ from the model's by %.1e at most", path, difference
            )
        run = RunFolder(Path(self.model).expanduser())
        if run.finished:
            written = write_labels(run, context.folder.path)
            for path in written:
                logger.info("%s  the clusters, for an annotation tool", path)
            if not written:
                logger.info(
                    "no files for annotation tools: the images of %s are not files, or are not "
                    "where they were",
                    run.path,
                )
        if self.repo is not None:
            metrics = run.metrics if run.finished else {}
            url = push(model, metrics, self.repo, private=self.private)
            logger.info("%s  %s and a model card are there", url, FILE_NAME)


def write_torch(network: ClusterNetwork, images: Tensor, path: Path) -> None:
    """Export for `torch.export.load(path).module()`; images (2, 3, S, S) are an example."""
    program = torch.export.export(network, (images,), dynamic_shapes=(_BATCH,))
    torch.export.save(program, path)


def answer_torch(path: Path, images: Tensor) -> Sequence[Tensor]:
    """Run what `write_torch` wrote."""
    with torch.inference_mode():
        answers: Sequence[Tensor] = torch.export.load(path).module()(images)
    return answers


def write_onnx(network: ClusterNetwork, images: Tensor, path: Path) -> None:
    """Export for onnxruntime and others; images (2, 3, S, S) are an example."""
    _need("onnx", "onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        torch.onnx.export(
            network,
            (images,),
            path,
            input_names=["images"],
            output_names=["probs", "embeddings"],
            dynamic_shapes=(_BATCH,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def answer_onnx(path: Path, images: Tensor) -> Sequence[Tensor]:
    """Run what `write_onnx` wrote."""
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    if absent := [name for name in packages if find_spec(name) is None]:
        raise UsageError(
            f"the format onnx needs {', '.join(absent)}; pip install 'spice-pl[export]'"
        )


_BATCH = {0: torch.export.Dim("batch", min=1)}
FORMATS: dict[
    str,
    tuple[
        str,
        Callable[[ClusterNetwork, Tensor, Path], None],
        Callable[[Path, Tensor], Sequence[Tensor]],
    ],
] = {"torch": ("pt2", write_torch, answer_torch), "onnx": ("onnx", write_onnx, answer_onnx)}
