"""A scikit-learn estimator that runs all stages.

torch, Lightning and Hydra are imported when something is fitted or predicted.

Shapes: N images, B images of a batch, K clusters, D features, S pixels a side, P numbers of a
flattened image.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from spice_pl.data.given import (
    absolute,
    channels_last,
    eight_bits,
    given_images,
    is_path,
    number_range,
    write_images,
    write_paths,
)
from spice_pl.system.command import quoted

if TYPE_CHECKING:
    from torch import Tensor

SCRATCH = "recipe=scratch"  # a setting: train from random weights


class SpiceClusterer(ClusterMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Cluster images as `spice photos` does, with fit and predict.

    By default cluster heads are trained on the features of a pretrained network that stays as it is
    (recipe=pretrained). `settings=["recipe=scratch"]` trains the paper's three stages from random
    weights, which takes many times as long.

    `fit` and all other methods take the same images: a folder, searched with its subfolders; a list
    of paths, PIL images, arrays or tensors of any sizes; or one array or tensor (N, H, W),
    (N, H, W, c), (N, c, H, W) with c = 1, 3 or 4, or (N, P) of flattened square grey images. An
    array (H, W, 3) or (H, W, 4) is one image. Transparency (c = 4) is laid on white. uint8 is used
    as it is. Other numbers in arrays are scaled to 0 to 255, so that the smallest and the largest
    number given to `fit` become 0 and 255.

    Args:
        n_clusters: K.
        image_size: S; None means that of the pretrained encoder; with recipe=scratch, the shorter
            side of an array's images, or 96 for files and lists.
        settings: as on the command line, for example ["proto.epochs=20", "minutes=10"].
        random_state: seed, or a generator that draws one.
        runs_dir: folder in which the runs and their reports are kept; None keeps no run.
        verbose: whether to print the table of results. Plan and progress are log messages: a script
            shows them after `logging.basicConfig(level="INFO")`.

    Attributes:
        labels_: (N,) clusters of the images given to `fit`. They are chosen among several, of which
            one is the network's, and `predict` gives those of the network. With answer=network or
            recipe=scratch in the settings both agree, unless images were moved by `edit`.
        model_: the trained model, see `spice_pl.load`; `model_.save(path)` writes it.
        keys_: (N,) the image of each label: its path below the folder, or its position. Files that
            cannot be decoded have no label and no key.
        run_: path of the run's folder, or None if `runs_dir` is None.
        report_: path of the report page in it, or None.
        n_features_in_: P, after `fit` on flattened images.

    Examples:
        >>> SpiceClusterer(n_clusters=12, settings=["proto.epochs=20"])
        SpiceClusterer(n_clusters=12, settings=['proto.epochs=20'])
    """

    def __init__(
        self,
        n_clusters: int = 10,
        *,
        image_size: int | None = None,
        settings: Sequence[str] = (),
        random_state: int | np.random.RandomState | None = 0,
        runs_dir: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.image_size = image_size
        self.settings = settings
        self.random_state = random_state
        self.runs_dir = runs_dir
        self.verbose = verbose

    def fit(self, X: Any, y: None = None) -> Self:  # noqa: N803
        """Train all stages on images X; y is never read.

        Raises:
            ValueError: X holds no images, or a setting does not fit them.
            KeyboardInterrupt: Ctrl-C or another signal asked to stop.
        """
        with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
            root, size, more = Path(temporary, "images"), self.image_size, []
            images = self._prepared(X, reset=True)
            if is_path(images):
                root = Path(images).expanduser().resolve()
            elif isinstance(images, np.ndarray):
                if SCRATCH in self.settings:  # a pretrained encoder has a size of its own
                    size = size or min(images.shape[1:3])
                write_images([Image.fromarray(image) for image in images], root)
            elif all(map(is_path, images)):
                root = Path(os.path.commonpath([absolute(path).parent for path in images]))
                table = Path(temporary, "paths.csv")
                write_paths([absolute(path).relative_to(root) for path in images], table)
                more = [f"dataset.table={quoted(table)}"]
            else:
                write_images(images, root)
            seed = self.random_state
            if not isinstance(seed, int | np.integer):
                seed = int(check_random_state(seed).randint(2**31))
            overrides = [
                "dataset=folder",
                f"dataset.root={quoted(root)}",
                f"dataset.num_clusters={self.n_clusters}",
                *([] if size is None else [f"dataset.image_size={size}"]),
                *more,
                f"seed={seed}",
                f"runs_dir={quoted(self.runs_dir or Path(temporary, 'runs'))}",
                f"cache_dir={quoted(Path(temporary, 'cache'))}",
                *self.settings,
            ]
            from spice_pl.models.portable import load
            from spice_pl.runs.folder import RunFolder

            folder = self._run(overrides)
            run = RunFolder(folder)
            self.model_, self.run_ = load(folder), str(folder) if self.runs_dir else None
            self.report_ = str(folder / "report.html") if self.runs_dir else None
            # The same model predicts new images: unless answer=auto, fit_predict and predict agree.
            found = self.model_.predict(images)
            self.labels_, self.keys_ = found.clusters, list(found.keys)
            if run.metrics.get("answer") is not None:
                self.labels_ = run.read_clusters().clusters.astype(np.int64)
        return self

    def edit(
        self,
        *,
        names: Mapping[int, str] | None = None,
        merge: Sequence[Sequence[int]] = (),
        split: Mapping[int, int] | None = None,
        move: Mapping[str, int] | None = None,
    ) -> Self:
        """Name, merge and split clusters and move images, as a review does; nothing is trained.

        Clusters keep their numbers. A merged cluster has the smallest number of its group, and the
        others of the group are empty. labels_, model_, run_ and report_ become those of the edited
        clusters, and another call edits these.

        Args:
            names: name by cluster.
            merge: groups of clusters; each group becomes one cluster.
            split: number of parts by cluster.
            move: new cluster by image, as named in keys_.

        Raises:
            ValueError: no run was kept, its images are not files that are still there, or the edits
                contradict themselves.
        """
        check_is_fitted(self, "model_")
        if self.run_ is None:
            raise ValueError("edit needs the files of the run; fit with runs_dir=FOLDER")
        from spice_pl.models.portable import load
        from spice_pl.runs.edited import edits_of
        from spice_pl.runs.folder import RunFolder
        from spice_pl.tasks.edit import edited_folder

        run = RunFolder(Path(self.run_))
        root = run.metrics["settings"].get("dataset.root")
        if root is None or not Path(root).is_dir():
            raise ValueError(
                f"the images of {run.path} are not in {root} any more; edit needs images that are "
                "files: give fit a folder, or a list of paths"
            )
        places = {key: i for i, key in enumerate(self.keys_)}
        if absent := [key for key in move or {} if key not in places]:
            raise ValueError(f"move names {absent[0]!r}, which is not in keys_")
        keys = run.read_clusters().keys
        moved = {keys[places[key]]: cluster for key, cluster in (move or {}).items()}
        edits = edits_of(run, names=names or {}, merge=merge, split=split or {}, move=moved)
        with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
            file = Path(temporary, "edits.json")
            file.write_text(json.dumps(edits.as_json()), encoding="utf-8")
            given = [f"cache_dir={quoted(Path(temporary, 'cache'))}", "open=false"]
            self._run(["stage=edit", f"edit.file={quoted(file)}", *given], of=run.path)
        edited = edited_folder(run)
        self.model_, self.run_ = load(edited.path), str(edited.path)
        self.report_ = str(edited.path / "report.html")
        self.labels_ = edited.read_clusters().clusters.astype(np.int64)
        return self

    def _run(self, overrides: Sequence[str], of: Path | None = None) -> Path:
        """Run the job of some settings; return the folder of its last stage."""
        from spice_pl.job import python

        kept = "with runs_dir=FOLDER it could be resumed"
        if self.runs_dir:
            kept = f'it is kept in {self.runs_dir}; "resume=true" in settings resumes it'
        return python.run(python.job_of(overrides, of), quiet=not self.verbose, kept=kept)

    def predict(self, X: Any) -> NDArray[np.int64]:  # noqa: N803
        """Return the cluster (N,) of each image; `model_.predict` gives the confidence too.

        Args:
            X: as for `fit`, or anything that `model_.predict` takes.
        """
        check_is_fitted(self, "model_")
        return self.model_.predict(self._prepared(X, reset=False)).clusters

    def predict_proba(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        """Return the probabilities (N, K) of each image; the largest is that of its cluster.

        Args:
            X: as for `fit`, or anything that `model_.predict` takes.
        """
        return np.concatenate([probs.numpy() for probs, _ in self._outputs(X)])

    def transform(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        """Return the embeddings (N, D) of each image, of length one.

        Args:
            X: as for `fit`, or anything that `model_.predict` takes.
        """
        return np.concatenate([embeddings.numpy() for _, embeddings in self._outputs(X)])

    def _outputs(self, X: Any) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: N803
        """Yield probabilities (B, K) and embeddings (B, D) batch by batch.

        Raises:
            ValueError: an image cannot be decoded; rows would no longer be those of X.
        """
        check_is_fitted(self, "model_")
        import torch

        from spice_pl.models.pixels import pixel_batches

        skipped: list[tuple[str, str]] = []
        images = self._prepared(X, reset=False)
        with torch.inference_mode():
            for _, pixels in pixel_batches(images, self.model_.image_size, 256, skipped):
                if skipped:
                    break
                probs, embeddings = self.model_.outputs(
                    torch.from_numpy(pixels).to(self.model_.device)
                )
                yield probs.cpu(), embeddings.cpu()
        if skipped:
            raise ValueError(f"{skipped[0][0]} cannot be decoded ({skipped[0][1]}); leave it out")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _prepared(self, X: Any, *, reset: bool) -> Any:  # noqa: N803
        """Return a folder, or a list of images with arrays as uint8, or (N, H, W, 3) uint8."""
        images = given_images(X)
        if is_path(images):
            if reset:
                self._range = None
            return images
        if isinstance(images, list) and any(map(_is_image, images)):
            arrays = [each for each in images if isinstance(each, np.ndarray)]
            if reset:
                self._range = number_range(arrays)
            between = getattr(self, "_range", None)
            return [
                eight_bits(_one(each, i), between) if isinstance(each, np.ndarray) else each
                for i, each in enumerate(images)
            ]
        if getattr(images, "ndim", 0) == 3 and images.shape[2] in (3, 4):
            images = images[None]
        return self._pixels(images, reset=reset)

    def _pixels(self, X: Any, *, reset: bool) -> NDArray[np.uint8]:  # noqa: N803
        """Check an array of images; return it as (N, H, W, 3) uint8."""
        least = 2 if reset else 1
        given: NDArray[Any] = check_array(
            X, ensure_2d=False, allow_nd=True, dtype=None, ensure_min_samples=least
        )
        if given.ndim < 3:
            given = validate_data(self, X, reset=reset, dtype=None, ensure_min_features=4)
            side = math.isqrt(given.shape[1])
            if side**2 != given.shape[1]:
                raise ValueError(
                    f"X {given.shape} is a table: {given.shape[1]} numbers are not a square image; "
                    "give images as (N, H, W) or (N, H, W, 3), or flattened square ones"
                )
            given = given.reshape(-1, side, side)
        given = channels_last(given, "X")
        if reset:
            self._range = number_range([given])
        return eight_bits(given, getattr(self, "_range", None))


def _one(image: NDArray[Any], i: int) -> NDArray[Any]:
    """View one image of a list, (H, W), (H, W, c) or (c, H, W), as (H, W, c).

    Raises:
        ValueError: it has another shape.
    """
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(
            f"image {i} of the list has the shape {image.shape}; give (H, W), (H, W, 3) or "
            "(3, H, W), with 4 in place of 3 for RGB and opacity"
        )
    return image


def _is_image(given: Any) -> bool:
    return is_path(given) or isinstance(given, Image.Image | np.ndarray)
