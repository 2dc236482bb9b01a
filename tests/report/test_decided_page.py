"""The page of runs that fitted decisions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from flows import Flow, unrendered
from playwright.sync_api import Browser
from reading import Reader, data
from small import write_params

from pipeline.learning.checkpoint import load_checkpoint

DECISIONS = {"thresholds": "common", "calibration": "temperature"}


@pytest.mark.slow
def test_the_page_has_both_blocks_thresholds_and_both_reliability_lines(
    small: Flow, browser: Browser
) -> None:
    own = {"variants": {"max-pool": {"validation": 0.3, "decisions": DECISIONS}}}
    write_params(small.folder, train=own)
    said = small.ok("compare", "--jobs", "1")
    assert "decided CF1" in said
    assert said.count("| full") > said.partition("decided CF1")[2].count("| full")
    with unrendered():
        small.ok("report")
    page = small / "reports/voc2007"
    overview = data(page, "overview")
    assert overview["thresholds"] is None  # of `full`, which is shown
    with (page / "tables/calibration.csv").open(newline="") as stream:
        variants = {row["variant"] for row in csv.DictReader(stream)}
    assert variants == {"full", "max-pool", "max-pool, calibrated"}

    with unrendered():
        small.ok("report", "--set", "variants=[max-pool]")
    [threshold, *others] = data(page, "overview")["thresholds"]
    fitted = load_checkpoint(small / "runs/voc2007/max-pool-s0/checkpoint.pt").decisions
    assert fitted is not None
    assert threshold == pytest.approx(100 * fitted.probabilities[0], abs=0.01)
    reader = Reader(browser, Path(page))
    try:
        table = reader.page.locator("#labels-table")
        heads = table.locator("thead th").all_inner_texts()
        [column] = [n for n, head in enumerate(heads) if head.startswith("threshold of max-pool")]
        assert reader.column("labels-table", column) == [f"{threshold:.1f}"] * (len(others) + 1)
        assert "Fitted thresholds" in reader.page.locator("#results-table thead").inner_text()
        stored = json.loads((small / "runs/voc2007/max-pool-s0/metrics.json").read_text())
        shown = [reader.column("results-table", number)[0] for number in range(-6, 0)]
        assert shown == [f"{percent:.1f}" for percent in stored["decided"].values()]
    finally:
        reader.close()
