"""Measure the report of many images: seconds and memory to make it, bytes, and a browser's work.

    python benchmarks/report.py --images 50000 --clusters 200 [--features 1280] [--side 160]

The images are smooth random patterns in groups, so that they compress like photographs. Prints one
JSON object. The browser is Chromium, if it and playwright are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spice_pl.data.images import ImageSet
from spice_pl.reports.page import write_report
from spice_pl.runs.clusters import ReliableRule, cluster_table
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.page_data import report_data

SCREENS = {"1280": (1280, 900), "400": (400, 800)}  # width and height in CSS pixels


def make_run(path: Path, count: int, clusters: int, width: int, side: int) -> tuple[Any, ...]:
    """Write a run and the one before it; return their folders, the images and metrics."""
    generator = np.random.default_rng(0)
    groups = generator.integers(0, clusters, count)
    centres = generator.normal(size=(clusters, width)).astype(np.float32)
    run, before = RunFolder(path / "proto" / "run", "smoothed"), RunFolder(path / "embed" / "run")
    for folder in (run, before):
        folder.path.mkdir(parents=True)
    features = np.lib.format.open_memmap(
        run.path / "features.npy", "w+", np.float32, (count, width)
    )
    pixels = np.memmap(path / "pixels", np.uint8, "w+", shape=(count, 3, side, side))
    patterns = generator.normal(size=(clusters, 3, 12, 12)).astype(np.float32)
    for start in range(0, count, 1000):
        part = groups[start : start + 1000]
        features[start : start + 1000] = centres[part] + 1.5 * generator.normal(
            size=(len(part), width)
        )
        coarse = patterns[part] + generator.normal(size=(len(part), 3, 12, 12))
        smooth = torch.nn.functional.interpolate(
            torch.from_numpy(coarse).float(), (side, side), mode="bicubic"
        )
        pixels[start : start + 1000] = (128 + 45 * smooth).clamp(0, 255).byte().numpy()
    embeddings = generator.normal(size=(clusters, 64))[groups] + generator.normal(size=(count, 64))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.save(run.path / "embeddings.npy", embeddings.astype(np.float32))
    logits = 4 * np.eye(clusters, dtype=np.float32)[groups]
    logits += generator.normal(size=logits.shape).astype(np.float32)
    probs = np.exp(logits)
    np.save(run.path / "probs.npy", probs / probs.sum(axis=1, keepdims=True))
    keys = [f"holiday {i % 97}/IMG_{i:06}.jpg" for i in range(count)]
    images = ImageSet("photos", np.asarray(pixels), keys, "benchmark")
    common = {"num_images": count, "seed": 0, "seconds": 1.0, "digest": "d", "fingerprint": "f"}
    before.write_json("metrics.json", {**common, "stage": "embed"})
    metrics = {
        **common,
        **{"stage": "proto", "title": "stage 2", "num_clusters": clusters, "rows": []},
        **{"overrides": [], "settings": {}, "versions": {}, "preset": "none"},
        **{"seconds_in_all": 1.0, "peak_memory_mb": 1.0, "devices": 1, "precision": "32-true"},
    }
    return run, before, images, metrics


def forget_peak() -> None:
    """Let the system count the peak memory from here on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Return the peak memory that is not shared with files, in MB (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) / 1024


def browse(page: Path) -> dict[str, Any]:
    """Return what a browser says about a page, by width of its window."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        return {}
    said: dict[str, Any] = {}
    with sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=found, args=sandbox)
        for name, (width, height) in SCREENS.items():
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(page.as_uri())
            tab.wait_for_timeout(1000)
            said[name] = tab.evaluate(
                """() => ({
                first_paint_s: performance.getEntriesByType("paint")[0].startTime / 1000,
                loaded_s: performance.getEntriesByType("navigation")[0].loadEventEnd / 1000,
                height_px: document.documentElement.scrollHeight,
                width_px: document.documentElement.scrollWidth,
                elements: document.querySelectorAll("*").length,
                heap_mb: performance.memory.usedJSHeapSize / 1e6})"""
            )
        browser.close()
    return said


def main() -> None:
    """Measure one page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, default in (("images", 50_000), ("clusters", 200), ("features", 1280), ("side", 160)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="folder that keeps the page")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run, before, images, metrics = make_run(
            Path(place), given.images, given.clusters, given.features, given.side
        )
        rule = ReliableRule(num_neighbors=20, agreement=0.95, confidence=0.9, balance="cap")
        table = cluster_table(images.keys, run.embeddings(images.train_index), run.probs, rule, 0)
        forget_peak()
        begun = time.monotonic()
        data = report_data(run, [before], images, metrics, table)
        collected = time.monotonic()
        page = write_report(data, (given.keep or Path(place)) / "report.html")
        written = time.monotonic()
        result = {
            **{name: getattr(given, name) for name in ("images", "clusters", "features", "side")},
            "data_s": collected - begun,
            "page_s": written - collected,
            "peak_memory_mb": peak_memory_mb(),
            "bytes": page.stat().st_size,
            "browser": browse(page),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
