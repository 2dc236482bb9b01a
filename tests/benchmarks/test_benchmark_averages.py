"""benchmarks.averages: the average of runs by an oracle, and what it prints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from flows import Flow
from sklearn.metrics import average_precision_score

from benchmarks.averages import average_of, main, measure
from pipeline.errors import InputError
from pipeline.evaluation.predictions import Scores


def test_the_average_is_that_of_probabilities() -> None:
    runs = [np.array([[0.0, 60.0, 2.0]], np.float32), np.array([[1.0, 60.0, -2.0]], np.float32)]
    expected = [(1 / (1 + math.exp(-0.0)) + 1 / (1 + math.exp(-1.0))) / 2, 1.0, 0.5]
    averaged = 1 / (1 + np.exp(-average_of(runs)))
    assert averaged[0] == pytest.approx(expected)
    assert np.isfinite(average_of(runs)).all()


def test_a_variant_is_measured_by_its_seeds_and_all_runs_together() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((30, 2)) < 0.4).astype(np.int8)
    logits = {
        name: [rng.normal(size=(30, 2)).astype(np.float32) for _ in range(2)] for name in "ab"
    }
    results = measure(Scores([str(n) for n in range(30)], truth, logits), ("x", "y"))
    assert list(results) == ["a", "b", "all"]
    assert [len(rows) for rows in results.values()] == [3, 3, 5]
    mean = np.mean([1 / (1 + np.exp(-run)) for runs in logits.values() for run in runs], axis=0)
    expected = 100 * np.mean([average_precision_score(truth[:, c], mean[:, c]) for c in range(2)])
    assert results["all"][0][0] == pytest.approx(expected)
    single = logits["b"][1]
    expected = 100 * np.mean([average_precision_score(truth[:, c], single[:, c]) for c in range(2)])
    assert results["b"][2][0] == pytest.approx(expected)


def test_made_runs_are_averaged(small: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = ("max-pool", "linear-mean", "hcp")
    named = [word for variant in variants for word in ("--variant", variant)]
    small.ok("compare", *named, "--seed", "0", "--seed", "1", "--jobs", "1")
    monkeypatch.chdir(small.folder)
    said: list[str] = []
    main(
        ["--dataset", "voc2007", "--variants", "max-pool,linear-mean", "--seeds", "0,1"],
        said.append,
    )
    rows = [line.split("|")[1:3] for line in said[0].splitlines()[2:] if line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["max-pool", "2"],
        ["linear-mean", "2"],
        ["all", "4"],
    ]
    maps = json.loads(said[-1])
    runs = [small / f"runs/voc2007/max-pool-s{seed}/metrics.json" for seed in (0, 1)]
    single = [json.loads(run.read_text())["mAP"] for run in runs]
    assert maps["max-pool"]["single"] == pytest.approx(np.mean(single), abs=0.01)
    with pytest.raises(InputError, match="hcp"):
        main(["--dataset", "voc2007", "--variants", "hcp", "--seeds", "0,1"], said.append)
