"""What tables, commands and the page show of heads that lack what GM-MLIC has.

The heads of `stand_in_heads`: `plain` tells regions not apart, `weighing` gives weights, the scores
of `whole-wins` come from the whole view for labels with even numbers, `sets` does not rank, and
`ranking` does not decide.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from flows import Flow
from playwright.sync_api import Browser, expect
from reading import Reader, choice, data, lit, unpacked
from small import make_small, write_params
from stand_in_heads import registered

from pipeline.datasets.readers.voc import VOCABULARY
from pipeline.report.inputs import PageInputs
from stages.checkout.params import read_request
from stages.checkout.results import load_runs

HEADS = ("full", "plain", "weighing", "whole-wins", "sets", "ranking")
PAGE = "reports/voc2007"


@pytest.fixture(scope="module", autouse=True)
def _stand_in_heads() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """Runs of all heads, and their page; to be read only."""
    flow = make_small(tmp_path_factory.mktemp("heads") / "small")
    write_params(flow.folder, variants=list(HEADS))
    (flow / "compared.txt").write_text(flow.ok("compare", "--jobs", "1", "--seed", "0"))
    flow.ok("report")
    return flow


def metrics(flow: Flow, variant: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(
        (flow / f"runs/voc2007/{variant}-s0/metrics.json").read_text()
    )
    return value


def regions(flow: Flow, variant: str) -> np.ndarray:
    """(N, C), as predictions.parquet holds them."""
    table = pq.read_table(flow / f"runs/voc2007/{variant}-s0/predictions.parquet")
    return np.array(table.column("regions").to_pylist())


# Files, tables and commands ----------------------------------------------------------------------


def test_the_predictions_have_the_regions_that_say_most(headed: Flow) -> None:
    for variant in ("plain", "sets"):
        assert (regions(headed, variant) == -1).all()
    for variant in ("full", "weighing", "ranking"):
        assert (regions(headed, variant) >= 0).all()
    whole = regions(headed, "whole-wins")
    assert (whole[:, ::2] == -1).all()
    assert (whole[:, 1::2] >= 0).all()


def test_metrics_that_are_not_defined_are_left_out(headed: Flow) -> None:
    six = {"CP", "CR", "CF1", "OP", "OR", "OF1"}
    every = {"mAP", "mAP11", "top3", "top3_forced"} | six
    absent = {"sets": {"mAP", "mAP11", "top3_forced"}, "ranking": six | {"top3"}}
    for variant in HEADS:
        expected = every - absent.get(variant, set())
        assert every & metrics(headed, variant).keys() == expected
        summary = json.loads((headed / f"runs/voc2007/{variant}-s0/summary.json").read_text())
        assert summary.keys() == {"mAP", "CF1", "OF1", "top3"} & expected
    assert set(metrics(headed, "sets")["AP"].values()) == {None}


def test_tables_show_a_dash(headed: Flow) -> None:
    tables = (headed / "compared.txt").read_text()
    rows = {
        cells[0]: cells[1:]
        for line in tables.partition("## Comparison")[0].splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in HEADS
    }
    assert rows.keys() == set(HEADS)
    assert "-" not in rows["plain"]
    assert [cell == "-" for cell in rows["sets"]][:3] == [True, False, False]
    assert [cell == "-" for cell in rows["ranking"]][:3] == [False, True, True]
    differences = tables.partition("## Difference from full")[2]
    assert all(name in differences for name in ("plain", "ranking"))
    assert "sets" not in differences
    made = csv.DictReader(io.StringIO((headed / PAGE / "tables/results.csv").read_text()))
    of = {row["variant"]: row for row in made}
    assert (of["sets"]["mAP"], of["sets"]["top3_forced_CF1"]) == ("", "")
    assert (of["ranking"]["OF1"], of["ranking"]["top3_CP"]) == ("", "")
    assert float(of["sets"]["OF1"]) == metrics(headed, "sets")["OF1"]


def test_others_are_compared_with_a_variant_that_has_a_map(headed: Flow) -> None:
    """By default with the first, but no difference to a predictor of sets is defined."""
    three = [word for name in ("sets", "plain", "weighing") for word in ("--variant", name)]
    said = headed.ok("compare", *three, "--seed", "0")
    assert "## Difference from plain" in said
    assert "weighing" in said.partition("## Difference from plain")[2]
    with contextlib.chdir(headed.folder):
        runs = load_runs(read_request("voc2007"), ["sets", "plain"], [0])
    assert PageInputs.base.fget(mock.Mock(runs=runs)) == "plain"  # type: ignore[attr-defined]


def test_commands_show_a_dash(headed: Flow) -> None:
    listed = {
        line.split("|")[1].strip(): line.split("|")[2].strip()
        for line in headed.ok("runs", "list").splitlines()
        if "voc2007/" in line
    }
    assert listed["runs/voc2007/sets-s0"] == "-"
    assert float(listed["runs/voc2007/ranking-s0"]) == pytest.approx(
        metrics(headed, "ranking")["mAP"], abs=0.051
    )
    shown = headed.ok("runs", "show", "sets-s0")
    assert re.search(r"^test mAP +-$", shown, re.MULTILINE)
    assert re.search(r"^test OF1 +\d", shown, re.MULTILINE)
    verified = headed.ok("verify")
    assert re.search(r"sets-s0/metrics\.json.*mAP -", verified)
    evaluated = (headed / "compared.txt").read_text()
    assert re.search(r"sets-s0: mAP -, OF1 \d", evaluated)
    assert re.search(r"ranking-s0: mAP \d+\.\d+, OF1 -", evaluated)


def test_a_sweep_of_a_predictor_of_sets_shows_of1(tmp_path: Path) -> None:
    flow = make_small(tmp_path / "small")
    write_params(flow.folder, variants=["sets"])
    options = ("--variant", "sets", "--jobs", "1", "--set", "train.voc2007.validation=0.3")
    printed = flow.ok("sweep", "epochs=1,2", *options)
    assert re.search(r"^\| 2 +\| \d.*\| - +\| \d", printed, re.MULTILINE)
    folder = flow / "runs/voc2007/sweeps/sets-epochs"
    with (folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert all(row["mAP"] == "" and float(row["OF1"]) >= 0 for row in rows)
    assert "test OF1" in (folder / "figure.svg").read_text()


# The page ----------------------------------------------------------------------------------------


def test_the_page_has_what_each_head_has(headed: Flow) -> None:
    overview = data(headed / PAGE, "overview")
    gallery = overview["gallery"]
    assert overview["variants"] == list(HEADS)
    assert gallery["attributions"] == ["logits", None, "weights", "logits", None, "logits"]
    assert gallery["decides"] == [True] * 5 + [False]
    facts = dict(overview["run"]["facts"])
    assert facts["head of each network"] == "full: gm-mlic, " + ", ".join(
        f"{name}: {name}" for name in HEADS[1:]
    )
    for number, variant in enumerate(HEADS):
        winners = unpacked(data(headed / PAGE, f"scores-{number}")["winners"])
        np.testing.assert_array_equal(winners, regions(headed, variant))
        path = headed / PAGE / f"data/regions-{number}.js"
        assert path.exists() == (gallery["attributions"][number] is not None)
    assert set(overview["ap"]["sets"]) == {None}
    rows = {row["name"]: row["cells"] for row in overview["rows"] if row["kind"] == "variant"}
    assert "mAP" not in rows["sets"]
    assert "difference" not in rows["sets"]
    assert "difference" in rows["ranking"]
    assert "OF1" not in rows["ranking"]
    curves = data(headed / PAGE, "curves")
    assert curves[0].keys() == set(HEADS) - {"sets"}
    of = (headed / PAGE / "tables/calibration.csv").read_text()
    assert {line.partition(",")[0] for line in of.splitlines()[1:]} == set(HEADS) - {
        "sets",
        "ranking",
    }
    assert "label-map" in {figure["name"] for figure in overview["figures"]}


def test_a_page_of_networks_that_do_not_rank_has_no_curves(
    headed: Flow, browser: Browser, tmp_path: Path
) -> None:
    flow = Flow(Path(shutil.copytree(headed.folder, tmp_path / "sets")))
    flow.ok("report", "--set", "variants=[sets]")
    folder = flow / PAGE
    names = {figure["name"] for figure in data(folder, "overview")["figures"]}
    assert not names & {"precision-recall", "calibration", "gains-and-losses", "label-map"}
    one = Reader(browser, folder)
    expect(one.page.locator("#curve-note")).to_contain_text("no curves")
    assert set(one.column("labels-table", 1)) == {"\u2013"}
    one.close()


@pytest.fixture
def of_heads(browser: Browser, headed: Flow) -> Iterator[Reader]:
    one = Reader(browser, headed / PAGE, viewport={"width": 1280, "height": 900})
    yield one
    one.close()


def test_the_results_table_has_a_dash(of_heads: Reader) -> None:
    shown = dict(
        zip(of_heads.column("results-table", 0), of_heads.column("results-table", 1), strict=True)
    )
    assert shown["sets"] == "\u2013"
    assert re.match(r"\d", shown["ranking"])


def test_what_pointing_at_labels_and_regions_says(of_heads: Reader, headed: Flow) -> None:
    page = of_heads.page
    said = page.locator("#gallery-info")
    card = page.locator('.card[data-image="1"]')

    def show(variant: str) -> None:
        """Choose a network, and wait for its cards, which take the place of the former ones."""
        card.evaluate("(card) => { card.dataset.former = 'yes'; }")
        choice(page, "Network").select_option(variant)
        expect(card).not_to_have_attribute("data-former", "yes")

    def point(variant: str, label: int | None = None) -> None:
        show(variant)
        if label is None:
            card.locator("rect").last.hover()
        else:
            card.locator(f'.chip[data-label="{label}"]').first.hover()

    def best(variant: str, parity: int | None = None) -> int | None:
        """One of the labels that a card shows, with an even or odd number."""
        show(variant)
        labels = [int(c.get_attribute("data-label") or -1) for c in card.locator(".chip").all()]
        return next((one for one in labels if parity in (None, one % 2)), None)

    point("plain", best("plain"))
    expect(said).to_contain_text("from the whole image")
    assert lit(card) == []
    point("plain")
    expect(said).to_contain_text(": plain does not tell regions apart")

    label = best("weighing")
    assert label is not None
    point("weighing", label)
    region = regions(headed, "weighing")[1, label]
    expect(said).to_contain_text(f"with most weight on region {region} (detector:")
    assert lit(card) == [region]
    point("weighing")
    expect(said).to_contain_text(re.compile(r"\): its weight for \w+ 0\.\d{3}, \w+ 0\.\d{3}"))

    for parity in (0, 1):
        label = best("whole-wins", parity)
        if label is not None:
            point("whole-wins", label)
            expect(said).to_contain_text("from region" if parity else "from the whole image")
            assert lit(card) == ([regions(headed, "whole-wins")[1, label]] if parity else [])


def test_a_network_that_only_ranks_predicts_no_label(of_heads: Reader) -> None:
    page = of_heads.page
    expect(page.locator("#gallery-about")).to_contain_text("ranking only rank labels")
    choice(page, "Network").select_option("ranking")
    counter = page.locator("#gallery-count")
    expect(counter).to_contain_text("18 of 18 images")
    kinds = page.locator('.card[data-image="2"] .chip').evaluate_all(
        "(chips) => chips.map((chip) => chip.classList[1])"
    )
    assert set(kinds) <= {"true", "untrue", "ignored"}
    assert "true" in kinds
    for kind in ("right", "wrong", "missed"):
        choice(page, "Show").select_option(kind)
        expect(counter).to_contain_text("0 of 18 images")
    assert len(VOCABULARY) == 20
