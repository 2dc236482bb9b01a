"""The page's gallery in a browser: what a reader filters, points at and compares."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from flows import VARIANTS, Flow
from playwright.sync_api import Browser, expect
from reading import Reader, choice, lit, truth_and_scores

from benchmarks.page import SIZES, write_random_page
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import open_split
from pipeline.shards.reader import RegionCache


def test_filters_keep_the_images_they_name(reader: Reader, made: Flow) -> None:
    page = reader.page
    truth, scores, _ = truth_and_scores(made, "max-pool-s0")
    over = scores > 0.5
    kinds = {
        "right": (over & (truth == 1), ~(over != (truth == 1)).any(axis=1)),
        "wrong": (over & (truth == 0), (over & (truth == 0)).any(axis=1)),
        "missed": (~over & (truth == 1), (~over & (truth == 1)).any(axis=1)),
        "true": (truth == 1, (truth == 1).any(axis=1)),
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


def test_pointing_at_a_label_lights_up_its_region(reader: Reader, made: Flow) -> None:
    truth, scores, regions = truth_and_scores(made, "full-s0")
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
            expect(reader.page.locator("#gallery-info")).to_contain_text(
                f"{VOCABULARY[label]} {100 * scores[image, label]:.1f} %"
            )
        others = [
            c.get_attribute("data-label")
            for c in card.locator(".chips").nth(1).locator(".chip").all()
        ]
        true = np.flatnonzero(truth[image] == 1)
        assert others == [str(label) for label in true if label not in top]
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
    logits = checkpoint.network()(batch, checkpoint.labels).regions[0].detach()
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
    choice(reader.page, "Compare with").select_option("max-pool")
    card = reader.page.locator('.card[data-image="1"]')
    expect(card.locator(".network")).to_have_text(["full", "max-pool"])
    for pane, run in enumerate(("full-s0", "max-pool-s0")):
        _, scores, regions = truth_and_scores(made, run)
        label = int(scores[1].argmax())
        chip = card.locator(".pane").nth(pane).locator(".chip").first
        expect(chip).to_contain_text(f"{VOCABULARY[label]}{100 * scores[1, label]:.1f}")
        chip.hover()
        assert lit(card) == [regions[1, label]]
        said = reader.page.locator("#gallery-info")
        expect(said).to_contain_text(f"{run.removesuffix('-s0')}: {VOCABULARY[label]}")


def test_images_on_which_two_networks_differ(reader: Reader, made: Flow) -> None:
    page = reader.page
    show = choice(page, "Show").locator("option")
    assert show.count() == 5  # a single network does not differ from another
    choice(page, "Compare with").select_option("max-pool")
    choice(page, "Show").select_option("differs")
    over = [truth_and_scores(made, f"{name}-s0")[1] > 0.5 for name in VARIANTS]
    differs = over[0] != over[1]
    counter = page.locator("#gallery-count")
    expect(counter).to_have_text(re.compile(f"^{int(differs.any(axis=1).sum())} of 12 images"))
    label = int(differs.sum(axis=0).argmax())
    choice(page, "Label").select_option(str(label))
    expect(counter).to_have_text(re.compile(f"^{int(differs[:, label].sum())} of 12 images"))
    choice(page, "Compare with").select_option("")
    assert show.count() == 5
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


def test_five_thousand_images_are_shown_a_page_at_a_time(browser: Browser, tmp_path: Path) -> None:
    scores = write_random_page(tmp_path, images=5000, regions=35, labels=20)
    one = Reader(browser, tmp_path)
    page = one.page
    assert page.locator(".card").count() == 24
    # The labels of regions are loaded when somebody points at a region.
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


def test_many_images_are_paged_through_and_found_by_name(browser: Browser, tmp_path: Path) -> None:
    write_random_page(tmp_path, images=5000, regions=3, labels=3)
    one = Reader(browser, tmp_path)
    page = one.page
    counter, cards = page.locator("#gallery-count"), page.locator(".card")

    def first() -> str | None:
        return cards.first.get_attribute("data-image")

    expect(counter).to_have_text("5,000 of 5,000 images, page 1 of 209")
    expect(page.locator("#gallery-about")).to_contain_text("5,000 test images")
    assert one.column("labels-table", -2) == ["5,000"] * 3
    below = page.locator("#next-below")
    below.click()
    assert first() == "24"
    expect(cards.first).to_be_in_viewport()
    expect(page.locator("#next")).to_be_focused()
    field = page.get_by_role("spinbutton", name="Go to page")
    for typed, shown in (("208", 208), ("9999", 209), ("-3", 1), ("", 1), ("209", 209)):
        field.fill(typed)
        field.press("Enter")
        expect(field).to_have_value(str(shown))
        assert first() == str(24 * (shown - 1))
    expect(below).to_be_disabled()
    name = page.get_by_role("searchbox", name="Name contains")
    name.fill(" 0499 ")
    found = [str(number) for number in range(5000) if "0499" in f"{number:012d}"]
    expect(counter).to_have_text(f"{len(found)} of 5,000 images, page 1 of 1")
    assert [card.get_attribute("data-image") for card in cards.all()] == found
    name.fill("4999x")
    expect(counter).to_have_text("0 of 5,000 images, page 1 of 1")
    one.close()


def test_the_gallery_follows_the_opened_image(browser: Browser, tmp_path: Path) -> None:
    write_random_page(tmp_path, images=50, regions=3, labels=3)
    one = Reader(browser, tmp_path)
    page = one.page
    title, place = page.locator("#detail-title"), page.locator("#detail-count")
    page.locator('.card[data-image="23"] .open').click()
    expect(place).to_have_text("24 of 50")
    # The arrow keys work on whatever was in focus, also if it is shown no more.
    page.locator("dialog .chip").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(place).to_have_text("26 of 50")
    last = title.inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("#gallery-count")).to_contain_text("page 2 of 3")
    expect(page.locator(".open:focus")).to_have_text(last)
    # So they do at the end, where a button for the next image can't be pressed any more.
    page.locator("#next").click()
    page.locator('.card[data-image="48"] .open').click()
    page.locator("#detail-next").focus()
    page.keyboard.press("ArrowRight")
    expect(place).to_have_text("50 of 50")
    page.keyboard.press("ArrowLeft")
    expect(place).to_have_text("49 of 50")
    one.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_keep_their_shape(browser: Browser, tmp_path: Path, width: int) -> None:
    write_random_page(tmp_path, images=len(SIZES), regions=2, labels=2)
    one = Reader(browser, tmp_path, viewport={"width": width, "height": 700})
    for number, (across, down) in enumerate(SIZES):
        card = one.page.locator(f'.card[data-image="{number}"]')
        card.locator(".open").click()
        for shown in (card, one.page.locator("dialog")):
            box = shown.locator(".picture").bounding_box()
            assert box is not None
            assert box["width"] / box["height"] == pytest.approx(across / down, rel=0.05)
            assert box["height"] <= 500
        one.page.keyboard.press("Escape")
    one.close()


def test_an_answer_that_arrives_late_is_not_shown(reader: Reader) -> None:
    page = reader.page
    page.evaluate(
        """() => {
          const { load } = gmpipe;
          gmpipe.load = (name) => new Promise((resolve) => {
            window.answer = () => load(name).then(resolve);
          });
        }"""
    )
    card = page.locator('.card[data-image="0"]')
    said = page.locator("#gallery-info")
    card.locator("rect").last.hover()
    expect(said).to_contain_text("detector")
    expect(said).to_be_in_viewport()
    card.locator("h3").hover()
    expect(said).to_be_empty()
    page.evaluate("() => window.answer()")
    assert said.text_content() == ""
