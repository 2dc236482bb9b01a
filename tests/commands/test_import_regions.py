"""`gmpipe import-regions`: regions that were made elsewhere become a cache, and runs read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flows import Flow, Outcome
from region_files import (
    LABELS,
    assert_stored,
    changed_line,
    images_of,
    make_arrays,
    make_lines,
    tsv_images_of,
    write_npz,
    write_tsv,
)
from ruamel.yaml import YAML

from pipeline import files as files_module
from pipeline.datasets.manifest import (
    COLUMNS,
    Manifest,
    full_counts,
    read_manifest,
    write_manifest,
)
from pipeline.errors import MismatchError
from pipeline.regions.detector import read_description
from pipeline.settings import Params
from pipeline.shards.failures import read_failures
from pipeline.shards.reader import RegionCache
from pipeline.shards.shard import read_header

PARAMS: dict[str, Any] = {
    "datasets": ["tiny"],
    "variants": ["full"],
    "seeds": [0],
    "prepare": {"tiny": {"source": "imported"}, "listed": {"source": "table"}},
    "detector": {"tiny": {"source": "imported"}, "listed": {"source": "imported"}},
    "extract": {
        "tiny": {"regions": 3, "rows_per_shard": 2},
        "listed": {"regions": 3, "rows_per_shard": 2},
    },
    "train": {
        name: {"network": {"latent_size": 8, "neighbors": 2}, "epochs": 1, "batch_size": 4}
        for name in ("tiny", "listed")
    },
}


class Checkout(Flow):
    """A folder that gmpipe runs in, whose arguments may be paths."""

    def gmpipe(self, *arguments: object) -> Outcome:
        return super().gmpipe(*map(str, arguments))

    def ok(self, *arguments: object) -> str:
        return super().ok(*map(str, arguments))

    def refused(self, pattern: str, *arguments: object) -> None:
        """Run a command that must fail with a message that matches, and write nothing."""
        before = self.outputs()
        assert self.gmpipe(*arguments).refused(pattern)
        assert self.outputs() == before

    def outputs(self) -> dict[str, bytes]:
        """All files of data/ and cache/ but locks."""
        files = self.bytes("data") | self.bytes("cache")
        return {name: content for name, content in files.items() if not name.endswith(".lock")}

    def cache(self, dataset: str = "tiny") -> RegionCache:
        return RegionCache.open(self / f"cache/{dataset}")


def make_checkout(folder: Path, params: dict[str, Any] = PARAMS) -> Checkout:
    folder.mkdir(exist_ok=True)
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump(json.loads(json.dumps(params)), stream)
    return Checkout(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


def write_listed(
    checkout: Checkout, image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] | None = None
) -> None:
    """Write a manifest of `listed`: every third image a test image, the labels in turn."""
    rows = [
        {
            "image_id": image_id,
            "path": f"{image_id}.jpg",
            "split": "test" if number % 3 == 2 else "train",
            "labels": [number % 3],
            "ignored": [],
            "width": None if sizes is None else sizes[number][0],
            "height": None if sizes is None else sizes[number][1],
        }
        for number, image_id in enumerate(image_ids)
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("listed", "own", LABELS, {}, full_counts(table), table)
    write_manifest(checkout / "data/listed/prepared/manifest.parquet", manifest)


def test_an_npz_becomes_cache_and_manifest_and_a_run(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    said = checkout.ok("import-regions", path)
    assert "cache/tiny: 9 rows of 3 x 6 float16, 9 of them imported now" in said
    assert "extract.tiny.regions: 4" in said  # keeps all
    assert_stored(checkout.cache(), images_of(path), 3)
    assert len({entry.fingerprint for entry in checkout.cache().shards}) == 5  # of other images
    recipe = checkout.cache().recipe
    assert {name: recipe[name] for name in ("imported_from", "regions", "feature_dtype")} == {
        "imported_from": "npz",
        "regions": 3,
        "feature_dtype": "float16",
    }
    assert sorted(name for name in checkout.outputs() if "cache" in name) == [
        "cache/tiny/index.parquet",
        *(f"cache/tiny/regions-{n:05d}.h5" for n in range(5)),
    ]

    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    arrays = make_arrays()
    assert manifest.dataset == "tiny"
    assert manifest.vocabulary == LABELS
    assert manifest.split_name == "imported"
    for number, row in enumerate(manifest.table.to_pylist()):
        labels = arrays["labels"][number]
        assert row == {
            "image_id": arrays["image_id"][number],
            "path": f"images/{arrays['image_id'][number]}.jpg",
            "split": arrays["split"][number],
            "labels": [n for n in range(3) if labels[n] == 1],
            "ignored": [n for n in range(3) if labels[n] == 0],
            "width": arrays["size_wh"][number, 0],
            "height": arrays["size_wh"][number, 1],
        }

    checkout.ok("detector")
    before = checkout.outputs()
    assert "imported" in checkout.ok("extract", "--replace")
    assert checkout.outputs() == before
    checkout.ok("train")
    checkout.ok("evaluate")
    metrics = json.loads((checkout / "runs/tiny/full-s0/metrics.json").read_text())
    assert metrics["fingerprint"] == checkout.cache().fingerprint
    assert metrics["images"] == 3


def test_tsvs_become_a_cache_and_a_run(checkout: Checkout, tmp_path: Path) -> None:
    lines = make_lines()
    paths = [write_tsv(tmp_path / f"{n}.tsv", lines[n : n + 5]) for n in (0, 5)]
    write_listed(checkout, [str(100 + n) for n in range(8)])
    manifest = checkout.bytes("data")
    said = checkout.ok("import-regions", *paths, "--dataset", "listed")
    assert "cache/listed: 8 rows of 3 x 6 float16, 8 of them imported now" in said
    assert "extract.listed.regions: 4" in said
    assert "1 image of 0.tsv, 5.tsv" in said
    expected = tsv_images_of(
        write_tsv(tmp_path / "all.tsv", lines), lambda text: str(int(text[-12:]))
    )
    del expected["108"]
    assert_stored(checkout.cache("listed"), expected, 3)
    assert checkout.bytes("data") == manifest
    checkout.ok("train", "--dataset", "listed")
    assert "mAP" in checkout.ok("evaluate", "--dataset", "listed")


def test_more_regions_than_there_are_are_not_made_up(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    assert "9 rows of 4 x 6 float32" in checkout.ok(
        "import-regions",
        path,
        "--set=extract.tiny.regions=50",
        "--set=extract.tiny.feature_dtype=float32",
    )
    assert_stored(checkout.cache(), images_of(path), 50)


def test_the_same_import_again_changes_nothing(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    every = [p for top in ("data", "cache") for p in (checkout / top).rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in every if p.suffix != ".lock"}
    said = checkout.ok("import-regions", path)
    assert "9 rows of 3 x 6 float16, 0 of them imported now; nothing to import" in said
    assert "resumed" not in said
    checkout.ok("import-regions", path, "--replace", "--set", "extract.tiny.rows_per_shard=4")
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_corrected_label_costs_no_region(checkout: Checkout, tmp_path: Path) -> None:
    checkout.ok("import-regions", write_npz(tmp_path))
    before = checkout.bytes("cache/tiny")
    labels = make_arrays()["labels"]
    labels[0] = -labels[0]
    said = checkout.ok("import-regions", write_npz(tmp_path, labels=labels))
    assert " 0 of them imported now" in said
    assert checkout.bytes("cache/tiny") == before
    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    assert manifest.table.to_pylist()[0]["labels"] == np.flatnonzero(labels[0] == 1).tolist()


def test_lost_and_damaged_shards_are_imported_again(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    before = checkout.outputs()
    (checkout / "cache/tiny/regions-00001.h5").unlink()
    assert "2 of them imported now" in checkout.ok("import-regions", path)
    assert checkout.outputs() == before
    damaged = checkout / "cache/tiny/regions-00002.h5"
    damaged.write_bytes(damaged.read_bytes()[:900])
    checkout.refused(r"regions-00002\.h5.*--replace", "import-regions", path)
    assert "2 of them imported now" in checkout.ok("import-regions", path, "--replace")
    assert checkout.outputs() == before


def test_an_import_that_stops_at_any_moment_can_be_continued(
    checkout: Checkout, tmp_path: Path
) -> None:
    """It is stopped before and after each of its renames, with an unfinished file left behind.

    There are six renames: the manifest and its folder, three shards and the index.
    """
    path = write_npz(tmp_path)
    command = ("import-regions", path, "--set", "extract.tiny.rows_per_shard=4")
    checkout.ok(*command)
    whole = checkout.outputs()
    for name in ("pipeline.files.fsync_folder", "pipeline.files.os.fsync"):
        renames = 0
        for moment in range(1, 99):
            shutil.rmtree(checkout / "data")
            shutil.rmtree(checkout / "cache")
            original = files_module.fsync_folder if "folder" in name else files_module.os.fsync
            calls = 0

            def ending(*arguments: Any, moment: int = moment, original: Any = original) -> None:
                nonlocal calls
                calls += 1
                if calls == moment:
                    raise KeyboardInterrupt
                original(*arguments)

            with mock.patch(name, ending):
                outcome = checkout.gmpipe(*command)
            if outcome.code == 0:
                break
            renames += 1
            (checkout / "cache/tiny/regions-00007.h5.0123abcd.tmp").write_bytes(b"unfinished")
            if "cache/tiny/index.parquet" not in checkout.outputs():
                checkout.refused("index|manifest", "train")
            checkout.ok(*command)
            assert checkout.outputs() == whole
        assert renames >= 5  # a folder's rename has nothing to flush before it


def test_a_grown_manifest_adds_images_and_a_shrunken_one_drops_them(
    checkout: Checkout, tmp_path: Path
) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    command = ("import-regions", path, "--dataset", "listed")
    write_listed(checkout, [str(100 + n) for n in range(6)])
    checkout.ok(*command)
    first = checkout.cache("listed")
    write_listed(checkout, [str(100 + n) for n in range(9)])
    assert "9 rows of 3 x 6 float16, 3 of them imported now" in checkout.ok(*command)
    grown = checkout.cache("listed")
    assert grown.fingerprint != first.fingerprint
    assert [e.sha256 for e in grown.shards][:3] == [e.sha256 for e in first.shards]
    write_listed(checkout, [str(100 + n) for n in (0, 1, 4, 5, 6, 7, 8)])
    assert "7 rows of 3 x 6 float16, 0 of them imported now" in checkout.ok(*command)
    write_listed(checkout, [str(100 + n) for n in (0, 4, 5, 6, 7, 8)])
    assert "6 rows of 3 x 6 float16, 1 of them imported now" in checkout.ok(*command)
    expected = tsv_images_of(path, lambda text: str(int(text[-12:])))
    for gone in ("101", "102", "103"):
        del expected[gone]
    assert_stored(checkout.cache("listed"), expected, 3)


def test_another_file_is_refused_until_it_may_replace(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    first = checkout.cache()
    checkout.refused(
        r"5 shards \(9 rows.*regions is 3, expected 2.*`gmpipe import-regions .*made\.npz "
        r"--dataset tiny --set extract\.tiny\.regions=2 --replace`",
        *("import-regions", path, "--set", "extract.tiny.regions=2"),
    )
    other = write_npz(tmp_path / "other", **make_arrays(images=12, seed=1))
    checkout.refused("source_sha256 is .*--replace", "import-regions", other)
    with mock.patch("pipeline.shards.store.write_shard", side_effect=KeyboardInterrupt):
        assert checkout.gmpipe("import-regions", other, "--replace").code == 130
    assert not (checkout / "cache/tiny/index.parquet").exists()  # of shards that are gone
    checkout.ok("import-regions", path)
    said = checkout.ok("import-regions", other, "--replace")
    assert "12 rows of 3 x 6 float16, 12 of them imported now" in said
    assert_stored(checkout.cache(), images_of(other), 3)
    assert checkout.cache().fingerprint != first.fingerprint
    assert len(read_manifest(checkout / "data/tiny/prepared/manifest.parquet")) == 12


def test_a_file_with_a_wrong_row_replaces_nothing(checkout: Checkout, tmp_path: Path) -> None:
    """A file is read to its last row before any shard is dropped."""
    checkout.ok("import-regions", write_npz(tmp_path))
    before = {path: path.read_bytes() for path in (checkout / "cache/tiny").iterdir()}
    manifest = (checkout / "data/tiny/prepared/manifest.parquet").read_bytes()
    arrays = make_arrays(images=12, seed=1)
    arrays["boxes"] = arrays["boxes"].copy()
    arrays["boxes"][11, 0] = (10, 20, 30, 40)
    other = write_npz(tmp_path / "other", **arrays)
    checkout.refused(r"boxes\[0\].*\[10", "import-regions", other, "--replace")
    assert {path: path.read_bytes() for path in (checkout / "cache/tiny").iterdir()} == before
    assert (checkout / "data/tiny/prepared/manifest.parquet").read_bytes() == manifest


def test_images_without_regions_are_listed_where_they_are_allowed(
    checkout: Checkout, tmp_path: Path
) -> None:
    count = make_arrays()["count"]
    count[[3, 4]] = 0
    path = write_npz(tmp_path, count=count)
    checkout.refused(
        r"made\.npz.*2 of 9 images.*'000103'.*--set extract\.tiny\.max_failures=2",
        *("import-regions", path),
    )
    said = checkout.ok("import-regions", path, "--set", "extract.tiny.max_failures=2")
    assert "7 rows" in said
    assert "2 images" in said
    assert "cache/tiny/failures.parquet" in said
    failures = read_failures(checkout / "cache/tiny")
    assert [(f.image_id, f.path) for f in failures.values()] == [
        ("000103", "images/000103.jpg"),
        ("000104", "images/000104.jpg"),
    ]
    assert_stored(checkout.cache(), images_of(path), 3)
    assert len(read_manifest(checkout / "data/tiny/prepared/manifest.parquet")) == 9
    assert "2 images without regions left out" in checkout.ok("train")
    assert "mAP" in checkout.ok("evaluate")

    other = write_npz(tmp_path, count=np.zeros(9, int))
    checkout.refused("count.*9 images", "import-regions", other)


def test_images_that_a_tsv_lacks_are_listed(checkout: Checkout, tmp_path: Path) -> None:
    none = dict.fromkeys(("objects", "objects_conf", "boxes", "features"), "")
    path = write_tsv(tmp_path / "a.tsv", changed_line(4, count=0, **none)[:5])
    write_listed(checkout, [str(100 + n) for n in range(6)])
    command = ("import-regions", path, "--dataset", "listed")
    checkout.refused(
        r"a\.tsv.*2 of 6 images.*'104'.*--set extract\.listed\.max_failures=2",
        *command,
    )
    checkout.ok(*command, "--set", "extract.listed.max_failures=2")
    assert pq.read_table(checkout / "cache/listed/failures.parquet").to_pylist() == [
        {"image_id": str(n), "path": f"{n}.jpg", "reason": mock.ANY} for n in (104, 105)
    ]
    assert sorted(checkout.cache("listed").ids) == ["100", "101", "102", "103"]
    path = write_tsv(path, make_lines(4))
    rest = write_tsv(tmp_path / "b.tsv", make_lines()[4:6])
    checkout.ok(*command[:2], rest, *command[2:], "--replace")
    assert not (checkout / "cache/listed/failures.parquet").exists()
    write_listed(checkout, ["7", "8", "9"])
    checkout.refused(
        r"line 1 \('COCO_train2014_000000000100'\).*'7'",
        *command,
    )


@pytest.mark.parametrize(
    ("setting", "files", "message"),
    [
        ("prepare.tiny.source=scenes", 1, r"prepare\.tiny\.source.*scenes.*imported"),
        ("detector.tiny.source=torchvision", 1, r"detector\.tiny\.source.*torchvision.*imported"),
        ("extract.tiny.views=2", 1, r"extract\.tiny\.views.*2.*1"),
        ("extract.tiny.regions=3", 2, "2 .*npz"),
    ],
)
def test_settings_that_contradict_an_import_are_named(
    checkout: Checkout, tmp_path: Path, setting: str, files: int, message: str
) -> None:
    paths = [write_npz(tmp_path)] * files
    checkout.refused(message, "import-regions", *paths, "--set", setting)


def test_a_tsv_needs_a_manifest_with_labels(checkout: Checkout, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    checkout.refused(r"prepare\.tiny\.source.*imported.*coco", "import-regions", path)
    checkout.refused("data/listed/.*gmpipe prepare", "import-regions", path, "--dataset", "listed")


def test_the_form_follows_from_the_suffix_or_an_option(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    plain = path.rename(tmp_path / "regions")
    checkout.refused(r"regions.*\.npz.*--form npz", "import-regions", plain)
    other = write_tsv(tmp_path / "a.tsv", make_lines())
    checkout.refused(r"a\.tsv.*--form", "import-regions", plain, other)
    assert "9 of them imported" in checkout.ok("import-regions", plain, "--form", "npz")


def test_a_data_set_that_is_not_described_gets_its_blocks(
    checkout: Checkout, tmp_path: Path
) -> None:
    for path, source in (
        (write_npz(tmp_path), "imported"),
        (write_tsv(tmp_path / "a.tsv", make_lines()), "coco"),
    ):
        outcome = checkout.gmpipe("import-regions", path, "--dataset", "new")
        assert outcome.refused(r"--dataset.*params\.yaml.*tiny, listed.*'new'")
        blocks = YAML(typ="safe").load(outcome.err[outcome.err.index("\n\n") :])
        raw = json.loads(json.dumps(PARAMS))
        for section, block in blocks.items():
            raw[section] |= block
        described = Params.model_validate(raw)
        assert described.prepare["new"].source == source
        assert described.detector["new"].source == "imported"
    assert checkout.outputs() == {}


def test_a_folder_that_another_process_writes_is_left_alone(
    checkout: Checkout, tmp_path: Path
) -> None:
    path = write_npz(tmp_path)
    for folder in ("cache/tiny", "data/tiny/prepared"):
        with files_module.folder_lock(checkout / folder):
            outcome = checkout.gmpipe("import-regions", path)
        assert outcome.refused(folder)
        assert checkout.outputs() == {}
    checkout.ok("import-regions", path)


def test_a_data_set_with_imported_regions_has_no_detector(checkout: Checkout) -> None:
    assert "tiny" in checkout.ok("detector")
    folder = checkout / "data/tiny/detector"
    assert sorted(p.name for p in folder.iterdir()) == ["detector.json", "metrics.json"]
    assert json.loads((folder / "detector.json").read_text())["source"] == "imported"
    with pytest.raises(MismatchError, match=r"detector\.json"):
        read_description(folder)


# Real data ---------------------------------------------------------------------------------------


def test_real_regions_of_voc2007(checkout: Checkout, shared: Path) -> None:
    path = shared / "data/voc2007-regions/regions.npz"
    smaller = ("--set=extract.tiny.regions=10", "--set=extract.tiny.rows_per_shard=500")
    said = checkout.ok("import-regions", path, *smaller)
    assert "1400 rows of 10 x 512 float16" in said
    assert_stored(checkout.cache(), images_of(path), 10)
    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    assert {split: count["images"] for split, count in manifest.counts.items()} == {
        "train": 840,
        "test": 560,
    }
    with np.load(path) as npz:
        labels = npz["labels"][npz["split"] == "test"]
    expected = np.where(labels == 1, 1, np.where(labels == 0, -1, 0))
    np.testing.assert_array_equal(manifest.truth("test"), expected)
    short = "--set=train.tiny.variants.max-pool.epochs=2"
    checkout.ok("train", "--variant", "max-pool", short)
    assert "mAP" in checkout.ok("evaluate", "--variant", "max-pool", short)


def test_real_bottom_up_features(checkout: Checkout, shared: Path) -> None:
    path = shared / "data/bottom-up-sample/train2014_obj36.tsv"
    expected = tsv_images_of(path, lambda text: str(int(text[-12:])))
    with path.open() as stream:
        columns = [line.split("\t", 3)[:3] for line in stream]
    ids = [str(int(column[0][-12:])) for column in columns]
    write_listed(checkout, ids, [(int(width), int(height)) for _, height, width in columns])
    said = checkout.ok(
        "import-regions", path, "--dataset", "listed", "--set=extract.listed.regions=40"
    )
    assert "10 rows of 36 x 2048 float16" in said
    cache = checkout.cache("listed")
    assert_stored(cache, expected, 40)
    assert read_header(checkout / "cache/listed/regions-00000.h5").feature_size == 2048
    checkout.ok("train", "--dataset", "listed")
    assert "mAP" in checkout.ok("evaluate", "--dataset", "listed")
