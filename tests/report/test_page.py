"""The page of `gmpipe report`, in a real browser: what a reader sees, points at and types.

Chromium is looked for on this machine, and its tests are skipped where there is none; where CI is
set, that is a failure.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from axe_playwright_python.sync_playwright import Axe
from flows import VARIANTS, Flow
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from small import make_small, write_params

from benchmarks.page import SIZES, write_random_page
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.evaluation.paper import METHOD, PAPER
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import open_split
from pipeline.shards.reader import RegionCache

expect.set_options(timeout=30_000)  # a machine that does something else may be slow

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        problem = f"no browser: none of {', '.join(_BROWSERS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class Reader:
    """Somebody with the page open. Every request is noted, and every error fails the test."""

    def __init__(self, browser: Browser, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda line: self.problems.append(line.text) if line.type == "error" else None,
        )
        self.page.goto((folder / "index.html").as_uri())
        expect(self.page.locator("#gallery-count")).not_to_be_empty()

    def column(self, table: str, number: int) -> list[str]:
        """What a column of a table shows, from top to bottom; 0 is that of the row's name."""
        cells = self.page.locator(f"#{table} tbody tr")
        return [row.locator("th, td").nth(number).inner_text() for row in cells.all()]

    def close(self) -> None:
        self.context.close()
        assert self.problems == []
        inside = self.folder.resolve().as_uri() + "/"
        assert [url for url in self.requests if not url.startswith((inside, "data:"))] == []


@pytest.fixture
def reader(browser: Browser, made: Flow, tmp_path: Path) -> Iterator[Reader]:
    """Of the page of the tiny scenes, in another place than it was made in."""
    moved = Path(shutil.copytree(made / "reports/tiny", tmp_path / "a page, moved #1"))
    one = Reader(browser, moved, viewport={"width": 1280, "height": 900})
    yield one
    one.close()


@pytest.fixture(scope="module")
def with_seeds(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A data set of the paper, without photographs, two variants with two seeds."""
    flow = make_small(tmp_path_factory.mktemp("page") / "small")
    write_params(flow.folder, seeds=[0, 1])
    flow.ok("compare", "--seed", "0", "--seed", "1", "--jobs", "1")
    flow.ok("sweep", "network.modules=1,2", "--jobs", "1")
    flow.ok("report")
    return flow


@pytest.fixture
def paper_reader(browser: Browser, with_seeds: Flow) -> Iterator[Reader]:
    one = Reader(browser, with_seeds / "reports/voc2007")
    yield one
    one.close()


def truth_and_scores(flow: Flow, run: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, C) truth, scores and winning regions of a run of the tiny scenes."""
    truth = read_manifest(flow / "data/tiny/prepared/manifest.parquet").truth("test")
    table = pq.read_table(flow / "runs/tiny" / run / "predictions.parquet")
    return truth, *(np.array(table.column(name).to_pylist()) for name in ("scores", "regions"))


def choice(page: Page, name: str) -> Locator:
    """One of the gallery's lists to choose from."""
    controls = page.locator("#gallery-controls")
    return controls.get_by_role("combobox", name=name, exact=True)


# Tables ------------------------------------------------------------------------------------------


def test_results_are_there_and_sort(paper_reader: Reader, with_seeds: Flow) -> None:
    page = paper_reader.page
    with (with_seeds / "reports/voc2007/tables/results.csv").open(newline="") as stream:
        runs = list(csv.DictReader(stream))
    names = paper_reader.column("results-table", 0)
    assert names[:6] == ["full", "seed 0", "seed 1", "max-pool", "seed 0", "seed 1"]
    paper = [re.sub(r"\s*paper$", "", name) for name in names[6:]]
    assert paper == list(PAPER["voc2007"].methods)
    shown = paper_reader.column("results-table", 1)
    assert [shown[place] for place in (1, 2, 4, 5)] == [f"{float(r['mAP']):.1f}" for r in runs]
    mean = np.mean([float(run["mAP"]) for run in runs[:2]])
    spread = np.std([float(run["mAP"]) for run in runs[:2]], ddof=1)
    assert shown[0].startswith(f"{mean:.1f} ± {spread:.1f}")
    assert re.search(r"\d to \d", shown[0])  # the interval
    assert shown[names.index(f"{METHOD}paper")] == "94.7"

    head = page.locator("#results-table thead").get_by_role("button", name="mAP", exact=True)
    for direction, reverse in (("descending", True), ("ascending", False)):
        head.click()
        cell = page.get_by_role("columnheader", name="mAP", exact=True)
        expect(cell).to_have_attribute("aria-sort", direction)
        rows = paper_reader.column("results-table", 0)
        maps = [
            float(text.split()[0])
            for name, text in zip(rows, paper_reader.column("results-table", 1), strict=True)
            if not name.startswith("seed")
        ]
        assert maps == sorted(maps, reverse=reverse)
        # Seeds stay with their variant.
        assert rows[rows.index("full") : rows.index("full") + 3] == ["full", "seed 0", "seed 1"]
        expect(head).to_be_focused()

    page.get_by_label("the paper's rows").uncheck()
    assert len(paper_reader.column("results-table", 0)) == 6
    page.get_by_label("each seed").uncheck()
    assert sorted(paper_reader.column("results-table", 0)) == ["full", "max-pool"]
    forced = page.get_by_label("always three")
    before = paper_reader.column("results-table", -1)
    forced.check()
    assert paper_reader.column("results-table", -1) != before
    expect(page.locator("#paper-differences li").first).to_contain_text("detector")


def test_every_metric_of_all_and_top_3_is_in_the_table(paper_reader: Reader) -> None:
    heads = paper_reader.page.locator("#results-table thead tr").nth(1).locator("button")
    six = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
    expected = ["network", "mAP", "11-point mAP", "minus full", *six, *six]
    assert [re.sub(r"\W*$", "", text) for text in heads.all_inner_texts()] == expected


def test_labels_sort_by_what_they_gain_and_lose(reader: Reader, made: Flow) -> None:
    page = reader.page
    ap = {name: made.metrics(f"{name}-s0")["AP"] for name in VARIANTS}
    gain = {
        label: ap["max-pool"][label] - ap["full"][label]
        for label in VOCABULARY
        if ap["full"][label] is not None
    }
    for button, sign in (("Most lost first", 1), ("Most gained first", -1)):
        page.get_by_role("button", name=button).click()
        shown = [label for label in reader.column("labels-table", 0) if label in gain]
        found = [sign * gain[label] for label in shown]
        assert found == sorted(found)
        assert len(shown) == len(gain)
    few = sum(count < 10 for count in (truth_and_scores(made, "full-s0")[0] == 1).sum(axis=0))
    expect(page.locator("#labels-note")).to_contain_text(f"{few} of 18 labels have fewer than 10")
    by_name = page.locator("#labels-table thead").get_by_role("button", name="label")
    by_name.click()
    assert reader.column("labels-table", 0) == sorted(VOCABULARY)
    first = sorted(VOCABULARY)[0]
    row = page.locator("#labels-table tbody tr").first
    expect(row).to_contain_text(f"{ap['full'][first]:.1f}")


def test_the_curve_of_a_label_can_be_chosen(reader: Reader, made: Flow) -> None:
    page = reader.page
    label = "person"
    page.locator("#curve-controls select").select_option(label)
    for name in VARIANTS:
        value = made.metrics(f"{name}-s0")["AP"][label]
        expect(page.locator("#curve-chart .legend")).to_contain_text(f"{name}: AP {value:.1f}")
    assert page.locator("#curve-chart path").count() == len(VARIANTS)


# Gallery -----------------------------------------------------------------------------------------


def test_filters_keep_the_images_they_name(reader: Reader, made: Flow) -> None:
    page = reader.page
    truth, scores, _ = truth_and_scores(made, "max-pool-s0")
    over = scores > 0.5
    kinds = {
        "right": (over & (truth == 1), ~(over != (truth == 1)).any(axis=1)),
        "wrong": (over & (truth == 0), (over & (truth == 0)).any(axis=1)),
        "missed": (~over & (truth == 1), (~over & (truth == 1)).any(axis=1)),
    }
    images = len(truth)

    def count(expected: int) -> None:
        counter = page.locator("#gallery-count")
        expect(counter).to_have_text(re.compile(rf"^{expected} of {images} images"))

    count(images)
    choice(page, "Network").select_option("max-pool")
    for kind, (by_label, by_image) in kinds.items():
        choice(page, "Show").select_option(kind)
        choice(page, "Label").select_option(label="any")
        count(int(by_image.sum()))
        for number in range(0, len(VOCABULARY), 5):
            choice(page, "Label").select_option(label=VOCABULARY[number])
            count(int(by_label[:, number].sum()))
    choice(page, "Show").select_option("any")
    label = int(np.argmax(scores.std(axis=0)))
    choice(page, "Label").select_option(label=VOCABULARY[label])
    low, high = (round(100 * value) for value in np.quantile(scores[:, label], [0.3, 0.8]))
    for name, value in (("Confidence from", low), ("to", high)):
        field = page.get_by_role("spinbutton", name=re.compile(f"^{name}"))
        field.fill(str(value))
        field.press("Enter")
    kept = (100 * scores[:, label] >= low) & (100 * scores[:, label] <= high)
    count(int(kept.sum()))
    choice(page, "Order").select_option("highest")
    order = [i for i in np.argsort(-scores[:, label], kind="stable") if kept[i]]
    shown = page.locator(".card")
    assert [int(card.get_attribute("data-image") or -1) for card in shown.all()] == order


def lit(place: Locator) -> list[int]:
    """The regions that a picture lights up."""
    found = place.locator("rect.on").all()
    return [int(box.get_attribute("data-region") or -1) for box in found]


def test_pointing_at_a_label_lights_up_its_region(reader: Reader, made: Flow) -> None:
    _, scores, regions = truth_and_scores(made, "full-s0")
    for image in (0, 3):
        card = reader.page.locator(f'.card[data-image="{image}"]')
        top = np.argsort(-scores[image], kind="stable")[:3]
        chips = card.locator(".chips").first.locator(".chip")
        shown = [int(chip.get_attribute("data-label") or -1) for chip in chips.all()]
        assert shown == top.tolist()
        for label in top:
            chip = chips.locator(f'xpath=self::*[@data-label="{label}"]')
            chip.hover()
            assert lit(card) == [regions[image, label]]
            expect(card.locator(".info")).to_contain_text(
                f"{VOCABULARY[label]} {100 * scores[image, label]:.1f} %"
            )
        card.locator("h3").hover()
        assert lit(card) == []


def test_pointing_at_a_region_lists_its_best_labels(reader: Reader, made: Flow) -> None:
    cache = RegionCache.open(made / "cache/tiny")
    manifest = read_manifest(made / "data/tiny/prepared/manifest.parquet")
    checkpoint = load_checkpoint(made / "runs/tiny/full-s0/checkpoint.pt")
    split = open_split(cache, manifest, "test")
    batch = split.instances(np.arange(1)).to(
        checkpoint.label_vectors.device, checkpoint.label_vectors.dtype
    )
    logits = checkpoint.network()(batch, checkpoint.label_vectors)[0].detach()
    reader.page.locator('.card[data-image="0"] .open').click()
    dialog = reader.page.locator("dialog")
    for region in range(int(batch.mask[0].sum())):
        dialog.locator(f'.chip[data-region="{region}"]').hover()
        assert lit(dialog) == [region]
        best = logits[region].topk(5)
        listed = ", ".join(
            f"{VOCABULARY[label]} {100 * value:.1f}"
            for label, value in zip(best.indices, best.values.sigmoid(), strict=True)
        )
        expect(dialog.locator(".info")).to_contain_text(f"region {region} (detector:")
        expect(dialog.locator(".info")).to_contain_text(listed)


def test_right_and_wrong_are_marked_and_the_truth_is_shown(reader: Reader, made: Flow) -> None:
    truth, scores, _ = truth_and_scores(made, "full-s0")
    reader.page.locator('.card[data-image="2"] .open').click()
    pane = reader.page.locator("dialog .pane")
    assert pane.locator(".chips").first.locator(".chip").count() == len(VOCABULARY)
    for label, name in enumerate(VOCABULARY):
        expected = {
            (True, 1): "right",
            (True, 0): "wrong",
            (False, 1): "missed",
            (False, 0): "absent",
        }[bool(scores[2, label] > 0.5), int(truth[2, label])]
        chip = pane.locator(".chips").first.locator(f'.chip[data-label="{label}"]')
        expect(chip).to_have_class(re.compile(rf"\b{expected}\b"))
        expect(chip).to_contain_text(name)
    shown = pane.locator(".chips").nth(1).locator(".chip")
    assert [int(chip.get_attribute("data-label") or -1) for chip in shown.all()] == np.flatnonzero(
        truth[2] == 1
    ).tolist()


def test_two_networks_stand_side_by_side(reader: Reader, made: Flow) -> None:
    choice(reader.page, "beside").select_option("max-pool")
    card = reader.page.locator('.card[data-image="1"]')
    expect(card.locator(".network")).to_have_text(["full", "max-pool"])
    for place, run in enumerate(("full-s0", "max-pool-s0")):
        _, scores, regions = truth_and_scores(made, run)
        label = int(scores[1].argmax())
        chip = card.locator(".pane").nth(place).locator(".chip").first
        expect(chip).to_contain_text(f"{VOCABULARY[label]}{100 * scores[1, label]:.1f}")
        chip.hover()
        assert lit(card) == [regions[1, label]]


def test_images_on_which_two_networks_differ(reader: Reader, made: Flow) -> None:
    page = reader.page
    show = choice(page, "Show").locator("option")
    assert show.count() == 4  # a network alone differs from none
    choice(page, "beside").select_option("max-pool")
    choice(page, "Show").select_option("differs")
    over = [truth_and_scores(made, f"{name}-s0")[1] > 0.5 for name in VARIANTS]
    differs = over[0] != over[1]
    counter = page.locator("#gallery-count")
    expect(counter).to_have_text(re.compile(f"^{int(differs.any(axis=1).sum())} of 12 images"))
    label = int(differs.sum(axis=0).argmax())
    choice(page, "Label").select_option(str(label))
    expect(counter).to_have_text(re.compile(f"^{int(differs[:, label].sum())} of 12 images"))
    choice(page, "beside").select_option("")
    assert show.count() == 4
    expect(choice(page, "Show")).to_have_value("any")


def test_everything_can_be_reached_by_keyboard(reader: Reader, made: Flow) -> None:
    page = reader.page
    _, scores, regions = truth_and_scores(made, "full-s0")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    opener = page.locator('.card[data-image="0"] .open')
    opener.focus()
    page.keyboard.press("Tab")
    card = page.locator('.card[data-image="0"]')
    assert lit(card) == [regions[0, scores[0].argmax()]]
    opener.focus()
    page.keyboard.press("Enter")
    title = page.locator("#detail-title")
    first = title.inner_text()
    page.keyboard.press("ArrowRight")
    expect(title).not_to_have_text(first)
    second = title.inner_text()
    page.keyboard.press("ArrowLeft")
    expect(title).to_have_text(first)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).not_to_be_visible()
    expect(page.locator(".open:focus")).to_have_text(second)


def test_without_photographs_boxes_stand_on_empty_ground(paper_reader: Reader) -> None:
    card = paper_reader.page.locator(".card").first
    assert card.locator("img").count() == 0
    assert card.locator("rect").count() == 3
    frame = card.locator(".picture").bounding_box()
    assert frame is not None
    assert frame["width"] == pytest.approx(frame["height"], rel=0.02)  # 100 x 100, as they say
    expect(paper_reader.page.locator("#gallery-about")).to_contain_text("18 photographs are not")


# The whole page ----------------------------------------------------------------------------------


def test_figures_tables_and_what_was_run_are_there(paper_reader: Reader, with_seeds: Flow) -> None:
    page = paper_reader.page
    folder = with_seeds / "reports/voc2007"
    names = [
        "average-precision",
        "gains-and-losses",
        "learning-curves",
        "precision-recall",
        "calibration",
        "co-occurrence",
        "label-map",
        "sweep-full-network-modules",
    ]
    assert sorted(path.stem for path in (folder / "figures").glob("*.svg")) == sorted(names)
    for name in names:
        image = page.locator(f"#figure-{name} img")
        image.scroll_into_view_if_needed()
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 100
        assert len(image.get_attribute("alt") or "") > 40
    for link in page.locator("a[href]:not([href^='#'])").all():
        assert (folder / (link.get_attribute("href") or "")).is_file()
    facts = page.locator("#run-facts")
    fingerprint = RegionCache.open(with_seeds / "cache/voc2007").fingerprint
    for text in (fingerprint, "imported/test", "torch", "latent_size: 4", "train", "full-s1"):
        expect(facts).to_contain_text(text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_reads_well(browser: Browser, made: Flow, width: int, scheme: Any) -> None:
    """No sideways scrolling of the page, and nothing that axe-core finds wrong."""
    size: Any = {"width": width, "height": 900}
    one = Reader(browser, made / "reports/tiny", viewport=size, color_scheme=scheme)
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    options = {"preload": False}  # it would ask for style sheets that a page from disk can't fetch
    found = Axe().run(one.page, options=options).response["violations"]
    one.page.locator(".card .open").first.click()
    found += Axe().run(one.page, options=options).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    one.close()


def test_five_thousand_images_are_shown_a_page_at_a_time(browser: Browser, tmp_path: Path) -> None:
    scores = write_random_page(tmp_path, images=5000, regions=35, labels=20)
    one = Reader(browser, tmp_path)
    page = one.page
    assert page.locator(".card").count() == 24
    # What more there is of the regions is read when somebody asks for it.
    assert not any("regions-0" in url for url in one.requests)
    page.locator("#next").click()
    expect(page.locator("#gallery-count")).to_contain_text("page 2 of 209")
    choice(page, "Label").select_option(label="label 7")
    choice(page, "Order").select_option("highest")
    first = page.locator(".card").first.get_attribute("data-image")
    assert int(first or -1) == int(scores[:, 7].argmax())
    page.locator(".card rect").last.hover()
    expect(page.locator(".info", has_text="detector")).to_contain_text(re.compile(r"\): label \d"))
    assert any("regions-0" in url for url in one.requests)
    one.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_keep_their_shape(browser: Browser, tmp_path: Path, width: int) -> None:
    write_random_page(tmp_path, images=len(SIZES), regions=2, labels=2)
    one = Reader(browser, tmp_path, viewport={"width": width, "height": 700})
    for number, (across, down) in enumerate(SIZES):
        card = one.page.locator(f'.card[data-image="{number}"]')
        card.locator(".open").click()
        for place in (card, one.page.locator("dialog")):
            box = place.locator(".picture").bounding_box()
            assert box is not None
            assert box["width"] / box["height"] == pytest.approx(across / down, rel=0.05)
            assert box["height"] <= 500
        one.page.keyboard.press("Escape")
    one.close()


def test_a_missing_script_is_said(browser: Browser, made: Flow, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "reports/tiny", tmp_path / "page"))
    (folder / "data/images.js").unlink()
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    expect(page.locator("#problem")).to_contain_text("data/images.js is missing")
    page.close()


def test_names_are_text_and_never_markup(browser: Browser, made: Flow, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "reports/tiny", tmp_path / "page"))
    images = (folder / "data/images.js").read_text()
    named = images.replace("test-00000", "<img src=x onerror=alert(1)>")
    assert named != images
    (folder / "data/images.js").write_text(named)
    one = Reader(browser, folder)
    expect(one.page.locator(".open").first).to_have_text("<img src=x onerror=alert(1)>")
    one.close()
