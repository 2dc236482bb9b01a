"""`gmpipe cache verify --repair` of imported regions, which nobody can extract again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import cut, flip_bit
from region_files import assert_stored, images_of, write_npz
from test_import_regions import PARAMS, Checkout, make_checkout

from pipeline.shards.failures import Failure, write_failures


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


REPAIR = ("cache", "verify", "--repair")


@pytest.mark.parametrize("index", ["sound", "damaged", "missing"])
def test_repair_keeps_sound_imported_rows(checkout: Checkout, tmp_path: Path, index: str) -> None:
    """Nobody can extract them again. The import then writes only what is missing."""
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    whole = images_of(path)
    flip_bit(checkout / "cache/tiny/regions-00001.h5", "features", 1)
    flip_bit(checkout / "cache/tiny/regions-00002.h5", "image_id", 0)
    cut(checkout / "cache/tiny/regions-00003.h5", 900)
    if index != "sound":
        cut(checkout / "cache/tiny/index.parquet", 0 if index == "missing" else 500)
    if index == "missing":
        (checkout / "cache/tiny/index.parquet").unlink()
    before = checkout.outputs()
    for _ in range(2):  # it can be repeated
        said = checkout.gmpipe(*REPAIR)
        assert said.refused(r"5 sound rows.* 4 images.*gmpipe import-regions FILE --dataset tiny")
        now = checkout.outputs()
        for name in ("index.parquet", "regions-00000.h5", "regions-00004.h5"):
            assert now.get(f"cache/tiny/{name}") == before.get(f"cache/tiny/{name}")
    assert "9 rows of 3 x 6 float16, 4 of them imported now" in checkout.ok("import-regions", path)
    assert_stored(checkout.cache(), whole, 3)
    assert "all sound" in checkout.ok(*REPAIR)


@pytest.mark.parametrize("index", ["damaged", "missing"])
def test_only_the_index_of_imported_regions_is_written_again(
    checkout: Checkout, tmp_path: Path, index: str
) -> None:
    checkout.ok("import-regions", write_npz(tmp_path))
    before = checkout.outputs()
    cut(checkout / "cache/tiny/index.parquet", 500)
    if index == "missing":
        (checkout / "cache/tiny/index.parquet").unlink()
    assert "9 imported rows, all sound" in checkout.ok(*REPAIR)
    assert checkout.outputs() == before


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"extract": {"regions": 2}}, r"regions is 3, expected 2.*import-regions .*--replace"),
        ({"extract": {"feature_dtype": "float32"}}, r"feature_dtype.*import-regions .*--replace"),
        ({"detector": {"source": "torchvision"}}, r"gmpipe detector --dataset tiny"),
    ],
)
def test_a_refused_repair_of_imported_regions_touches_nothing(
    checkout: Checkout, tmp_path: Path, change: dict[str, Any], pattern: str
) -> None:
    checkout.ok("import-regions", write_npz(tmp_path))
    flip_bit(checkout / "cache/tiny/regions-00001.h5", "features", 1)
    raw = json.loads(json.dumps(PARAMS))
    for section, values in change.items():
        raw[section]["tiny"].update(values)
    make_checkout(checkout.folder, raw)
    checkout.refused(pattern, *REPAIR)


@pytest.mark.parametrize("without_regions", [0, 1])
def test_damaged_failures_of_imports_end_in_an_import(
    checkout: Checkout, tmp_path: Path, without_regions: int
) -> None:
    """Which images had no regions in the import is known by an import only."""
    path = write_npz(tmp_path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["count"][:without_regions] = 0
    np.savez(path, **arrays)
    tolerated = ("--set", "extract.tiny.max_failures=1")
    checkout.ok("import-regions", path, *tolerated)
    failures = checkout / "cache/tiny/failures.parquet"
    assert failures.exists() == bool(without_regions)
    before = checkout.outputs()
    failures.write_bytes(b"damaged")
    for command in (("cache", "verify"), ("cache", "info"), ("train",)):
        assert checkout.gmpipe(*command).refused(r"failures\.parquet.*cache verify .*--repair")
    if without_regions:
        refused = r"without regions: 1 image\..*`gmpipe import-regions FILE --dataset tiny`"
        assert checkout.gmpipe(*REPAIR).refused(refused)
        checkout.ok("import-regions", path, *tolerated)
    else:
        assert "9 imported rows, all sound" in checkout.ok(*REPAIR)
    assert checkout.outputs() == before
    assert "all sound" in checkout.ok(*REPAIR)


@pytest.mark.parametrize("without", ["regions", "index", "cache", "shard"])
def test_what_lacks_imported_regions_names_the_import(
    checkout: Checkout, tmp_path: Path, without: str
) -> None:
    """`gmpipe extract` makes none of them."""
    checkout.ok("import-regions", write_npz(tmp_path))
    folder = checkout / "cache/tiny"
    if without == "regions":
        ids = checkout.cache().ids
        write_failures(folder, [Failure(image_id, "x.png", "none") for image_id in ids])
        assert checkout.gmpipe("train").refused(r"none of the .*failures\.parquet.*[Ii]mport")
        assert "gmpipe extract" not in checkout.gmpipe("train").err
        return
    if without == "cache":
        shutil.rmtree(folder)
    else:
        (folder / ("index.parquet" if without == "index" else "regions-00002.h5")).unlink()
    assert checkout.gmpipe("train").refused(r"`gmpipe import-regions FILE --dataset tiny`")
