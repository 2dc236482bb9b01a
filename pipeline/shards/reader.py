"""A cache of regions, read row by row. Shards and index are untrusted: they travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedError, MissingError, advising
from pipeline.shards.index import INDEX_NAME, Index, check_listed, check_sizes, read_index
from pipeline.shards.mapping import MappedFiles
from pipeline.shards.schema import (
    CHECKSUMS,
    WHOLE,
    Recipe,
    RegionRows,
    check_same_recipe,
    row_checksums,
)
from pipeline.shards.shard import read_header

_LOOKED_UP = 4096  # images whose rows are searched for together


class RegionCache:
    """All rows of a data set's shards, by number, in the order of the index.

    A shard is mapped when one of its rows is first wanted, in the process that wants it. So a cache
    may be pickled, and a process that holds one may be forked. Every row is checked against its
    checksum and its contract before a process uses it for the first time.

    For each row a process holds some 15 bytes plus the length of the longest image id.
    """

    def __init__(self, folder: Path, index: Index, *, check_rows: bool, remedy: str) -> None:
        """Use `open`."""
        self.folder = folder
        self.dataset = index.dataset
        self.recipe = index.recipe
        self.fingerprint = index.fingerprint
        self.regions = m = index.regions
        """m."""
        self.feature_size = d = index.feature_size
        """d."""
        self.feature_dtype = index.feature_dtype
        """`float16` or `float32`."""
        self.has_whole = index.has_whole
        """Whether the rows have the vector of the whole view."""
        self.shards = index.shards
        self.views = index.views
        """View of each row, (len(self),)."""
        self._index = index
        self._check_rows = check_rows
        self._remedy = remedy
        self._checked = np.zeros(len(self), dtype=np.bool_)
        self._files = MappedFiles([entry.bytes for entry in index.shards])
        forms: dict[str, npt.DTypeLike] = {
            "features": (index.feature_dtype, (m, d)),
            "boxes": ("<f4", (m, 4)),
            "scores": ("<f4", (m,)),
            "classes": ("<i2", (m,)),
            "count": "<i2",
            "view": "<i2",
            CHECKSUMS: "<u4",
        }
        if self.has_whole:
            forms[WHOLE] = (index.feature_dtype, (d,))
        # A field of one row: for numpy, a dtype that includes a shape.
        self._forms = {field: np.dtype(form) for field, form in forms.items()}
        self._sizes = np.array([form.itemsize for form in self._forms.values()], dtype=np.int64)
        self._items = {
            field: self._files.items(form.itemsize) for field, form in self._forms.items()
        }
        # Of each shard: whether it is mapped, and where in the maps its arrays begin.
        shards = len(index.shards)
        self._is_mapped = np.zeros(shards, dtype=np.bool_)
        self._all_mapped = False
        self._starts = np.zeros((shards, len(forms)), dtype=np.int64)
        self._id_starts = np.zeros(shards, dtype=np.int64)
        self._id_widths = np.zeros(shards, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the cache as its index: maps and checks belong to one process."""
        again = partial(RegionCache, check_rows=self._check_rows, remedy=self._remedy)
        return again, (self.folder, self._index)

    @classmethod
    def open(
        cls,
        folder: Path,
        recipe: Recipe | None = None,
        *,
        check_rows: bool = True,
        remedy: str = "Delete the shard, and write its rows again.",
    ) -> RegionCache:
        """Read the index of ``folder``, and compare the shards' sizes with it.

        Args:
            folder: of the shards and the index.
            recipe: what the features must have been made with; None accepts any.
            check_rows: False reads rows without checking whether they are damaged.
            remedy: of errors about a missing or damaged shard that `gather` raises.

        Raises:
            MissingError: the index or a shard is missing.
            DamagedError: the index is damaged, or a shard has another size than it says.
            MismatchError: the index is of another recipe, or a newer version of gmpipe wrote it.
        """
        index = read_index(folder)
        if recipe is not None:
            check_same_recipe(index.recipe, recipe, str(folder))
        check_sizes(folder, index)
        return cls(folder, index, check_rows=check_rows, remedy=remedy)

    def __len__(self) -> int:
        """Number of rows of all shards."""
        return len(self.views)

    @property
    def ids(self) -> list[str]:
        """Image id of each row, (len(self),); a new list at each call."""
        return [image_id.decode() for image_id in self._index.image_ids.tolist()]

    def lookup(self, image_ids: Sequence[str], view: int = 0) -> npt.NDArray[np.int64]:
        """Find the row numbers (N,) of one view of each of N images.

        Raises:
            MissingError: names the first image that has no such view, and how many have none.
        """
        rows = np.flatnonzero(self.views == view)
        known = self._index.image_ids[rows]
        order = np.argsort(known, kind="stable")
        numbers = np.full(len(image_ids), -1, dtype=np.int64)
        # In pieces and by bisection: a hash table of millions of ids takes far more memory.
        for start in range(0, len(image_ids) if len(rows) else 0, _LOOKED_UP):
            piece = [image_id.encode() for image_id in image_ids[start : start + _LOOKED_UP]]
            wanted = np.array(piece, dtype=np.bytes_)
            nearest = np.searchsorted(known, wanted, sorter=order).clip(max=len(rows) - 1)
            nearest = order[nearest]
            stored = known[nearest] == wanted
            numbers[start : start + len(piece)][stored] = rows[nearest[stored]]
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            raise MissingError(
                f"{self.folder}: found no view {view} of image {image_ids[missing[0]]!r}; it is "
                f"missing for {len(missing)} of {len(image_ids)} images.",
                "Write the rows of these images.",
            )
        return numbers

    def gather(self, rows: npt.ArrayLike) -> RegionRows:
        """Copy the rows of these numbers (N,), in that order. Numbers may repeat.

        Raises:
            IndexError: a number is not in 0 to len(self) - 1.
            DamagedError: a row is damaged or breaks the contract. Names the shard, the row and its
                image.
            MissingError, MismatchError: a shard is gone, or is not the one that the index lists.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        outside = numbers.view(np.uint64) >= len(self)  # true for negative numbers as well
        if outside.any():
            raise IndexError(f"row {numbers[outside][0]} of a cache of {len(self)} rows")
        shard, row = self._index.shard[numbers], self._index.row[numbers].astype(np.int64)
        if not self._all_mapped:
            self._map(shard)
        starts = self._starts_of(shard, row)
        gathered = RegionRows(
            features=self._stored("features", starts),
            boxes=self._stored("boxes", starts),
            scores=self._stored("scores", starts),
            classes=self._stored("classes", starts),
            count=self._stored("count", starts),
            image_id=self._index.image_ids[numbers],
            view=self.views[numbers],
            whole=self._stored(WHOLE, starts) if self.has_whole else None,
        )
        if self._check_rows and not self._checked[numbers].all():
            fresh = np.flatnonzero(~self._checked[numbers])
            self._check(gathered.take(fresh), numbers[fresh])
        return gathered

    def _starts_of(
        self, shard: npt.NDArray[np.int32], row: npt.NDArray[np.int64]
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Where in the maps each field of N rows of mapped shards begins: (N,) for each field."""
        starts = self._starts[shard] + row[:, None] * self._sizes
        return dict(zip(self._forms, starts.T, strict=True))

    def _stored(self, field: str, starts: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[Any]:
        """A field of the N rows that begin at ``starts``, copied from the maps: (N, *its shape)."""
        return self._items[field][starts[field]].view(self._forms[field])

    def _check(self, rows: RegionRows, numbers: npt.NDArray[np.int64]) -> None:
        """Check that ``rows``, copied from the shards, are sound and those that the index lists.

        Raises:
            DamagedError: as `gather`.
        """

        def refuse(position: int, breach: str) -> NoReturn:
            path = self.folder / self.shards[shard[position]].name
            image = f"image {rows.image_id[position].decode()!r}, view {rows.view[position]}"
            raise DamagedError(f"{path}: row {row[position]} ({image}) {breach}.", self._remedy)

        shard, row = self._index.shard[numbers], self._index.row[numbers].astype(np.int64)
        stored, expected = self._stored_with_ids(rows, shard, row)
        sums = row_checksums(stored)
        for position in np.flatnonzero(sums != expected).tolist():
            refuse(
                position,
                f"is damaged: its checksum is {sums[position]:#010x}, expected "
                f"{expected[position]:#010x}",
            )
        for position, (breach, rule) in stored.breaches().items():
            refuse(position, f"breaks the contract: {breach}; expected {rule}")
        moved = (stored.image_id != rows.image_id) | (stored.view != rows.view)
        for position in np.flatnonzero(moved).tolist():
            refuse(
                position,
                f"does not match {INDEX_NAME}: the shard holds image "
                f"{stored.image_id[position].decode()!r}, view {stored.view[position]}",
            )
        self._checked[numbers] = True

    def _stored_with_ids(
        self, rows: RegionRows, shard: npt.NDArray[np.int32], row: npt.NDArray[np.int64]
    ) -> tuple[RegionRows, npt.NDArray[np.uint32]]:
        """N gathered rows with the ids and views that the shards hold, and their checksums."""
        widths = self._id_widths[shard]
        image_id = np.empty(len(rows), f"S{widths.max()}")
        for width in np.unique(widths).tolist():
            same = np.flatnonzero(widths == width)
            starts = self._id_starts[shard[same]] + row[same] * width
            image_id[same] = self._files.items(width)[starts].view(f"S{width}")
        begins = self._starts_of(shard, row)
        stored = replace(rows, image_id=image_id, view=self._stored("view", begins))
        return stored, self._stored(CHECKSUMS, begins)

    def _map(self, wanted: npt.NDArray[np.int32]) -> None:
        """Map the shards ``wanted`` that are not mapped yet, after a check of their headers."""
        for shard in np.unique(wanted[~self._is_mapped[wanted]]).tolist():
            path = self.folder / self.shards[shard].name
            with advising(self._remedy, MissingError, DamagedError):
                header = read_header(path)
                check_listed(path, header, self._index, shard)
            self._files.map(shard, path)
            start = self._files.starts[shard]
            self._starts[shard] = [start + header.offsets[field] for field in self._forms]
            self._id_starts[shard] = start + header.offsets["image_id"]
            self._id_widths[shard] = header.id_width
            self._is_mapped[shard] = True
        self._all_mapped = bool(self._is_mapped.all())
