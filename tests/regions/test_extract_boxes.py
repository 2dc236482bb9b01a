"""`gmpipe extract` at given boxes: what it stores, says and refuses, and what reads its cache.

Each test starts from the finished flow of 24 training and 12 test images, whose worker is a thread
of this process.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import assert_same_rows, flip_bit
from clusters import worker_in_this_process
from flows import Flow
from region_files import write_box_file

from pipeline.datasets.manifest import BoxTable, read_boxes, read_manifest, write_boxes
from pipeline.report.facts import what_was_run
from pipeline.report.inputs import PageInputs
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import RegionRows
from pipeline.shards.shard import whole_shards
from stages.checkout.params import read_request
from stages.report import _read_inputs

SIDE = 64  # of a photograph, in pixels
ANNOTATED = ("--set", "extract.tiny.boxes=annotations")
OF_FILE = ("--set", "extract.tiny.boxes=file", "--set", "extract.tiny.boxes_file=mine.npz")


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    with worker_in_this_process():
        yield


def plain_rows(flow: Flow) -> dict[str, RegionRows]:
    """The row of each image's view 0."""
    cache = RegionCache.open(flow / "cache/tiny")
    rows = cache.gather(range(len(cache)))
    return {rows.image_id[row].decode(): rows.take([row]) for row in np.flatnonzero(rows.view == 0)}


def boxes_of(flow: Flow) -> BoxTable:
    manifest = read_manifest(flow / "data/tiny/prepared/manifest.parquet")
    ids = manifest.table["image_id"].to_pylist()
    return read_boxes(flow / "data/tiny/prepared/boxes.parquet", ids)


def inputs_of(flow: Flow, *overrides: str) -> PageInputs:
    with contextlib.chdir(flow.folder):
        return _read_inputs(read_request(None, overrides), ["max-pool"], [0], 1)


def write_mine(flow: Flow, **changes: Any) -> Path:
    """Two boxes of every image, of classes that no detector knows."""
    ids = list(boxes_of(flow).images)
    rows: dict[str, list[Any]] = {
        "image_id": [*ids, *ids],
        "box": [[8, 0, 40, 64]] * len(ids) + [[0, 0, 16, 32]] * len(ids),
        "score": [0.25] * len(ids) + [0.75] * len(ids),
        "class": ["zebra"] * len(ids) + ["ant"] * len(ids),
    }
    return write_box_file(flow / "data/tiny/mine.npz", {**rows, **changes})


def test_the_annotated_boxes_are_extracted_after_a_replacement(flow: Flow) -> None:
    detected = plain_rows(flow)
    refused = flow.gmpipe("extract", *ANNOTATED)
    assert refused.refused('boxes is absent, expected "annotations".*boxes_sha256.*--replace')
    assert "60 rows, 60 of them" in flow.ok("extract", *ANNOTATED, "--replace")
    assert "nothing to extract" in flow.ok("extract", *ANNOTATED)
    table = boxes_of(flow)
    for image_id, row in plain_rows(flow).items():
        objects = table.images[image_id]
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        order = sorted(range(len(sides)), key=lambda at: -float(np.float64(sides[at]).prod()))[:4]
        assert row.count[0] == len(order)
        np.testing.assert_allclose(row.boxes[0, : len(order)], objects.boxes[order], atol=1e-6)
        assert row.classes[0, : len(order)].tolist() == objects.classes[order].tolist()
        assert set(row.scores[0, : len(order)].tolist()) == {1}
        np.testing.assert_array_equal(row.whole, detected[image_id].whole)
    # Damage is repaired at the same boxes.
    before = plain_rows(flow)
    flip_bit(whole_shards(flow / "cache/tiny")[0], "features", 0)
    flow.ok("cache", "verify", "--repair", *ANNOTATED)
    for image_id, row in plain_rows(flow).items():
        assert_same_rows(row, before[image_id])
    assert "images/s" in flow.ok("cache", "estimate", *ANNOTATED, "--probe", "2")
    # The runs say so, and can't label new photographs.
    said = flow.gmpipe("train", "--variant", "max-pool")
    assert "boxes annotations (params.yaml: detector)" in said.out + said.err
    photograph = "data/tiny/prepared/images/test-00000.png"
    for command in (("predict", photograph), ("explain", photograph, "-o", "picture.png")):
        outcome = flow.gmpipe(*command, "--run", "runs/tiny/max-pool-s0")
        assert outcome.refused(r"`boxes` was `annotations`.*extract\.tiny\.boxes.*`detector`")


def test_boxes_of_a_file_and_their_names(flow: Flow) -> None:
    path = write_mine(flow)
    assert "60 rows, 60 of them" in flow.ok("extract", *OF_FILE, "--replace")
    for row in plain_rows(flow).values():
        expected = np.array([[0, 0, 16, 32], [8, 0, 40, 64]]) / SIDE
        np.testing.assert_allclose(row.boxes[0, :2], expected, atol=1e-6)
        assert row.scores[0, :2].tolist() == [0.75, 0.25]
        assert (row.count[0], row.classes[0, :2].tolist()) == (2, [2, 1])
    flow.ok("train", "--variant", "max-pool")
    flow.ok("evaluate", "--variant", "max-pool")
    overrides = OF_FILE[1::2]
    assert inputs_of(flow, *overrides).classes == ("background", "zebra", "ant")
    made_by = dict(what_was_run(inputs_of(flow, *overrides))["facts"])["regions made by"]
    assert made_by.startswith("the boxes of a file, with features of")
    assert inputs_of(flow).classes is None  # the detector's numbers mean others
    # Other boxes are another cache, and their names are not those of these regions.
    write_mine(flow, score=[0.5] * 72)
    assert inputs_of(flow, *overrides).classes is None
    assert flow.gmpipe("extract", *OF_FILE).refused("boxes_sha256 is .*--replace")
    path.unlink()
    assert flow.gmpipe("extract", *OF_FILE).refused("data/tiny/mine.npz.*boxes_file")


def test_images_without_boxes_are_counted_and_named(flow: Flow) -> None:
    table = boxes_of(flow)
    for image_id in ("train-00004", "test-00002"):
        del table.images[image_id]
    write_boxes(flow / "data/tiny/prepared/boxes.parquet", table)
    outcome = flow.gmpipe("extract", *ANNOTATED, "--replace")
    assert outcome.code == 0
    assert re.search(r"2 of 36 images.*'train-00004', 'test-00002'", outcome.out + outcome.err)
    row = plain_rows(flow)["test-00002"]
    assert (row.count[0], row.classes[0, 0], row.scores[0, 0]) == (1, 0, 0)
    assert row.boxes[0, 0].tolist() == [0, 0, 1, 1]


def test_without_boxes_the_setting_is_refused(flow: Flow, small: Flow) -> None:
    (flow / "data/tiny/prepared/boxes.parquet").write_bytes(b"PAR1")
    assert flow.gmpipe("extract", *ANNOTATED).refused("boxes.parquet.*gmpipe prepare")
    (flow / "data/tiny/prepared/boxes.parquet").unlink()
    before = flow.bytes("cache/tiny")
    refused = flow.gmpipe("extract", *ANNOTATED, "--replace")
    assert refused.refused("tiny has no boxes.*`detector`.*`boxes_file`")
    assert flow.bytes("cache/tiny") == before
    imported = small.gmpipe("extract", "--set", "extract.voc2007.boxes=annotations")
    assert imported.refused("voc2007 are imported.*Remove `boxes`")
