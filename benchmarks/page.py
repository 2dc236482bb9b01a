"""How long a browser takes for a page of many images, compared with a page of few.

`python -m benchmarks.page` prints a table and, last, a line of JSON with the ratios of 5,000 images
to 500. The pages have the size of MS-COCO (35 regions, 80 labels), two networks, random numbers and
no photographs. They are measured in turn, so that disturbances of the machine affect both. Chromium
is needed.

- ready: from opening the page to its first gallery;
- filter: from choosing a label and an order to the new gallery;
- turn: to the next page of the gallery;
- point: from pointing at a region to its best labels, the first time, while these are still on
  disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, sync_playwright
from tabulate import tabulate

from pipeline.report.figures import looks
from pipeline.report.folder import write_data, write_frame
from pipeline.report.gallery import (
    BEST_LABELS,
    ShownRegions,
    ShownScores,
    write_images,
    write_scores,
)

VARIANTS = ("full", "max-pool")
SIZES = ((500, 375), (375, 500), (1000, 100), (100, 1000))  # of the images, repeated


def write_random_page(
    folder: Path, *, images: int, regions: int, labels: int, seed: int = 0
) -> np.ndarray:
    """Write a page of random numbers, without figures, into an empty folder.

    Returns:
        (N, C), the scores that both networks have.
    """
    rng = np.random.default_rng(seed)
    write_frame(folder)
    names = [f"label {number}" for number in range(labels)]
    curve = {variant: [[1], [1]] for variant in VARIANTS}
    write_data(folder, "curves", [curve, *[None] * (len(names) - 1)])
    write_data(folder, "times", [])
    write_data(folder, "overview", _overview(images, names))
    corners = np.sort(rng.random((images, regions, 2, 2), np.float32), axis=2)
    write_images(
        folder,
        [f"{number:012d}" for number in range(images)],
        np.resize(np.array(SIZES, np.int32), (images, 2)),
        np.zeros(images, dtype=bool),
        (rng.random((images, labels)) < 0.1).astype(np.int8),
        ShownRegions(
            corners.reshape(images, regions, 4),
            -np.sort(-rng.random((images, regions), np.float32)),
            np.ones((images, regions), np.int16),
            np.full(images, regions, np.int16),
        ),
    )
    scores = rng.random((images, labels), np.float32)
    shape = (images, regions, BEST_LABELS)
    shown = ShownScores(
        scores,
        rng.integers(0, regions, (images, labels)).astype(np.int16),
        rng.integers(0, labels, shape).astype(np.int16),
        rng.random(shape, np.float32),
    )
    for number in range(len(VARIANTS)):
        write_scores(folder, number, shown)
    return scores


def _overview(images: int, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "dataset": "random",
        "caption": "random numbers",
        "interval": "",
        "interval_is_weak": False,
        "top3": "",
        "few": 1,
        "thresholds": None,
        "doubts": None,
        "detector": "chance",
        "base": VARIANTS[0],
        "variants": VARIANTS,
        "looks": looks(VARIANTS),
        "labels": labels,
        "groups": None,
        "positives": [images] * len(labels),
        "ap": {variant: [[50, None]] * len(labels) for variant in VARIANTS},
        "columns": [{"key": "mAP", "title": "mAP", "group": ""}],
        "rows": [],
        "paper": None,
        "figures": [],
        "gallery": {
            "images": images,
            "of": images,
            "photographs": {"origin": "", "problem": ""},
            "seed": 0,
            "classes": None,
            "attributions": ["logits"] * len(VARIANTS),
            "decides": [True] * len(VARIANTS),
        },
        "run": {"facts": [], "packages": [], "settings": []},
    }


def measure(browser: Browser, folder: Path) -> dict[str, float]:
    """Measure the milliseconds of each step; the module's docstring lists them."""
    page = browser.new_page()
    counter = page.locator("#gallery-count")
    taken: dict[str, float] = {}

    def timed(name: str, act: Callable[[], object], done: str) -> None:
        began = time.perf_counter()
        act()
        page.wait_for_function(done)
        taken[name] = 1000 * (time.perf_counter() - began)

    def says(text: str) -> str:
        return f'document.querySelector("#gallery-count").textContent.includes("{text}")'

    timed("ready", lambda: page.goto((folder / "index.html").as_uri()), says("page 1 "))
    controls = page.locator("#gallery-controls")
    order = controls.get_by_role("combobox", name="Order")
    label = controls.get_by_role("combobox", name="Label")
    before = counter.inner_text()

    def choose() -> None:
        controls.get_by_role("combobox", name="Show").select_option("wrong")
        label.select_option("7")
        order.select_option("highest")

    timed("filter", choose, f"!({says(before)})")
    timed("turn", page.locator("#next").click, says("page 2 "))
    point = page.locator(".card rect").last.hover
    listed = (
        r'[...document.querySelectorAll(".info")].some((p) => /\): label \d/.test(p.textContent))'
    )
    timed("point", point, listed)
    page.close()
    return taken


def main() -> None:
    """Measure both pages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument("--many", type=int, default=5000)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    taken: dict[int, list[dict[str, float]]] = {options.few: [], options.many: []}
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        for images in taken:
            (Path(name) / str(images)).mkdir()
            write_random_page(Path(name) / str(images), images=images, regions=35, labels=80)
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        for turn in range(options.turns + 1):
            for images, measurements in taken.items():
                one = measure(browser, Path(name) / str(images))
                if turn:  # the first turn warms up
                    measurements.append(one)
        browser.close()
    steps = list(taken[options.few][0])
    medians = {
        images: [statistics.median(one[step] for one in measurements) for step in steps]
        for images, measurements in taken.items()
    }
    rows = [(f"{images} images", *map(round, times)) for images, times in medians.items()]
    print(tabulate(rows, headers=["milliseconds", *steps]))
    ratios = {
        step: round(many / few, 2)
        for step, few, many in zip(steps, medians[options.few], medians[options.many], strict=True)
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
