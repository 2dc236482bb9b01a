"""Runs that `report` needs and that are not made: the message names both ways out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from flows import Flow, unrendered
from small import write_params


@pytest.fixture(autouse=True, scope="module")
def _unrendered() -> Iterator[None]:
    with unrendered():
        yield


def commands(flow: Flow) -> list[list[str]]:
    """The commands that `report` names when it refuses, without `gmpipe`; not `runs list`."""
    outcome = flow.gmpipe("report")
    assert outcome.refused(r"metrics\.json")
    named = [shlex.split(found)[1:] for found in re.findall("`(gmpipe .*?)`", outcome.err)]
    assert ["runs", "list", "--dataset", "voc2007"] in named
    return [command for command in named if command[0] != "runs"]


def test_the_variants_that_are_made_can_be_shown_alone(small: Flow) -> None:
    small.ok("train")
    small.ok("evaluate")
    make, _, _, show = commands(small)
    assert make == ["compare", "--dataset", "voc2007", "--seed", "0"]
    assert show == ["report", "--dataset", "voc2007", "--set", "variants=[full]"]
    small.ok(*show)
    small.ok(*make, "--jobs", "1")
    small.ok("report")


def test_the_seeds_that_are_made_can_be_shown_alone(small: Flow) -> None:
    small.ok("compare", "--seed", "0", "--jobs", "1")
    write_params(small.folder, seeds=[0, 1])
    *_, show = commands(small)
    assert show == ["report", "--dataset", "voc2007", "--set", "seeds=[0]"]
    small.ok(*show)


def test_without_any_run_there_is_nothing_to_show(small: Flow) -> None:
    assert [command[0] for command in commands(small)] == ["compare", "train", "evaluate"]


def test_a_page_without_the_variant_that_others_are_compared_with(small: Flow) -> None:
    small.ok("compare", "--seed", "0", "--variant", "max-pool")
    *_, show = commands(small)
    assert show[-1] == "variants=[max-pool]"
    small.ok(*show)
