"""Write the regions of a cache as a file that other programs read, and `import-regions` too.

- ``.npz``: the arrays that `pipeline.shards.imports.npz` reads, with splits and labels.
- ``.parquet``: the columns that `pipeline.shards.imports.parquet` reads.
- ``.tsv``: the lines that `pipeline.shards.imports.bottom_up` reads.

Rows are copied from the cache some at a time. Class ids count from 0 in these files, and -1 stands
for none.

Letters: N images of the export, n regions of one image, C labels; R, m and d as in
`pipeline.shards.schema`.
"""

from __future__ import annotations

import tempfile
import zipfile
from binascii import b2a_base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

from pipeline.errors import InputError
from pipeline.files import replacing
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import DTYPES, WHOLE, RegionRows

_AT_ONCE = 1 << 24  # bytes of regions that are copied together

OnImages = Callable[[int], object]
"""Called with the number of images that were written since the last call."""


@dataclass(frozen=True, eq=False)
class ExportedImages:
    """The N images of an export, in their order.

    Attributes:
        image_ids: N.
        rows: (N,) the cache's row of each one's whole view; -1 for an image without regions.
        sizes: (N, 2) int32, width and height in pixels.
        splits: N, `train`, `val` or `test`.
        labels: (N, C) int8: 1 positive, 0 neither (difficult), -1 negative.
        label_names: C.
    """

    image_ids: Sequence[str]
    rows: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    splits: Sequence[str]
    labels: npt.NDArray[np.int8]
    label_names: Sequence[str]


def write_npz_export(
    path: Path, cache: RegionCache, images: ExportedImages, on_images: OnImages
) -> None:
    """Write all N images; those without regions have a count of 0.

    Raises:
        InputError: no label is negative, but some are neither, which a reader would take for
            negative.
        GmpipeError: as `RegionCache.gather`, or as `replacing`.
    """
    if (images.labels == 0).any() and not (images.labels == -1).any():
        raise InputError(
            f"{path}: no label of an image is negative, but some are ignored. An npz with 0 and "
            "without -1 is read as one whose 0 is negative; expected both.",
            "Export a .parquet instead.",
        )
    n = len(images.image_ids)
    m, d = cache.regions, cache.feature_size
    shapes: dict[str, tuple[int, ...]] = {
        "features": (n, m, d),
        "boxes": (n, m, 4),
        "scores": (n, m),
        "classes": (n, m),
        "count": (n,),
    }
    if cache.has_whole:
        shapes[WHOLE] = (n, d)
    arrays = {
        "image_id": np.array(images.image_ids, dtype=np.str_),
        "size_wh": images.sizes,
        "split": np.array(images.splits, dtype=np.str_),
        "labels": images.labels,
        "label_names": np.array(images.label_names, dtype=np.str_),
    }
    with replacing(path) as temporary, ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(temporary, "w"))
        with archive.open("features.npy", "w", force_zip64=True) as features:
            # An archive is written member after member, so what is small waits in other files.
            streams: dict[str, IO[bytes]] = {"features": features} | {
                name: stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                for name in shapes
                if name != "features"
            }
            for name, stream in streams.items():
                dtype = cache.feature_dtype if name in ("features", WHOLE) else DTYPES[name][0]
                _write_header(stream, dtype, shapes[name])
            for numbers, rows in _pieces(cache, images.rows):
                for name, stream in streams.items():
                    stream.write(_spread(rows, name, images.rows[numbers] >= 0).tobytes())
                on_images(len(numbers))
        for name in list(shapes)[1:]:
            streams[name].seek(0)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                while chunk := streams[name].read(_AT_ONCE):
                    member.write(chunk)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def write_parquet_export(
    path: Path, cache: RegionCache, images: ExportedImages, on_images: OnImages
) -> None:
    """Write a row for each image that has regions; raises as `write_npz_export`."""
    feature = pa.float16() if cache.feature_dtype == "float16" else pa.float32()
    fields = {
        "image_id": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "features": pa.list_(pa.list_(feature, cache.feature_size)),
        "boxes": pa.list_(pa.list_(pa.float32(), 4)),
        "scores": pa.list_(pa.float32()),
        "classes": pa.list_(pa.int16()),
    }
    if cache.has_whole:
        fields[WHOLE] = pa.list_(feature, cache.feature_size)
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=False,  # features hardly ever repeat
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        for numbers, rows in _pieces(cache, images.rows):
            stored = numbers[images.rows[numbers] >= 0]
            columns: dict[str, Any] = {
                "image_id": [images.image_ids[number] for number in stored],
                "width": images.sizes[stored, 0],
                "height": images.sizes[stored, 1],
            }
            for name in list(fields)[3:]:
                columns[name] = _column(rows, name)
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            on_images(len(numbers))


def write_tsv_export(
    path: Path, cache: RegionCache, images: ExportedImages, on_images: OnImages
) -> None:
    """Write a line for each image that has regions; raises as `write_npz_export`.

    Features are float32 there. Boxes are float32 pixels, so that they may come back changed in the
    last bit. Attributes, which a cache lacks, have the id -1 and the confidence 0.

    Raises:
        InputError: an image id has a tab or the end of a line.
        GmpipeError: as `write_npz_export`.
    """
    for image_id in images.image_ids:
        if set("\t\r\n") & set(image_id):
            raise InputError(
                f"{path}: the image id {image_id!r} has a tab or the end of a line; expected none "
                "in a TSV.",
                "Export an .npz or a .parquet instead.",
            )
    with replacing(path) as temporary, temporary.open("wb") as stream:
        for numbers, rows in _pieces(cache, images.rows):
            stored = numbers[images.rows[numbers] >= 0]
            for row, number in enumerate(stored.tolist()):
                n = int(rows.count[row])
                width, height = images.sizes[number].tolist()
                arrays = (
                    rows.classes[row, :n].astype("<i8") - 1,
                    rows.scores[row, :n],
                    np.full(n, -1, dtype="<i8"),
                    np.zeros(n, dtype="<f4"),
                    n,
                    rows.boxes[row, :n].astype(np.float64) * [width, height, width, height],
                    rows.features[row, :n],
                )
                fields = [images.image_ids[number].encode(), b"%d" % height, b"%d" % width]
                fields += [b"%d" % one if isinstance(one, int) else _encoded(one) for one in arrays]
                stream.write(b"\t".join(fields) + b"\n")
            on_images(len(numbers))


WRITERS: Mapping[str, Callable[[Path, RegionCache, ExportedImages, OnImages], None]] = {
    ".npz": write_npz_export,
    ".parquet": write_parquet_export,
    ".tsv": write_tsv_export,
}
"""By the suffix of the file that is written."""


def _pieces(
    cache: RegionCache, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], RegionRows]]:
    """Yield the numbers of some of the N images, and the rows of those of them that have one."""
    size = cache.regions * cache.feature_size * np.dtype(cache.feature_dtype).itemsize
    step = max(1, _AT_ONCE // size)
    for start in range(0, len(rows), step):
        numbers = np.arange(start, min(start + step, len(rows)))
        there = rows[numbers]
        yield numbers, cache.gather(there[there >= 0])


def _stored(rows: RegionRows, name: str) -> npt.NDArray[Any]:
    """A field of rows as a file has it: classes count from 0, and -1 stands for none."""
    array: npt.NDArray[Any] = getattr(rows, name)
    if name != "classes":
        return array
    from_zero: npt.NDArray[Any] = array - (np.arange(array.shape[1]) < rows.count[:, None])
    return from_zero.astype(array.dtype)


def _spread(rows: RegionRows, name: str, there: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """A field for some images, with zeros where an image has no row."""
    stored = _stored(rows, name)
    spread = np.zeros((len(there), *stored.shape[1:]), dtype=stored.dtype)
    spread[there] = stored
    return spread


def _column(rows: RegionRows, name: str) -> pa.Array:
    """A field of rows as a column of Parquet, without the regions beyond their count."""
    stored = _stored(rows, name)
    if name == WHOLE:
        return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1])
    real = np.arange(stored.shape[1]) < rows.count[:, None]
    values = pa.array(stored[real].ravel())
    if stored.ndim == 3:
        values = pa.FixedSizeListArray.from_arrays(values, stored.shape[2])
    offsets = np.concatenate([[0], np.cumsum(rows.count, dtype=np.int32)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _write_header(stream: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    descr = npy.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})


def _encoded(array: npt.NDArray[Any]) -> bytes:
    """An array in base64: integers as they are, floats as float32."""
    kept = array if array.dtype.kind == "i" else array.astype("<f4")
    return b2a_base64(kept.tobytes(), newline=False)
