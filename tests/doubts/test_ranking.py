"""The measure of `gmpipe doubts`, against the definition entry by entry."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.doubts.ranking import FEWEST, Thresholds, find_doubtful, judged, self_confidence


def by_definition(p: np.ndarray, truth: np.ndarray) -> list[tuple[float, int, int]]:
    """Confidence, image and label of the doubtful entries, as the paper builds its joint counts.

    An entry is counted for the answer with the highest probability among those that reach their
    threshold; it is off the diagonal if that is not the given one.
    """
    found = []
    for label in range(p.shape[1]):
        answers = {1: p[:, label], 0: 1 - p[:, label]}
        images = {answer: np.flatnonzero(truth[:, label] == answer) for answer in (0, 1)}
        if min(map(len, images.values())) < FEWEST:
            continue
        threshold = {answer: answers[answer][images[answer]].mean() for answer in (0, 1)}
        for image, own in enumerate(truth[:, label].tolist()):
            reached = {a: answers[a][image] for a in (0, 1) if answers[a][image] >= threshold[a]}
            if own < 0 or not reached:
                continue
            if own not in reached or reached[own] < max(reached.values()):
                found.append((answers[own][image], image, label))
    return sorted(found)


@given(st.integers(0, 2**31), st.integers(20, 60), st.integers(1, 4))
@settings(max_examples=30)
def test_the_list_is_that_of_the_definition(seed: int, images: int, labels: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([-1, 0, 1], (images, labels), p=[0.1, 0.5, 0.4]).astype(np.int8)
    p = (rng.random((images, labels)) + 0.4 * (truth == 1)) / 1.4
    expected = by_definition(p, truth)
    rows, columns = find_doubtful(p, truth, Thresholds.of(p, truth))
    assert set(zip(rows, columns, strict=True)) == {(i, c) for _, i, c in expected}
    confidence = self_confidence(p, truth)[rows, columns]
    assert np.array_equal(confidence, np.sort(confidence))
    assert np.allclose(confidence, [own for own, _, _ in expected])


def test_a_label_of_few_images_is_not_judged() -> None:
    truth = np.zeros((40, 3), np.int8)
    truth[: FEWEST - 1, 0] = truth[:FEWEST, 1] = 1
    truth[: 41 - FEWEST, 2] = 1  # one too few lack it
    p = np.where(truth == 1, 0.2, 0.1)
    p[:, 1] = np.where(np.arange(40) == 39, 0.9, p[:, 1])
    assert judged(truth).tolist() == [False, True, False]
    rows, columns = find_doubtful(p, truth, Thresholds.of(p, truth))
    assert set(columns) == {1}
    assert rows[0] == 39


def test_labels_have_thresholds_of_their_own() -> None:
    """0.3 is little for a label that its images get 0.9 for, and much for one of 0.2."""
    truth = np.zeros((40, 2), np.int8)
    truth[:20] = 1
    p = np.where(truth == 1, [0.9, 0.2], 0.02)
    p[39] = 0.3
    rows, columns = find_doubtful(p, truth, Thresholds.of(p, truth))
    assert (39, 1) in set(zip(rows, columns, strict=True))
    assert (39, 0) not in set(zip(rows, columns, strict=True))


def test_thresholds_of_one_split_judge_another() -> None:
    truth = np.repeat(np.array([[1], [0]], np.int8), 20, axis=0)
    thresholds = Thresholds.of(np.where(truth == 1, 0.8, 0.1), truth)
    p, other = np.array([[0.85], [0.75], [0.05], [0.2]]), np.array([[0], [0], [1], [1]], np.int8)
    assert find_doubtful(p, other, thresholds)[0].tolist() == [2, 0]
