"""Files of results that notice a single changed bit: Parquet and JSON with a digest of themselves.

Disks, copies and hands change bits. A changed digit in JSON is still JSON, and a changed number in
Parquet is still Parquet, so every file that gmpipe reads back holds a digest of its content:

    Parquet  in the schema's metadata, under `gmpipe`: JSON with the key `sha256` beside what the
             writer says about the table; pages have checksums too
    JSON     an object with the key `sha256`

Torch's files need none: they are zips, whose checksums `pipeline.tensors` compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedError, briefly
from pipeline.files import canonical_json, read_bytes, replacing, sha256_json, write_json

_KEY = "sha256"
_METADATA = b"gmpipe"


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its digest, whole or not at all.

    Args:
        content: JSON values by name, none of them called `sha256`.
    """
    write_json(path, {**content, _KEY: sha256_json(dict(content))})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, without the digest.

    Raises:
        DamagedError: the file is not such an object, or was changed.
        InputError, OSError: as `read_bytes`.
    """
    try:
        content = json.loads(read_bytes(path))
        digest = _digest_in(content)
        matches = digest == sha256_json(content)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not an intact JSON file ({briefly(error)}).") from error
    if not matches:
        raise DamagedError(f"{path} is damaged: its content does not match its sha256.")
    return dict(content)


def write_sealed_table(path: Path, table: pa.Table, about: Mapping[str, Any]) -> None:
    """Write a table as Parquet with its digest, whole or not at all.

    Args:
        table: columns of numbers, strings, and lists of these.
        about: JSON values by name, none of them called `sha256`: what the table is.
    """
    sealed = {**about, _KEY: _digest(table, about)}
    with replacing(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata({_METADATA: canonical_json(sealed)}),
            temporary,
            write_page_checksum=True,
        )


def read_sealed_table(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    """Read what `write_sealed_table` wrote: the table without metadata, and what it is.

    Args:
        schema: that the table must have.

    Raises:
        DamagedError: the file is not such a table, or was changed.
        InputError, OSError: as `read_bytes`.
    """
    stored = read_bytes(path)
    try:
        with pq.ParquetFile(pa.BufferReader(stored), page_checksum_verification=True) as file:
            about = json.loads((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
            digest = _digest_in(about)
            found = file.schema_arrow.remove_metadata()
            if found == schema:
                table = file.read().replace_schema_metadata(None)
                table.validate(full=True)
                matches = digest == _digest(table, about)
    except (
        OSError,  # pyarrow raises it for damaged files too; the bytes were read before
        pa.ArrowException,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
        OverflowError,
        MemoryError,  # a changed length
    ) as error:
        raise DamagedError(f"{path} is not an intact Parquet file ({briefly(error)}).") from error
    if found != schema:
        raise DamagedError(f"{path}: expected the columns\n{schema}\nfound\n{found}\n")
    if not matches:
        raise DamagedError(f"{path} is damaged: its content does not match its sha256.")
    return table, dict(about)


def _digest_in(content: dict[str, Any]) -> Any:
    """Take the digest out of the metadata of a file."""
    if _KEY not in content:
        raise ValueError(f"no {_KEY} in its metadata; older versions of gmpipe wrote none")
    return content.pop(_KEY)


def _digest(table: pa.Table, about: Mapping[str, Any]) -> str:
    """Hex sha256 over the values of a table and what it is, however the file lays them out."""
    digest = hashlib.sha256(canonical_json(dict(about)).encode())
    for field in table.schema:
        digest.update(f"{field.name}, {len(table)} rows".encode())
        _add(digest, table.column(field.name).combine_chunks())
    return digest.hexdigest()


def _add(digest: Any, values: pa.Array | pa.ChunkedArray) -> None:
    """Add the values of a column to a digest: which are null, the lengths, the bytes."""
    if isinstance(values, pa.ChunkedArray):  # of no rows
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    digest.update(np.packbits(np.asarray(pc.is_valid(values), dtype=bool)).tobytes())
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0)
        digest.update(np.asarray(lengths).astype("<i8").tobytes())
        _add(digest, pc.list_flatten(values))
    elif pa.types.is_string(values.type):
        texts = pc.fill_null(values, "").cast(pa.binary())
        digest.update(np.asarray(pc.binary_length(texts)).astype("<i8").tobytes())
        digest.update(b"".join(texts.to_pylist()))
    else:
        numbers = np.asarray(pc.fill_null(values, 0))
        digest.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
