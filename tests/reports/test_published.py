"""The table of published results: its format, and some rows as their papers print them."""

from __future__ import annotations

import csv
from importlib.resources import files

import pytest
from tests.conftest import CONF

from spice_pl.reports.published import FEATURES, published_results

TEXT = files("spice_pl.reports").joinpath("published.csv").read_text(encoding="utf-8")
ROWS = list(csv.DictReader(TEXT.splitlines()))
NAMES = {file.stem for file in (CONF / "dataset").glob("*.yaml")}
NAMES |= {"imagenet"}  # of all 1,000 classes, as a folder of your own


def test_every_row_has_the_columns_and_a_source() -> None:
    head = "dataset,protocol,method,acc,nmi,ari,spread,features,source"
    assert TEXT.splitlines()[0] == head
    for row in ROWS:
        assert list(row) == head.split(","), row
        assert row["dataset"] in NAMES, row
        assert row["protocol"] in ("whole", "split", ""), row
        assert row["features"] in ("", *FEATURES), row
        assert row["method"].strip(), row
        assert row["source"].strip(), row


def test_scores_are_shares_with_three_places() -> None:
    for row in ROWS:
        scores = {key: row[key] for key in ("acc", "nmi", "ari", "spread") if row[key]}
        assert "acc" in scores, row
        for key, text in scores.items():
            assert len(text.partition(".")[2]) == 3, row
            assert 0 <= float(text) <= (0.1 if key == "spread" else 1), row


def test_no_method_is_listed_twice_on_a_data_set() -> None:
    names = [(row["dataset"], row["protocol"], row["method"]) for row in ROWS]
    assert len(names) == len(set(names))


# Of the papers; the order of the data sets is CIFAR-10, CIFAR-20, STL10, ImageNet-10, Dogs, Tiny.
SETS = ("cifar10", "cifar20", "stl10", "imagenet10", "imagenet_dogs", "tiny_imagenet")
PERCENT = {
    "ProPos + DCBoost, best": (96.0, 63.9, 93.6, 97.1, 79.7, 31.9),
    "ProPos + DCBoost, 5 runs": (95.5, 62.1, 93.3, 96.6, 79.8, None),
    "CDC": (94.7, 61.6, 93.0, 97.3, 79.2, 33.9),
    "DPAC": (93.4, 55.5, 93.4, 97.0, 72.6, None),
    "SeCu": (93.0, 55.2, 83.6, None, None, None),
}


@pytest.mark.parametrize("method", PERCENT)
def test_rows_are_those_of_the_papers(method: str) -> None:
    for name, percent in zip(SETS, PERCENT[method], strict=True):
        found = [row.acc for row in published_results(name) if row.method == method]
        assert found == ([] if percent is None else [pytest.approx(percent / 100)]), name


def test_networks_that_learned_from_more_are_marked() -> None:
    titles = {row.title: row.acc for row in published_results("cifar10")}
    assert titles["TURTLE on CLIP and DINOv2 [text-supervised]"] == 0.995
    assert titles["ICCE [pretrained on other images]"] == 0.993
    assert titles["SPICE"] == 0.926
    assert titles["CoNR + DCBoost, on a long tail of 10:1"] == 0.653
    unmarked = [row for row in ROWS if not row["features"]]
    assert not [row for row in unmarked if "CLIP" in row["method"] or "DINO" in row["method"]]
