"""Regions in folders: an npz for each image as they are published, and an array in each `.npy`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brought import list_images, make_brought, stored
from flows import Flow
from pages import read_page
from region_files import assert_stored, make_arrays, read_tsv, write_npz

from pipeline.errors import InputError
from pipeline.shards.imports import NpyFolder, NpzFolder
from pipeline.shards.reader import RegionCache

Images = dict[str, dict[str, Any]]


def make_images(sizes: tuple[int, ...] = (3, 5, 2), feature_size: int = 6) -> Images:
    """The arrays of some images, in pixels, as a published npz has them."""
    rng = np.random.default_rng(0)
    images: Images = {}
    for number, n in enumerate(sizes):
        corners = np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4) * [199, 99, 199, 99]
        images[f"COCO_train2014_{100 + number:012d}.jpg"] = {
            "x": rng.normal(size=(n, feature_size)).astype(np.float32),
            "bbox": corners.astype(np.float32),
            "num_bbox": n,
            "image_h": 100,
            "image_w": 200,
        }
    return images


def write_images(folder: Path, images: Images, *, save: Any = np.savez_compressed) -> Path:
    """Write an npz for each image, with the pickled `info` that the published ones have."""
    for image_id, arrays in images.items():
        path = folder / f"{image_id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        info = {"info": np.array({"objects_id": [1, 2]}, dtype=object)}
        save(path, **{name: one for name, one in (info | arrays).items() if one is not None})
    return folder


def expected(images: Images) -> dict[str, dict[str, np.ndarray]]:
    """What the cache holds of published files, computed here: no scores and no classes."""
    made = {}
    for image_id, arrays in images.items():
        n = arrays["num_bbox"]
        scale = np.array([arrays["image_w"], arrays["image_h"]] * 2, dtype=np.float64)
        made[image_id] = {
            "features": arrays["x"][:n],
            "boxes": arrays["bbox"][:n] / scale,
            "scores": np.ones(n, dtype=np.float32),
            "classes": np.full(n, -1),
        }
    return made


def listed(flow: Flow, images: Images) -> None:
    list_images(flow, {key: (one["image_w"], one["image_h"]) for key, one in images.items()})


@pytest.mark.parametrize(("turned", "below"), [(False, ""), (True, "train2014/")])
def test_a_folder_of_published_npz_becomes_a_cache(
    tmp_path: Path, turned: bool, below: str
) -> None:
    flow = make_brought(tmp_path / "checkout")
    images = make_images((3, 6, 2))  # the second one is square, so that only the others tell
    files = {
        f"{below}{key}": {**one, "x": one["x"].T.copy() if turned else one["x"]}
        for key, one in images.items()
    }
    write_images(flow / "features", files)
    listed(flow, images)
    outcome = flow.gmpipe("import-regions", "features", "--dataset", "listed")
    assert outcome.code == 0, outcome.err
    assert "3 rows of 6 x 6 float16" in outcome.out
    assert "scores" in outcome.err
    assert_stored(RegionCache.open(flow / "cache/listed"), expected(images), 50)
    assert "nothing to import" in flow.ok("import-regions", "features", "--dataset", "listed")


def test_padding_and_other_types_of_numbers(tmp_path: Path) -> None:
    images = make_images((4, 4, 4))
    first = next(iter(images))
    images[first] |= {"num_bbox": 2, "image_h": np.array([100]), "bbox": np.full((4, 4), 7)}
    source = NpzFolder.open([write_images(tmp_path, images, save=np.savez)])
    (image,) = source.read(np.array([0]))
    assert (source.counts.tolist(), source.feature_size) == ([2, 4, 4], 6)
    assert image.features.tolist() == images[first]["x"][:2].tolist()
    assert image.boxes.tolist() == [[7 / 200, 7 / 100, 7 / 200, 7 / 100]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {"x": None}, r"`x`.*missing.*bbox.*x, bbox"),
        (lambda one: {"x": one["x"][:2]}, r"`x`.*\(2, 6\).*3"),
        (lambda one: {"x": one["x"].astype(int)}, r"`x`.*int64.*floats"),
        (lambda one: {"x": one["x"][:, :5]}, r"`x`.*d = 5.*d = 6"),
        (lambda one: {"x": one["x"].T}, r"`x`.*\(d, K\).*\(K, d\)"),
        (lambda one: {"x": one["x"].astype(object)}, r"`x`.*object"),
        (lambda one: {"bbox": one["bbox"][:, :3]}, r"`bbox`.*\(3, 3\).*\(K, 4\)"),
        (lambda one: {"num_bbox": 4}, r"num_bbox.*4.*3"),
        (lambda one: {"image_w": 0}, r"`image_w`.*0.*1"),
        (lambda one: {"image_h": np.array([1, 2])}, r"`image_h`.*\(2,\)"),
        (lambda one: {"bbox": one["bbox"] * 3}, r"boxes\[\d\].*200 x 100"),
        (lambda one: {"bbox": one["bbox"] / 200}, r"\[0, 1\].*[Mm]ultiply"),
        (
            lambda one: {"bbox": np.array([[150, 80, 20, 10], *[[10, 10, 5, 5]] * 2])},
            "width, height",
        ),
    ],
)
def test_a_file_of_another_form_is_named(
    tmp_path: Path, change: Callable[[Any], dict[str, Any]], message: str
) -> None:
    images = make_images((3, 3, 3))
    wrong = list(images)[1]
    images[wrong] |= change(images[wrong])
    write_images(tmp_path, images)
    with pytest.raises(InputError, match=rf"{wrong}.*{message}"):
        list(NpzFolder.open([tmp_path]).read(np.arange(3)))


def test_damage_and_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty.*\.npz"):
        NpzFolder.open([tmp_path / "empty"])
    path = write_images(tmp_path, make_images()) / "COCO_train2014_000000000101.jpg.npz"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"000000000101.*damaged"):
        NpzFolder.open([tmp_path])
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(InputError, match=r"000000000101.*damaged"):
        NpzFolder.open([tmp_path])


def test_pickled_information_is_converted_as_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [block] = [one for one in read_page("docs/guides/forms.md").blocks if "_info.npy" in one.text]
    images = make_images()
    (tmp_path / "mmf").mkdir()
    for image_id, one in images.items():
        stem = image_id.removesuffix(".jpg")
        info = {"bbox": one["bbox"], "num_boxes": one["num_bbox"], "objects": [1], "cls_prob": []}
        info |= {"image_width": one["image_w"], "image_height": one["image_h"]}
        np.save(tmp_path / f"mmf/{stem}.npy", one["x"])
        np.save(tmp_path / f"mmf/{stem}_info.npy", np.array(info, dtype=object))
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.where, "exec"), {})
    source = NpzFolder.open([tmp_path / "converted"])
    for read, one in zip(source.read(np.arange(3)), images.values(), strict=True):
        assert read.features.tolist() == one["x"].tolist()
        np.testing.assert_allclose(read.boxes, one["bbox"] / [200, 100, 200, 100], rtol=1e-6)


def test_single_files_are_taken_for_whole_data_sets(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    write_images(flow / "features", make_images())
    files = sorted(str(path) for path in (flow / "features").glob("*.npz"))
    assert flow.gmpipe("import-regions", *files).refused("3.*folder")


def test_real_regions_as_published_npz(shared: Path, tmp_path: Path) -> None:
    """The sample's lines, written as the npz of its pictures would be."""
    images: Images = {}
    for image_id, one in read_tsv(shared / "data/bottom-up-sample/train2014_obj36.tsv").items():
        images[image_id] = {
            "x": one["features"],
            "bbox": (one["boxes"] * [640, 480, 640, 480]).astype(np.float32),
            "num_bbox": len(one["boxes"]),
            "image_h": 480,
            "image_w": 640,
        }
    flow = make_brought(tmp_path / "checkout", feature_dtype="float32")
    write_images(flow / "features", images)
    listed(flow, images)
    flow.ok("import-regions", "features", "--dataset", "listed")
    assert_stored(RegionCache.open(flow / "cache/listed"), expected(images), 50)


# An array in each file ----------------------------------------------------------------------------

OF_FOLDER = ("features", "boxes", "scores", "classes", "count", "size_wh", "whole")


def write_arrays(folder: Path, **changes: Any) -> Path:
    """Write the arrays of a sound npz as `.npy`, but for the changes; None leaves one out."""
    folder.mkdir(exist_ok=True)
    whole = np.random.default_rng(2).normal(size=(9, 6)).astype(np.float32)
    arrays = {"whole": whole, **make_arrays(), **changes}
    for name in OF_FOLDER:
        if arrays[name] is not None:
            np.save(folder / f"{name}.npy", arrays[name])
    (folder / "ids.txt").write_text("\n".join(arrays["image_id"]) + "\n")
    return folder


def test_arrays_in_a_folder_are_those_of_an_npz(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    folder = write_arrays(flow / "arrays")
    whole = np.load(folder / "whole.npy")
    write_npz(flow.folder, whole=whole)
    sizes = make_arrays()["size_wh"].tolist()
    ids = make_arrays()["image_id"].tolist()
    list_images(flow, {key: tuple(size) for key, size in zip(ids, sizes, strict=True)})
    flow.ok("import-regions", "made.npz")
    flow.ok("import-regions", "arrays", "--dataset", "listed")
    assert stored(flow, "listed") == stored(flow, "npz")
    other = write_arrays(flow / "other", whole=2 * whole)
    assert flow.gmpipe("import-regions", str(other), "--dataset", "listed").refused("--replace")
    assert flow.gmpipe("import-regions", str(other), "--dataset", "new").refused("coco.*yolo")


def test_scores_classes_and_counts_may_be_missing(tmp_path: Path) -> None:
    folder = write_arrays(tmp_path, scores=None, classes=None, count=None, whole=None)
    source = NpyFolder.open(folder)
    assert source.whole_sha256 is None
    images = list(source.read(np.array([2, 5])))
    features = make_arrays()["features"]
    for row, image in zip((2, 5), images, strict=True):
        assert image.features.tolist() == features[row].tolist()
        assert image.scores.tolist() == [1] * 4
        assert image.classes.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": None}, r"boxes\.npy.*ids\.txt, features\.npy"),
        ({"features": np.zeros((9, 4))}, r"features\.npy.*\(9, 4\).*\(N, M, d\)"),
        ({"scores": np.zeros((9, 3))}, r"scores\.npy.*\(9, 3\).*M = 4.*features"),
        ({"count": np.full(9, 5)}, r"count\.npy, row 0.*5.*0 to 4"),
        ({"size_wh": np.zeros((9, 2), int)}, r"size_wh\.npy, row 0.*0.*1 to"),
        ({"classes": np.zeros((9, 4))}, r"classes\.npy.*float64.*integers"),
        ({"image_id": ["a"] * 9}, "'a'.*once"),
        ({"image_id": ["a"]}, r"ids\.txt.*1.*9"),
        ({"scores": np.array([[None] * 4] * 9)}, r"scores\.npy.*can't be read"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        NpyFolder.open(write_arrays(tmp_path, **changes))


def test_a_cut_array_is_named(tmp_path: Path) -> None:
    path = write_arrays(tmp_path) / "scores.npy"
    whole = path.read_bytes()
    np.savez(tmp_path / "other.npz", scores=np.load(path))
    zipped = (tmp_path / "other.npz").read_bytes()
    without_bracket = whole.replace(b"}", b" ", 1)
    for damaged in (whole[:-8], b"", zipped, zipped[:-30], without_bracket):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"scores\.npy can't be read.*npy "):
            NpyFolder.open(tmp_path)


def test_ids_end_with_their_line(tmp_path: Path) -> None:
    ids = [f"{n}\u0085a\u2028b\x0c" for n in range(9)]
    path = write_arrays(tmp_path, image_id=ids) / "ids.txt"
    for ends in ("\n", "\r\n"):
        path.write_bytes(ends.join(ids).encode())
        assert [line.file_id for line in NpyFolder.open(tmp_path).lines] == ids
    path.write_text("\n".join([*ids[:4], "", *ids[5:]]))
    with pytest.raises(InputError, match=r"ids\.txt, row 4.*empty"):
        NpyFolder.open(tmp_path)
