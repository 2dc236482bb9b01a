"""benchmarks.decisions: what it prints is what a run with those decisions gets from `evaluate`."""

from __future__ import annotations

import json

import pytest
from toys import make_checkout

from benchmarks.decisions import COLUMNS, KINDS, main


@pytest.mark.slow
def test_a_run_with_decisions_gets_the_same_numbers(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_checkout(tmp_path_factory.mktemp("measured"), validation=0.5, epochs=1)
    flow.ok("train")
    monkeypatch.chdir(flow.folder)
    said: list[str] = []
    main(["--variants", "full", "--seeds", "0"], said.append)
    [(variant, kinds)] = json.loads(said[-1]).items()
    assert (variant, kinds.keys()) == ("full", KINDS.keys())
    chosen = "train.toy.decisions={thresholds: common, calibration: temperature}"
    flow.ok("train", "--set", chosen)
    flow.ok("evaluate", "--set", chosen)
    [path] = (flow / "runs/toy").glob("full-s0-*/metrics.json")
    metrics = json.loads(path.read_text())
    errors = metrics["calibration_error"]
    expected = {
        **metrics["decided"],
        "error": errors["after"],
        "error by label": errors["after_by_label"],
    }
    measured = kinds["temperature, common"]
    assert measured.keys() == set(COLUMNS)
    assert measured == pytest.approx(expected, abs=0.01)
