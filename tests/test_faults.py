"""One test per row of the list of faults that people report of similar tools, in its order."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from tests.conftest import TINY, Finished, make_job, write_folder
from tests.data.test_levels import WRITERS
from tests.data.test_levels import test_sixteen_bit_colours_are_right as check_16_bit_colours
from tests.nasty import FORMATS, encoded, nasty_folder, on_disk, picture, saved
from tests.process import train

import spice_pl
from spice_pl.cli import with_folder
from spice_pl.data import decode as decode_module
from spice_pl.data import formats, retry, store
from spice_pl.data.decode import Decoded, Decoding, Unread, decode, read_image
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.archives import shards
from spice_pl.data.sources.folder import folder
from spice_pl.errors import UsageError
from spice_pl.functional.reliability import neighbors_for
from spice_pl.job.run import run_stages
from spice_pl.job.words import with_quotes
from spice_pl.models.pixels import pixels_of
from spice_pl.nn.pretrained import is_not_fetched, without_network
from spice_pl.runs.folder import RunFolder

S = 16


def opened(root: Path, **settings: Any) -> ImageSet:
    return folder(str(root), S, str(root.parent / "cache"), **settings)


def photos(root: Path, count: int = 5) -> Path:
    for i in range(count):
        saved(picture(seed=i), root / f"{i}.png")
    return root


def job_on(root: Path, *more: str) -> Any:
    places = (f"runs_dir={root.parent / 'runs'}", f"cache_dir={root.parent / 'cache'}")
    return make_job("dataset=folder", f"dataset.root={root}", *places, *TINY, *more)


def test_row_01_a_small_folder_needs_no_sizes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    sizes = ("queue_size", "batch_size", "buffer_size", "head_batch_size")
    settings = [text for text in TINY if not any(f"{size}=" in text for size in sizes)]
    places = (f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    job = make_job(
        *("dataset=folder", f"dataset.root={root}", *places, *settings),
        *("stages=[moco,proto]", "moco.epochs=1", "proto.epochs=1"),
    )
    run_stages(job)
    assert job.folder("proto").finished


def test_row_02_neighbours_scale_with_the_size_of_clusters() -> None:
    # Agreement cannot exceed cluster size / neighbours: 120 images in 4 groups have 30 each.
    assert neighbors_for(100, 120, 4) * 0.95 <= 30


@pytest.mark.parametrize("suffix", FORMATS)
def test_row_03_every_format_is_read_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:16], colours[16:] = (200, 120, 60), (30, 90, 220)
    expected = Image.fromarray(colours)
    if suffix in ("pgm", "pbm"):
        expected = expected.convert("L" if suffix == "pgm" else "1", dither=Image.Dither.NONE)
    if not saved(expected, tmp_path / f"images/1.{suffix}"):
        pytest.skip(f"this Pillow does not write {suffix}")
    for name in ("noext", "2.jpg", "3.txt"):
        shutil.copy(tmp_path / f"images/1.{suffix}", tmp_path / "images" / name)
    images = opened(tmp_path / "images")
    # A DIB has no mark of its own: it is read where its name says image.
    taken = ["1.dib", "2.jpg"] if suffix == "dib" else [f"1.{suffix}", "2.jpg", "3.txt", "noext"]
    assert list(images.keys) == taken
    assert len(images) + images.num_skipped == 4
    shown = np.asarray(expected.convert("RGB").resize((S, S)), int)
    for image in images.images:
        difference = np.abs(image.transpose(1, 2, 0).astype(int) - shown)
        assert np.median(difference) <= 8


def test_row_03_every_file_is_used_or_left_out(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    nasty_folder(root)
    found: list[ImageSet] = []
    # A pipe or a device that is opened would block for ever.
    work = threading.Thread(target=lambda: found.append(opened(root)), daemon=True)
    work.start()
    work.join(timeout=120)
    assert found, "the scan hangs"
    (images,) = found
    used, skipped = list(images.keys), [key for key, _ in images.skipped]
    assert sorted([*used, *skipped]) == on_disk(root)
    assert images.num_files == len(used) + images.num_skipped == len(on_disk(root))
    assert all(reason for _, reason in images.skipped)
    assert not [key for key in used if key.startswith(("foreign", "marked", "damaged"))]
    assert len([key for key in used if key.startswith("names/")]) == 28
    assert all(np.asarray(image).std() > 1 for image in images.images if image.max() > 0)
    run_stages(job_on(root, "stage=inspect"))
    written = json.loads((tmp_path / "runs/images/inspect/seed0/inspect.json").read_text())
    assert written["num_files"] == written["num_images"] + written["num_skipped"]
    assert written["num_files"] == len(on_disk(root))


def test_row_03_a_copy_that_failed_is_not_half_grey(tmp_path: Path) -> None:
    jpeg = encoded(picture(200, 100), "JPEG")
    cut = jpeg[: len(jpeg) // 2]
    for tail in (600, 100_000):
        assert read_image(cut + bytes(tail), Decoding(S)) == "cut off: the file ends in zeros"
        assert isinstance(read_image(jpeg + bytes(tail), Decoding(S)), Decoded)


def test_row_04_an_update_of_the_decoders_tries_skipped_images_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "images", 2)
    data = encoded(picture(seed=9), "WEBP")
    (root / "new.heic").write_bytes(data)
    monkeypatch.setattr(formats, "_formats", lambda: ("PNG",))
    assert len(opened(root)) == 2
    monkeypatch.undo()
    assert len(opened(root)) == 2  # the same decoders by name: nothing is tried again
    monkeypatch.setattr(store, "decoders", lambda: ("one more",))
    assert len(opened(root)) == 3


@pytest.mark.parametrize(
    "error",
    [*(OSError(getattr(errno, name), "x") for name in ("EIO", "EMFILE", "ESTALE")), MemoryError()],
)
def test_row_05_an_error_that_may_pass_is_never_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    root = photos(tmp_path / "images")
    monkeypatch.setattr(retry, "PAUSES_S", (0, 0))
    real = formats.open_bytes

    def failing(file: Any) -> Any:
        if str(file).endswith("3.png"):
            raise error
        return real(file)

    monkeypatch.setattr(decode_module, "open_bytes", failing)
    assert isinstance(read_image(root / "3.png", Decoding(S)), Unread)
    assert len(opened(root)) == 4
    monkeypatch.undo()
    assert len(opened(root)) == 5


def test_row_06_foreign_folders_are_no_classes(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("cats", "dogs", ".Trash-1000", "@eaDir", "$Recycle.Bin", "#snapshot", "drafts"):
        saved(picture(seed=len(name)), root / name / "1.png")
    images = opened(root, labels="folders", exclude=["drafts"])
    assert images.class_names == ["cats", "dogs"]
    reasons = dict(images.skipped)
    assert reasons["#snapshot/1.png"] == "in #snapshot, older versions of the files"
    assert reasons["drafts/1.png"] == "excluded by dataset.exclude"


def test_row_06_the_folder_that_is_given_is_searched_whatever_its_name(tmp_path: Path) -> None:
    for name in (".hidden", "#snapshot", "lost+found"):
        assert len(opened(photos(tmp_path / name, 2))) == 2


def test_row_07_results_inside_the_root_are_left_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    job = make_job(
        *("dataset=folder", f"dataset.root={root}", *TINY, "stages=[moco,proto]"),
        *(f"runs_dir={root / 'runs'}", f"cache_dir={root / 'cache'}"),
    )
    run_stages(job)
    saved(picture(), job.folder("proto").path / "media/1.png")
    saved(picture(), root / "cache/1.png")
    images = folder(str(root), 8, str(root / "cache"))
    assert len(images) == 90
    assert images.num_files == len(on_disk(root))


def test_row_08_one_odd_pixel_does_not_decide(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).random((40, 40)).astype(np.float32)
    seen = {}
    for name, odd in (("plain", 0.5), ("over", 1.0001), ("inf", np.inf), ("nan", np.nan)):
        changed = levels.copy()
        changed[3, 3] = odd
        Image.fromarray(changed).save(tmp_path / "1.tif")
        pixels = decode(tmp_path / "1.tif", S)
        assert isinstance(pixels, np.ndarray)
        seen[name] = pixels.astype(int)
        assert seen[name].std() > 20
        assert np.median(np.abs(seen[name] - seen["plain"])) <= 1


@pytest.mark.parametrize(("kind", "white"), [("uint16", 4095), ("int32", 255), ("int16", 3000)])
def test_row_09_few_bits_in_many_are_visible(tmp_path: Path, kind: str, white: int) -> None:
    levels = np.linspace(0, white, 1600).reshape(40, 40).astype(kind)
    Image.fromarray(levels).save(tmp_path / "1.tif")
    pixels = decode(tmp_path / "1.tif", 40)
    assert isinstance(pixels, np.ndarray)
    assert pixels.max() > 150
    set_by_hand = decode(tmp_path / "1.tif", 40, (0, 2 * white))
    assert isinstance(set_by_hand, np.ndarray)
    assert abs(int(set_by_hand.max()) - 127) <= 2


def test_row_09_the_levels_of_a_run_are_those_of_its_model(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    generator = np.random.default_rng(0)
    for i in range(90):
        levels = generator.integers(0, 1500, (8, 8)).astype(np.uint16)
        Image.fromarray(levels).save(root / f"{i:02}.tif")
    job = job_on(root, "dataset.levels=[0,3000]", "stages=[moco,proto]")
    run_stages(job)
    run = job.folder("proto")
    model = spice_pl.load(run.path)
    assert model.levels == [0.0, 3000.0]
    np.testing.assert_allclose(model.predict(root).confidence, run.probs.max(axis=1), atol=1e-5)
    dark = np.full((8, 8), 1500, np.uint16)
    pixels = pixels_of(Image.fromarray(dark), 8, model.levels)
    assert isinstance(pixels, np.ndarray)
    assert set(pixels.ravel().tolist()) == {128}
    # The task reads a folder as the model says, whatever dataset.levels is there.
    new = job_on(root, "stage=predict", f"predict.model={run.path}")
    run_stages(new)
    with (new.folder("predict").path / "predictions.csv").open(encoding="utf-8") as file:
        found = [float(row["confidence"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(found, run.probs.max(axis=1), atol=1e-4)


@pytest.mark.parametrize("writer", WRITERS)
def test_row_10_colours_of_16_bits_are_right(writer: str) -> None:
    check_16_bit_colours(writer)


def tar(path: Path, members: Sequence[tuple[str, bytes | str]]) -> Path:
    """Write a tar file; text is the target of a hard link."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                file.addfile(info)
            else:
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def test_row_11_names_with_dots_keep_their_labels(tmp_path: Path) -> None:
    data = [encoded(picture(seed=i), "PNG") for i in range(3)]
    members: list[tuple[str, bytes | str]] = []
    for i, image in enumerate(data):
        members += [(f"2{i}.00.png", image), (f"2{i}.00.cls", str(i % 2).encode())]
    tar(tmp_path / "tars/1.tar", members)
    images = shards(str(tmp_path / "tars"), S, str(tmp_path / "cache"), labels="cls")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0]


def test_row_12_hard_links_and_odd_members_are_followed_or_counted(tmp_path: Path) -> None:
    data = encoded(picture(), "PNG")
    tar(
        tmp_path / "tars/1.tar",
        [
            *(("1.png", data), ("2.png", "1.png"), ("3.png", "nowhere"), ("#snapshot/4.png", data)),
            *(("../5.png", data), ("6.png", b""), ("._7.png", data), ("new\nline.png", data)),
        ],
    )
    images = shards(str(tmp_path / "tars"), S, str(tmp_path / "cache"))
    assert list(images.keys) == ["1.tar/1.png", "1.tar/2.png", "1.tar/new\nline.png"]
    assert images.num_files == 8


def table_on(root: Path, text: str | bytes, name: str = "list.csv") -> ImageSet:
    file = root.parent / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return opened(root, table=str(file), labels="csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n0,1.png,cat\n", 'put a path with a comma into quotes: "a,b.jpg"'),
        ("path,label\n0.png,a\n./0.png,b\n", "which row 1 names as 0.png"),
        ("path,label\n0.png,a\n0.png,b\n", "names 0.png twice"),
        ("file,label\n0.png,a\n", "has no column path; it has file, label"),
    ],
)
def test_row_13_a_row_is_said_for_what_it_is(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table_on(photos(tmp_path / "images"), text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path,label\n0.png,a\n1.png,nan\n", "list.csv"),
        ("\ufeffpath,label\r\n0.png,a\r\n1.png,\r\n", "list.csv"),
        ("path\tlabel\n0.png\ta\n1.png\t\n", "list.tsv"),
        ("path;label\n0.png;a\n1.png;\n", "list.csv"),
        ('path,note,label\n0.png,"two\nlines, quoted",a\n1.png,x,\n', "list.csv"),
        ("path\tlabel\n0.png\ta\n1.png\t\n".encode("utf-16"), "list.txt"),
    ],
)
def test_row_13_tables_of_spreadsheets_are_read(
    tmp_path: Path, text: str | bytes, name: str
) -> None:
    images = table_on(photos(tmp_path / "images"), text, name)
    assert list(images.keys) == ["0.png", "1.png"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, -1]


def test_row_13_a_missing_file_is_not_a_broken_link(tmp_path: Path) -> None:
    root = photos(tmp_path / "images")
    (root / "sub").mkdir()
    shutil.copy(root / "0.png", root / "sub/5.png")
    (root / "link.png").symlink_to("nowhere")
    images = table_on(root, "path,label\n0.png,a\nnone.png,a\nsub\\5.png,a\nlink.png,a\n")
    reasons = dict(images.skipped)
    assert reasons["none.png"] == "there is no such file"
    assert reasons["sub\\5.png"] == "there is no such file, but there is one with / instead of \\"
    assert reasons["link.png"] == "broken link"


@pytest.mark.parametrize(
    "name",
    [
        *("Müller", "a=b", "a,b", "x#y", "a b", "😀", "[x]", "{x}", "${x}", "it's", 'd"q', "1e3"),
        *("(x)", "100%", "back\\slash", " lead", "a\\", "~x", "!b", "007", "null", "C:x"),
    ],
)
def test_row_14_any_name_of_a_folder_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    parser = OverridesParser.create()
    for given in (name, str(tmp_path / name), f"{name}/", f"./{name}"):
        (word,) = with_quotes([f"dataset.root={given}"])
        value = parser.parse_override(word).value()
        text = value if isinstance(value, str) else getattr(value, "text", value)
        assert str(text).replace("\\${", "${") == given
    assert with_folder([name])[0] == "dataset=folder"


def test_row_14_a_list_that_cannot_be_read_says_the_quoting() -> None:
    with pytest.raises(UsageError, match=r"\"dataset\.exclude=\['Müller','a,b'\]\""):
        with_quotes(["dataset.exclude=[Müller]"])
    (word,) = with_quotes(["dataset.exclude=['Müller','a,b']"])
    assert OverridesParser.create().parse_override(word).value() == ["Müller", "a,b"]
    assert with_quotes(["seed=1", "-m", "moco.epochs=2,3"]) == ["seed=1", "-m", "moco.epochs=2,3"]


def test_row_14_from_the_shell(tmp_path: Path) -> None:
    root = photos(tmp_path / "Müller, 50% #1=b", 5)
    places = (f"runs_dir={tmp_path / 'läufe'}", f"cache_dir={tmp_path / 'c,d'}")
    done = train(
        "dataset=folder", f"dataset.root={root}", "stage=inspect", "recipe=scratch", *places
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "läufe" / root.name / "inspect/seed0/inspect.html").is_file()


def test_row_15_foreign_checkpoints(tmp_path: Path) -> None:
    from tests.models.test_foreign import KINDS

    wanted = {"SCAN", "SimSiam", "SwAV", "MoCo v3", "DINO", "compiled"}
    assert wanted <= KINDS.keys()  # tests/models/test_foreign.py reads each of them


def moved(job: Callable[..., Any], root: Path) -> Path:
    """Move the images of a run to a folder of the same name in another place."""
    new = root.parent / "mount" / root.name
    new.parent.mkdir()
    shutil.move(root, new)
    return new


def test_row_16_a_run_continues_after_its_images_moved(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    more = ("stages=[moco]", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    job = job_on(root, *more)
    run_stages(job)
    run = job.folder("moco").path
    (run / "metrics.json").unlink()  # as if it had been stopped
    new = moved(job_on, root)
    again = job_on(new, *more, "resume=true")
    run_stages(again)
    assert again.folder("moco").path == run
    assert again.folder("moco").finished
    run_stages(job_on(new, *more, "resume=true"))  # a finished one is reused


def test_row_16_other_images_in_the_other_place_are_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    more = ("stages=[moco]", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    run_stages(job_on(root, *more))
    other = write_folder(tmp_path / "mount" / "photos", classes=False, seed=1)
    with pytest.raises(UsageError, match="was made from other images or another order"):
        run_stages(job_on(other, *more, "resume=true"))


def test_row_17_a_finished_run_is_trained_on(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    job = job_on(root, "stages=[moco]")
    run_stages(job)
    assert job.folder("moco").metrics["settings"]["moco.epochs"] == "2"
    with pytest.raises(UsageError, match=r"moco\.epochs: 2 -> 4\n.*resume=true to train on"):
        run_stages(job_on(root, "stages=[moco]", "moco.epochs=4"))
    run_stages(job_on(root, "stages=[moco]", "moco.epochs=4", "resume=true"))
    assert job.folder("moco").metrics["settings"]["moco.epochs"] == "4"
    text = (job.folder("moco").path / "metrics.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert sorted({int(row["epoch"]) for row in rows if row["epoch"]}) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match=r"moco\.epochs: 4 -> 3"):  # fewer are other settings
        run_stages(job_on(root, "stages=[moco]", "moco.epochs=3", "resume=true"))


def test_row_17_a_later_stage_is_not_left_on_features_that_are_gone(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    job = job_on(root, "stages=[moco,proto]")
    run_stages(job)
    with pytest.raises(UsageError, match="give stage=moco to train that one alone"):
        run_stages(job_on(root, "stages=[moco,proto]", "moco.epochs=4", "resume=true"))
    assert job.folder("moco").finished  # nothing was changed


def test_row_18_memory_for_a_large_photo_is_a_setting(tmp_path: Path) -> None:
    Image.new("L", (2000, 2000)).save(tmp_path / "1.png")
    said = read_image(tmp_path / "1.png", Decoding(S, max_decode_mb=1))
    assert isinstance(said, str)
    needed = float(said.rpartition("dataset.max_decode_mb=")[2])
    assert isinstance(read_image(tmp_path / "1.png", Decoding(S, max_decode_mb=needed)), Decoded)


def test_row_19_names_are_neutral_for_spreadsheets_if_asked_for(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", classes=False)
    odd = ["=cmd|' C'!A0.png", "+1.png", "-1.png", "@SUM.png", "\tx.png", "'quoted.png", "a=1.png"]
    for i, name in enumerate(odd):
        (root / f"{i:03}.png").rename(root / name)
    job = job_on(root, "stages=[moco,proto]", "spreadsheet=true")
    run_stages(job)
    run = job.folder("proto")
    new = job_on(root, "stage=predict", f"predict.model={run.path}", "spreadsheet=true")
    run_stages(new)
    for file in (run.path / "clusters.csv", new.folder("predict").path / "predictions.csv"):
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        names = [name for row in rows for key, name in row.items() if key.startswith(("im", "ne"))]
        assert not [name for name in names if name.startswith(("=", "+", "-", "@", "\t", "\r"))]
        assert {f"'{name}" for name in odd[:-1]} | {"a=1.png"} <= set(names)
    assert set(odd) <= set(run.read_clusters().keys)  # read back as they are on disk
    run_stages(job_on(root, "stages=[moco,proto]", "overwrite=true"))
    assert "=cmd|' C'!A0.png" in (run.path / "clusters.csv").read_text(encoding="utf-8")


def test_row_20_advice_about_one_colour_is_accepted(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for i in range(12):
        saved(Image.new("RGB", (8, 8), (0, 200, i)), root / f"{i:02}.png")
    job = job_on(root, "stage=inspect")
    run_stages(job)
    text = (job.folder("inspect").path / "inspect.html").read_text(encoding="utf-8")
    advice = [
        f"dataset.{key}=[" + text.split(f"dataset.{key}=[")[1].split("]")[0] + "]"
        for key in ("mean", "std")
    ]
    assert "nearly one level in red, green" in text
    run_stages(
        job_on(
            root,
            "stages=[moco]",
            *advice,
            *("moco.module.queue_size=12", "moco.streams.images.batch_size=12"),
        )
    )


def test_row_21_copies_are_refused_before_work_with_the_right_advice(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for i in range(20):
        saved(picture(8, 8, seed=i % 2), root / f"{i:02}.png")
    with pytest.raises(UsageError, match=r"copies of 2, .* cannot be 3 clusters; give"):
        run_stages(job_on(root, "stages=[moco,proto]"))
    for i in range(20):
        saved(picture(8, 8), root / f"{i:02}.png")
    with pytest.raises(UsageError, match="copies of 1, pixel by pixel") as error:
        run_stages(job_on(root, "stages=[moco]", "dataset.num_clusters=2"))
    assert "seed" not in str(error.value)
    assert not (tmp_path / "runs/photos/moco/seed0/last.ckpt").exists()


def test_row_22_weights_that_cannot_be_fetched_say_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    root = photos(tmp_path / "photos", 20)
    more = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "recipe=scratch"]
    more += ["backbone=timm", "backbone.model_name=resnet18", "dataset.image_size=32"]
    done = train(
        "dataset=folder", f"dataset.root={root}", "stage=embed", *more, "backbone.pretrained=true"
    )
    assert done.returncode == 2
    assert "embed.module.weights=FILE" in done.stderr
    assert "https://huggingface.co/timm/resnet18.a1_in1k" in done.stderr
    assert "Traceback" not in done.stderr
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    run_stages(
        make_job(
            "dataset=folder",
            f"dataset.root={root}",
            "stage=embed",
            *more,
            f"embed.module.weights={tmp_path / 'w.pth'}",
            "dataset.num_clusters=2",
        )
    )


def test_row_22_only_errors_of_the_network_are_taken_for_one() -> None:
    from urllib.error import URLError

    assert is_not_fetched(URLError("no name"))
    assert not is_not_fetched(FileNotFoundError("x"))
    assert "backbone.name=resnet18" in without_network({"_target_": "x", "name": "resnet18"})


def test_row_23_two_folders_of_one_name_do_not_share_a_page(tmp_path: Path) -> None:
    one, other = photos(tmp_path / "a/photos"), photos(tmp_path / "b/photos", 6)
    places = (f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", "stage=inspect")
    run_stages(job_on(one, *places))
    page = job_on(one, *places).folder("inspect").path / "inspect.html"
    before = page.read_bytes()
    with pytest.raises(UsageError, match=r"a/photos -> .*b/photos\ngive dataset\.name="):
        run_stages(job_on(other, *places))
    assert page.read_bytes() == before
    run_stages(job_on(one, *places))  # the same folder again is fine
    run_stages(job_on(other, *places, "dataset.name=other"))
    run_stages(job_on(other, *places, "overwrite=true"))


def test_row_24_trust_reads_the_network_of_the_run(finished: Finished) -> None:
    run_stages(finished.job("stage=trust", "trust.task.num_nulls=2", "backbone.widths=[16]"))
    assert RunFolder(finished.folder("trust").path).metrics["measures"]["views"] is not None


def test_row_25_both_ways_of_the_benchmark_have_one_precision() -> None:
    text = (Path(__file__).parents[1] / "benchmarks/proto.py").read_text(encoding="utf-8")
    assert 'if precision == "32-true":' in text  # only there have both ways to agree


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_folder_on_another_disk_is_searched(tmp_path: Path) -> None:
    root = photos(tmp_path / "images", 2)
    (root / "disk").mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(  # noqa: S603
            [mount, "-t", "tmpfs", "tmpfs", str(root / "disk")], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("may not mount")
    try:
        saved(picture(seed=9), root / "disk/1.png")
        assert len(opened(root)) == 3
    finally:
        subprocess.run([str(shutil.which("umount")), str(root / "disk")], check=True)  # noqa: S603


@pytest.mark.parametrize("form", ["relative", "slash", "home"])
def test_any_way_to_write_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    photos(tmp_path / "images", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = {"relative": "images", "slash": f"{tmp_path}/images/", "home": "~/images"}[form]
    assert len(folder(root, S, "cache")) == 2


def test_fifty_classes_of_one_image(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(50):
        saved(picture(seed=i), root / f"class {i}/1.png")
    images = opened(root, labels="folders")
    assert images.class_names is not None
    assert len(images.class_names) == len(images) == 50
