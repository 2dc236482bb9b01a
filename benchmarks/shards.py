"""Rows per second in a shuffled epoch, from the cache and from other stores of the same bytes.

`python -m benchmarks.shards` prints a table and, on its last line, the ratios of the rates as JSON.

- cache: `RegionCache.gather`, with and without the checks of rows;
- memmap: one numpy memmap per field, all fields indexed with the rows of the batch;
- npz: one uncompressed npz per image, the rows stacked;
- LMDB: one value per image with all fields one after the other, the rows stacked.

All of them are in the page cache. They take turns, so that whatever disturbs the machine disturbs
all of them alike. The first turn is printed separately. The ratios are medians over the later
turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from pipeline.shards.index import write_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import Recipe, RegionRows, fields_of
from pipeline.shards.shard import shard_name, write_shard

DATASET = "benchmark"
RECIPE: Recipe = {"images": "all"}
FIELDS = fields_of(whole=False)
REGIONS, FEATURE_SIZE = 35, 1024

Gather = Callable[[npt.NDArray[np.int64]], RegionRows]


def make_rows(first: int, rows: int, regions: int = REGIONS) -> RegionRows:
    """Make rows of random numbers that follow the contract. All regions are real."""
    rng = np.random.default_rng([first, rows])
    features = rng.standard_normal((rows, regions, FEATURE_SIZE), dtype=np.float32)
    corners = np.sort(rng.random((rows, regions, 2, 2), dtype=np.float32), axis=2)
    return RegionRows(
        features=features.astype(np.float16),
        boxes=corners.reshape(rows, regions, 4),
        scores=-np.sort(-rng.random((rows, regions), dtype=np.float32), axis=1),
        classes=rng.integers(1, 91, (rows, regions)).astype(np.int16),
        count=np.full(rows, regions, dtype=np.int16),
        image_id=np.array([f"image_{first + row:012d}" for row in range(rows)], np.bytes_),
        view=np.zeros(rows, dtype=np.int16),
    )


class Store:
    """The same rows in every store, in one folder."""

    def __init__(self, folder: Path, rows: int, rows_of_others: int, rows_per_shard: int) -> None:
        # Here, since `benchmarks.gpu` makes rows where the package is not installed.
        import lmdb

        self.folder = folder
        self.rows = rows
        paths = []
        (folder / "npz").mkdir()
        self.lmdb = lmdb.open(str(folder / "lmdb"), map_size=1 << 40, lock=False, sync=False)
        for number, first in enumerate(range(0, rows, rows_per_shard)):
            part = make_rows(first, min(rows_per_shard, rows - first))
            paths.append(folder / DATASET / shard_name(number))
            write_shard(paths[-1], part, dataset=DATASET, recipe=RECIPE)
            for field in FIELDS:
                with (folder / f"{field}.bin").open("ab") as stream:
                    stream.write(getattr(part, field).tobytes())
            with self.lmdb.begin(write=True) as transaction:
                for row in range(min(len(part), rows_of_others - first)):
                    values = {field: getattr(part, field)[row] for field in FIELDS}
                    np.savez(folder / "npz" / f"{first + row}.npz", **values)
                    value = b"".join(np.asarray(value).tobytes() for value in values.values())
                    transaction.put(b"%d" % (first + row), value)
        write_index(folder / DATASET, DATASET, RECIPE, paths)
        self.forms = {
            field: (getattr(part, field).dtype, getattr(part, field).shape[1:]) for field in FIELDS
        }
        self.maps = {
            field: np.memmap(folder / f"{field}.bin", dtype, "r", shape=(rows, *shape))
            for field, (dtype, shape) in self.forms.items()
        }

    def from_memmap(self, rows: npt.NDArray[np.int64]) -> RegionRows:
        return RegionRows(**{field: array[rows] for field, array in self.maps.items()})

    def from_npz(self, rows: npt.NDArray[np.int64]) -> RegionRows:
        fields: dict[str, list[npt.NDArray[np.generic]]] = {field: [] for field in FIELDS}
        for row in rows:
            with np.load(self.folder / "npz" / f"{row}.npz") as file:
                for field in FIELDS:
                    fields[field].append(file[field])
        return RegionRows(**{field: np.stack(arrays) for field, arrays in fields.items()})

    def from_lmdb(self, rows: npt.NDArray[np.int64]) -> RegionRows:
        batch = {
            field: np.empty((len(rows), *shape), dtype)
            for field, (dtype, shape) in self.forms.items()
        }
        with self.lmdb.begin(buffers=True) as transaction:
            for position, row in enumerate(rows):
                value, start = transaction.get(b"%d" % row), 0
                for array in batch.values():
                    one = array[position : position + 1]
                    stored = np.frombuffer(value, one.dtype, one.size, start)
                    one[...] = stored.reshape(one.shape)
                    start += one.nbytes
        return RegionRows(**batch)


def rate(gather: Gather, order: npt.NDArray[np.int64], batch: int) -> float:
    """Rows per second in an epoch in that order."""
    started = time.perf_counter()
    for start in range(0, len(order), batch):
        gather(order[start : start + batch])
    return len(order) / (time.perf_counter() - started)


def compare(
    folder: Path, options: argparse.Namespace
) -> tuple[dict[str, tuple[Gather, int]], dict[str, list[float]]]:
    """Write the stores to ``folder``, and measure them in turns.

    Returns:
        how each gathers, and of how many rows; and its rate in each turn.
    """
    rng = np.random.default_rng(options.seed)
    others = min(options.others, options.rows)
    store = Store(folder, options.rows, others, options.rows_per_shard)
    checked = RegionCache.open(store.folder / DATASET, RECIPE)
    unchecked = RegionCache.open(store.folder / DATASET, RECIPE, check_rows=False)
    ways: dict[str, tuple[Gather, int]] = {
        "memmap": (store.from_memmap, options.rows),
        "cache": (unchecked.gather, options.rows),
        "cache, checked": (checked.gather, options.rows),
        "npz": (store.from_npz, others),
        "LMDB": (store.from_lmdb, others),
    }
    sample = rng.choice(others, size=min(64, others), replace=False)
    expected = store.from_memmap(sample)
    for gather, _ in ways.values():
        rows = gather(sample)
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(rows, field), getattr(expected, field))
    # Opened again, or the rows of the sample would already be checked in the first turn.
    checked = RegionCache.open(store.folder / DATASET, RECIPE)
    ways["cache, checked"] = (checked.gather, options.rows)

    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.turns + 1):
        # Each way goes first as often as the others do.
        names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in names:
            gather, number = ways[name]
            rates[name].append(rate(gather, rng.permutation(number), options.batch))
    store.lmdb.close()
    return ways, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8000, help="rows of the cache and the memmap")
    parser.add_argument(
        "--others", type=int, default=2000, help="how many of them for npz and LMDB"
    )
    parser.add_argument("--rows-per-shard", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9, help="turns after the first one")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows")
    parser.add_argument("--folder", type=Path, help="where to create a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ways, rates = compare(Path(folder), options)

    def ratio(name: str, other: str) -> float:
        pairs = zip(rates[name][1:], rates[other][1:], strict=True)
        return round(float(np.median([one / two for one, two in pairs])), 3)

    table = [
        (name, ways[name][1], round(first), round(np.median(later)), round(max(later)))
        for name, (first, *later) in rates.items()
    ]
    headers = ["rows/s from", "rows", "first epoch", "later, median", "later, best"]
    print(tabulate(table, headers=headers))
    print(
        json.dumps(
            {
                "vs_memmap": ratio("cache", "memmap"),
                "vs_memmap_checked": ratio("cache, checked", "memmap"),
                "vs_npz": ratio("cache, checked", "npz"),
                "vs_lmdb": ratio("cache, checked", "LMDB"),
            }
        )
    )


if __name__ == "__main__":
    main()
