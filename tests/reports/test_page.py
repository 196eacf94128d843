import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spice_pl.reports import pictures, script_data, sections
from spice_pl.reports.charts import charts
from spice_pl.reports.choices import Compared, Comparison, KChoice, Preview
from spice_pl.reports.html import content_hash
from spice_pl.reports.map import Map
from spice_pl.reports.oddities import Oddity, num_odd
from spice_pl.reports.page import ReportData, render_report, write_report
from spice_pl.reports.tables import NO_LABELS, ResultRow

VOID = {"meta", "link", "br", "hr", "img", "input"}


def noise(index: NDArray[np.intp], side: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (len(index), 3, side, side), dtype=np.uint8)


def report(num_images: int = 60, num_clusters: int = 4, **changes: Any) -> ReportData:
    """Clusters 0, 1, 2, ... in turn, the last one empty; a label is its cluster."""
    generator = np.random.default_rng(0)
    clusters = np.arange(num_images) % max(num_clusters - 1, 1)
    base = ReportData(
        title="A run",
        dataset="noise",
        num_images=num_images,
        num_clusters=num_clusters,
        protocol="trained and scored on all",
        seed=7,
        rows=[ResultRow("proto", 0.9, 0.8, 0.7, "trained and scored on all", 7, 61.0)],
        images=noise,
        keys=[f"folder/{i}.png" for i in range(num_images)],
        clusters=clusters,
        confidence=generator.random(num_images),
        agreement=generator.random(num_images),
        reliable=generator.random(num_images) > 0.5,
        labels=clusters,
    )
    return dataclasses.replace(base, **changes)


def unlabelled(**changes: Any) -> ReportData:
    row = ResultRow("proto", None, None, None, "own folder", 7, 61.0)
    return report(labels=None, rows=[row], **changes)


class Page(HTMLParser):
    """Tags as they open, the text of headings, and whether all are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("data", [report(), unlabelled()], ids=["labels", "no labels"])
def test_page_is_well_formed_with_headings_in_order(data: ReportData) -> None:
    parsed = Page(render_report(data))
    assert parsed.open == []
    levels = [level for level, _ in parsed.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [(a["href"] or "").removeprefix("#") for a in parsed.attributes("a")]
    assert len(targets) > 10
    assert set(targets) <= set(ids)


def test_page_can_be_read_without_seeing_it() -> None:
    parsed = Page(render_report(report(logs={"moco": {"train/loss": [(0, 2.0), (10, 1.0)]}})))
    assert parsed.attributes("html") == [{"lang": "en"}]
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in parsed.tags}
    assert all("scope" in attributes for attributes in parsed.attributes("th"))
    shown = [a for _, a in parsed.tags if a.get("role") == "img"]
    assert len(shown) > 50
    assert all(a.get("title") or a.get("aria-label") for a in shown)
    named = {a["id"] for _, a in parsed.tags if "id" in a}
    assert {a["aria-labelledby"] for _, a in parsed.tags if "aria-labelledby" in a} <= named


def test_nothing_comes_from_outside_and_only_our_script_runs() -> None:
    text = render_report(report(logs={"moco": {"train/loss": [(0, 2.0), (10, 1.0)]}}))
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    page_alone = text.replace(scripts[0][1], "").replace(scripts[1][1], "")
    references = re.findall(r"""(?:src|href|srcset|action|data)=["']([^"']*)""", page_alone)
    references += re.findall(r"url\(([^)]*)\)", page_alone)
    assert len(references) > 10
    assert all(reference.startswith(("#", "data:image/")) for reference in references)
    assert "//" not in re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page_alone)
    assert "@import" not in text
    assert "http" not in scripts[1][1]
    assert "innerHTML" not in scripts[1][1]
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert content_hash(scripts[1][1]) in policy[0]
    assert "default-src 'none'" in policy[0]


def test_untrusted_names_are_escaped_everywhere() -> None:
    evil = '"></script><script>alert(1)</script>'
    text = render_report(
        report(
            title=evil,
            dataset=evil,
            protocol=evil,
            rows=[ResultRow(evil, 1, 1, 1, evil, 0, 1)],
            keys=[evil] * 60,
            class_names=[evil] * 4,
            logs={evil: {"train/loss": [(0, 1.0), (1, 0.5)]}},
            map=Map(np.arange(60), np.zeros((60, 2)), evil),
            names={0: evil},
            cost={evil: evil},
            review={"command": evil, "reviewed": evil},
            skipped=[(evil, evil)],
            settings={evil: evil},
            versions={evil: evil},
            notes=[evil],
        )
    )
    assert text.count("<script") == text.count("</script") == 2  # the data, and our own
    assert text.count("&lt;script&gt;") > 60
    assert Page(text).open == []


def payload(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return dict(json.loads(found[0]))


def test_script_reads_what_the_arrays_hold() -> None:
    data = report(names={1: "cats"})
    read = payload(render_report(data))
    clusters = np.frombuffer(base64.b64decode(read["cluster"]), "<u2")
    flags = np.frombuffer(base64.b64decode(read["flags"]), "<u1")
    np.testing.assert_array_equal(clusters, data.clusters)
    np.testing.assert_array_equal(flags & 1, data.reliable)
    np.testing.assert_array_equal(flags >> 1, data.agreement < 0.5)
    assert read["listed"] is None
    assert read["keys"] == data.keys
    assert read["names"] == {"1": "cats"}


def test_list_of_files_ends_where_it_would_be_too_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_data, "LISTED_BYTES", 1_000)
    drawn = np.arange(0, 3_000, 100)
    read = payload(render_report(report(3_000, map=Map(drawn, np.zeros((30, 2)), "a plane"))))
    listed = np.frombuffer(base64.b64decode(read["listed"]), "<u4")
    rows = np.frombuffer(base64.b64decode(read["map"]["row"]), "<u4")
    np.testing.assert_array_equal(listed[rows], drawn)
    assert read["keys"] == [f"folder/{i}.png" for i in listed]
    assert 30 < len(listed) < 200


def test_published_results_stand_beside_ours() -> None:
    text = render_report(report(dataset="cifar10"))
    assert "Published on cifar10" in text
    row = text.split('<th scope="row">SPICE</th>')[1].split("</tr>")[0]
    assert re.findall(r">([^<]+)</td>", row)[:4] == ["0.926", "0.865", "0.852", "whole"]
    assert "no published results on noise" in render_report(report())


def test_reliable_images_stand_beside_all() -> None:
    clusters, labels = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 1])
    reliable = np.array([True, True, True, False])
    data = report(4, 2, clusters=clusters, labels=labels, reliable=reliable)
    accuracies = {subset.name: (subset.size, subset.acc) for subset in sections.subsets(data)}
    assert accuracies == {
        "all": (4, "0.750"),
        "reliable": (3, "1.000"),
        "not reliable": (1, "0.000"),
    }


def test_kept_head_is_the_one_of_the_lowest_loss() -> None:
    logs = {
        "proto": {
            "val/selection_loss_head_0": [(0, 2.0), (1, 1.7)],
            "val/selection_loss_head_1": [(0, 1.6), (1, 1.9)],
        }
    }
    text = " ".join(render_report(report(logs=logs)).split())
    assert (
        '<th scope="row">1</th><td class="n">1.6000</td><td class="n">0</td><td>kept</td>' in text
    )
    assert '<th scope="row">0</th><td class="n">1.7000</td><td class="n">1</td><td></td>' in text


def test_kept_head_is_the_one_of_the_highest_information_where_heads_were_chosen_by_it() -> None:
    logs = {
        "proto": {
            "val/selection_loss_head_0": [(0, 1.5)],
            "val/selection_loss_head_1": [(0, 1.6)],
            "val/mutual_information_head_0": [(0, 0.5)],
            "val/mutual_information_head_1": [(0, 0.75)],
        }
    }
    text = " ".join(render_report(report(logs=logs)).split())
    assert (
        '<th scope="row">1</th><td class="n">0.7500</td><td class="n">0</td><td>kept</td>' in text
    )
    assert "mutual information of each head" in text


def test_names_that_cannot_be_printed_are_spelled_out() -> None:
    names = ["\udcff.png", "\u202egnp.exe"]  # an undecodable byte; a right-to-left override
    text = render_report(report(2, 1, keys=names, labels=None))
    assert text.encode("utf-8")
    assert "\\udcff.png" in text
    assert "\\u202egnp.exe" in text


def test_every_filled_cluster_has_a_section_and_empty_ones_are_counted() -> None:
    text = render_report(report(num_clusters=4))
    parsed = Page(text)
    articles = [attributes["id"] for attributes in parsed.attributes("article")]
    assert articles == [f"cluster-{i}" for i in range(3)]
    assert 'data-name="3"' not in text
    assert "Clusters without an image, which are not shown: 1 of 4 (3)." in text


def test_a_run_that_used_labels_does_not_claim_the_opposite() -> None:
    row = ResultRow("supervised", 0.9, 0.8, 0.7, "whole", 7, 61.0, oracle=True)
    text = render_report(report(rows=[row]))
    assert "found without labels" not in text
    assert "(oracle)" in text
    assert "found without labels" in render_report(report())


def test_terms_are_explained_and_scores_only_where_they_are_shown() -> None:
    assert all(f"<dt>{term}</dt>" in render_report(unlabelled()) for term in sections.TERMS)
    assert "<dt>ACC</dt>" in render_report(report())
    assert "<dt>ACC</dt>" not in render_report(unlabelled())


def test_the_time_says_what_it_is_of() -> None:
    """It is that of the stages; decoding, the estimate of K and the page are not in it."""
    shown = sections.facts(report(), report().rows[0], num_not_sure=0)
    times = [(name, value) for name, value, _ in shown if "ime" in name]
    assert times == [("Time for features and clusters", "1 min 01 s")]


def test_a_collapse_is_named() -> None:
    clusters = np.array([2] * 50 + [0] * 10)
    assert "Cluster 2 holds 83% of all images" in render_report(report(clusters=clusters))


def told(**changes: object) -> str:
    """Return the warnings of a page on which everything else is fine."""
    fine = {"agreement": np.ones(60), "clusters": np.arange(60) % 4, **changes}
    return " ".join(sections.warnings(unlabelled(**fine)))


def test_nothing_is_warned_of_where_all_is_well() -> None:
    assert told(least_alike=0.5, colour_share=0.3) == ""


def test_images_that_all_look_the_same_are_named() -> None:
    assert "hardly any difference between these images" in told(least_alike=0.95)


def test_copies_are_named_where_they_are_many() -> None:
    many, few = (
        told(oddities=[Oddity("exact copies", np.arange(2 * count), count)]) for count in (7, 6)
    )
    assert "7 of 60 images are exact copies" in many
    assert few == ""


def test_many_images_between_clusters_are_named() -> None:
    agreement = np.ones(60)
    agreement[:6] = 0.2
    assert told(agreement=agreement) == ""
    agreement[6] = 0.2
    assert "12% of the images are not sure" in told(agreement=agreement)


def test_clusters_by_colour_are_named() -> None:
    assert "62% of the differences in the mean colour" in told(colour_share=0.62)


def test_one_cluster_of_two_may_be_large_but_not_nearly_all() -> None:
    for others, said in ((10, False), (4, True)):
        found = told(clusters=(np.arange(60) < others).astype(np.int64), num_clusters=2)
        assert ("Cluster 0 holds" in found) is said


def test_edits_are_within_reach_of_the_first_screen() -> None:
    text = render_report(report())
    assert text.index('id="edit-first"') < text.index("<nav")


def test_each_cell_of_a_table_of_cards_names_its_column() -> None:
    """On a phone the head of the table is hidden."""
    rows = [Compared("walk", True, 0.912, 0.987, 1.0)]
    page = report(comparison=Comparison(rows, 60, {"walk": 2.5}, "walk"))
    tables = re.findall(r'<table class="[^"]*cards">.*?</table>', render_report(page), re.DOTALL)
    assert len(tables) >= 4
    for table in tables:
        assert re.findall(r"<td(?![^>]*data-col)", table) == []


def test_labels_are_shown_as_truth() -> None:
    labels = np.arange(60) % 3
    labels[0] = 1  # one of the 20 images of cluster 0
    labels[3] = -1  # and one of unknown class
    text = render_report(report(labels=labels, class_names=["cat", "dog", "owl"]))
    assert '<span class="truth">truth: mostly cat (95%)</span>' in text  # 18 of 19
    row = text.split('class="confusion"')[1].split("<tr>")[2]
    assert [int(n) for n in re.findall(r">(\d+)</td>", row)] == [18, 1, 0]
    assert "0.900" in text


def test_without_labels_there_is_no_column_of_truth() -> None:
    row = Compared("network", True, 0.9, 0.8, 1.0)
    text = render_report(unlabelled(comparison=Comparison([row], 60, {"network": 2.0}, "network")))
    text = text.rpartition("<script>")[0]
    assert NO_LABELS in text
    for absent in ("ACC", "NMI", "ARI", "Truth", 'class="truth"', 'id="confusion"'):
        assert absent not in text


def test_no_result_and_no_image_is_a_page_too() -> None:
    text = render_report(
        report(0, 2, rows=[], keys=[], reliable=np.zeros(0, bool), clusters=np.zeros(0, int))
    )
    assert "<article" not in text
    assert Page(text).open == []


def test_curves_leave_out_what_is_not_finite_and_keep_their_ends() -> None:
    points = [(step, 1 / (1 + step)) for step in range(10_000)]
    logs = {"moco": {"train/loss": [*points, (10_000, float("nan"))]}, "none": {"train/loss": []}}
    text = render_report(report(logs=logs))
    lines = re.findall(r'<polyline class="curve l0" points="([^"]*)"', text)
    assert len(lines) == 1
    assert len(lines[0].split()) <= 302
    assert lines[0].startswith("0.0,0.0 ")
    assert lines[0].endswith("300.0,100.0")
    assert "Left out: 1 value that was not finite." in text
    assert "nan" not in lines[0]


def test_adaptive_thresholds_are_drawn_over_time_with_their_mean() -> None:
    levels = {f"train/threshold_{k}": [(0, 0.1), (1, 0.1 * (k + 1))] for k in range(5)}
    drawn = next(c for c in charts({"freematch": levels}) if c.title == "confidence threshold")
    assert [line.name for line in drawn.lines] == [*(f"cluster {k}" for k in range(5)), "mean"]
    mean = drawn.lines[-1]
    assert (mean.last, mean.kept) == ("0.3", True)
    assert mean.points == "0.0,100.0 300.0,50.0"  # from 0.1, the lowest, to the middle of 0.1-0.5
    assert drawn.words.endswith("between 0.1 and 0.5: mean 0.3 at the end")
    text = " ".join(render_report(report(logs={"freematch": levels})).split())
    assert "freematch: confidence threshold" in text
    assert "<li><i></i>mean over clusters (single clusters in grey)</li>" in text
    assert "confidence threshold" not in render_report(
        report(logs={"moco": {"train/loss": [(0, 1)]}})
    )


def test_long_lists_are_counted_not_listed() -> None:
    skipped = [(f"broken-{i}.png", "truncated") for i in range(1_234)]
    text = render_report(report(skipped=skipped))
    assert "1,234 files could not be used. The first 200 are listed." in " ".join(text.split())
    assert "broken-199.png" in text
    assert "broken-200.png" not in text
    many = render_report(report(labels=np.arange(60) * 100))
    assert "4 clusters by 5901 classes are too many for a table" in many


@pytest.mark.parametrize(
    ("num_images", "num_clusters", "side"), [(60_000, 10, 32), (100_000, 200, 8)]
)
def test_pages_of_many_images_fit_into_a_mail(
    num_images: int, num_clusters: int, side: int, tmp_path: Path
) -> None:
    plane = Map(np.arange(5_000), np.random.default_rng(0).random((5_000, 2)), "a plane")
    data = report(num_images, num_clusters, images=lambda index: noise(index, side), map=plane)
    path = write_report(data, tmp_path / "report.html")
    assert path.stat().st_size < 15_000_000


def test_pictures_shrink_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def sheet_bytes() -> int:
        text = render_report(report(images=lambda index: noise(index, 96)))
        return sum(map(len, re.findall(r"url\((data:[^)]*)\)", text)))

    whole = sheet_bytes()
    monkeypatch.setattr(pictures, "SHEETS_BYTES", whole // 2)
    assert sheet_bytes() <= whole // 2


def test_only_shown_pictures_are_read() -> None:
    seen: list[int] = []

    def images(index: NDArray[np.intp]) -> NDArray[np.uint8]:
        seen.extend(index.tolist())
        return noise(index)

    render_report(report(6_000, 4, images=images))
    assert len(seen) == 3 * 4 * 12  # three filled clusters, four walls each


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(report(), path) == path
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(report(title="Another"), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_clusters_are_in_order_of_size_everywhere() -> None:
    clusters = np.repeat([0, 1, 2], [10, 30, 20])
    parsed = Page(render_report(report(60, 3, clusters=clusters)))
    assert [a["id"] for a in parsed.attributes("article")] == [
        "cluster-1",
        "cluster-2",
        "cluster-0",
    ]
    lines = [a["data-id"] for a in parsed.attributes("li") if "data-id" in a]
    assert lines == ["1", "2", "0"] * 2  # at a glance, and the bars of sizes


def test_from_thirty_clusters_on_there_is_an_index_with_one_picture_each() -> None:
    few, many = (render_report(report(600, 1 + count)) for count in (29, 30))
    assert "Index of 30 clusters" in many
    assert "At a glance" in few
    assert [text.count(' square"') for text in (few, many)] == [4 * 29, 30]
    assert "Files of the pictures above" not in many  # 2,400 rows of tables


def test_odd_images_are_shown_with_their_number_and_rule() -> None:
    odd = [
        Oddity("exact copies", np.array([3, 9, 4, 5]), 2),
        Oddity("outliers", np.arange(20), 20),
        Oddity("tiny", np.array([7]), 1),
        Oddity("blurred", np.empty(0, np.int64), 0),
    ]
    text = render_report(report(oddities=odd))
    section = text.split('id="odd"')[1].split("</section>")[0]
    for said in ("2 exact copies", "20 outliers", "1 tiny image", "not found: blurred.",
                 "The first 12 are shown"):  # fmt: skip
        assert said in section
    assert re.findall(r'data-i="(\d+)"', section) == [*"3945", *map(str, range(12)), "7"]
    assert num_odd(odd) == 20  # some are odd in two ways
    assert "<dt>Odd</dt><dd>20</dd>" in text


def test_the_choice_is_explained_without_labels() -> None:
    rows = [
        Compared("walk", True, 0.912, 0.987, 1.0),
        Compared("k-means", False, 0.9, 0.5, 0.75, 12, 48, 0.8, 2.25),
    ]
    compared = Comparison(rows, 60, {"network": 2.0, "walk": 2.5}, "walk")
    text = " ".join(render_report(unlabelled(comparison=compared)).split())
    assert "Why these clusters" in text
    assert "(network 2.000, walk 2.500)" in text
    row = text.split('<th scope="row">k-means</th>')[1].split("</tr>")[0]
    cells = ["12 – 48", "90.0 %", "80 %", "0.500", "2.250", "75.0 %"]
    assert re.findall(r">([^<]+)</td>", row) == cells


def chosen(clear: bool) -> KChoice:
    previews = [Preview(2, [(40, [0, 1]), (20, [2])], "train K=2 'a folder'")]
    return KChoice(4, 3, clear, [(2, 0.1), (3, 0.9), (4, 0.5)], previews)


def test_an_unclear_number_is_said_first_and_others_are_offered() -> None:
    drawn = Map(np.arange(60), np.zeros((60, 2)), "a plane")
    text = render_report(report(k_choice=chosen(clear=False), map=drawn))
    # Four clusters were chosen by the user, whatever the estimate is.
    assert "The number of clusters is unclear" not in text.split("<main>")[0]
    estimated = dataclasses.replace(chosen(clear=False), estimated=4)
    head = render_report(report(k_choice=estimated, map=drawn)).split("<main>")[0]
    assert "The number of clusters is unclear" in head
    assert "best guess is 3" in text
    assert "2 clusters</button>" in text
    assert "train K=2 &#39;a folder&#39;" in text  # without JavaScript
    (preview,) = payload(text)["previews"]
    assert preview == {"num_clusters": 2, "groups": [[40, [0, 1]], [20, [2]]],
                       "command": "train K=2 'a folder'"}  # fmt: skip
    marks = dict(chosen(clear=True).marks)
    assert marks == {"K = 4, shown": 100.0, "K = 3, estimated": 50.0}
    clear = render_report(report(k_choice=chosen(clear=True), map=drawn))
    assert "is unclear" not in clear
    assert "divide most clearly into 3 groups" in clear


def test_pictures_keep_their_shape_and_fit_together() -> None:
    wide = np.full((3, 40, 80), 200, np.uint8)
    shapes = {0: wide, 1: wide[:, :, :20]}
    text = render_report(
        report(
            images=lambda index: noise(index, 40),
            shapes=lambda index, height: {i: shapes[i][:, :, :] for i in index if i in shapes},
            confidence=np.linspace(1, 0, 60),
            agreement=np.ones(60),
        )
    )
    width = {
        int(image): float(w) for w, image in re.findall(r'--w:([\d.]+)[^"]*" data-i="(\d+)"', text)
    }
    assert (width[0], width[1], width[2]) == (2.0, 0.5, 1.0)
    wall = text.split('aria-label="Prototypes of cluster 0"')[1].split("</ul>")[0]
    tiles = [tuple(map(float, pair)) for pair in re.findall(r"--x:([\d.]+);--w:([\d.]+)", wall)]
    ends = np.cumsum([0.0, *(wide for _, wide in tiles)])
    assert [left for left, _ in tiles] == pytest.approx(ends[:-1])


def test_nearest_images_and_addresses_are_handed_to_the_script() -> None:
    data = report(
        neighbors=lambda index: np.stack([np.roll(np.arange(len(index)), -1)], axis=1),
        originals="file:///my%20photos/",
        csv="clusters.csv",
    )
    text = render_report(data)
    read = payload(text)
    pictured = np.frombuffer(base64.b64decode(read["pictured"]), "<u4")
    near = np.frombuffer(base64.b64decode(read["near"]), "<u2")
    assert sorted({int(i) for i in re.findall(r'data-i="(\d+)"', text)}) == pictured.tolist()
    np.testing.assert_array_equal(pictured[near], np.roll(pictured, -1))
    assert (read["numNear"], read["originals"]) == (1, "file:///my%20photos/")
    assert '<a href="clusters.csv" download>' in text


def test_lengths_are_checked_once() -> None:
    with pytest.raises(ValueError, match="confidence has 3 entries for num_images 60"):
        report(confidence=np.zeros(3))


def test_folders_are_proposed_as_names_and_given_to_no_cluster() -> None:
    num = 60
    keys = [f"{'<b>cats' if i % 3 == 0 else 'trip'}/{i}.png" for i in range(num)]
    text = render_report(unlabelled(keys=keys))
    page = Page(text)
    assert "“<b>cats”" in "".join(page.text)
    assert "Most images, 100%, are in folders called" in "".join(page.text)
    articles = {
        attrs["data-id"]: attrs.get("data-folder")
        for tag, attrs in page.tags
        if tag == "article" and attrs.get("class") == "cluster"
    }
    assert articles == {"0": "<b>cats", "1": "trip", "2": "trip"}
    assert {heading for level, heading in page.headings if level == 3} >= {"Cluster 0", "Cluster 1"}
    assert "data-folder" not in render_report(report(keys=keys))  # with labels
    assert "data-folder" not in render_report(unlabelled())  # one folder
