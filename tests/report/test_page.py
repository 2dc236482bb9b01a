"""The page of `gmpipe report` in a browser: tables, curves, figures, and the page as a whole."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from flows import VARIANTS, Flow
from playwright.sync_api import Browser, expect
from reading import Reader, truth_and_scores
from small import make_small, write_params

from pipeline.datasets.readers.voc import VOCABULARY as VOC_LABELS
from pipeline.datasets.scenes import VOCABULARY
from pipeline.evaluation.paper import METHOD, PAPER
from pipeline.evaluation.tables import FEW
from pipeline.report.figures import COLOURS
from pipeline.shards.reader import RegionCache


@pytest.fixture(scope="module")
def with_seeds(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A data set of the paper, without photographs; two variants, `full` not first; two seeds."""
    flow = make_small(tmp_path_factory.mktemp("page") / "small")
    write_params(flow.folder, variants=["max-pool", "full"], seeds=[0, 1])
    flow.ok("compare", "--seed", "0", "--seed", "1", "--jobs", "1")
    flow.ok("sweep", "network.modules=1,2", "--jobs", "1")
    flow.ok("report")
    return flow


@pytest.fixture
def paper_reader(browser: Browser, with_seeds: Flow) -> Iterator[Reader]:
    one = Reader(browser, with_seeds / "reports/voc2007")
    yield one
    one.close()


def test_clean_knows_every_file_of_the_page(with_seeds: Flow) -> None:
    listed = with_seeds.ok("clean", "voc2007")
    assert "\nreports/voc2007: " in listed
    assert "gmpipe did not write" not in listed


# Tables ------------------------------------------------------------------------------------------


def test_results_are_shown_and_sort(paper_reader: Reader, with_seeds: Flow) -> None:
    page = paper_reader.page
    with (with_seeds / "reports/voc2007/tables/results.csv").open(newline="") as stream:
        runs = list(csv.DictReader(stream))
    names = paper_reader.column("results-table", 0)
    assert names[:6] == ["max-pool", "seed 0", "seed 1", "full", "seed 0", "seed 1"]
    paper = [re.sub(r"\s*paper$", "", name) for name in names[6:]]
    assert paper == list(PAPER["voc2007"].methods)
    shown = paper_reader.column("results-table", 1)
    assert [shown[row] for row in (1, 2, 4, 5)] == [f"{float(r['mAP']):.1f}" for r in runs]
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

    page.get_by_label("paper's rows").uncheck()
    assert len(paper_reader.column("results-table", 0)) == 6
    page.get_by_label("each seed").uncheck()
    assert sorted(paper_reader.column("results-table", 0)) == ["full", "max-pool"]
    forced = page.get_by_label("top-3")
    before = paper_reader.column("results-table", -1)
    forced.check()
    assert paper_reader.column("results-table", -1) != before
    expect(page.locator("#paper-differences li").first).to_contain_text("Detector")


def test_variants_have_the_colours_of_the_figures(paper_reader: Reader) -> None:
    """`full` is drawn first, wherever params.yaml lists it."""
    page = paper_reader.page
    lines = page.locator("#curve-chart path")
    assert [line.get_attribute("stroke") for line in lines.all()] == list(COLOURS[:2])
    expect(page.locator("#curve-chart .legend li")).to_contain_text(["full", "max-pool"])
    for part, colour in ((".fill", COLOURS[0]), (".mark", COLOURS[1])):
        bar = page.locator(f"#labels-table {part}").first
        rgb = ", ".join(str(int(colour[start : start + 2], 16)) for start in (1, 3, 5))
        expect(bar).to_have_css("background-color", f"rgb({rgb})")


def test_every_metric_of_all_and_top_3_is_in_the_table(paper_reader: Reader) -> None:
    head = paper_reader.page.locator("#results-table thead")
    six = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
    expected = ["network", "mAP", "11-point mAP", "difference from full", *six, *six]
    texts = head.locator("button").all_inner_texts()
    assert [re.sub(r"\W*$", "", text) for text in texts] == expected
    for row in head.locator("tr").all():  # no cell without a title
        assert all(text.strip() for text in row.locator("th, td").all_inner_texts())
    assert head.locator("[scope=colgroup]").all_inner_texts() == ["All", "Top-3"]
    expect(paper_reader.page.locator("#results-note")).to_contain_text("top3_forced")


def test_labels_sort_by_what_they_gain_and_lose(reader: Reader, made: Flow) -> None:
    page = reader.page
    ap = {name: made.metrics(f"{name}-s0")["AP"] for name in VARIANTS}
    gain = {
        label: ap["max-pool"][label] - ap["full"][label]
        for label in VOCABULARY
        if ap["full"][label] is not None
    }
    for button, sign in (("losses first", 1), ("gains first", -1)):
        page.get_by_role("button", name=button).click()
        shown = [label for label in reader.column("labels-table", 0) if label in gain]
        values = [sign * gain[label] for label in shown]
        assert values == sorted(values)
        assert len(shown) == len(gain)
    few = sum(0 < count < FEW for count in (truth_and_scores(made, "full-s0")[0] == 1).sum(axis=0))
    expect(page.locator("#labels-note")).to_contain_text(
        f"{few} of 18 labels have fewer than {FEW}"
    )
    by_name = page.locator("#labels-table thead").get_by_role("button", name="label")
    by_name.click()
    assert reader.column("labels-table", 0) == sorted(VOCABULARY)
    first = sorted(VOCABULARY)[0]
    row = page.locator("#labels-table tbody tr").first
    expect(row).to_contain_text(f"{ap['full'][first]:.1f}")


def test_labels_without_test_positives_are_not_called_few(paper_reader: Reader) -> None:
    page, others = paper_reader.page, len(VOC_LABELS) - 1  # all but tvmonitor
    expect(page.locator("#labels-note")).to_contain_text(f"{others} of {others + 1} labels have")
    expect(page.locator("#labels-table .few")).to_have_count(others)


def test_the_curve_of_a_label_can_be_chosen(reader: Reader, made: Flow) -> None:
    page = reader.page
    label = "person"
    page.locator("#curve-controls select").select_option(label)
    for name in VARIANTS:
        value = made.metrics(f"{name}-s0")["AP"][label]
        expect(page.locator("#curve-chart .legend")).to_contain_text(f"{name}: AP {value:.1f}")
    assert page.locator("#curve-chart path").count() == len(VARIANTS)


def test_without_photographs_boxes_are_drawn_on_a_blank_background(paper_reader: Reader) -> None:
    card = paper_reader.page.locator(".card").first
    assert card.locator("img").count() == 0
    assert card.locator("rect").count() == 3
    frame = card.locator(".picture").bounding_box()
    assert frame is not None
    assert frame["width"] == pytest.approx(frame["height"], rel=0.02)  # 100 x 100 was imported
    about = paper_reader.page.locator("#gallery-about")
    expect(about).to_contain_text("data/voc2007/images/<id>.jpg")
    expect(about).to_contain_text("18 of 18 photographs")


def test_an_opened_image_shows_its_difficult_label(reader: Reader, paper_reader: Reader) -> None:
    page = paper_reader.page
    card = page.locator('.card[data-image="1"]')
    assert card.locator('.chip[data-label="0"]').count() == 0
    card.locator(".open").click()
    pane = page.locator("dialog .pane")
    assert pane.locator(".chips").first.locator(".chip").count() == len(VOC_LABELS)
    expect(pane.locator(".chip.ignored")).to_have_attribute("data-label", "0")
    expect(pane.locator(".chip.ignored .mark")).to_have_text("?")
    for one, has in ((paper_reader, True), (reader, False)):
        assert ("?" in one.page.locator("#gallery-about").inner_text()) == has


def test_classes_without_a_name_are_numbers(paper_reader: Reader) -> None:
    page = paper_reader.page
    page.locator(".card .open").first.click()
    expect(page.locator("dialog .chip.region").first).to_have_text(
        re.compile(r"^0: class \d+, \d+\.\d %$")
    )


def test_only_groups_that_the_data_set_defines_are_shown(
    reader: Reader, paper_reader: Reader
) -> None:
    def heads(one: Reader) -> list[str]:
        texts = one.page.locator("#labels-table thead th").all_inner_texts()
        return [re.sub(r"\W*$", "", text) for text in texts]

    own = ["label", "full", "max-pool", "max-pool \u2212 full"]
    assert heads(reader) == [*own, "positives", "group", "AP as bars"]
    assert heads(paper_reader) == [*own, "paper", "positives", "AP as bars"]
    for one, column in ((reader, {"group"}), (paper_reader, set())):
        with (one.folder / "tables/label-map.csv").open(newline="") as stream:
            assert set(next(csv.reader(stream))) == {"map", "label", "x", "y"} | column
        table = (one.folder / "tables/results.md").read_text()
        assert ("| group" in table) == bool(column)


def test_intervals_of_few_positives_are_marked(reader: Reader, paper_reader: Reader) -> None:
    for one in (reader, paper_reader):
        positives = one.page.evaluate("gmpipe.data('overview').positives")
        weak = bool(np.mean([count for count in positives if count]) < 10)
        [ends, *_] = one.page.locator("#results-table .ends").all_inner_texts()
        assert ends.endswith("\u26a0") == weak
        assert ("too narrow" in one.page.locator("#results-note").inner_text()) == weak


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_shadow_shows_that_more_follows_beside(
    browser: Browser, with_seeds: Flow, scheme: Any
) -> None:
    size: Any = {"width": 400, "height": 900}
    one = Reader(browser, with_seeds / "reports/voc2007", viewport=size, color_scheme=scheme)
    page = one.page
    place = page.locator("#results-place .edges")
    right = re.compile(r"\bmore-right\b")
    left = re.compile(r"\bmore-left\b")
    expect(place).to_have_class(right)
    expect(place).not_to_have_class(left)
    page.locator("#results-place .scroll").evaluate("(one) => { one.scrollLeft = 1e6; }")
    expect(place).to_have_class(left)
    expect(place).not_to_have_class(right)
    # The facts have long words, and fit.
    expect(page.locator("#run-facts .edges").first).not_to_have_class(right)
    # The first numbers of the labels are in sight at once.
    for column in (1, 2, 3):
        box = page.locator("#labels-table tbody tr").first.locator("th, td").nth(column)
        area = box.bounding_box()
        assert area is not None
        assert area["x"] + area["width"] <= size["width"]
    one.close()


# The whole page ----------------------------------------------------------------------------------


def test_figures_tables_and_what_was_run_are_shown(paper_reader: Reader, with_seeds: Flow) -> None:
    page = paper_reader.page
    folder = with_seeds / "reports/voc2007"
    names = [
        "average-precision",  # only as files: the table of labels has its bars
        "gains-and-losses",
        "learning-curves",
        "precision-recall",
        "calibration",
        "co-occurrence",
        "label-map",
        "sweep-full-network-modules",
    ]
    assert sorted(path.stem for path in (folder / "figures").glob("*.svg")) == sorted(names)
    for name in names[1:]:
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


@pytest.mark.parametrize(
    ("width", "scheme", "rules"),
    [
        (1280, "light", {}),
        (400, "dark", {}),
        # Of all rules, only the contrast depends on the colours.
        (1280, "dark", {"runOnly": ["color-contrast"]}),
        (400, "light", {"runOnly": ["color-contrast"]}),
    ],
)
def test_it_reads_well(
    browser: Browser, made: Flow, width: int, scheme: Any, rules: dict[str, Any]
) -> None:
    """The page does not scroll sideways, and axe-core reports no violation in it or its dialog."""
    size: Any = {"width": width, "height": 900}
    one = Reader(browser, made / "reports/tiny", viewport=size, color_scheme=scheme)
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    # `preload` would request style sheets, which a page that was opened from disk can't fetch.
    options = {"preload": False, "resultTypes": ["violations"], **rules}
    violations = Axe().run(one.page, options=options).response["violations"]
    one.page.locator(".card .open").first.click()
    violations += Axe().run(one.page, "dialog", options=options).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []
    one.close()


def test_a_missing_script_is_named(browser: Browser, made: Flow, tmp_path: Path) -> None:
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
