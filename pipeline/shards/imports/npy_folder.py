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
from numpy.lib import format as npy

from pipeline.files import raise_if_refused, sha256_json
from pipeline.formats.npz import naming_damage
from pipeline.shards.imports.arrays import ARRAYS, Lengths
from pipeline.shards.imports.image_regions import (
    ImageRegions,
    ListedImage,
    OnBytes,
    first_true,
    hash_file,
    refuse,
    refuse_no_file,
    refuse_repeated,
)
from pipeline.shards.schema import WHOLE

IDS = "ids.txt"
_SAVE_AGAIN = "Save the array with `numpy.save`, and import again."
_REQUIRED = ("features", "boxes", "size_wh")
_OPTIONAL = ("scores", "classes", "count", WHOLE)


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
    lengths = Lengths()
    for name in (*_REQUIRED, *_OPTIONAL):
        path = folder / f"{name}.npy"
        if name in _OPTIONAL and (not path.exists() or (name == WHOLE and not whole)):
            continue
        if not path.exists():
            expected = ", ".join(f"{one}.npy" for one in _REQUIRED)
            refuse(str(path), "file", "missing", f"{IDS}, {expected}", _SAVE_AGAIN)
        refuse_no_file(path)
        with naming_damage(path, _SAVE_AGAIN, "one array in npy"):
            array = npy.open_memmap(path, mode="r")
        _, kinds, words = ARRAYS[name]
        if array.dtype.kind not in kinds or array.dtype.subdtype is not None:
            refuse(str(path), "dtype", array.dtype, words)
        lengths.check(str(path), name, array.shape, _SAVE_AGAIN)
        arrays[name] = array
    return arrays


def _ids(path: Path) -> list[str]:
    """The ids in a list, one on each line; other marks that can end a line may be part of one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise_if_refused(error, path)
        refuse(str(path), "list", f"not readable ({error})", "an image id on each line, in UTF-8")
    ids = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "" in ids:
        refuse(f"{path}, row {ids.index('')}", "id", "empty", "an image id on each line")
    return ids
