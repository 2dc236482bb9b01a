"""What a search tries: lists and ranges, all of a grid, or some of it at random."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from pipeline.errors import InputError
from stages.commands.searching.spaces import Range, Space, choose_trials, read_space


@pytest.mark.parametrize(
    ("setting", "key", "space"),
    [
        ("network.modules=1,2", "network.modules", [1, 2]),
        ("label_vectors=../a.npz,../b.npz", "label_vectors", ["../a.npz", "../b.npz"]),
        ("patience=null,3", "patience", [None, 3]),
        ("epochs=5..8", "epochs", range(5, 9)),
        ("averaging=0.0..0.5", "averaging", Range(0.0, 0.5, log=False)),
        ("learning_rate=log:1e-4..0.1", "learning_rate", Range(1e-4, 0.1, log=True)),
        ("network.latent_size=log:8..512", "network.latent_size", Range(8, 512, log=True)),
    ],
)
def test_a_setting_is_read(setting: str, key: str, space: Space) -> None:
    assert read_space(setting) == (key, space)


@pytest.mark.parametrize("setting", ["epochs=8..5", "epochs=5..5", "learning_rate=log:0..1"])
def test_a_range_without_numbers_is_named(setting: str) -> None:
    with pytest.raises(InputError, match=setting):
        read_space(setting)


def test_all_of_a_grid_is_tried_in_order() -> None:
    spaces: dict[str, Space] = {"a": [1, 2], "b": range(3), "c": ["x"]}
    assert choose_trials(spaces, None) == list(product([1, 2], [0, 1, 2], ["x"]))
    assert choose_trials(spaces, 6) == choose_trials(spaces, None)


def test_a_grid_that_is_too_large_asks_for_a_number_of_trials() -> None:
    for space in (range(2000), Range(0.0, 1.0, log=False)):
        with pytest.raises(InputError, match="--trials"):
            choose_trials({"a": space}, None)


def test_trials_are_drawn_once_and_more_of_them_continue() -> None:
    rate = Range(1e-4, 0.1, log=True)
    spaces: dict[str, Space] = {"rate": rate, "size": Range(8, 512, log=True), "n": [1, 2, 3]}
    trials = choose_trials(spaces, 300)
    assert len(set(trials)) == 300
    assert choose_trials(spaces, 20) == trials[:20]
    rates, sizes, numbers = (np.array(values) for values in zip(*trials, strict=True))
    assert 1e-4 <= rates.min() < 2e-4
    assert 0.05 < rates.max() <= 0.1
    assert np.mean(rates < math.sqrt(1e-4 * 0.1)) == pytest.approx(0.5, abs=0.1)
    assert all(float(f"{value:.2e}") == value for value in rates)
    assert sizes.dtype.kind == "i"
    assert set(sizes) <= set(range(8, 513))
    assert np.mean(sizes < 64) == pytest.approx(0.5, abs=0.1)
    assert set(numbers) == {1, 2, 3}
    # There are only six numbers of so few digits here.
    few = choose_trials({"a": Range(0.1, 0.105, log=False)}, 50)
    assert sorted(few) == [(0.1,), (0.101,), (0.102,), (0.103,), (0.104,), (0.105,)]
