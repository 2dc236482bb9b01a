"""The page's section on doubtful labels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect
from reading import Reader, data

from pipeline.report.folder import write_data


def doubt(rank: int, label: str, **changes: Any) -> dict[str, Any]:
    row = {"image_id": f"image-{rank}", "split": "train", "label": label, "score": 0.012}
    return {**row, "rank": rank, "duplicate_of": [], "picture": None, "size": [0, 0], **changes}


def test_the_section_is_there_if_there_is_a_list(
    browser: Browser, moved: Path, tmp_path: Path
) -> None:
    page = Path(shutil.copytree(moved, tmp_path / "page"))
    picture = min((page / "pictures").glob("*.jpg")).relative_to(page).as_posix()
    present = doubt(1, "cat", picture=picture, size=[64, 48], duplicate_of=["x", "y"])
    absent = [doubt(2, "<b>dog", score=0.9876), doubt(4, "owl", split="test")]
    overview = {
        **data(page, "overview"),
        "doubts": {
            "about": ["Why & how."],
            "present": {"count": 1, "shown": [present]},
            "absent": {"count": 1234, "shown": absent},
        },
    }
    assert data(page, "overview")["doubts"] is None
    write_data(page, "overview", overview)

    without, reader = Reader(browser, moved), Reader(browser, page)
    expect(without.page.locator("#doubts")).to_be_hidden()
    without.close()
    section = reader.page.locator("#doubts")
    expect(section.locator("h3")).to_have_text(
        ["Given, but looks absent: 1", "Not given, but looks present: 1,234, of which 2 are shown"]
    )
    cards = section.locator(".card")
    expect(cards.locator("h4")).to_have_text(["1. cat", "2. <b>dog", "4. owl"])
    expect(cards.nth(0)).to_contain_text("x, y")
    expect(cards.nth(1)).to_contain_text("0.988")
    expect(cards.nth(2)).to_contain_text("image-4 (test)")
    expect(section.locator("#doubts-about li")).to_have_text("Why & how.")
    image = cards.nth(0).locator("img")
    image.scroll_into_view_if_needed()
    assert image.evaluate("async (img) => { await img.decode(); return img.naturalWidth; }") > 0
    reader.close()
