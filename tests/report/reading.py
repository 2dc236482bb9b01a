"""Reading a page of `gmpipe report` in a browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from flows import Flow
from playwright.sync_api import Browser, Locator, Page, expect

from pipeline.datasets.manifest import read_manifest

expect.set_options(timeout=30_000)  # a busy machine may be slow


class Reader:
    """A reader with the page open. Requests are recorded, and every error fails the test."""

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
        """The texts in a column of a table, from top to bottom; column 0 names the row."""
        rows = self.page.locator(f"#{table} tbody tr")
        return rows.evaluate_all(
            "(rows, number) => rows.map((row) => [...row.cells].at(number).innerText)", number
        )

    def close(self) -> None:
        self.context.close()
        assert self.problems == []
        inside = self.folder.resolve().as_uri() + "/"
        assert [url for url in self.requests if not url.startswith((inside, "data:"))] == []


def truth_and_scores(flow: Flow, run: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, C) truth, scores and winning regions of a run of the tiny scenes."""
    truth = read_manifest(flow / "data/tiny/prepared/manifest.parquet").truth("test")
    table = pq.read_table(flow / "runs/tiny" / run / "predictions.parquet")
    logits, regions = (np.array(table.column(name).to_pylist()) for name in ("logits", "regions"))
    return truth, 1 / (1 + np.exp(-logits)), regions


def choice(page: Page, name: str) -> Locator:
    """One of the gallery's drop-down lists."""
    controls = page.locator("#gallery-controls")
    return controls.get_by_role("combobox", name=name, exact=True)


def lit(place: Locator) -> list[int]:
    """The regions that a picture lights up."""
    boxes = place.locator("rect.on").all()
    return [int(box.get_attribute("data-region") or -1) for box in boxes]


def data(folder: Path, name: str) -> Any:
    """The value that a script in data/ hands to the page."""
    text = (folder / f"data/{name}.js").read_text()
    match = re.fullmatch(rf'gmpipe\.receive\("{name}",(.*)\);\n', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def unpacked(value: dict[str, Any]) -> np.ndarray:
    """An array, as the page reads it."""
    content = base64.b64decode(value["base64"])
    return np.frombuffer(content, np.dtype(value["type"]).newbyteorder("<")).reshape(value["shape"])
