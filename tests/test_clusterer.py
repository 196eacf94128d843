"""SpiceClusterer: scikit-learn's own checks, and what they check, on pictures."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from tests.conftest import NUM_CLASSES, NUM_IMAGES, TINY, photographs, write_folder

from spice_pl import SpiceClusterer
from spice_pl.job.job import Job
from spice_pl.system.interrupts import Interrupts

SETTINGS = [text for text in TINY if not text.startswith("dataset.")]
TABLE = "fits tables of two to ten numbers per row, which are not pictures"
# Where the behaviour that they check has a meaning for pictures, it is tested below.
NOT_FOR_PICTURES = dict.fromkeys(
    (
        "check_fit_score_takes_y",
        "check_estimators_overwrite_params",
        "check_dont_overwrite_parameters",
        "check_estimators_fit_returns_self",
        "check_readonly_memmap_input",
        "check_positive_only_tag_during_fit",
        "check_estimators_dtypes",
        "check_dtype_object",
        "check_pipeline_consistency",
        "check_estimators_nan_inf",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_clustering",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_dict_unchanged",
        "check_fit_idempotent",
        "check_fit_check_is_fitted",
        "check_n_features_in",
        "check_fit2d_predict1d",
        "check_transformer_general",
        "check_transformer_data_not_an_array",
    ),
    TABLE,
) | {"check_n_features_in_after_fitting": "fits 15 rows, fewer than the queue of stage 1 holds"}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(  # type: ignore[untyped-decorator]
    [SpiceClusterer(n_clusters=3, settings=["recipe=scratch"])],  # quick to refuse tables
    expected_failed_checks=lambda _: NOT_FOR_PICTURES,
)
def test_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def images() -> Any:
    """Read-only photographs (90, 8, 8, 3)."""
    array = photographs()
    array.flags.writeable = False
    return array


@pytest.fixture(scope="module")
def fitted(images: Any, tmp_path_factory: pytest.TempPathFactory) -> SpiceClusterer:
    runs = tmp_path_factory.mktemp("it's a run")
    clusterer = SpiceClusterer(NUM_CLASSES, settings=SETTINGS, random_state=7, runs_dir=str(runs))
    assert clusterer.fit(images) is clusterer
    return clusterer


def test_labels_are_what_predict_says(fitted: SpiceClusterer, images: Any) -> None:
    assert fitted.labels_.shape == (NUM_IMAGES,)
    assert fitted.labels_.dtype == np.int64
    assert set(fitted.labels_) <= set(range(NUM_CLASSES))
    np.testing.assert_array_equal(fitted.predict(images), fitted.labels_)
    np.testing.assert_array_equal(fitted.predict(images.transpose(0, 3, 1, 2)), fitted.labels_)
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    np.testing.assert_array_equal(fitted.predict(images[order]), fitted.labels_[order])
    np.testing.assert_array_equal(fitted.predict(images[:1]), fitted.labels_[:1])


def test_fit_changes_no_parameter_and_keeps_the_run(fitted: SpiceClusterer) -> None:
    assert fitted.get_params()["settings"] is SETTINGS
    (report,) = Path(fitted.runs_dir or "").glob("images/fixmatch/seed7/report.html")
    assert report.stat().st_size > 1000


def test_it_predicts_folders_and_files(fitted: SpiceClusterer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", classes=False)
    files = sorted(folder.iterdir())
    np.testing.assert_array_equal(fitted.predict(folder), fitted.labels_)
    np.testing.assert_array_equal(fitted.predict(files[:3]), fitted.labels_[:3])


def test_it_can_be_pickled_and_cloned(fitted: SpiceClusterer, images: Any) -> None:
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    np.testing.assert_array_equal(again.predict(images), fitted.labels_)
    unfitted = clone(fitted)
    assert unfitted.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        unfitted.predict(images)


@pytest.mark.slow
def test_one_seed_gives_one_clustering(fitted: SpiceClusterer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", classes=False)
    again = clone(fitted).set_params(runs_dir=None, image_size=8)
    np.testing.assert_array_equal(again.fit_predict(folder), fitted.labels_)
    assert again.keys_ == [f"{i:03}.png" for i in range(NUM_IMAGES)]


@pytest.mark.slow
def test_flattened_grey_images_of_any_numbers() -> None:
    digits = load_digits().data[:NUM_IMAGES]  # (90, 64), floats 0 to 16
    clusterer = SpiceClusterer(NUM_CLASSES, settings=SETTINGS)
    labels = clusterer.fit_predict(digits)
    assert clusterer.n_features_in_ == 64
    np.testing.assert_array_equal(clusterer.predict(digits.reshape(-1, 8, 8)), labels)
    with pytest.raises(ValueError, match="X has 49 features, but SpiceClusterer is expecting 64"):
        clusterer.predict(digits[:, :49])
    with pytest.raises(ValueError, match="contains NaN"):
        clusterer.predict(np.full((2, 64), np.nan))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((5, 7)), "7 numbers are not a square image; give images as"),
        (np.zeros((5, 6, 6, 2)), r"X \(5, 6, 6, 2\) are not images"),
        (np.zeros((5, 2, 4, 4, 3)), "are not images"),
        (np.zeros((1, 4, 4)), "minimum of 2 is required"),
        (np.zeros((40, 40, 3)), "minimum of 2 is required"),  # one image
        ("/not/there", r"dataset\.root=/not/there does not exist"),
    ],
)
def test_what_is_not_a_set_of_images_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpiceClusterer(3).fit(given)


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("form", ["folder", "paths", "PIL", "array", "flattened"])
def test_by_default_the_features_are_those_of_a_pretrained_encoder(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def run_stages(job: Job) -> None:
        jobs.append(job)
        raise EnoughError

    monkeypatch.setattr("spice_pl.job.python.run_stages", run_stages)
    array = photographs()
    folder = write_folder(tmp_path / "photos", classes=False)
    forms: dict[str, Any] = {
        "folder": folder,
        "paths": sorted(folder.iterdir()),
        "PIL": [Image.fromarray(image) for image in array],
        "array": array,
        "flattened": array[..., 0].reshape(NUM_IMAGES, -1),
    }
    for settings in ([], ["recipe=scratch"]):
        with pytest.raises(EnoughError):
            SpiceClusterer(3, settings=settings).fit(forms[form])
    pretrained, scratch = jobs
    assert list(pretrained.stages) == ["embed", "proto"]
    assert pretrained.cfg.dataset.image_size >= 160  # that of the encoder, not 8
    assert list(scratch.stages) == ["moco", "proto", "fixmatch"]
    assert scratch.cfg.dataset.image_size == (8 if form in ("array", "flattened") else 96)


@pytest.mark.parametrize("times", [1, 2])
def test_a_stop_reaches_the_caller_with_a_message(
    times: int, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_stages(job: Job) -> None:
        with Interrupts() as interrupts:
            interrupts.deferred = times == 2
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("spice_pl.job.python.run_stages", run_stages)
    kept = SpiceClusterer(3, runs_dir=str(tmp_path / "runs"))
    with pytest.raises(KeyboardInterrupt, match=r'stopped .*/runs; "resume=true" in settings'):
        kept.fit(images)
    with pytest.raises(KeyboardInterrupt, match="with runs_dir=FOLDER it could be resumed"):
        SpiceClusterer(3).fit(images)


def test_settings_that_do_not_fit_are_named(images: Any) -> None:
    with pytest.raises(ValueError, match=r"dataset\.num_clusters 91 is not between 2 and the 90"):
        SpiceClusterer(91, settings=SETTINGS).fit(images)


def test_probabilities_and_embeddings_belong_to_the_labels(
    fitted: SpiceClusterer, images: Any
) -> None:
    probs = fitted.predict_proba(images)
    assert probs.shape == (NUM_IMAGES, NUM_CLASSES)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probs.argmax(axis=1), fitted.labels_)
    embeddings = fitted.transform(images)
    assert len(embeddings) == NUM_IMAGES
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert Path(fitted.report_ or "").name == "report.html"
    assert Path(fitted.report_ or "").is_file()


def test_all_forms_of_the_same_images_are_alike(
    fitted: SpiceClusterer, images: Any, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "photos", classes=False)
    files = sorted(folder.iterdir())
    forms: dict[str, Any] = {
        "tensor": torch.from_numpy(images.copy()),
        "tensor, channels first": torch.from_numpy(images.copy()).permute(0, 3, 1, 2),
        "list of arrays": list(images),
        "PIL": [Image.fromarray(image) for image in images],
        "paths": [str(file) for file in files],
        "folder": str(folder),
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(fitted.predict(form), fitted.labels_, err_msg=name)
        assert len(fitted.predict_proba(form)) == NUM_IMAGES
    assert len(fitted.predict(forms["PIL"][0])) == 1
    np.testing.assert_array_equal(fitted.predict(images[0]), fitted.labels_[:1])
    np.testing.assert_array_equal(fitted.predict(each for each in images), fitted.labels_)
    grey = images.max(axis=3)
    expected = fitted.predict(grey)
    for name, form in {"(N, 1, H, W)": grey[:, None], "(N, H, W, 1)": grey[..., None]}.items():
        np.testing.assert_array_equal(fitted.predict(form), expected, err_msg=name)


def test_images_that_fit_did_not_see_in_this_form(fitted: SpiceClusterer, images: Any) -> None:
    """fit saw uint8: other kinds of uint8 are right, other numbers have no known levels."""
    opaque = np.concatenate([images, np.full((*images.shape[:3], 1), 255, np.uint8)], axis=3)
    mixed: list[Any] = [
        np.repeat(each, 2, axis=0) if i % 2 else each for i, each in enumerate(images)
    ]
    for form in (opaque, opaque.transpose(0, 3, 1, 2), list(opaque)):
        np.testing.assert_array_equal(fitted.predict(form), fitted.labels_)
    assert len(fitted.predict_proba(opaque[0])) == 1
    alike = fitted.predict([Image.fromarray(each) for each in mixed])
    np.testing.assert_array_equal(fitted.predict(mixed), alike)
    mixed[0], mixed[1] = Image.fromarray(images[0]), torch.from_numpy(images[1].copy())
    np.testing.assert_array_equal(fitted.predict(mixed)[::2], alike[::2])
    for form in (images / 255, [images[0] / 255, mixed[3]], images.astype(np.uint16)):
        with pytest.raises(ValueError, match="those given to fit had levels of 8 bits; give uint8"):
            fitted.predict(form)
    for form in ([], images[:0], [images[0], "none.png", images[2][:0]]):
        with pytest.raises(ValueError, match=r"0 sample|has the shape|minimum of 1"):
            fitted.predict(form)


def test_floats_of_several_sizes_share_one_scale() -> None:
    clusterer = SpiceClusterer(2)
    first, second = np.full((4, 4), 0.5), np.linspace(0, 1, 5 * 4).reshape(5, 4)
    prepared = clusterer._prepared([first, second], reset=True)
    assert [each.shape for each in prepared] == [(4, 4, 3), (5, 4, 3)]
    assert (prepared[0] == 128).all()  # not its own black and white
    (again,) = clusterer._prepared([first, second[:3]], reset=False)[:1]
    np.testing.assert_array_equal(again, prepared[0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        clusterer._prepared([first, second * np.nan], reset=True)


def test_floats_are_scaled_alike_in_every_order_of_channels(images: Any) -> None:
    clusterer = SpiceClusterer(NUM_CLASSES)
    as_levels = clusterer._prepared(images.astype(np.float32) / images.max(), reset=True)
    expected = np.round(images * (255 / images.max()))  # the smallest level is 0
    assert images.min() == 0
    np.testing.assert_allclose(as_levels, expected, atol=1)
    half = torch.from_numpy(images[:9].copy()).permute(0, 3, 1, 2) / images.max()
    np.testing.assert_array_equal(clusterer._prepared(half, reset=False), as_levels[:9])


def test_undecodable_files_are_named(fitted: SpiceClusterer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", classes=False)
    (folder / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000\.png cannot be decoded .* leave it out"):
        fitted.predict_proba(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tensor", "PIL", "paths", "sizes"])
def test_fit_takes_all_forms(form: str, fitted: SpiceClusterer, tmp_path: Path) -> None:
    images = photographs()
    given: Any = torch.from_numpy(images)
    if form == "PIL":
        given = [Image.fromarray(image) for image in images]
    elif form == "paths":
        given = sorted(write_folder(tmp_path / "photos", classes=True).rglob("*.png"))
        given = sorted(given, key=lambda path: path.name)
    elif form == "sizes":
        given = [np.repeat(each, 2, axis=0) if i % 2 else each for i, each in enumerate(images)]
    again = clone(fitted).set_params(runs_dir=None, image_size=8).fit(given)
    assert again.report_ is None
    if form == "sizes":
        assert len(again.labels_) == NUM_IMAGES
    else:
        np.testing.assert_array_equal(again.labels_, fitted.labels_)
    if form == "paths":
        assert again.keys_ == [str(path) for path in given]


def test_importing_it_loads_little_more_than_scikit_learn() -> None:
    """Its base class is scikit-learn's, which takes most of the second; torch is not among it."""
    code = "import sys, sklearn.base; before = set(sys.modules); "
    code += "from spice_pl import SpiceClusterer; SpiceClusterer(); "
    code += "more = {name.partition('.')[0] for name in set(sys.modules) - before}; "
    code += "print(sorted(more - sys.stdlib_module_names))"
    found = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "['PIL', 'spice_pl']"


def test_edits_name_merge_and_move_without_training(fitted: SpiceClusterer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", classes=False)
    more = {"runs_dir": str(tmp_path / "runs"), "image_size": 8}
    edited = clone(fitted).set_params(**more).fit(folder)
    before = edited.labels_.copy()
    kept, gone, other = np.argsort(-np.bincount(before, minlength=3))
    kept, gone = sorted((int(kept), int(gone)))
    moved = edited.keys_[int(np.flatnonzero(before == kept)[0])]
    edited.edit(names={kept: "left"}, merge=[[gone, kept]], move={moved: int(other)})
    expected = np.where(before == gone, kept, before)
    expected[edited.keys_.index(moved)] = other
    np.testing.assert_array_equal(edited.labels_, expected)
    assert edited.model_.names[kept] == "left"
    # The model follows merges and names; an image that was moved by hand is not learnt.
    found = edited.predict(folder)
    assert gone not in found
    assert np.delete(found == expected, edited.keys_.index(moved)).mean() > 0.95
    assert Path(edited.report_ or "").is_file()
    first = edited.run_
    edited.edit(names={int(other): "right"})  # keeps the first edits
    np.testing.assert_array_equal(edited.labels_, expected)
    assert edited.run_ != first
    assert (edited.model_.names[kept], edited.model_.names[other]) == ("left", "right")


def test_edits_that_cannot_be_made_are_refused(fitted: SpiceClusterer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are not in .* any more; .* give fit a folder"):
        fitted.edit(names={0: "left"})
    folder = write_folder(tmp_path / "photos", classes=False)
    edited = clone(fitted).set_params(runs_dir=str(tmp_path / "runs"), image_size=8).fit(folder)
    with pytest.raises(ValueError, match=r"move names 'no\.png', which is not in keys_"):
        edited.edit(move={"no.png": 0})
    with pytest.raises(ValueError, match="edits name cluster 7, and there are 0 to 2"):
        edited.edit(merge=[[0, 7]])
    edited.run_ = None
    with pytest.raises(ValueError, match="fit with runs_dir=FOLDER"):
        edited.edit(names={0: "left"})
