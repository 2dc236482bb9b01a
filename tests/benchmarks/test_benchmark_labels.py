"""benchmarks.labels: flips of labels and labels left out, by hand, and what they print."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flows import Flow

from benchmarks.labels import doubts, unseen
from pipeline.errors import InputError


def test_flips_are_as_many_as_said_and_ignored_labels_stay() -> None:
    truth = np.random.default_rng(0).choice([-1, 0, 1], (500, 4), p=[0.1, 0.7, 0.2])
    given, known = (truth == 1).sum(), (truth >= 0).sum()
    for protocol, removed_too in (("any", False), ("equal", True)):
        flipped = doubts.flip(truth, protocol, 0.1, seed=3)
        assert np.array_equal(flipped[truth < 0], truth[truth < 0])
        removed, added = ((flipped != truth) & (truth == value) for value in (1, 0))
        if removed_too:
            assert removed.sum() == added.sum() == round(0.1 * given)
        else:
            assert removed.sum() + added.sum() == round(0.1 * known)
        assert not np.array_equal(flipped, doubts.flip(truth, protocol, 0.1, seed=4))


def test_the_share_is_that_of_the_first_of_each_list() -> None:
    """12 of 30 images have the label; one label was removed and two were added, one is found."""
    truth = np.zeros((30, 1), np.int8)
    truth[:12] = 1
    flipped = truth.copy()
    flipped[0], flipped[12:14] = 0, 1
    scores = np.where(flipped == 1, 0.9, 0.1)
    scores[12], scores[5] = 0.05, 0.2  # an added label that is found, and a sound one
    shares = doubts.found(truth, flipped, scores)
    assert shares["given"] == pytest.approx([50, 2, 100 * 2 / 13])
    assert shares["not given"] == pytest.approx([0, 1, 100 / 17])
    assert shares["together"] == pytest.approx([100 / 3, 3, 10])


def test_flipped_labels_are_looked_for(small: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.folder)
    monkeypatch.setattr("pipeline.doubts.ranking.FEWEST", 1)
    said: list[str] = []
    arguments = ["--dataset", "voc2007", "--seeds", "0", "--protocols", "equal", "--folds", "2"]
    doubts.main([*arguments, "--share", "0.1"], said.append)
    assert json.loads(said[-1]).keys() == {f"equal, {kind}" for kind in doubts.KINDS}
    assert not (small / ".state").exists()


def test_labels_are_left_out(small: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.folder)
    said: list[str] = []
    with pytest.raises(InputError, match=r"max-pool.*full"):
        unseen.main(["--dataset", "voc2007", "--variant", "max-pool"], said.append)
    options = ["--left-out", "3", "--set", "train.voc2007.epochs=1"]
    unseen.main(["--dataset", "voc2007", "--seeds", "0,1", *options], said.append)
    means = json.loads(said[-1])
    assert means.keys() == {*unseen.COLUMNS, "before", "after"}
    names = [line.split("|")[2].strip() for line in said[0].splitlines()[2:-1]]
    assert len(names) == 6
    assert names[:3] != names[3:]
