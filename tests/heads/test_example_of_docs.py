"""The head that docs/heads.md shows passes its own test, and the tests of all heads."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import test_every_head
from pages import read_page

from pipeline.settings import TrainSettings, head_of_variant, head_variants, variant_changes
from pipeline.settings.heads import HEADS, Entry

CODE, TEST = (block for block in read_page("docs/heads.md").blocks if block.file is not None)
[ENTRY] = [one for one in read_page("docs/heads.md").blocks if ": Entry(" in one.text]


def run_block(text: str, name: str) -> ModuleType:
    """Run the text of a block as a module."""
    module = ModuleType(name)
    with mock.patch.dict(sys.modules, {name: module}):
        exec(compile(text, name, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def variant() -> Iterator[str]:
    """The example's variant, while its file is imported and its line is in the registry."""
    entries: dict[str, Entry] = eval(f"{{{ENTRY.text}}}", {"Entry": Entry})
    [(name, entry)] = entries.items()
    assert entry.file == Path(str(CODE.file))
    module = run_block(CODE.text, entry.module)
    with mock.patch.dict(sys.modules, {entry.module: module}), mock.patch.dict(HEADS, entries):
        yield name


def test_its_own_test_passes(variant: str) -> None:
    module = run_block(TEST.text, Path(str(TEST.file)).stem)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


OF_VARIANTS = [
    test
    for name, test in vars(test_every_head).items()
    if name.startswith("test_") and "variant" in inspect.signature(test).parameters
]


@pytest.mark.parametrize("test", OF_VARIANTS, ids=lambda test: test.__name__)
def test_it_does_what_every_head_must(variant: str, test: Any) -> None:
    cases = {mark.args[0]: mark.args[1] for mark in test.pytestmark}
    del cases["variant"]
    for values in itertools.product(*cases.values()):
        test(variant=variant, **dict(zip(cases, values, strict=True)))


def test_its_variant_is_a_built_in_one(variant: str) -> None:
    assert variant in head_variants()
    network = TrainSettings.model_validate(variant_changes(variant)).network
    assert network.head == head_of_variant(variant)
