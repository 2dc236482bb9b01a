"""Fitted decisions in tables: there if a run fitted any, and absent if none did."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from results import make_evaluation, make_metrics, make_six

from pipeline.evaluation.metrics import CalibrationErrors, Evaluation
from pipeline.evaluation.tables import decisions_table, results_csv
from pipeline.report.rows import columns, own_rows


def plain(value: float) -> Evaluation:
    return make_evaluation(make_metrics(value))


def decided(value: float) -> Evaluation:
    errors = CalibrationErrors(before=5, after=value, before_by_label=7, after_by_label=8)
    metrics = replace(
        make_metrics(value), decided=make_six(60, CF1=value + 10), calibration_error=errors
    )
    return make_evaluation(metrics)


RUNS = {"full": [decided(1), decided(2)], "max-pool": [plain(1), plain(2)]}
PLAIN = {"max-pool": [plain(1), plain(2)]}


def test_the_table_has_the_runs_that_fitted_decisions() -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in decisions_table(RUNS).splitlines()
    ]
    # `make_metrics` gives CF1 and OF1 as the numbers after its value; 60 is CP, so OF1 is 65.
    assert lines[2:] == [
        ["full", "2.5 ± 0.7", "11.5 ± 0.7", "3.5 ± 0.7", "65.0 ± 0.0", "5.0 ± 0.0", "1.5 ± 0.7"]
    ]


def test_csv_and_page_have_columns_only_where_a_run_fitted_decisions() -> None:
    for runs, there in ((RUNS, True), (PLAIN, False)):
        rows = list(csv.DictReader(io.StringIO(results_csv(runs))))
        assert ("decided_CF1" in rows[0]) == there
        groups = {column["group"] for column in columns(runs, next(iter(runs)))}
        assert ("Fitted thresholds" in groups) == there
    [row, *_] = csv.DictReader(io.StringIO(results_csv(RUNS)))
    assert row["decided_CF1"] == "11"
    assert own_rows(RUNS, {}, "full")[0]["cells"]["decided CF1"][0] == 11.5
