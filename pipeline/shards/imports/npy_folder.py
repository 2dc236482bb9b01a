"""Regions in a folder of arrays, each in a file of its own, with a list of the images' ids.

Letters: as in `pipeline.shards.imports.npz`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.files import raise_if_refused, sha256_json
from pipeline.shards.imports.image_regions import (
    ImageRegions,
    ListedImage,
    OnBytes,
    first_true,
    hash_file,
    refuse,
    refuse_repeated,
)
from pipeline.shards.schema import WHOLE

IDS = "ids.txt"
_ARRAYS = {
    "features": ("NMd", "f", "floats"),
    "boxes": ("NM4", "f", "floats"),
    "size_wh": ("N2", "iu", "integers"),
    "scores": ("NM", "f", "floats"),
    "classes": ("NM", "iu", "integers"),
    "count": ("N", "iu", "integers"),
    WHOLE: ("Nd", "f", "floats"),
}
"""Axes and kinds of type of the arrays, as in an npz of regions."""

_REQUIRED = ("features", "boxes", "size_wh")


@dataclass(frozen=True, eq=False)
class NpyFolder:
    """Regions in a folder of `.npy` files, with the images' ids in `ids.txt`, one on each line.

    ``features`` (N,M,d) and ``boxes`` (N,M,4) xyxy in [0,1] are floats, ``size_wh`` (N,2) is each
    image's width and height in pixels. Without ``scores`` (N,M) all are 1, without ``classes``
    (N,M) there is none, without ``count`` (N,) all M regions are real. ``whole`` (N,d) is the
    feature of the whole image. Files are mapped, so that they may be larger than the memory.

    Attributes:
        folder: of the files.
        sha256: hex, over the files.
        whole_sha256: that of ``whole``; None if it is missing or not read.
        lines: N.
        counts: (N,) number of regions of each image.
        feature_size: d.
    """

    folder: Path
    sha256: str
    whole_sha256: str | None
    lines: tuple[ListedImage, ...]
    counts: npt.NDArray[np.int64]
    feature_size: int

    @classmethod
    def open(
        cls, folder: Path, on_bytes: OnBytes = lambda read, total: None, *, whole: bool = True
    ) -> NpyFolder:
        """Read the files through: their hashes, and all but the regions.

        Args:
            folder: of the files.
            on_bytes: called with the progress.
            whole: whether to read ``whole`` if it is there.

        Raises:
            InputError: a file is missing or damaged, has another type or shape, or an impossible
                value. Names file and row.
        """
        arrays = _mapped(folder, whole=whole)
        paths = [folder / IDS, *(folder / f"{name}.npy" for name in arrays)]
        total = sum(path.stat().st_size for path in paths if path.exists())
        hashes = {path.stem: hash_file(path, lambda n: on_bytes(n, total)) for path in paths}
        n, m, d = arrays["features"].shape
        whole_sha256 = hashes.pop(WHOLE, None)
        ids = _ids(folder / IDS)
        if len(ids) != n:
            refuse(str(folder / IDS), "number of ids", len(ids), f"{n}, as features has images")
        sizes, counts = arrays["size_wh"], arrays.get("count", np.full(n, m))
        for name, values, least, most in (
            ("size_wh", sizes, 1, np.iinfo(np.int32).max),
            ("count", counts, 0, m),
        ):
            for row, *_ in first_true((values < least) | (values > most)):
                where = f"{folder / name}.npy, row {row} ({ids[row]!r})"
                refuse(where, name, values[row].tolist(), f"{least} to {most}")
        lines = tuple(
            ListedImage(f"{folder}, row {row} ({image_id!r})", image_id, *sizes[row].tolist())
            for row, image_id in enumerate(ids)
        )
        refuse_repeated(lines)
        return cls(
            folder=folder,
            sha256=sha256_json(hashes),
            whole_sha256=whole_sha256,
            lines=lines,
            counts=np.array(counts, dtype=np.int64),
            feature_size=d,
        )

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """Yield the regions of the images with these numbers; raises as `open`."""
        arrays = _mapped(self.folder, whole=self.whole_sha256 is not None)
        for row in images.tolist():
            n = int(self.counts[row])
            yield ImageRegions(
                where=self.lines[row].where,
                features=arrays["features"][row, :n],
                boxes=arrays["boxes"][row, :n],
                scores=arrays["scores"][row, :n] if "scores" in arrays else np.ones(n, np.float32),
                classes=arrays["classes"][row, :n]
                if "classes" in arrays
                else np.full(n, -1, dtype=np.int16),
                whole=arrays[WHOLE][row] if WHOLE in arrays else None,
            )


def _mapped(folder: Path, *, whole: bool) -> dict[str, npt.NDArray[Any]]:
    """The arrays that are there, mapped, after a check that they agree with each other."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    lengths: dict[str, tuple[int, str]] = {"4": (4, "xyxy"), "2": (2, "width and height")}
    for name, (axes, kinds, words) in _ARRAYS.items():
        path = folder / f"{name}.npy"
        if name not in _REQUIRED and (not path.exists() or (name == WHOLE and not whole)):
            continue
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise_if_refused(error, path)
            expected = ", ".join(f"{one}.npy" for one in _REQUIRED)
            raise InputError(
                f"{path} can't be read ({error}); expected {IDS}, {expected}.",
                "Save the array with `numpy.save`, and import again.",
            ) from error
        if array.dtype.kind not in kinds or array.dtype.subdtype is not None:
            refuse(str(path), "dtype", array.dtype, words)
        if array.ndim != len(axes) or 0 in array.shape:
            refuse(str(path), "shape", array.shape, f"({', '.join(axes)}), none of them 0")
        for axis, length in zip(axes, array.shape, strict=True):
            known, elsewhere = lengths.setdefault(axis, (length, name))
            if length != known:
                expected = f"({', '.join(axes)}) with {axis} = {known}, as in {elsewhere}"
                refuse(str(path), "shape", array.shape, expected)
        arrays[name] = array
    return arrays


def _ids(path: Path) -> list[str]:
    """The ids in a list, one on each line."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise_if_refused(error, path)
        refuse(str(path), "list", f"not readable ({error})", "an image id on each line, in UTF-8")
