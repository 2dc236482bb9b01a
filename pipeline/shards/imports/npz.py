"""Regions in an npz, the format of `numpy.savez`, with split and labels.

Letters: as in `pipeline.shards.imports.image_regions`; M is the number of regions that the arrays
have room for, for each image.
"""

from __future__ import annotations

import hashlib
import logging
import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.files import sha256_json
from pipeline.formats.encodings import plain_text
from pipeline.formats.npz import NpyHeader, decoded_texts, naming_damage, npy_header
from pipeline.shards.imports.arrays import ARRAYS, CODING, Lengths
from pipeline.shards.imports.box_forms import are_odd, form_of
from pipeline.shards.imports.image_regions import (
    CHUNK,
    ImageRegions,
    OnBytes,
    first_true,
    refuse,
    refuse_no_file,
)

_log = logging.getLogger(__name__)

_OPTIONAL = "whole"

_CASTS = {"text": "str", "floats": "numpy.float32", "integers": "numpy.int64"}

_LONGEST_TEXT = 4 * 4096  # bytes; numpy takes 4 for a character
_MOST_LABELS = np.iinfo(np.int16).max + 1  # of a manifest

_OF_REGIONS = ("image_id", "features", "boxes", "scores", "classes", "count")


@dataclass(frozen=True, eq=False)
class NpzFile:
    """An npz of regions that also holds the split and the labels.

    ``features`` (N,M,d), ``boxes`` (N,M,4) xyxy in [0,1] and ``scores`` (N,M) are floats,
    ``classes`` (N,M) and ``count`` (N,) integers. The first ``count`` of an image's M entries are
    its regions, the others are ignored. ``whole`` (N,d), which a file may lack, are floats: the
    features of the whole images. The other arrays are described below.

    Attributes:
        path: of the file.
        sha256: hex, over the arrays that decide the regions. Corrected labels don't change it.
        whole_sha256: hex, of the array ``whole``; None if the file has none or it is not read.
        image_ids: N, unique.
        counts: (N,) number of regions of each image; 0 for an image without any.
        feature_size: d.
        sizes: (N, 2) int32, the array ``size_wh``: width and height in pixels.
        splits: N, ``train`` or ``test``, the array ``split``.
        labels: (N, C) int8: 1 positive, 0 neither (difficult), -1 negative. Those of a file of
            truth values, or without any -1, are multi-hot: 0 is negative there.
        label_names: C, in the form of `plain_text`, no two of which are equal.
        manifest_sources: hex sha256 of each array that the manifest is made of.
    """

    path: Path
    sha256: str
    whole_sha256: str | None
    image_ids: list[str]
    counts: npt.NDArray[np.int64]
    feature_size: int
    sizes: npt.NDArray[np.int32]
    splits: list[str]
    labels: npt.NDArray[np.int8]
    label_names: tuple[str, ...]
    manifest_sources: dict[str, str]

    @classmethod
    def open(
        cls, path: Path, on_bytes: OnBytes = lambda read, total: None, *, whole: bool = True
    ) -> NpzFile:
        """Read the file through: its checksums, and all arrays except those of the regions.

        Args:
            path: of the file.
            on_bytes: called with the progress.
            whole: whether to read the array ``whole`` if the file has it.

        Raises:
            InputError: the file is missing, damaged or not an npz, or an array is missing, has
                another type or shape, or holds an impossible value. Names the array and the row.
        """
        refuse_no_file(path)
        hashes: dict[str, str] = {}
        small: dict[str, npt.NDArray[Any]] = {}
        with naming_damage(path, _COPY_AGAIN), zipfile.ZipFile(path) as archive:
            arrays = _declared(path, archive, whole=whole)
            total = sum(archive.getinfo(f"{name}.npy").file_size for name in arrays)
            for name, array in arrays.items():
                hashing = hashlib.sha256()
                # To the end, since the archive's checksum is compared there.
                with archive.open(f"{name}.npy") as stream:
                    while chunk := stream.read(CHUNK):
                        hashing.update(chunk)
                        on_bytes(len(chunk), total)
                hashes[name] = hashing.hexdigest()
                if len(array.shape) == 1 or name in ("size_wh", "labels"):
                    with archive.open(f"{name}.npy") as stream:
                        stream.read(array.offset)
                        small[name] = _take(stream, array, array.shape[0])
            texts = {name: _texts(path, name, small[name]) for name in ("image_id", "split")}
            _refuse_values(path, texts["image_id"], texts["split"], small, arrays["boxes"].shape[1])
            _refuse_box_form(path, archive, arrays["boxes"], small)
        of_manifest = ("image_id", "size_wh", "split", "labels", "label_names")
        return cls(
            path=path,
            sha256=sha256_json([hashes[name] for name in _OF_REGIONS]),
            whole_sha256=hashes.get("whole"),
            image_ids=texts["image_id"],
            counts=small["count"].astype(np.int64),
            feature_size=arrays["features"].shape[2],
            sizes=small["size_wh"].astype(np.int32),
            splits=texts["split"],
            labels=_coded_labels(path, small["labels"]),
            label_names=_label_names(path, _texts(path, "label_names", small["label_names"])),
            manifest_sources={f"{path.name}/{name}": hashes[name] for name in of_manifest},
        )

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]:
        """Yield the regions of the images with these ascending numbers.

        Raises:
            InputError: as `open`.
        """
        wanted = set(images.tolist())
        last = max(wanted, default=-1)
        with ExitStack() as stack:
            stack.enter_context(naming_damage(self.path, _COPY_AGAIN))
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            has_whole = self.whole_sha256 is not None
            arrays = _declared(self.path, archive, whole=has_whole)
            rows: dict[str, Iterator[npt.NDArray[Any]]] = {}
            of_regions = ("features", "boxes", "scores", "classes")
            for name in (*of_regions, "whole") if has_whole else of_regions:
                stream = stack.enter_context(archive.open(f"{name}.npy"))
                stream.read(arrays[name].offset)
                rows[name] = _rows(stream, arrays[name])
            for row in range(last + 1):
                # Also of images that are not wanted: a compressed member is read in order.
                taken = {name: next(each) for name, each in rows.items()}
                if row in wanted:
                    n = self.counts[row]
                    where = _row(self.path, row, self.image_ids[row])
                    regions = {name: taken[name][:n] for name in of_regions}
                    yield ImageRegions(where, **regions, whole=taken.get("whole"))


def _rows(stream: IO[bytes], array: NpyHeader) -> Iterator[npt.NDArray[Any]]:
    """Yield the entries of an array along its first axis.

    In Fortran's order each is scattered over the whole array, which is then read into memory.
    """
    at_once = array.shape[0] if array.in_fortran_order else 1
    for _ in range(0, array.shape[0], at_once):
        yield from _take(stream, array, at_once)


def _take(stream: IO[bytes], array: NpyHeader, rows: int) -> npt.NDArray[Any]:
    """Read the next ``rows`` along the first axis; the stream is positioned before them.

    They are all rows if the array is in Fortran's order.
    """
    shape = (rows, *array.shape[1:])
    data = stream.read(math.prod(shape) * array.dtype.itemsize)
    order: Literal["C", "F"] = "F" if array.in_fortran_order else "C"
    return np.frombuffer(data, array.dtype, math.prod(shape)).reshape(shape, order=order)


_ANOTHER_WHOLE = (
    " If this array is not the features of whole images, set `extract.<dataset>.whole: false`, or "
    "save it under another name."
)
_COPY_AGAIN = "Copy it again, or save it again with `numpy.savez`."
_SAVE_AGAIN = "Save the arrays again with `numpy.savez`."


def _declared(path: Path, archive: zipfile.ZipFile, *, whole: bool) -> dict[str, NpyHeader]:
    """The headers of `ARRAYS`, after a check that they agree with each other.

    That of ``whole`` is left out if the file lacks it, or if it is not asked for.
    """
    arrays: dict[str, NpyHeader] = {}
    lengths = Lengths()
    for name, (_, kinds, _) in ARRAYS.items():
        is_there = f"{name}.npy" in archive.namelist()
        if name == _OPTIONAL and not (whole and is_there):
            continue
        if not is_there:
            held = sorted(member.removesuffix(".npy") for member in archive.namelist())
            required = [name for name in ARRAYS if name != _OPTIONAL]
            expected = f"the arrays {', '.join(required)}"
            refuse(str(path), f"array `{name}`", f"missing; the file has {held[:20]}", expected)
        where = f"{path}, `{name}`"
        save_again = _SAVE_AGAIN + (_ANOTHER_WHOLE if name == _OPTIONAL else "")
        array = npy_header(archive, name)
        dtype = array.dtype
        if dtype.kind not in kinds or dtype.itemsize == 0 or dtype.subdtype is not None:
            _refuse_type(where, name, dtype)
        if kinds == "US" and dtype.itemsize > _LONGEST_TEXT:
            refuse(where, "dtype", dtype, f"texts of at most {_LONGEST_TEXT} bytes", save_again)
        lengths.check(where, name, array.shape, save_again)
        size = archive.getinfo(f"{name}.npy").file_size
        if size != array.size:
            refuse(where, "size", f"{size} bytes", f"{array.size} bytes", save_again)
        arrays[name] = array
    labels, _ = lengths.known["C"]
    if labels > _MOST_LABELS:
        refuse(str(path), "number of labels", labels, f"at most {_MOST_LABELS}")
    return arrays


def _refuse_type(where: str, name: str, dtype: np.dtype[Any]) -> NoReturn:
    """Refuse an array of another kind of type, with the call that gives it the right one."""
    axes, _, kind = ARRAYS[name]
    expected = f"{kind}: {CODING}, or truth values" if name == "labels" else kind
    remedy = (
        f"Save it as {kind}: `numpy.savez(..., {name}={name}.astype({_CASTS[kind]}))`, with the "
        "other arrays as they are."
    )
    if dtype.hasobject:
        expected += ", since objects would have to be unpickled, which can run code of the file"
        if axes.startswith("NM"):
            remedy += (
                " If images have different numbers of regions, fill each with zeros up to the "
                "largest number first, and save the numbers as `count`."
            )
    refuse(where, "dtype", dtype, expected, remedy + (_ANOTHER_WHOLE if name == _OPTIONAL else ""))


def _coded_labels(path: Path, labels: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """The labels (N, C) by the coding of `NpzFile.labels`; says what could be meant otherwise."""
    if labels.dtype.kind == "b":
        return np.where(labels, 1, -1).astype(np.int8)
    zeros, negatives = int((labels == 0).sum()), int((labels == -1).sum())
    if zeros and not negatives:
        _log.warning(
            "%s, `labels`: read as multi-hot, with each 0 as negative, since none is -1. If a 0 "
            "means unknown there, set the known negatives to -1.",
            path,
        )
        return np.where(labels == 1, 1, -1).astype(np.int8)
    if zeros > negatives:
        _log.warning(
            "%s, `labels`: 0 (neither, by default ignored) occurs %d times, and -1 "
            "(negative) %d times. If 0 means negative there and -1 unknown, save "
            "`numpy.where(labels == 1, 1, -1 - labels)` instead.",
            path,
            zeros,
            negatives,
        )
    return labels.astype(np.int8)


def _label_names(path: Path, stored: list[str]) -> tuple[str, ...]:
    """The names of the C labels. Two that look alike would be two labels of one name."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(map(plain_text, stored)):
        where = f"{path}, `label_names`"
        if not name:
            refuse(where, f"entry {number}", f"{stored[number]!r}, which is empty", "a name")
        first = numbers.setdefault(name, number)
        if first != number:
            found = f"{stored[number]!r}, the same name as {stored[first]!r} (entry {first})"
            expected = "each label once"
            refuse(where, f"entry {number}", found, expected, "Rename or join them. " + _SAVE_AGAIN)
    return tuple(numbers)


def _texts(path: Path, name: str, array: npt.NDArray[Any]) -> list[str]:
    """The strings of an array of fixed-width text, decoded."""
    try:
        return decoded_texts(array)
    except UnicodeDecodeError as error:
        refuse(f"{path}, `{name}`", "text", f"not Unicode ({error})", "text as numpy saves it")


def _refuse_values(
    path: Path,
    image_ids: list[str],
    splits: list[str],
    small: dict[str, npt.NDArray[Any]],
    most: int,
) -> None:
    """Refuse the first impossible value of the small arrays.

    Args:
        path: of the file.
        image_ids, splits: N.
        small: the arrays without those of the regions.
        most: M.
    """
    first: dict[str, int] = {}
    for row, image_id in enumerate(image_ids):
        if not image_id:
            refuse(_row(path, row, image_id), "image_id", "empty", "an image's id")
        if image_id in first:
            expected = f"each image once; row {first[image_id]} has this id as well"
            refuse(_row(path, row, image_id), "image_id", repr(image_id), expected)
        first[image_id] = row
    for row, split in enumerate(splits):
        if split not in ("train", "val", "test"):
            refuse(_row(path, row, image_ids[row]), "split", repr(split), "train, val or test")
    for split in ("train", "test"):
        if split not in splits:
            refuse(str(path), "split", f"never {split!r}", "images of train and of test")
    limits = {
        "count": (0, most),
        "size_wh": (1, np.iinfo(np.int32).max),
        "labels": (-1, 1),
    }
    for name, (lowest, highest) in limits.items():
        values = small[name]
        for row, *index in first_true((values < lowest) | (values > highest)):
            where = "".join(f"[{axis}]" for axis in index)
            value = values[row, *index]
            expected = CODING if name == "labels" else f"{lowest} to {highest}"
            refuse(_row(path, row, image_ids[row]), f"{name}{where}", value, expected)


def _refuse_box_form(
    path: Path, archive: zipfile.ZipFile, array: NpyHeader, small: dict[str, npt.NDArray[Any]]
) -> None:
    """Refuse boxes of which most have another form than xyxy in [0, 1], such as pixels.

    A single wrong box is refused with its region, when it is read.
    """
    counts = small["count"].tolist()

    def boxes() -> Iterator[npt.NDArray[np.float64]]:
        with archive.open("boxes.npy") as stream:
            stream.read(array.offset)
            for n, row in zip(counts, _rows(stream, array), strict=True):
                yield row[:n].astype(np.float64)

    if not any(are_odd(some) for some in boxes()):
        return
    every = np.concatenate(list(boxes()))
    if not np.isfinite(every).all():
        return
    found = form_of(every, np.repeat(small["size_wh"], counts, axis=0).astype(np.float64))
    if found is None:
        return
    form, steps = found
    row = next(row for row, some in enumerate(boxes()) if are_odd(some))
    refuse(
        f"{path}, `boxes`",
        f"the form of the {len(every)} boxes",
        f"probably {form}; those of row {row} begin with {every[sum(counts[:row])].tolist()}",
        "xyxy in [0, 1] of the image",
        f"Convert them with `{'; '.join(steps)}`, save the arrays, and import again.",
    )


def _row(path: Path, row: int, image_id: str) -> str:
    return f"{path}, row {row} ({image_id!r})"
