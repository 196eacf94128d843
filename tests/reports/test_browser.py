"""The page in a browser: console errors, search, filter, map, keyboard, phone, edits."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.reports.test_page import noise, report
from tests.reports.test_shading import looked

from spice_pl.reports.choices import KChoice, Preview
from spice_pl.reports.map import Map
from spice_pl.reports.page import ReportData, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason=f"no browser: none of {', '.join(BROWSERS)}"),
]
EVIL = '"><img src=x onerror=console.error(1)>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = started.chromium.launch(executable_path=FOUND, args=sandbox)
        yield opened
        opened.close()


def hostile(num_images: int = 60, num_clusters: int = 4) -> ReportData:
    points = np.random.default_rng(0).random((num_images, 2))
    return report(
        num_images,
        num_clusters,
        images=lambda index: noise(index, 8),
        keys=[f"{EVIL}/{i}.png" for i in range(num_images)],
        class_names=[EVIL] * num_clusters,
        names={0: EVIL},
        map=Map(np.arange(num_images), points, "a plane"),
        logs={"moco": {"train/loss": [(0, 2.0), (10, 1.0)]}},
        review={"command": "train edits={edits} K={num_clusters}", "reviewed": "proto/seed0",
                "fingerprint": "f", "digest": "d"},
    )  # fmt: skip


class Opened:
    """A page of a report, and everything that its console logged."""

    def __init__(self, browser: Any, data: ReportData, folder: Path, **settings: Any) -> None:
        self.said: list[str] = []
        context = browser.new_context(**{"reduced_motion": "reduce", **settings})
        context.set_default_timeout(120_000)  # ms; the machine may be busy
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(write_report(data, folder / "report.html").as_uri())

    def shown(self) -> list[str]:
        """Return the ids of the visible clusters."""
        return [
            each.get_attribute("id")
            for each in self.page.query_selector_all(".cluster")
            if each.is_visible()
        ]


@pytest.mark.parametrize("num_clusters", [1, 200])
def test_hostile_names_do_nothing_and_search_and_filter_work(
    browser: Any, tmp_path: Path, num_clusters: int
) -> None:
    opened = Opened(browser, hostile(250, num_clusters), tmp_path)
    page = opened.page
    assert page.locator("img").count() == 0
    filled = max(num_clusters - 1, 1)  # the last cluster is empty
    assert len(opened.shown()) == min(filled, 12)  # of many, 12 are shown at first
    page.fill("#find", "/17.png")
    page.wait_for_selector("#found li")
    assert page.locator("#found li").count() == 1
    assert EVIL + "/17.png" in page.inner_text("#found")
    assert opened.shown() == [f"cluster-{17 % filled}"]
    page.fill("#find", "no such file")
    page.locator("#status", has_text="0 clusters, 0 files").wait_for()
    assert opened.shown() == []
    page.fill("#find", "")
    page.select_option("#only", "unsure")
    tiles = page.locator("#list .tile:visible")
    assert 0 < tiles.count() < page.locator("#list .tile").count()
    assert all("agreement 0." in str(tiles.nth(i).get_attribute("title")) for i in range(3))
    assert opened.said == []


def test_map_answers_to_pointer_and_keys(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, hostile(), tmp_path)
    page = opened.page
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#point")
    assert ".png" in first
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#point") != first
    for colour in ("label", "confidence", "agreement", "reliable", "cluster"):
        page.select_option("#colour", colour)
        assert page.locator("#key li").count() >= 2
    page.check("#thumbs")
    page.click("#closer")
    page.keyboard.press("Enter")
    assert opened.said == []


def test_tiles_are_reached_by_keyboard_and_open(browser: Any, tmp_path: Path) -> None:
    page = Opened(browser, hostile(), tmp_path).page
    wall = page.locator("#cluster-0 .wall").first
    assert wall.locator('[tabindex="0"]').count() == 1
    wall.locator('[tabindex="0"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("dialog[open]").count() == 1
    assert ".png" in page.inner_text("#one-title")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_where_it_looks_is_switched_by_keyboard(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, report(attention=looked()), tmp_path)
    page, drawn = opened.page, "tile => getComputedStyle(tile, '::after').backgroundImage"
    tile = page.locator("[data-look]").first
    assert tile.evaluate(drawn) == "none"
    page.focus("#look")
    page.keyboard.press("Space")
    assert tile.evaluate(drawn).startswith('url("data:image/png')
    tile.press("Enter")
    assert "the upper right" in page.inner_text("dialog[open] dl")
    big = page.locator("dialog .big .tile")
    assert big.evaluate(drawn).startswith('url("data:image/png')
    assert big.evaluate("tile => getComputedStyle(tile).backgroundImage").startswith('url("data:')
    page.keyboard.press("Escape")
    page.uncheck("#look")
    assert tile.evaluate(drawn) == "none"
    assert opened.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(browser: Any, tmp_path: Path, scheme: str) -> None:
    opened = Opened(
        browser,
        hostile(),
        tmp_path,
        viewport={"width": 360, "height": 740},
        has_touch=True,
        color_scheme=scheme,
    )
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour[4:-1].split(",")) / 3
    assert (brightness > 128) == (scheme == "light")
    assert opened.said == []


def test_page_reads_without_a_script(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, hostile(), tmp_path, java_script_enabled=False)
    assert len(opened.shown()) == 3
    assert not opened.page.locator("#find").is_visible()
    assert opened.page.locator(".tile").count() > 30


def test_many_clusters_are_shown_in_parts_and_the_index_leads_to_all(
    browser: Any, tmp_path: Path
) -> None:
    opened = Opened(browser, hostile(1_000, 101), tmp_path)
    page = opened.page
    assert page.locator(".glance li").count() == 100
    page.click("#more")
    assert len(opened.shown()) == 24
    assert "76 left" in page.inner_text("#more")
    page.click('.glance a[href="#cluster-90"]')
    assert "cluster-90" in opened.shown()
    assert page.locator("#cluster-90").evaluate("part => part.getBoundingClientRect().top") < 200
    page.locator(".order").first.select_option("id")
    first = page.locator(".glance li").first
    assert first.get_attribute("data-id") == opened.shown()[0].removeprefix("cluster-") == "0"
    assert opened.said == []


def test_large_picture_leads_to_its_nearest_images_and_to_the_file(
    browser: Any, tmp_path: Path
) -> None:
    data = replace(
        hostile(),
        keys=[f"a b/{i} \udcff#%?.png" for i in range(60)],
        neighbors=lambda index: np.stack([np.roll(np.arange(len(index)), -1)], axis=1),
        originals="file:///my%20photos/",
    )
    opened = Opened(browser, data, tmp_path)
    page = opened.page
    page.locator("#cluster-0 .tile").first.click()
    image = int(str(page.locator("#cluster-0 .tile").first.get_attribute("data-i")))
    address = page.locator("#one-title a").get_attribute("href")
    assert address == f"file:///my%20photos/a%20b/{image}%20%FF%23%25%3F.png"
    page.locator("#one .near button").first.click()
    assert f"a b/{image + 1} \\udcff#%?.png" in page.inner_text("#one-title")
    assert opened.said == []


def test_another_number_is_shown_at_once_with_its_command(browser: Any, tmp_path: Path) -> None:
    previews = [Preview(2, [(40, [0, 1]), (20, [2])], f"train {EVIL}")]
    choice = KChoice(4, 3, False, [(2, 0.1), (3, 0.9)], previews)
    opened = Opened(browser, replace(hostile(), k_choice=choice), tmp_path)
    page = opened.page
    page.click(".preview")
    assert page.locator("#preview li").count() == 2
    assert "40 images" in page.inner_text("#preview")
    assert page.locator("#preview .piece").count() == 3
    assert page.inner_text("#preview code") == f"train {EVIL}"
    page.click(".preview")
    assert not page.locator("#preview").is_visible()
    assert opened.said == []


def test_the_table_is_downloaded_with_names_and_runs_nothing(browser: Any, tmp_path: Path) -> None:
    data = replace(hostile(), keys=["=1+1.png", 'a,"b".png', *(f"{i}.png" for i in range(58))])
    page = Opened(browser, data, tmp_path).page
    with page.expect_download() as download:
        page.click(".first .csv")
    download.value.save_as(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[:3]] == ["'=1+1.png", 'a,"b".png', "0.png"]
    assert [int(row["cluster"]) for row in rows] == data.clusters.tolist()
    assert {row["name"] for row in rows if row["cluster"] == "0"} == {EVIL}


def test_edits_are_saved_as_json_and_read_again(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, hostile(), tmp_path)
    page = opened.page
    page.click("#edit")
    page.fill("#cluster-1 .edit input[type=text]", "owls")
    page.keyboard.press("Enter")
    page.select_option("#cluster-2 .edit select", "1")
    page.fill("#cluster-0 .edit input[type=number]", "3")
    page.locator("#cluster-0 .tile").first.click()
    moved = page.locator("#cluster-0 .tile").first.get_attribute("data-i")
    assert page.is_disabled("#move")  # no cluster is chosen yet
    page.select_option("#target", "1")
    page.click("#move")
    assert "4 clusters become 5" in page.inner_text("#summary")
    assert page.inner_text("#cluster-1-title") == "owls"
    with page.expect_download() as download:
        page.click("#save")
    file = tmp_path / "edits.json"
    download.value.save_as(file)
    edits = json.loads(file.read_text())
    assert edits == {
        "format": "spice-pl edits 1",
        "reviewed": "proto/seed0",
        "fingerprint": "f",
        "digest": "d",
        "num_clusters": 4,
        "names": {"0": EVIL, "1": "owls"},
        "merge": [[1, 2]],
        "split": {"0": 3},
        "move": {f"{EVIL}/{moved}.png": 1},
    }
    assert page.inner_text("#command") == "train edits=edits.json K=5"
    page.reload()
    page.click("#edit")
    page.set_input_files("#open", file)
    page.locator("#summary", has_text="become 5").wait_for()
    page.click("#undo")
    assert "Nothing changed yet" in page.inner_text("#summary")
    assert opened.said == []


def test_a_suggested_name_is_marked_and_taken_by_a_click(browser: Any, tmp_path: Path) -> None:
    data = replace(hostile(), labels=None, names={}, suggested={0: (EVIL, 0.416), 1: ("cat", 1.0)})
    page = Opened(browser, data, tmp_path).page
    assert page.inner_text(".glance li[data-id='1'] .suggested") == "suggested (1.00): cat"
    assert f"“{EVIL}”, score 0.42" in str(page.text_content("#cluster-0 header"))
    title = page.locator("#cluster-0-title")
    assert title.text_content() == "Cluster 0"  # nothing is named by it
    page.click("#edit")
    page.locator("#cluster-0 .edit button", has_text="Use suggested name").click()
    assert title.text_content() == EVIL
    page.click("#undo")
    assert title.text_content() == "Cluster 0"


def test_the_name_of_a_folder_is_taken_by_a_click_and_undone(browser: Any, tmp_path: Path) -> None:
    keys = [f"{EVIL if i % 3 == 0 else 'trip'}/{i}.png" for i in range(60)]
    opened = Opened(browser, replace(hostile(), labels=None, names={}, keys=keys), tmp_path)
    page = opened.page
    title = page.locator("#cluster-0-title")
    assert title.text_content() == "Cluster 0"
    page.click("#edit")
    page.locator("#cluster-0 .edit button", has_text="Use folder name").click()
    assert title.text_content() == EVIL.rpartition("/")[2]
    page.click("#undo")
    assert title.text_content() == "Cluster 0"
    assert opened.said == []
