"""Region rows to shards, and shards to the index beside them; every file whole or not at all."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import GmpipeError
from pipeline.files import canonical_json, replacing, sha256_file
from pipeline.machine import cores
from pipeline.shards.reader import (
    INDEX_COLUMNS,
    RegionCache,
    map_shard,
    read_ids,
    whole_shards,
)
from pipeline.shards.schema import (
    AXES,
    CHECKSUMS,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    INDEX_VERSION,
    Recipe,
    RegionRows,
    ShardEntry,
    check_same_recipe,
    fingerprint,
    row_checksums,
    without_images,
)

_ROW_GROUP = 8192
"""Rows of an index that are written together."""


def shard_name(number: int) -> str:
    """The file name of a shard: `regions-00000.h5` for number 0."""
    return f"regions-{number:05d}.h5"


def free_shard_names(folder: Path) -> Iterator[str]:
    """Names for further shards of a folder, the least numbers that are free as of this call.

    A run that goes on after a killed one thus ends with the names that an undisturbed one has.
    """
    taken = {path.name for path in whole_shards(folder)}
    return (name for number in itertools.count() if (name := shard_name(number)) not in taken)


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


def write_index(folder: Path, dataset: str, recipe: Recipe, shards: Sequence[Path]) -> None:
    """Write the index of ``shards``, which lie in ``folder``.

    Columns `image_id` string, `view` int16, `shard` string (file name), `row` int32, a row each
    row of a shard, in the order of the shards. The schema's metadata hold, as JSON, what the
    shards have in common and the list of them (`schema.ShardEntry`).

    Args:
        recipe: of the whole cache; the shards' own differ from it in `images` alone.

    Raises:
        GmpipeError: there are no shards, one was made with other settings, they disagree in data
            set, m, d or feature dtype, or a view of an image is there twice.
    """
    again = f"run `gmpipe extract --dataset {dataset}` again"
    if not shards:
        raise GmpipeError(
            f"{folder}: found no shards to list; expected at least one. Run `gmpipe extract "
            f"--dataset {dataset}`."
        )
    layout: tuple[str, int, int, str] | None = None
    entries: list[ShardEntry] = []
    # Of image id and view of each row: to hold all ids would take far more memory.
    hashes: list[npt.NDArray[np.uint64]] = []
    for path in shards:
        header, rows, _ = map_shard(path)
        check_same_recipe(without_images(header.recipe), without_images(recipe), str(path))
        found = (header.dataset, header.regions, header.feature_size, header.feature_dtype)
        expected = layout = layout or (dataset, *found[1:])
        if found != expected:
            raise GmpipeError(
                f"{path}: found (data set, m, d, dtype) {found}; expected {expected}, as in the "
                f"first shard of {dataset}. Move it away and {again}."
            )
        size = path.stat().st_size
        entries.append(ShardEntry(path.name, "", size, header.rows, header.fingerprint))
        keys = zip(rows.image_id.tolist(), rows.view.tolist(), strict=True)
        hashes.append(np.array([_hash(*key) for key in keys], dtype=np.uint64))
    assert layout is not None
    with ThreadPoolExecutor(cores()) as pool:  # reads the whole cache
        sums = pool.map(sha256_file, shards)
        entries = [replace(entry, sha256=sha) for entry, sha in zip(entries, sums, strict=True)]
    _refuse_repeats(shards, np.concatenate(hashes), again)
    about = {
        "format_version": INDEX_VERSION,
        "dataset": dataset,
        "fingerprint": fingerprint(recipe),
        "recipe": dict(recipe),
        "regions": layout[1],
        "feature_size": layout[2],
        "feature_dtype": layout[3],
        "shards": [asdict(entry) for entry in entries],
    }
    schema = INDEX_COLUMNS.with_metadata({"gmpipe": canonical_json(about)})
    with (
        replacing(folder / INDEX_NAME) as temporary,
        pq.ParquetWriter(temporary, schema, write_page_checksum=True) as file,
    ):
        group: list[pa.RecordBatch] = []
        for path in shards:
            image_ids, views = read_ids(path)
            names = pa.repeat(path.name, len(views))
            numbers = np.arange(len(views), dtype=np.int32)
            group.append(pa.record_batch([image_ids, views, names, numbers], schema=schema))
            if path == shards[-1] or sum(map(len, group)) >= _ROW_GROUP:
                file.write_table(pa.Table.from_batches(group))
                group.clear()
                pa.default_memory_pool().release_unused()


def update_index(folder: Path, dataset: str, recipe: Recipe, shards: Mapping[Path, str]) -> None:
    """Write the index unless the one that is there is of ``recipe`` and lists just ``shards``.

    Args:
        shards: in ``folder``, at least one, each with its fingerprint.

    Raises:
        GmpipeError: as `write_index`.
    """
    wanted = {path.name: found for path, found in shards.items()}
    try:
        entries = RegionCache.open(folder, recipe).shards
        if {entry.name: entry.fingerprint for entry in entries} == wanted:
            return
    except GmpipeError:
        pass  # missing, damaged, or older than the shards: a killed run leaves such an index
    write_index(folder, dataset, recipe, list(shards))


def _refuse_repeats(shards: Sequence[Path], hashes: npt.NDArray[np.uint64], again: str) -> None:
    """Raise `GmpipeError` if a view of an image is in two rows of ``shards``.

    Args:
        hashes: `_hash` of each row's image id and view; sorted in place.
    """
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    holders: dict[tuple[bytes, int], str] = {}
    for path in shards if suspects else ():
        _, rows, _ = map_shard(path)
        for key in zip(rows.image_id.tolist(), rows.view.tolist(), strict=True):
            if _hash(*key) in suspects:
                if key in holders:
                    raise GmpipeError(
                        f"{path.parent}: image {key[0].decode(errors='replace')!r}, view {key[1]}, "
                        f"is in {holders[key]} and in {path.name}; expected it once. Delete one of "
                        f"the two and {again}."
                    )
                holders[key] = path.name


def _hash(image_id: bytes, view: int) -> int:
    """64 bits: enough that repeats are nearly all that is left to look at."""
    return int.from_bytes(hashlib.blake2b(b"%d %b" % (view, image_id), digest_size=8).digest())
