"""A scikit-learn estimator that runs all stages.

torch, Lightning and Hydra are imported when something is fitted or predicted.

Shapes: N images, B images of a batch, K clusters, D features, S pixels a side, P numbers of a
flattened image.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
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

from spice_pl.system.command import quoted
from spice_pl.usage import conf_folder

if TYPE_CHECKING:
    from torch import Tensor

    from spice_pl.job.job import Job

SCRATCH = "recipe=scratch"  # a setting: train from random weights


class SpiceClusterer(ClusterMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Cluster images as `spice photos` does, with fit and predict.

    By default cluster heads are trained on the features of a pretrained network that stays as it is
    (recipe=pretrained). `settings=["recipe=scratch"]` trains the paper's three stages from random
    weights, which takes many times as long.

    `fit` and all other methods take the same images: a folder, searched with its subfolders; a list
    of paths, PIL images or uint8 arrays of any sizes; or one array or tensor (N, H, W),
    (N, H, W, c), (N, c, H, W) with c = 1 or 3, or (N, P) of flattened square grey images. An array
    (H, W, 3) is one image. uint8 is used as it is. Other numbers are scaled to 0 to 255, so that
    the smallest and the largest number given to `fit` become 0 and 255.

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
            if _is_folder(images):
                root = Path(images).expanduser().resolve()
            elif isinstance(images, np.ndarray):
                if SCRATCH in self.settings:  # a pretrained encoder has a size of its own
                    size = size or min(images.shape[1:3])
                write_images([Image.fromarray(image) for image in images], root)
            elif all(map(_is_folder, images)):
                root = Path(os.path.commonpath([_absolute(path).parent for path in images]))
                table = Path(temporary, "paths.csv")
                write_paths([_absolute(path).relative_to(root) for path in images], table)
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

            folder = self._run(_job(overrides))
            from spice_pl.runs.folder import RunFolder

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
        from spice_pl.runs.edits import Edits
        from spice_pl.runs.folder import RunFolder
        from spice_pl.tasks.edit import edited_folder

        run = RunFolder(Path(self.run_))
        root, metrics = run.metrics["settings"].get("dataset.root"), run.metrics
        if root is None or not Path(root).is_dir():
            raise ValueError(
                f"the images of {run.path} are not in {root} any more; edit needs images that are "
                "files: give fit a folder, or a list of paths"
            )
        places = {key: i for i, key in enumerate(self.keys_)}
        if absent := [key for key in move or {} if key not in places]:
            raise ValueError(f"move names {absent[0]!r}, which is not in keys_")
        keys = run.read_clusters().keys
        edits = Edits(
            reviewed=f"{run.path.parent.name}/{run.path.name}",
            fingerprint=metrics["fingerprint"],
            digest=metrics["digest"],
            num_clusters=int(metrics["num_clusters"]),
            names={**run.names, **(names or {})},
            merge=[list(map(int, group)) for group in merge],
            split=dict(split or {}),
            move={keys[places[key]]: int(cluster) for key, cluster in (move or {}).items()},
        )
        with tempfile.TemporaryDirectory(prefix="spice-pl-") as temporary:
            file = Path(temporary, "edits.json")
            file.write_text(json.dumps(edits.as_json()), encoding="utf-8")
            given = [f"cache_dir={quoted(Path(temporary, 'cache'))}", "open=false"]
            self._run(_job(["stage=edit", f"edit.file={quoted(file)}", *given], of=run.path))
        edited = edited_folder(run)
        self.model_, self.run_ = load(edited.path), str(edited.path)
        self.report_ = str(edited.path / "report.html")
        self.labels_ = edited.read_clusters().clusters.astype(np.int64)
        return self

    def _run(self, job: Job) -> Path:
        """Run all stages; return the folder of the last one.

        Raises:
            KeyboardInterrupt: a signal asked to stop. The command exits with a code instead, which
                would end a script or a notebook without a word.
        """
        from spice_pl.job.run import run_stages
        from spice_pl.system.interrupts import RESUME_CODE, SIGNALS

        with contextlib.ExitStack() as stack:
            if not self.verbose:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            try:
                run_stages(job)
            except SystemExit as error:
                if error.code not in {RESUME_CODE, *(128 + number for number in SIGNALS)}:
                    raise
                kept = "with runs_dir=FOLDER it could be resumed"
                if self.runs_dir:
                    kept = f'it is kept in {self.runs_dir}; "resume=true" in settings resumes it'
                raise KeyboardInterrupt(f"a signal stopped the run; {kept}") from error
        return job.folder(job.stages[-1]).path

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
        """Return a folder or a list of images as it is, anything else as (N, H, W, 3) uint8."""
        images: Any = list(X) if isinstance(X, Iterator) else X
        if not hasattr(images, "__array__") and (_is_folder(images) or _is_list_of_images(images)):
            return images
        if isinstance(images, Image.Image):
            return [images]
        if hasattr(images, "detach"):
            images = images.numpy(force=True)
        if getattr(images, "ndim", 0) == 3 and images.shape[2] == 3:
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
        if given.ndim == 3:
            given = given[..., None]
        if given.ndim == 4 and given.shape[1] in (1, 3) and given.shape[3] not in (1, 3):
            given = given.transpose(0, 2, 3, 1)  # (N, H, W, c)
        if given.ndim != 4 or given.shape[3] not in (1, 3):
            raise ValueError(
                f"X {given.shape} are not images; give (N, H, W), (N, H, W, 3) or (N, 3, H, W), "
                "with 1 in place of 3 for grey"
            )
        if given.shape[3] == 1:
            given = np.repeat(given, 3, axis=3)  # (N, H, W, 3)
        if given.dtype == np.uint8:
            return given
        numbers = given.astype(np.float64)
        if reset:
            self._range = float(numbers.min()), float(numbers.max())
        low, high = self._range
        scaled = (numbers - low) / (high - low or 1.0) * 255
        levels: NDArray[np.uint8] = np.round(scaled).clip(0, 255).astype(np.uint8)
        return levels


def _job(overrides: Sequence[str], of: Path | None = None) -> Job:
    """Return the job of a command line; with `of`, a task with the settings of that run."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from spice_pl.job.job import Job
    from spice_pl.job.of_run import with_settings_of_run

    given = [*overrides, *([] if of is None else [f"of={quoted(of)}"])]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", given)
        if of is not None:
            parser = OverridesParser.create()
            cfg = with_settings_of_run(cfg, parser.parse_overrides(list(overrides)))
        return Job(cfg, tuple(given), "none", sweep=False)


def write_images(images: Sequence[Any], root: Path) -> None:
    """Write PIL images, uint8 arrays and files into a folder; their names keep the order."""
    root.mkdir()
    for i, image in enumerate(images):
        if _is_folder(image):
            shutil.copyfile(image, root / f"{i:09}{Path(image).suffix}")
            continue
        if not isinstance(image, Image.Image):
            image = Image.fromarray(_levels(np.asarray(image)))
        shown = image if image.mode in ("L", "RGB") else image.convert("RGB")
        shown.save(root / f"{i:09}.png", compress_level=1)


def write_paths(paths: Sequence[Path], file: Path) -> None:
    """Write a table of paths in their order, for `dataset.table`."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        writer = csv.writer(lines)
        writer.writerow(["path"])
        writer.writerows([str(path)] for path in paths)


def _absolute(path: Any) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _levels(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return one image of a list as (H, W) or (H, W, 3).

    Raises:
        ValueError: it does not hold levels 0 to 255.
    """
    if image.ndim == 3 and image.shape[0] == 3 != image.shape[2]:
        image = image.transpose(1, 2, 0)
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"an image of the list is {image.dtype} {image.shape}; give uint8 levels as (H, W), "
            "(H, W, 3) or (3, H, W), or one array of all images"
        )
    return np.ascontiguousarray(image)


def _is_folder(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)


def _is_list_of_images(given: Any) -> bool:
    """Whether this is a list of paths, of PIL images, or of uint8 arrays of several sizes."""
    first = next(iter(given), None) if isinstance(given, Sequence) else None
    if isinstance(first, str | os.PathLike | Image.Image):
        return True
    shapes = {getattr(each, "shape", None) for each in given} if first is not None else {None}
    return len(shapes) > 1 and None not in shapes
