"""`gmpipe sweep` over several settings: rounds of trials, and only the best one is tested."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from unittest import mock

import pytest
from flows import Flow
from small import no_run_is_made, run_names

from pipeline.errors import InputError
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.report.illustrations import draw_sweep
from pipeline.report.sweeps import read_sweep
from stages.commands.runs.entries import is_sweep

SETTINGS = ("learning_rate=0.0001,0.1", "loss.beta=0.0,0.4")
VALIDATED = ("--set", "train.voc2007.validation=0.3")
ALONE = ("--jobs", "1")
SEEDS = ("--seed", "0", "--seed", "1")


def measured(flow: Flow) -> dict[tuple[float, float], dict[int, float]]:
    """Learning rate and beta -> seed -> validation mAP, of every trained run."""
    maps: dict[tuple[float, float], dict[int, float]] = {}
    for path in (flow / "runs/voc2007").glob("*/checkpoint.pt"):
        checkpoint = load_checkpoint(path)
        trial = (checkpoint.settings.learning_rate, checkpoint.settings.loss.beta)
        maps.setdefault(trial, {})[checkpoint.seed] = checkpoint.history[-1]["validation_mAP"]
    return maps


@pytest.mark.slow
def test_the_better_half_goes_on_and_the_best_alone_is_tested(small: Flow, tmp_path: Path) -> None:
    said = small.ok("sweep", *SETTINGS, *VALIDATED, *ALONE, *SEEDS, "--halving")
    maps = measured(small)
    assert len(maps) == 4
    first = sorted(maps, key=lambda trial: -maps[trial][0])
    assert {trial for trial in maps if 1 in maps[trial]} == set(first[:2])
    best = max(first[:2], key=lambda trial: fmean(maps[trial].values()))
    for path in (small / "runs/voc2007").glob("*/metrics.json"):
        settings = load_checkpoint(path.parent / "checkpoint.pt").settings
        assert (settings.learning_rate, settings.loss.beta) == best
    assert len(run_names(small)) == 2
    mean = fmean(maps[best].values())
    assert re.search(
        rf"^\| {best[0]} +\| {best[1]} +\| {mean:.1f} ± \S+ \(best\) +\| 2 ", said, re.M
    )
    assert f"learning_rate={best[0]}, loss.beta={best[1]}." in said
    assert f"--set train.voc2007.learning_rate={best[0]} --set train.voc2007.loss.beta" in said

    folder = small / "runs/voc2007/sweeps/learning_rate+loss.beta+search"
    assert is_sweep(folder)
    with (folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    for row in rows:
        trial = (float(row["learning_rate"]), float(row["loss.beta"]))
        assert float(row["validation_mAP"]) == maps[trial][int(row["seed"])]
        assert bool(row["mAP"]) == (trial == best)

    results = read_sweep(folder / "sweep.json")
    for name in ("figures", "tables"):
        (tmp_path / name).mkdir()
    figure = draw_sweep(tmp_path, results)
    assert f"learning_rate={best[0]}, loss.beta={best[1]}" in figure.note
    assert (tmp_path / f"figures/{figure.name}.svg").exists()

    # If the time is over, the runs that are there decide, and an unfinished round is left out.
    more = ("--seed", "2", "--minutes", "1e-9", "--halving")
    with no_run_is_made():
        late = small.gmpipe("sweep", *SETTINGS, *VALIDATED, *ALONE, *SEEDS, *more)
    assert re.search(r"\b1 run of seed 2\b", late.err)
    assert said.endswith(late.out[late.out.index("| learning_rate") :])

    # If the last trial that is left fails, the finished rounds decide among the others.
    diverging = mock.Mock(side_effect=InputError("The loss of seed 2 is nan.", ""))
    with mock.patch.dict("stages.commands.compare._STAGES", train=diverging):
        failed = small.gmpipe(
            "sweep", *SETTINGS, *VALIDATED, *ALONE, *SEEDS, "--seed", "2", "--halving"
        )
    assert diverging.call_count == 1
    assert "The loss of seed 2" in failed.err
    [second] = set(first[:2]) - {best}
    assert re.search(
        rf"^\| {second[0]} +\| {second[1]} +\| \S+ ± \S+ \(best\) +\| 2 ", failed.out, re.M
    )
    assert re.search(rf"^\| {best[0]} +\| {best[1]} +\| failed ", failed.out, re.M)


def test_a_trial_that_diverges_is_listed_and_the_others_are_compared(small: Flow) -> None:
    wild = ("--set", "train.voc2007.clip_norm=1e30", "--set", "train.voc2007.epochs=1")
    options = (*wild, *VALIDATED, *ALONE, "--seed", "0")
    plain = small / "runs/voc2007/sweeps/learning_rate/sweep.json"
    plain.parent.mkdir(parents=True)
    plain.write_text("of a sweep")
    outcome = small.gmpipe("sweep", "learning_rate=0.01,1e25", "--halving", *options)
    assert outcome.code == 0, outcome.err
    assert re.search(r"^\| 0\.01 +\| \S+ \(best\)", outcome.out, re.M)
    assert re.search(r"^\| 1e\+25 +\| failed", outcome.out, re.M)
    assert "diverged" in outcome.err
    # A search over one setting leaves the sweep of that setting as it is.
    assert plain.read_text() == "of a sweep"
    assert read_sweep(plain.parent.with_name("learning_rate+search") / "sweep.json").runs
    late = ("--minutes", "1e-9", *VALIDATED, "--seed", "7")
    assert small.gmpipe("sweep", "epochs=1,2", *late).refused("No trial.*--minutes")


@pytest.fixture
def untrained(small: Flow) -> Iterator[Flow]:
    with no_run_is_made():
        yield small
    assert not (small / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            SETTINGS,
            r"learning_rate=0\.0001, loss\.beta=0\.0.*`--set train\.voc2007\.validation=0\.2`",
        ),
        (("validation=0.2,0.3", "epochs=1,2"), "validation.*can't be compared"),
        (("epochs=1,2", "epochs=3,4", *VALIDATED), "epochs=3,4.*twice"),
        (("learning_rate=0.1..0.2", *VALIDATED), "learning_rate.*--trials"),
        (("epochs=1,2", "loss.gamma=1.0,2.0", *VALIDATED), r"train\.voc2007\.loss\.gamma"),
        (
            ("variants.full.decisions.thresholds=common,f1", "epochs=1,2", *VALIDATED),
            r"variants\.full\.decisions\.thresholds.*params\.yaml",
        ),
        (
            ("epochs=1,2", "momentum=0.5,0.9", "--variant", "max-pool", *VALIDATED),
            "epochs|momentum",
        ),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_before_anything_is_trained(
    untrained: Flow, arguments: tuple[str, ...], message: str
) -> None:
    assert untrained.gmpipe("sweep", *arguments).refused(message)
