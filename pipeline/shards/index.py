"""The index beside the shards: which row of which shard holds which view of which image.

It is written last, so a folder with an index was complete when it was written. It is untrusted, as
the shards are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.files import canonical_json, open_regular, replacing, sha256_file, sha256_json
from pipeline.machine import cores
from pipeline.shards.schema import (
    DTYPES,
    Recipe,
    check_same_recipe,
    fingerprint,
    holds_whole,
    without_images,
)
from pipeline.shards.shard import (
    ShardHeader,
    check_version,
    is_shard_name,
    map_shard,
    read_ids,
    sound_recipe,
)

INDEX_NAME = "index.parquet"
INDEX_VERSION = 2

_COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("view", pa.int16()),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
)
_ABOUT = {
    "format_version",
    "dataset",
    "fingerprint",
    "recipe",
    "regions",
    "feature_size",
    "feature_dtype",
    "shards",
}
"""What an index says about the cache."""

_ROW_GROUP = 8192
"""Rows of an index that are written together."""

_PART = 1024
"""Rows of an index that are decoded together."""

_WRITE_AGAIN = "Delete it, and write it again from the shards."


@dataclass(frozen=True)
class ShardEntry:
    """What the index records of a shard file."""

    name: str
    """File name, in the folder of the index."""
    sha256: str
    """Hex sha256 of the file."""
    bytes: int
    """Size of the file."""
    rows: int
    """R, the rows it holds."""
    fingerprint: str
    """Of the shard's own recipe."""


@dataclass(frozen=True)
class Index:
    """The contents of an index, after a check that columns, rows and metadata agree."""

    dataset: str
    recipe: Recipe
    """Of the whole cache."""
    fingerprint: str
    """`schema.fingerprint` of the recipe."""
    regions: int
    """m."""
    feature_size: int
    """d."""
    feature_dtype: str
    """`float16` or `float32`."""
    shards: tuple[ShardEntry, ...]
    image_ids: npt.NDArray[np.bytes_]
    """(R,) fixed-width bytes: image id of each row of the cache."""
    views: npt.NDArray[np.int16]
    """(R,)."""
    shard: npt.NDArray[np.int32]
    """(R,) number of each row's shard in `shards`."""
    row: npt.NDArray[np.int32]
    """(R,) number of each row in its shard."""

    @property
    def has_whole(self) -> bool:
        """Whether the rows have the field `whole`: those of every shard, or of none."""
        return holds_whole(self.recipe)


# Writing -----------------------------------------------------------------------------------------


def write_index(folder: Path, dataset: str, recipe: Recipe, shards: Sequence[Path]) -> None:
    """Write the index of ``shards``, which lie in ``folder``.

    Its columns are `image_id` string, `view` int16, `shard` string (file name) and `row` int32,
    with one row per row of a shard, in the order of the shards. The schema's metadata hold, as
    JSON, what the shards have in common and the list of them (`ShardEntry`).

    Args:
        folder: of the shards, and of the index.
        dataset: name of the data set.
        recipe: of the whole cache; the shards' own differ from it only in `images`.
        shards: paths of the shards.

    Raises:
        MissingError: there are no shards.
        MismatchError: a shard was made with other settings, or the shards disagree in data set, m,
            d or feature dtype.
        DamagedError: a view of an image is stored twice, or a shard is damaged.
    """
    if not shards:
        raise MissingError(f"{folder}: found no shards to list; expected at least one.")
    entries, layout = _entries(dataset, recipe, shards)
    about = {
        "format_version": INDEX_VERSION,
        "dataset": dataset,
        "fingerprint": fingerprint(recipe),
        "recipe": dict(recipe),
        "regions": layout.regions,
        "feature_size": layout.feature_size,
        "feature_dtype": layout.feature_dtype,
        "shards": [asdict(entry) for entry in entries],
    }
    about["sha256"] = sha256_json(about)  # of the metadata; the rows have checksums by page
    schema = _COLUMNS.with_metadata({"gmpipe": canonical_json(about)})
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


def _entries(
    dataset: str, recipe: Recipe, shards: Sequence[Path]
) -> tuple[list[ShardEntry], ShardHeader]:
    """The entries of at least one shard, and a header whose layout all of them share.

    Raises:
        GmpipeError: as `write_index`.
    """
    first: ShardHeader | None = None
    entries: list[ShardEntry] = []
    # Of image id and view of each row: the ids themselves would take far more memory.
    hashes: list[npt.NDArray[np.uint64]] = []
    for path in shards:
        header, rows, _ = map_shard(path)
        first = first or header
        check_same_recipe(without_images(header.recipe), without_images(recipe), str(path))
        layout, expected = _layout(header), (dataset, *_layout(first)[1:])
        if layout != expected:
            raise MismatchError(
                f"{path}: found (data set, m, d, dtype) {layout}; expected {expected}, as in the "
                f"first shard of {dataset}.",
                "Move it away, and write its rows again.",
            )
        size = path.stat().st_size
        entries.append(ShardEntry(path.name, "", size, header.rows, header.fingerprint))
        keys = zip(rows.image_id.tolist(), rows.view.tolist(), strict=True)
        hashes.append(np.array([_hash(*key) for key in keys], dtype=np.uint64))
    assert first is not None
    with ThreadPoolExecutor(cores()) as pool:  # reads the whole cache
        sums = pool.map(sha256_file, shards)
        entries = [replace(entry, sha256=sha) for entry, sha in zip(entries, sums, strict=True)]
    _refuse_repeats(shards, np.concatenate(hashes))
    return entries, first


def _layout(of: ShardHeader | Index) -> tuple[str, int, int, str]:
    return of.dataset, of.regions, of.feature_size, of.feature_dtype


def _refuse_repeats(shards: Sequence[Path], hashes: npt.NDArray[np.uint64]) -> None:
    """Refuse ``shards`` of which two rows hold the same view of an image.

    Args:
        shards: paths of the shards.
        hashes: `_hash` of each row's image id and view; sorted in place.

    Raises:
        DamagedError: names the view and both shards.
    """
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    holders: dict[tuple[bytes, int], str] = {}
    for path in shards if suspects else ():
        _, rows, _ = map_shard(path)
        for key in zip(rows.image_id.tolist(), rows.view.tolist(), strict=True):
            if _hash(*key) in suspects:
                if key in holders:
                    raise DamagedError(
                        f"{path.parent}: image {key[0].decode(errors='replace')!r}, view {key[1]}, "
                        f"is in {holders[key]} and in {path.name}; expected it once.",
                        "Delete one of the two shards, and write its rows again.",
                    )
                holders[key] = path.name


def _hash(image_id: bytes, view: int) -> int:
    """A hash of 64 bits: equal hashes nearly always mean repeats."""
    return int.from_bytes(hashlib.blake2b(b"%d %b" % (view, image_id), digest_size=8).digest())


# Reading -----------------------------------------------------------------------------------------


def read_index(folder: Path) -> Index:
    """Read the index of a folder of shards. The shards are not opened.

    Raises:
        MissingError: there is no index.
        DamagedError: it is damaged or of an older format.
        MismatchError: a newer version of gmpipe wrote it.
        OSError: the system can't read it.
    """
    path = folder / INDEX_NAME
    try:
        with open_regular(path) as stream:  # what pyarrow says does not tell damage from rights
            stream.read(1)
    except FileNotFoundError:
        raise MissingError(
            f"{path}: there is no index of regions.", "Extract or import the regions first."
        ) from None
    try:
        with (
            open_regular(path) as stream,
            pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file,
        ):
            schema = file.schema_arrow
            about = _metadata(path, schema)
            entries = tuple(ShardEntry(**entry) for entry in about["shards"])
            recipe = _sound_metadata(about, entries, schema)
            names = pa.array([entry.name for entry in entries])
            # In parts: a large index takes several times as much memory while it is decoded.
            parts = file.iter_batches(_PART, use_threads=False)
            columns = [_decoded_part(batch, names) for batch in parts]
        image_ids, views, shard, row = (
            np.concatenate(arrays) for arrays in zip(*columns, strict=True)
        )
        rows = np.array([entry.rows for entry in entries])
        if not ((shard >= 0) & (row >= 0) & (row < rows[shard])).all():
            raise ValueError("its rows and its list of shards contradict each other")
    except (OSError, pa.ArrowException, KeyError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the system; pyarrow's own, for a damaged file, has no number
        raise DamagedError(
            f"{path}: expected an index of format version {INDEX_VERSION}, found a damaged file or "
            f"another format ({error!r}).",
            _WRITE_AGAIN,
        ) from error
    pa.default_memory_pool().release_unused()
    return Index(
        dataset=about["dataset"],
        recipe=recipe,
        fingerprint=about["fingerprint"],
        regions=about["regions"],
        feature_size=about["feature_size"],
        feature_dtype=about["feature_dtype"],
        shards=entries,
        image_ids=image_ids,
        views=views,
        shard=shard,
        row=row,
    )


def _metadata(path: Path, schema: pa.Schema) -> dict[str, Any]:
    """What an index says about its cache, unchanged since it was written.

    Raises:
        KeyError, RecursionError, TypeError, ValueError: it is not that of an index.
        MismatchError, DamagedError: as `check_version`.
    """
    about: dict[str, Any] = json.loads(schema.metadata[b"gmpipe"])
    check_version(path, about["format_version"], INDEX_VERSION)
    # Indexes of version 0.1.0 have none.
    if "sha256" in about and about.pop("sha256") != sha256_json(about):
        raise ValueError("its metadata do not match their sha256")
    if about.keys() != _ABOUT:
        raise ValueError(f"its metadata are {', '.join(about)}")
    return about


def _sound_metadata(
    about: dict[str, Any], entries: Sequence[ShardEntry], schema: pa.Schema
) -> Recipe:
    """Check an index's metadata, which came from JSON; return the recipe.

    Raises:
        KeyError, TypeError, ValueError: they are not those of an index.
    """
    recipe = sound_recipe(json.dumps(about["recipe"]), about["fingerprint"])
    m, d = about["regions"], about["feature_size"]
    sound = (
        isinstance(about["dataset"], str)
        and type(m) is type(d) is int
        and about["feature_dtype"] in DTYPES["features"]
        and schema.equals(_COLUMNS)
        and len({entry.name for entry in entries}) == len(entries) > 0
        and all(_sound_entry(entry) for entry in entries)
        and 0 < m * d < min(entry.bytes for entry in entries)
    )
    if recipe is None or not sound:
        raise ValueError("its columns and its metadata contradict each other")
    return recipe


def _sound_entry(entry: ShardEntry) -> bool:
    """Whether the fields of an entry, which came from JSON, have their types."""
    texts, numbers = (entry.name, entry.sha256, entry.fingerprint), (entry.bytes, entry.rows)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
        and is_shard_name(entry.name)
    )


def _decoded_part(batch: pa.RecordBatch, names: pa.Array) -> tuple[npt.NDArray[Any], ...]:
    """The columns of some rows, `shard` as the position of its name in ``names``, or -1."""
    batch.validate(full=True)  # ids are UTF-8
    if any(column.null_count for column in batch.columns):
        raise ValueError("a value is missing")
    image_ids = np.array(batch["image_id"].cast(pa.binary()).to_pylist(), dtype=np.bytes_)
    shard = pc.fill_null(pc.index_in(batch["shard"], value_set=names), -1)
    # Copies: the batch's memory belongs to Arrow, which would keep it.
    return image_ids, *(column.to_numpy().copy() for column in (batch["view"], shard, batch["row"]))


# Index and shards together -----------------------------------------------------------------------


def check_listed(path: Path, header: ShardHeader, index: Index, shard: int) -> None:
    """Refuse a shard that is not the one that the index lists as number ``shard``.

    Raises:
        MismatchError: it was made with other settings (names the field) or of other images, or has
            another data set, layout or number of rows.
    """
    entry = index.shards[shard]
    remedy = "Restore the shard that the index lists, or write its rows again."
    if header.fingerprint != entry.fingerprint:
        check_same_recipe(
            without_images(header.recipe), without_images(index.recipe), str(path), remedy
        )
        raise MismatchError(
            f"{path}: found a shard of other images, with fingerprint {header.fingerprint}; "
            f"expected {entry.fingerprint}, as in {INDEX_NAME}.",
            remedy,
        )
    stored, expected = (header.rows, *_layout(header)), (entry.rows, *_layout(index))
    if stored != expected:
        raise MismatchError(
            f"{path}: found (R, data set, m, d, dtype) {stored}; expected {expected}, as in "
            f"{INDEX_NAME}.",
            remedy,
        )


def check_sizes(folder: Path, index: Index) -> None:
    """Refuse a folder in which a shard is missing or has another size than the index says.

    Raises:
        MissingError, DamagedError: names the shard.
    """
    for entry in index.shards:
        path = folder / entry.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise MissingError(
                f"{path}: {INDEX_NAME} lists this shard, which is not there.",
                "Restore it, or write its rows again.",
            ) from None
        if size != entry.bytes:
            raise DamagedError(
                f"{path}: found {size} bytes; expected {entry.bytes}, as in {INDEX_NAME}.",
                "Delete it, and write its rows again.",
            )
