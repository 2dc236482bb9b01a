"""Region rows to shards, and shards to the index beside them; every file whole or not at all."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import GmpipeError
from pipeline.files import canonical_json, replacing, sha256_file
from pipeline.shards.reader import (
    INDEX_COLUMNS,
    map_shard,
    read_header,
    read_ids,
    whole_shards,
)
from pipeline.shards.schema import (
    AXES,
    CHECKSUMS,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    Recipe,
    RegionRows,
    ShardEntry,
    fingerprint,
    row_checksums,
)


def shard_name(number: int) -> str:
    """The file name of a shard: `regions-00000.h5` for number 0."""
    return f"regions-{number:05d}.h5"


def write_shard(path: Path, rows: RegionRows, *, dataset: str, recipe: Recipe) -> None:
    """Write ``rows`` as the shard ``path``: the same rows give the same bytes.

    The file is read back and compared before it gets its name.

    Raises:
        GmpipeError: the rows break their contract, there are none, or they were not read back as
            they were written.
    """
    rows.check()
    if len(rows) == 0:
        raise GmpipeError(f"{path}: found no rows; a shard holds at least one. Write no shard.")
    checksums = row_checksums(rows)
    arrays = {field: getattr(rows, field) for field in AXES}
    # The least width that holds the ids, whatever wider column the rows were cut from.
    arrays["image_id"] = np.array(rows.image_id.tolist(), dtype=np.bytes_)
    arrays[CHECKSUMS] = checksums
    with replacing(path) as temporary:
        # In memory first: on a full disk HDF5 crashes the process.
        image = io.BytesIO()
        # Fixed bounds: a newer HDF5 library may choose other structures, and so other bytes.
        with h5py.File(image, "w", libver=("earliest", "v110")) as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=np.ascontiguousarray(array), track_times=False)
            file.attrs["format_version"] = FORMAT_VERSION
            texts = {
                "format_name": FORMAT_NAME,
                "dataset": dataset,
                "fingerprint": fingerprint(recipe),
                "recipe": canonical_json(dict(recipe)),
            }
            # Of fixed length: HDF5 keeps others in a heap, and can hang on a damaged heap.
            for name, text in texts.items():
                file.attrs[name] = np.bytes_(text.encode())
        temporary.write_bytes(image.getbuffer())
        _, stored, stored_checksums = map_shard(temporary)
        damaged = (stored_checksums != checksums) | (row_checksums(stored) != checksums)
        if damaged.any():
            row = int(damaged.argmax())
            raise GmpipeError(
                f"{path}: row {row} (image {rows.image_id[row].decode()!r}) was read back with "
                f"another checksum than {checksums[row]:#010x}, with which it was written. Check "
                "the disk, and run the command again."
            )


def write_index(folder: Path, dataset: str, recipe: Recipe) -> None:
    """Write the index of all whole shards in ``folder`` that have this recipe's fingerprint.

    Columns `image_id` string, `view` int16, `shard` string (file name), `row` int32, a row each
    row of a shard, in the order of the shards. The schema's metadata hold, as JSON, what the
    shards have in common and the list of them (`schema.ShardEntry`).

    Raises:
        GmpipeError: there is no such shard, shards disagree in data set, m, d or feature dtype, or
            a view of an image is there twice.
    """
    wanted = fingerprint(recipe)
    headers = {path: read_header(path) for path in whole_shards(folder)}
    headers = {path: header for path, header in headers.items() if header.fingerprint == wanted}
    if not headers:
        raise GmpipeError(
            f"{folder}: found no shard with fingerprint {wanted}; expected at least one. Run "
            f"`gmpipe extract --dataset {dataset}`."
        )
    first = next(iter(headers.values()))
    expected = (dataset, first.regions, first.feature_size, first.feature_dtype)
    for path, header in headers.items():
        found = (header.dataset, header.regions, header.feature_size, header.feature_dtype)
        if found != expected:
            raise GmpipeError(
                f"{path}: found (data set, m, d, dtype) {found}; expected {expected}, as in the "
                f"first shard of {dataset}. Move it away and run `gmpipe extract --dataset "
                f"{dataset}` again."
            )

    image_ids: list[str] = []
    views: list[int] = []
    shards: list[str] = []
    rows: list[int] = []
    holders: dict[tuple[str, int], str] = {}
    for path, header in headers.items():
        shard_ids, shard_views = read_ids(path)
        for key in zip(shard_ids, shard_views.tolist(), strict=True):
            if key in holders:
                raise GmpipeError(
                    f"{folder}: image {key[0]!r}, view {key[1]}, is in {holders[key]} and in "
                    f"{path.name}; expected it once. Delete one of the two and run `gmpipe extract "
                    f"--dataset {dataset}` again."
                )
            holders[key] = path.name
        image_ids += shard_ids
        views += shard_views.tolist()
        shards += [path.name] * header.rows
        rows += range(header.rows)
    entries = [
        ShardEntry(path.name, sha256_file(path), path.stat().st_size, header.rows)
        for path, header in headers.items()
    ]
    about = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "fingerprint": wanted,
        "recipe": dict(recipe),
        "regions": first.regions,
        "feature_size": first.feature_size,
        "feature_dtype": first.feature_dtype,
        "shards": [asdict(entry) for entry in entries],
    }
    schema = INDEX_COLUMNS.with_metadata({"gmpipe": canonical_json(about)})
    with replacing(folder / INDEX_NAME) as temporary:
        pq.write_table(pa.table([image_ids, views, shards, rows], schema=schema), temporary)
