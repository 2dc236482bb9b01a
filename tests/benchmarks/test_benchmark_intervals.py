"""benchmarks.intervals: its true values, and that moved intervals hold them more often."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.intervals import SEPARATIONS, draw_splits, main, measure, true_ap
from pipeline.evaluation.metrics import average_precision


@pytest.mark.parametrize("share", [0.015, 0.2])
def test_the_true_value_is_that_of_very_many_images(share: float) -> None:
    [split] = draw_splits(share, 100_000, 1, seed=0)
    for label in (0, -1):
        measured = average_precision(split.scores["own"][:, label], split.truth[:, label])
        assert measured == pytest.approx(true_ap(share, SEPARATIONS[label]), abs=0.02)


def test_a_moved_interval_holds_the_true_value_more_often() -> None:
    """3 positives a label; 40 splits have a standard error of 6 to 8 percent."""
    row = measure(0.015, 200, repeats=40, resamples=50)
    assert row["off"] > row["resamples"] > 2
    assert row["mAP plain"] + 15 < row["mAP moved"]


@pytest.mark.slow
def test_the_coverage_that_the_documentation_gives() -> None:
    """3 and 10 positives a label; 100 splits have a standard error of 3 to 5 percent."""
    few = measure(0.015, 200, repeats=100, resamples=100)
    assert few["off"] > few["resamples"] > 2
    assert few["mAP fixed"] + 5 < few["mAP moved"]
    assert few["mAP plain"] + 20 < few["mAP moved"]
    more = measure(0.05, 200, repeats=100, resamples=100)
    assert few["off"] / 2 > more["off"] > 0.5
    assert min(more[name] for name in ("mAP moved", "near moved")) > 86
    assert more["far plain"] + 15 < more["far moved"]


def test_a_row_for_each_share_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--repeats", "2", "--resamples", "4", "--images", "30"])
    *table, line = capsys.readouterr().out.splitlines()
    rows = json.loads(line)["rows"]
    assert len(table) == 2 + len(rows) == 2 + 4
    assert np.isfinite([list(row.values()) for row in rows]).all()
