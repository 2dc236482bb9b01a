"""Which rows a cache has, and the digest that stands for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from builders import draw_scenes
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets.manifest import Manifest
from pipeline.regions.plan import PlannedImages, ViewJob, ViewPlan, rows_digest


def test_every_training_view_and_every_test_image_is_planned(tmp_path: Path) -> None:
    plan = ViewPlan(draw_scenes(tmp_path).manifest, 3)
    jobs = plan.jobs(np.arange(len(plan)))
    assert len(jobs) == 12 * 3 + 2
    assert jobs[:4] == [
        ViewJob("train-00000", "images/train-00000.png", 0),
        ViewJob("train-00000", "images/train-00000.png", 1),
        ViewJob("train-00000", "images/train-00000.png", 2),
        ViewJob("train-00001", "images/train-00001.png", 0),
    ]
    assert [(job.image_id, job.view) for job in jobs[-2:]] == [
        ("test-00000", 0),
        ("test-00001", 0),
    ]


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4))
def test_a_plan_is_what_two_loops_list(train: list[bool], views: int) -> None:
    """Splits in any order, compared with the plainest way to list the rows."""
    splits = ["train" if one else "test" for one in train]
    manifest = object.__new__(Manifest)  # a plan may be of one split, a manifest has both
    columns = {
        "image_id": [f"i{n}" for n in range(len(splits))],
        "path": [f"{n}.png" for n in range(len(splits))],
        "split": splits,
    }
    object.__setattr__(manifest, "table", pa.table(columns))
    expected = [
        ViewJob(f"i{n}", f"{n}.png", view)
        for wanted in ("train", "test")
        for n, split in enumerate(splits)
        if split == wanted
        for view in range(views if split == "train" else 1)
    ]
    plan = ViewPlan(manifest, views)
    assert plan.jobs(np.arange(len(plan))) == expected
    # Back from ids and views to rows; unknown ids have no number, further views no row.
    numbers = plan.numbers([*(job.image_id for job in expected), "other"])
    assert numbers[-1] == -1
    numbers, of_views = numbers[:-1], np.array([job.view for job in expected], np.int16)
    assert plan.rows(numbers, of_views).tolist() == list(range(len(expected)))
    beyond = np.full(len(expected), views, np.int16)
    assert len(plan.rows(numbers, beyond)) == 0
    # What a cache of every other row lacks.
    images = PlannedImages(plan, np.zeros((len(splits), 32), np.uint8))
    missing = images.missing_rows(numbers[::2], of_views[::2])
    assert missing.tolist() == list(range(1, len(expected), 2))


def test_a_digest_of_rows_depends_on_the_rows_alone() -> None:
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (5, 32), dtype=np.uint8)
    views = np.array([0, 1, 0, 300, 2], np.int16)
    whole = rows_digest(digests, views)
    order = rng.permutation(5)
    assert rows_digest(digests[order], views[order]) == whole
    assert rows_digest(digests[:4], views[:4]) != whole
    assert rows_digest(digests, views[::-1].copy()) != whole
    changed = digests.copy()
    changed[2, 31] ^= 1
    assert rows_digest(changed, views) != whole
