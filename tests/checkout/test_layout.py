"""The names of runs' folders say which run is in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.names import LONGEST_NAME
from stages.checkout.layout import run_folder, run_of_folder

NAMES = st.from_regex(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{LONGEST_NAME - 1}}}", fullmatch=True)
LIKE_RUNS = ("a-s1", "full-s0-0123abcd", "my-small", "x-s", "s0-s0", "My_variant")


@given(NAMES | st.sampled_from(LIKE_RUNS), st.integers(0, 2**63 - 1), st.booleans())
def test_a_folder_names_its_run(variant: str, seed: int, hashed: bool) -> None:
    folder = run_folder("tiny", variant, seed, {"beta": 0.5} if hashed else None)
    assert run_of_folder(folder.name) == (variant, seed, hashed)


@pytest.mark.parametrize(
    "name",
    [
        *("full", "full-s", "-s0", "full-s-1", "full-s01", "full-sx", "full-s0-", "full_s0"),
        *("full-s0-0123abc", "full-s0-0123ABCD", "full-s0-0123abcde", "full-s0-backup"),
        *(".full-s0", "_full-s0", "mine.v2-s0", "my variant-s0", "hündchen-s0", "full-s٣"),
        *("full-s0\n", "a/full-s0", f"{'x' * (LONGEST_NAME + 1)}-s0", "sweeps", ""),
    ],
)
def test_other_names_are_no_runs(name: str) -> None:
    assert run_of_folder(name) is None
