"""Files of regions that were made elsewhere, as others write them: tiny, each from a seed.

They are written with `numpy.savez` and `csv`, and read back here without the importer.
"""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.reader import RegionCache

Arrays = dict[str, Any]
Line = dict[str, Any]

LABELS = ("cat", "dog", "sun")
COLUMNS_OF_TSV = (
    "image_id",
    "height",
    "width",
    "objects",
    "objects_conf",
    "attributes",
    "attributes_conf",
    "count",
    "boxes",
    "features",
)


def make_arrays(images: int = 9, slots: int = 4, size: int = 6, seed: int = 0) -> Arrays:
    """Arrays of a sound npz with room for ``slots`` regions of each image.

    The ids are `000100`, `000101`, ...; the counts 1, 2, ... in turn; every third image is a test
    image.
    """
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((images, slots, 2, 2)), axis=2).reshape(images, slots, 4)
    return {
        "image_id": np.array([f"{100 + image:06d}" for image in range(images)]),
        "features": rng.normal(size=(images, slots, size)).astype(np.float16),
        "boxes": corners.astype(np.float32),
        "scores": rng.random((images, slots)).astype(np.float32),
        "classes": rng.integers(0, 80, (images, slots)).astype(np.int16),
        "count": (np.arange(images) % slots + 1).astype(np.int16),
        "size_wh": rng.integers(100, 600, (images, 2)).astype(np.int32),
        "split": np.where(np.arange(images) % 3 == 2, "test", "train"),
        "labels": rng.integers(-1, 2, (images, len(LABELS))).astype(np.int8),
        "label_names": np.array(LABELS),
    }


def write_npz(folder: Path, **changes: Any) -> Path:
    """Write a sound npz but for the changes; None leaves an array out."""
    folder.mkdir(exist_ok=True)
    path = folder / "made.npz"
    arrays = {**make_arrays(), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def make_lines(images: int = 9, size: int = 6, seed: int = 0) -> list[Line]:
    """The columns of sound lines, by name.

    The ids end in 100, 101, ...; every image is 200 x 100; the counts are 1, 2, 3, 4 in turn.
    """
    rng = np.random.default_rng(seed)
    lines: list[Line] = []
    for image in range(images):
        n = image % 4 + 1
        corners = np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4) * [199, 99, 199, 99]
        lines.append(
            {
                "image_id": f"COCO_train2014_{100 + image:012d}",
                "height": 100,
                "width": 200,
                "objects": rng.integers(0, 1600, n),
                "objects_conf": rng.random(n).astype(np.float32),
                "attributes": rng.integers(0, 400, n),
                "attributes_conf": rng.random(n).astype(np.float32),
                "count": n,
                "boxes": corners.astype(np.float32),
                "features": rng.normal(size=(n, size)).astype(np.float32),
            }
        )
    return lines


def write_tsv(path: Path, lines: Sequence[Line], end: str = "\n") -> Path:
    """Write lines as the published scripts do: with csv's writer, arrays in base64."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS_OF_TSV, delimiter="\t", lineterminator=end)
        for line in lines:
            writer.writerow(
                {k: encoded(v) if isinstance(v, np.ndarray) else v for k, v in line.items()}
            )
    return path


def changed_line(number: int, **changes: Any) -> list[Line]:
    """Sound lines but for the columns ``changes`` of line ``number``, from 0."""
    lines = make_lines()
    lines[number] |= changes
    return lines


def read_tsv(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a TSV by image id, read as the users of these files commonly do."""
    kinds = {"objects": np.int64, "objects_conf": np.float32}
    kinds |= {"boxes": np.float32, "features": np.float32}
    csv.field_size_limit(sys.maxsize)
    images = {}
    with path.open() as stream:
        for item in csv.DictReader(stream, COLUMNS_OF_TSV, delimiter="\t"):
            n = int(item["count"])
            arrays = {
                name: np.frombuffer(base64.b64decode(item[name]), kind)
                for name, kind in kinds.items()
            }
            arrays["features"] = arrays["features"].reshape(n, -1)
            width, height = int(item["width"]), int(item["height"])
            arrays["boxes"] = arrays["boxes"].reshape(n, 4) / [width, height, width, height]
            images[item["image_id"]] = arrays
    return images


def images_of(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The regions in an npz by image id, without images that have none."""
    with np.load(path) as npz:
        arrays = {name: npz[name] for name in npz}
    return {
        str(image_id): {
            name: arrays[name][row, : arrays["count"][row]]
            for name in ("features", "boxes", "scores", "classes")
        }
        for row, image_id in enumerate(arrays["image_id"])
        if arrays["count"][row]
    }


def tsv_images_of(path: Path, name: Callable[[str], str]) -> dict[str, dict[str, np.ndarray]]:
    """The regions in a TSV by the image id that ``name`` makes of the file's."""
    return {
        name(image_id): {**image, "scores": image["objects_conf"], "classes": image["objects"]}
        for image_id, image in read_tsv(path).items()
    }


def assert_stored(cache: RegionCache, images: Mapping[str, Any], regions: int) -> None:
    """The cache holds the best regions of exactly these images, with their numbers."""
    assert sorted(cache.ids) == sorted(images)
    rows = cache.gather(np.arange(len(cache)))
    assert not rows.view.any()
    for row, image_id in enumerate(cache.ids):
        image = images[image_id]
        order = sorted(range(len(image["scores"])), key=lambda i: -image["scores"][i])[:regions]
        n = len(order)
        assert rows.count[row] == n
        for rank, region in enumerate(order):
            features = image["features"][region].astype(cache.feature_dtype)
            assert (rows.features[row, rank] == features).all()
            np.testing.assert_allclose(rows.boxes[row, rank], image["boxes"][region], atol=1e-6)
            assert rows.scores[row, rank] == np.float32(image["scores"][region])
            assert rows.classes[row, rank] == image["classes"][region] + 1
        assert not rows.features[row, n:].any()


def write_box_file(path: Path, rows: Mapping[str, Sequence[Any]]) -> Path:
    """Write boxes, by the columns of their file, as npz or Parquet; return the path."""
    if path.suffix == ".npz":
        arrays: Arrays = {name: np.array(values) for name, values in rows.items()}
        np.savez(path, **arrays)
    else:
        pq.write_table(pa.table(dict(rows)), path)
    return path
