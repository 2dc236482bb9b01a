"""`gmpipe cache export`: what it writes, `import-regions` reads back bit for bit."""

from __future__ import annotations

import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import list_images, make_brought, start_again, stored
from flows import Flow
from PIL import Image
from region_files import (
    LABELS,
    make_arrays,
    make_lines,
    read_tsv,
    write_npz,
    write_tsv,
)

from pipeline.datasets.manifest import COLUMNS, full_counts, read_manifest, write_manifest
from pipeline.shards import export
from pipeline.shards.imports import BottomUpFiles
from pipeline.shards.reader import RegionCache


def edge_cases(**changes: Any) -> dict[str, Any]:
    """Arrays with a region without class, equal scores, and the features of whole images."""
    arrays = make_arrays()
    arrays["classes"][0, 0], arrays["classes"][1, 0] = -1, 32766
    arrays["scores"][3] = 0.5
    arrays["whole"] = np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
    return {**arrays, **changes}


def test_an_npz_comes_back_with_its_manifest(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout", max_failures=1)
    count = make_arrays()["count"]
    count[4] = 0
    write_npz(flow.folder, **edge_cases(count=count))
    flow.ok("import-regions", "made.npz")
    table = read_manifest(flow / "data/npz/prepared/manifest.parquet").table
    before = stored(flow, "npz")
    with mock.patch.object(export, "_AT_ONCE", 200):  # two or three images at a time
        said = flow.ok("cache", "export", "--to", "out/regions.npz")
    assert "out/regions.npz" in said
    assert "8 images" in said
    assert "max_failures: 1" in said
    start_again(flow, ("cache", "data"))
    flow.ok("import-regions", "out/regions.npz")
    assert stored(flow, "npz") == before
    assert len(before) == 8
    assert read_manifest(flow / "data/npz/prepared/manifest.parquet").table == table
    # It is the same file each time, and plain NumPy reads it.
    first = (flow / "out/regions.npz").read_bytes()
    flow.ok("cache", "export", "--to", "out/regions.npz")
    assert (flow / "out/regions.npz").read_bytes() == first
    with np.load(flow / "out/regions.npz") as npz:
        assert npz["label_names"].tolist() == list(LABELS)
        assert npz["features"].dtype == np.float16
        assert npz["classes"][0, 0] == -1
        assert 32766 in npz["classes"][1]


@pytest.mark.parametrize(("dtype", "whole"), [("float16", True), ("float32", False)])
def test_parquet_comes_back(tmp_path: Path, dtype: str, whole: bool) -> None:
    flow = make_brought(tmp_path / "checkout", feature_dtype=dtype)
    write_npz(flow.folder, **edge_cases(**({} if whole else {"whole": None})))
    flow.ok("import-regions", "made.npz")
    sizes: list[int] = []
    gather = RegionCache.gather

    def noted(cache: RegionCache, rows: Any) -> Any:
        sizes.append(len(rows))
        return gather(cache, rows)

    with (
        mock.patch.object(export, "_AT_ONCE", 200),
        mock.patch.object(RegionCache, "gather", noted),
    ):
        flow.ok("cache", "export", "--to", "all.parquet")
    assert sum(sizes) == 9
    assert max(sizes) == (4 if dtype == "float16" else 2)
    table = pq.read_table(flow / "all.parquet")
    assert ("whole" in table.column_names) == whole
    assert table.column("scores")[3].as_py() == [0.5] * 4
    pixels = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    list_images(flow, dict(zip(table["image_id"].to_pylist(), pixels, strict=True)))
    said = flow.ok("import-regions", "all.parquet", "--dataset", "listed")
    assert "9 rows" in said
    assert stored(flow, "listed") == stored(flow, "npz")


def test_a_tsv_comes_back_but_for_the_last_bit_of_boxes(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    write_npz(flow.folder, **edge_cases())
    flow.ok("import-regions", "made.npz")
    said = flow.ok("cache", "export", "--to", "all.tsv")
    assert "float32 pixels" in said
    assert "whole" in said
    with np.load(flow / "made.npz") as npz:
        sizes = dict(zip(npz["image_id"].tolist(), npz["size_wh"].tolist(), strict=True))
    list_images(flow, {key: (width, height) for key, (width, height) in sizes.items()})
    flow.ok("import-regions", "all.tsv", "--dataset", "listed")
    before, after = stored(flow, "npz"), stored(flow, "listed")
    assert before.keys() == after.keys()
    for image_id, fields in after.items():
        boxes = (np.frombuffer(one["boxes"], "<f4") for one in (fields, before[image_id]))
        np.testing.assert_allclose(*boxes, rtol=1.2e-7)
        assert {**fields, "boxes": b"", "whole": b""} == {
            **before[image_id],
            "boxes": b"",
            "whole": b"",
        }
    # As others read such a file.
    image = read_tsv(flow / "all.tsv")["000103"]
    assert image["features"].shape == (4, 6)
    assert image["objects_conf"].tolist() == [0.5] * 4


def test_an_extracted_cache_is_exported_without_its_crops(made: Flow, tmp_path: Path) -> None:
    before = stored(made, "tiny")
    said = made.ok("cache", "export", "--to", str(tmp_path / "tiny.npz"))
    assert "24 rows of random crops" in said
    flow = make_brought(tmp_path / "checkout", views=1)
    flow.ok("import-regions", str(tmp_path / "tiny.npz"))
    assert stored(flow, "npz") == before


def test_an_npz_that_would_be_read_otherwise_is_refused(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    labels = np.where(make_arrays()["labels"] == 1, 1, 0)
    labels[0, 0] = -1
    write_npz(flow.folder, labels=labels)
    flow.ok("import-regions", "made.npz")
    flow.ok("cache", "export", "--to", "x.npz")
    path = flow / "data/npz/prepared/manifest.parquet"
    manifest = read_manifest(path)
    rows = manifest.table.to_pylist()
    rows[0]["ignored"] = [n for n in range(3) if n not in rows[0]["labels"]]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    write_manifest(path, replace(manifest, table=table, counts=full_counts(table)))
    assert flow.gmpipe("cache", "export", "--to", "y.npz").refused(r"y\.npz.*\.parquet")


def test_sizes_are_read_from_photographs_if_need_be(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    images = {str(100 + n): (200, 100) for n in range(9)}
    list_images(flow, dict.fromkeys(images))
    write_tsv(flow / "a.tsv", make_lines())
    flow.ok("import-regions", "a.tsv", "--dataset", "listed")
    command = ("cache", "export", "--dataset", "listed", "--to", "all.parquet")
    assert flow.gmpipe(*command).refused(r"100\.jpg.*'100'.*data/listed")
    assert not (flow / "all.parquet").exists()
    for image_id in images:
        Image.new("RGB", (30, 20)).save(flow / f"data/listed/{image_id}.jpg")
    flow.ok(*command)
    assert pq.read_table(flow / "all.parquet")["width"].to_pylist() == [30] * 9


def test_what_can_not_be_exported(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    assert flow.gmpipe("cache", "export", "--to", "x.npz").refused("gmpipe extract|import-regions")
    write_npz(flow.folder, image_id=np.array([f"{n}\tx" for n in range(9)]))
    flow.ok("import-regions", "made.npz")
    assert flow.gmpipe("cache", "export", "--to", "x.csv").refused(r"x\.csv.*\.npz.*\.tsv")
    assert flow.gmpipe("cache", "export", "--to", "x.tsv").refused(r"'0\\tx'.*\.parquet")
    flow.ok("cache", "export", "--to", "x.parquet")
    with mock.patch("pipeline.shards.export.npy.write_array", side_effect=KeyboardInterrupt):
        assert flow.gmpipe("cache", "export", "--to", "x.npz").code == 130
    assert sorted(path.name for path in flow.folder.glob("x*")) == ["x.parquet"]
    list_images(flow, {"elsewhere": (1, 1), "b": (1, 1), "c": (1, 1)})
    (flow / "cache/npz").rename(flow / "cache/listed")
    assert flow.gmpipe("cache", "export", "--dataset", "listed", "--to", "x.npz").refused("npz")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    """400 images of 24 kB are copied a hundred kilobytes at a time."""
    flow = make_brought(tmp_path / "checkout", rows_per_shard=100)
    write_npz(flow.folder, **make_arrays(400, slots=3, size=4000))
    flow.ok("import-regions", "made.npz")
    flow.ok("cache", "export", "--to", "warm.npz")
    for name in ("a.npz", "a.tsv", "a.parquet"):
        with mock.patch.object(export, "_AT_ONCE", 100_000):
            tracemalloc.start()
            flow.ok("cache", "export", "--to", name)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert (flow / name).stat().st_size > 5.5e6
        assert peak < 3e6
    assert zipfile.ZipFile(flow / "a.npz").testzip() is None


def test_real_bottom_up_regions_come_back(shared: Path, tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout", feature_dtype="float32")
    path = shared / "data/bottom-up-sample/train2014_obj36.tsv"
    lines = BottomUpFiles.open([path]).lines
    list_images(flow, {line.file_id: (line.width, line.height) for line in lines})
    flow.ok("import-regions", str(path), "--dataset", "listed")
    before = stored(flow, "listed")
    assert len(before) == 10
    flow.ok("cache", "export", "--dataset", "listed", "--to", "out.parquet")
    start_again(flow)
    flow.ok("import-regions", "out.parquet", "--dataset", "listed")
    assert stored(flow, "listed") == before


@pytest.mark.slow
def test_the_real_regions_of_voc2007_come_back(shared: Path, tmp_path: Path) -> None:
    """9,960 images of ten regions, with the features of whole images."""
    flow = make_brought(tmp_path / "checkout", regions=10)
    flow.ok("import-regions", str(shared / "data/voc2007-official/regions.npz"))
    table = read_manifest(flow / "data/npz/prepared/manifest.parquet").table
    before = stored(flow, "npz")
    for name in ("out.npz", "out.parquet"):
        flow.ok("cache", "export", "--to", name)
    start_again(flow, ("cache", "data/npz"))
    flow.ok("import-regions", "out.npz")
    assert stored(flow, "npz") == before
    assert read_manifest(flow / "data/npz/prepared/manifest.parquet").table == table
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    list_images(flow, dict(zip(table["image_id"].to_pylist(), sizes, strict=True)))
    flow.ok("import-regions", "out.parquet", "--dataset", "listed")
    assert stored(flow, "listed") == before
