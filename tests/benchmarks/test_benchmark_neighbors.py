"""benchmarks.neighbors: its numbers against plain loops, and what it prints.

`toys` describes the toy problem.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from reference import nearest_instances
from tiny import make_batch
from torchvision.ops import box_iou
from toys import N_TRAIN, M, make_checkout

from benchmarks.neighbors import main, measure
from pipeline.heads.contract import RegionBatch

NAMES = ("neighbours", "overlapping %", "overlapping alike %", "same class %", "distance")


def by_loops(batches: list[RegionBatch], neighbors: int) -> list[float]:
    """The columns of a row, pair by pair."""
    overlapping, both, alike, distances, regions = 0, 0, 0, [], 0
    for batch, image in [(one, image) for one in batches for image in range(len(one.mask))]:
        boxes, classes = batch.boxes[image].tolist(), batch.classes[image].tolist()
        iou = box_iou(batch.boxes[image], batch.boxes[image]).tolist()
        centers = [((x + right) / 2, (y + bottom) / 2) for x, y, right, bottom in boxes]
        for i in range(int(batch.mask[image].sum())):
            regions += 1
            for j in nearest_instances(batch, image, i, neighbors):
                overlapping += iou[i][j] > 0.5
                both += iou[i][j] > 0.5 and classes[i] == classes[j]
                alike += classes[i] == classes[j]
                distances.append(math.dist(centers[i], centers[j]))
    shares = [100 * count / len(distances) for count in (overlapping, both, alike)]
    return [len(distances) / regions, *shares, sum(distances) / len(distances)]


def test_a_row_counts_the_neighbours_of_every_region() -> None:
    batches = [make_batch(9, regions, seed=regions) for regions in (8, 6)]
    rows = measure(batches, [1, 4])
    assert [row["K"] for row in rows] == [1, 4, "all"]
    for row, neighbors in zip(rows, (1, 4, 8), strict=True):
        expected = by_loops(batches, neighbors)
        assert [row[name] for name in NAMES] == pytest.approx(expected)
        assert all(share > 0 for share in expected[1:3])


def test_the_training_images_of_a_data_set_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    main(["--dataset", "toy", "--neighbors", "1", "2"], said.append)
    table, line = said
    content = json.loads(line)
    assert (content["dataset"], content["images"], content["regions"]) == ("toy", N_TRAIN, M)
    # A third of the images each has 1, 2 and 3 regions: of 6 regions 5 have one neighbour, 3 two.
    found = {row["K"]: row["neighbours"] for row in content["rows"]}
    assert list(found) == [1, 2, "all"]
    assert found[1] == pytest.approx(5 / 6)
    assert found[2] == found["all"] == pytest.approx(8 / 6)
    assert len(table.strip().splitlines()) == 2 + 3
