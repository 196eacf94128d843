"""A scikit-learn estimator that runs all stages.

Shapes: N images, S pixels a side, P numbers of a flattened image.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from spice_pl.job.job import Job
from spice_pl.job.run import run_stages
from spice_pl.models.portable import load
from spice_pl.system.command import quoted
from spice_pl.usage import conf_folder


class SpiceClusterer(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Cluster images as `python train.py` does, with fit and predict.

    Images are a folder, searched with its subfolders, or an array: (N, H, W), (N, H, W, 3),
    (N, 3, H, W), or (N, P) flattened square grey images. uint8 is used as it is. Other numbers are
    scaled to 0 to 255, so that the smallest and the largest number given to `fit` become 0 and 255.

    Args:
        n_clusters: K.
        image_size: S; None means the shorter side of an array's images, or 96 for a folder.
        settings: as on the command line, for example ["moco.epochs=50", "backbone=resnet_small"].
        random_state: seed, or a generator that draws one.
        runs_dir: folder in which the runs and their reports are kept; None keeps no run.
        verbose: whether to print what the command prints.

    Attributes:
        labels_: (N,) clusters of the images given to `fit`.
        model_: the trained model, see `spice_pl.load`; `model_.save(path)` writes it.
        keys_: (N,) the image of each label: its path below the folder, or its position. Files that
            cannot be decoded have no label and no key.
        n_features_in_: P, after `fit` on flattened images.

    Examples:
        >>> SpiceClusterer(n_clusters=12, settings=["moco.epochs=50"])
        SpiceClusterer(n_clusters=12, settings=['moco.epochs=50'])
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
        """
        with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
            root, size = Path(temporary, "images"), self.image_size
            if _is_folder(X):
                root, images = Path(X).expanduser().resolve(), X
            else:
                images = self._pixels(X, reset=True)
                size = size or min(images.shape[1:3])
                write_images(images, root)
            seed = self.random_state
            if not isinstance(seed, int | np.integer):
                seed = int(check_random_state(seed).randint(2**31))
            overrides = [
                "dataset=folder",
                "recipe=scratch",
                f"dataset.root={quoted(root)}",
                f"dataset.num_clusters={self.n_clusters}",
                *([] if size is None else [f"dataset.image_size={size}"]),
                f"seed={seed}",
                f"runs_dir={quoted(self.runs_dir or Path(temporary, 'runs'))}",
                f"cache_dir={quoted(Path(temporary, 'cache'))}",
                *self.settings,
            ]
            with initialize_config_dir(str(conf_folder()), version_base="1.3"):
                job = Job(compose("config", overrides), tuple(overrides), "none", sweep=False)
            with contextlib.ExitStack() as stack:
                if not self.verbose:
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                run_stages(job)
            self.model_ = load(job.folder(job.stages[-1]).path)
            # The same model predicts new images, so that fit_predict and predict agree.
            found = self.model_.predict(images)
        self.labels_, self.keys_ = found.clusters, list(found.keys)
        return self

    def predict(self, X: Any) -> NDArray[np.int64]:  # noqa: N803
        """Return the cluster (N,) of each image; `model_.predict` gives the confidence too.

        Args:
            X: as for `fit`, or anything that `model_.predict` takes.
        """
        check_is_fitted(self, "model_")
        is_array = hasattr(X, "__array__") or not (_is_folder(X) or _are_files(X))
        return self.model_.predict(self._pixels(X, reset=False) if is_array else X).clusters

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

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
        if given.ndim == 4 and given.shape[1] == 3 != given.shape[3]:
            given = given.transpose(0, 2, 3, 1)
        if given.ndim == 3:
            given = np.repeat(given[..., None], 3, axis=3)  # (N, H, W, 3)
        if given.ndim != 4 or given.shape[3] != 3:
            raise ValueError(
                f"X {given.shape} are not images; give (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
            )
        if given.dtype == np.uint8:
            return given
        numbers = given.astype(np.float64)
        if reset:
            self._range = float(numbers.min()), float(numbers.max())
        low, high = self._range
        scaled = (numbers - low) / (high - low or 1.0) * 255
        levels: NDArray[np.uint8] = np.round(scaled).clip(0, 255).astype(np.uint8)
        return levels


def write_images(images: NDArray[np.uint8], root: Path) -> None:
    """Write images (N, H, W, 3) as PNG files whose names keep their order."""
    root.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / f"{i:09}.png", compress_level=1)


def _is_folder(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _are_files(given: Any) -> bool:
    first = next(iter(given), None) if isinstance(given, Sequence) else None
    return isinstance(first, str | os.PathLike | Image.Image)
