"""How long a browser takes over a page of many images, against one of few.

`python -m benchmarks.page` prints a table and, last, a line of JSON with the ratios of 5,000 images
to 500. Pages are of MS-COCO's size, 35 regions and 80 labels, two networks, with random numbers and
without photographs. They take turns, so that what disturbs the machine disturbs both. It needs
Chromium.

- ready: from asking for the page to its first gallery;
- filter: choosing a label and an order, to the new gallery;
- turn: to the next page of the gallery;
- point: from pointing at a region to its best labels, the first time, when they are still on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright
from tabulate import tabulate

from pipeline.report.gallery import BEST_LABELS, ShownRegions, ShownScores
from pipeline.report.page import write_data, write_frame, write_images, write_scores

VARIANTS = ("full", "max-pool")
SIZES = ((500, 375), (375, 500), (1000, 100), (100, 1000))  # of the images, in turn


def write_random_page(
    folder: Path, *, images: int, regions: int, labels: int, seed: int = 0
) -> np.ndarray:
    """A page without figures, of random numbers, in an empty folder.

    Returns:
        (N, C) the scores that both networks have.
    """
    rng = np.random.default_rng(seed)
    write_frame(folder)
    names = [f"label {place}" for place in range(labels)]
    write_data(folder, "curves", {names[0]: {variant: [[1], [1]] for variant in VARIANTS}})
    write_data(folder, "times", [])
    write_data(
        folder,
        "overview",
        {
            "dataset": "random",
            "caption": "random numbers",
            "interval": "",
            "few": 1,
            "detector": "chance",
            "base": VARIANTS[0],
            "variants": VARIANTS,
            "labels": names,
            "groups": {},
            "positives": [images] * labels,
            "ap": {variant: [[50, None]] * labels for variant in VARIANTS},
            "columns": [{"key": "mAP", "title": "mAP", "group": ""}],
            "rows": [],
            "paper": None,
            "figures": [],
            "gallery": {"images": images, "of": images, "pictures": 0, "seed": 0, "classes": None},
            "run": {"facts": [], "packages": [], "settings": ""},
        },
    )
    corners = np.sort(rng.random((images, regions, 2, 2), np.float32), axis=2)
    write_images(
        folder,
        [f"{place:012d}" for place in range(images)],
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
    found = ShownScores(
        scores,
        rng.integers(0, regions, (images, labels)).astype(np.int16),
        rng.integers(0, labels, shape).astype(np.int16),
        rng.random(shape, np.float32),
    )
    for place in range(len(VARIANTS)):
        write_scores(folder, place, found)
    return scores


def measure(browser: Browser, folder: Path) -> dict[str, float]:
    """Milliseconds of each step; see the module."""
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
    told = (
        r'[...document.querySelectorAll(".info")].some((p) => /\): label \d/.test(p.textContent))'
    )
    timed("point", point, told)
    page.close()
    return taken


def main() -> None:
    """Measure, print."""
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
            for images, found in taken.items():
                one = measure(browser, Path(name) / str(images))
                if turn:  # the first is to warm up
                    found.append(one)
        browser.close()
    steps = list(taken[options.few][0])
    medians = {
        images: [statistics.median(one[step] for one in found) for step in steps]
        for images, found in taken.items()
    }
    rows = [(f"{images} images", *map(round, found)) for images, found in medians.items()]
    print(tabulate(rows, headers=["milliseconds", *steps]))
    ratios = {
        step: round(many / few, 2)
        for step, few, many in zip(steps, medians[options.few], medians[options.many], strict=True)
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
