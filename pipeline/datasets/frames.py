"""The frame of boxes: on which picture they were drawn, and where they are in the upright one.

A camera stores a photograph as its sensor was held, with an EXIF orientation that says how to turn
it upright. Everything here decodes photographs upright (`pipeline/regions/transforms.py`), so boxes
must be in the upright picture. But some labelling tools draw on the stored one. The size that a
tool writes beside its boxes tells which, if turning exchanges width and height:

- The listed size is that of the upright picture, or of the stored one: the boxes were drawn on it.
- It is neither, but has the same shape within a pixel: the picture was resized afterwards.
- There is none, or it is the same for both (turned by 180 degrees, mirrored, square): the boxes
  were drawn as those of the data set's other turned photographs. If these don't tell either, or
  contradict each other, the setting `box_frame` has to.
- The boxes reach beyond it, but fit it with width and height exchanged: so it is exchanged.
- It is another: the file is not the one that was annotated.

Boxes whose frame is unknown are left out and their images marked as incomplete. Each of these
cases is noted, except for sizes of the upright picture. What the headers of files whose boxes are
left out say is kept with the boxes, so that another file in their place is noticed.

Letters: N images of the manifest, n annotated objects.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.datasets.listing import ListedBoxes, Listing
from pipeline.datasets.manifest import BoxTable, ImageBoxes, Manifest, SeenHeader
from pipeline.files import open_regular
from pipeline.images import read_header
from pipeline.settings import BoxFrame

Frame = Literal["upright", "stored"]
Size = tuple[int, int]  # width and height in pixels

_SIDES = ("width", "height")
_SHOWN = 3  # files that a note names
_EXCHANGED = (
    "The boxes of {} reach beyond the listed size, but not beyond it with width and height "
    "exchanged, which is the size that is used: an EXIF orientation turns the photographs"
)


@dataclass(frozen=True)
class Header:
    """What the header of a photograph says.

    Attributes:
        stored: its size as it is stored.
        orientation: 1 to 8, how it is turned upright (EXIF, tag 0x0112); 1 for not at all.
    """

    stored: Size
    orientation: int

    def size(self, frame: Frame) -> Size:
        """The size of the picture in a frame."""
        swaps = frame == "upright" and self.orientation >= 5
        return self.stored[::-1] if swaps else self.stored


def place_boxes(
    listing: Listing,
    manifest: Manifest,
    root: Path,
    frame: BoxFrame,
    on_images: Callable[[int], object] = lambda number: None,
) -> tuple[Manifest, BoxTable]:
    """Place boxes in the upright pictures, whose sizes are read from the files' headers.

    What is placed in a way that could be wrong, and what is left out, is noted.

    Args:
        listing: the images of the data set's files, and their boxes.
        manifest: the images of the listing that are kept.
        root: the folder that paths are relative to.
        frame: the setting `box_frame`.
        on_images: called with the number of headers that were read since the last call.

    Returns:
        the manifest with the sizes of the upright pictures, and with notes; and the boxes.
    """
    objects = listing.boxes
    assert objects is not None
    paths = manifest.table.column("path").to_pylist()
    headers = read_headers([root / path for path in paths], on_images)
    sizes = zip(*(manifest.table.column(side).to_pylist() for side in _SIDES), strict=True)
    images = [
        _Image(path, None if None in size else size, header)
        for path, size, header in zip(paths, sizes, headers, strict=True)
    ]
    image_ids = manifest.table.column("image_id")
    kept = pc.index_in(listing.table.column("image_id"), value_set=image_ids.combine_chunks())
    rows = np.asarray(pc.fill_null(kept, -1), dtype=np.int64)[objects.rows]
    numbers = np.flatnonzero(rows >= 0)  # of the objects whose image is in the manifest
    objects, rows = objects.take(numbers), rows[numbers]
    classes, pixels = objects.classes, objects.pixels
    drawn = ~np.isnan(pixels).any(axis=1)

    images, exchanged = _exchange_sizes(images, rows[drawn], pixels[drawn])
    with_boxes = np.unique(rows[drawn]).tolist()
    common = _common_frame(images, set(with_boxes))
    placements = _place(images, frame, common[0])
    boxes, placed, notes = _unit_boxes(rows, objects, placements, paths)
    notes = [
        *_note_cases(images, placements, with_boxes, manifest.dataset, common),
        *_note(exchanged, paths, _EXCHANGED),
        *_note(rows[~drawn], paths, "Some objects of {} have no box, and count as labels only"),
        *notes,
    ]
    names = image_ids.to_pylist()
    table = BoxTable(
        classes=listing.vocabulary,
        images=_grouped(names, rows[placed], classes[placed], boxes[placed]),
        incomplete=frozenset(names[row] for row in np.unique(rows[~placed])),
        left_out={
            paths[row]: _seen(headers[row]) for row in with_boxes if placements[row].size is None
        },
    )
    manifest = replace(_with_sizes(manifest, headers), notes=(*manifest.notes, *notes))
    return manifest, table


def same_headers(root: Path, left_out: Mapping[str, SeenHeader]) -> bool:
    """Whether the files below ``root`` are those that `BoxTable.left_out` was made from."""
    headers = read_headers([root / path for path in left_out])
    return [*map(_seen, headers)] == [*left_out.values()]


def _seen(header: Header | None) -> SeenHeader:
    return None if header is None else (*header.stored, header.orientation)


def turn_boxes(boxes: np.ndarray, orientations: np.ndarray) -> np.ndarray:
    """Turn boxes from stored pictures to the upright ones.

    Args:
        boxes: (n, 4), xyxy in [0,1] of the stored picture.
        orientations: (n,), 1 to 8, of each box's picture.

    Returns:
        (n, 4), xyxy in [0,1] of the upright picture.
    """
    swapped = (orientations >= 5)[:, None]
    turned = np.where(swapped, boxes[:, [1, 0, 3, 2]], boxes)
    right = np.isin(orientations, (2, 3, 6, 7))  # what is stored at the left, or top, is right
    bottom = np.isin(orientations, (3, 4, 7, 8))
    mirrored = np.stack([right, bottom, right, bottom], axis=1)
    return np.where(mirrored, 1 - turned[:, [2, 3, 0, 1]], turned)


# --- headers -------------------------------------------------------------------------------------


def read_headers(
    paths: Sequence[Path], on_images: Callable[[int], object] = lambda number: None
) -> list[Header | None]:
    """The header of each photograph; None where it can't be read, which extraction reports."""
    Image.init()  # before the threads, which would all do it at once
    headers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, which don't matter here
        with ThreadPoolExecutor() as pool:
            for header in pool.map(_read_header, paths):
                headers.append(header)
                on_images(1)
    return headers


def _read_header(path: Path) -> Header | None:
    try:
        with open_regular(path) as stream:
            return Header(*read_header(stream))
    except MemoryError:  # not the file's fault
        raise
    except Exception:  # the readers of formats raise anything for a damaged header
        return None


# --- frames --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """A photograph: its path, the size that its data set lists, and what its header says."""

    path: str
    listed: Size | None
    header: Header | None

    def fits(self) -> list[Frame]:
        """The frames that the listed size fits: exactly, else in its shape. No size fits all."""
        if self.header is None:
            return []
        frames: list[Frame] = ["upright"] if self.header.orientation == 1 else ["upright", "stored"]
        if self.listed is None:
            return frames
        exact = [frame for frame in frames if self.header.size(frame) == self.listed]
        return exact or [
            frame for frame in frames if _same_shape(self.listed, self.header.size(frame))
        ]


@dataclass(frozen=True)
class _Placement:
    """How the boxes of an image are placed.

    Attributes:
        case: `sure`, or the key of a note in `_note_cases`.
        size: what pixels are divided by; None if the boxes are left out.
        turn: the orientation that the boxes are turned by afterwards.
    """

    case: str
    size: Size | None
    turn: int = 1


def _place(images: Sequence[_Image], setting: str, common: Frame | None) -> list[_Placement]:
    """How the boxes of each image are placed.

    Args:
        setting: `box_frame`.
        common: the frame of turned images whose sizes can't tell.
    """
    placements = []
    for image in images:
        header, fits, case = image.header, image.fits(), "sure"
        frame: Frame | None = fits[0] if len(fits) == 1 else common
        if header is None:
            placements.append(_Placement("sure" if image.listed else "without size", image.listed))
            continue
        listed = image.listed
        if setting != "auto":
            frame = "stored" if setting == "stored" else "upright"
            listed = _as_in(listed, header.size(frame))
        elif not fits:
            listed = None
        elif len(fits) > 1:
            case = "followed"
        elif frame == "stored":
            case = "stored"
        if image.listed and not listed:
            placements.append(_Placement("misfit", None))
        elif frame is None:
            placements.append(_Placement("undecided", None))
        else:
            size = listed or header.size(frame)
            if case == "sure" and size != header.size(frame):
                case = "resized"
            turn = header.orientation if frame == "stored" else 1
            placements.append(_Placement(case, size, turn))
    return placements


def _as_in(listed: Size | None, size: Size) -> Size | None:
    """A listed size, or the same with its sides exchanged, if it fits a picture of ``size``."""
    for candidate in (listed, listed[::-1]) if listed else ():
        if _same_shape(candidate, size):
            return candidate
    return None


def _same_shape(listed: Size, size: Size) -> bool:
    """Whether resizing a picture of ``size`` gives the listed size, to a pixel."""
    across = abs(listed[0] - size[0] * listed[1] / size[1])
    down = abs(listed[1] - size[1] * listed[0] / size[0])
    return min(across, down) <= 1


def _exchange_sizes(
    images: Sequence[_Image], rows: np.ndarray, pixels: np.ndarray
) -> tuple[list[_Image], list[int]]:
    """Exchange the sides of listed sizes that only then hold the boxes of a turned photograph.

    Args:
        rows: (n,), the image of each box.
        pixels: (n, 4), as in `ListedBoxes`.

    Returns:
        the images; and which of them were changed.
    """
    reach = np.zeros((len(images), 2))
    np.maximum.at(reach, rows, pixels[:, 2:])
    result, changed = list(images), []
    for row, (image, (right, bottom)) in enumerate(zip(images, reach.tolist(), strict=True)):
        if image.listed is None or image.header is None or image.header.orientation < 5:
            continue
        width, height = (side + 1 for side in image.listed)  # a pixel more is rounding
        if (right > width or bottom > height) and right <= height and bottom <= width:
            result[row] = replace(image, listed=image.listed[::-1])
            changed.append(row)
    return result, changed


def _common_frame(images: Sequence[_Image], drawn: Set[int]) -> tuple[Frame | None, int]:
    """The frame of all turned images whose sizes tell, None if they differ; and their number.

    The number counts those of the images ``drawn``, which have boxes, if there are any.
    """
    frames = {
        row: image.fits()[0]
        for row, image in enumerate(images)
        if image.listed and image.header and image.header.orientation > 1 and len(image.fits()) == 1
    }
    frame = next(iter(frames.values())) if len(set(frames.values())) == 1 else None
    return frame, len(frames.keys() & drawn) or len(frames)


def _note_cases(
    images: Sequence[_Image],
    placements: Sequence[_Placement],
    drawn: Sequence[int],
    dataset: str,
    common: tuple[Frame | None, int],
) -> list[str]:
    """Note which boxes are placed in a way that could be wrong, or are left out.

    Args:
        drawn: the images that have boxes.
        common: as `_common_frame` gives it.
    """
    key = f"`prepare.{dataset}.box_frame`"
    choice = (
        f"Set {key} in params.yaml to `upright` if boxes were drawn on the photographs as viewers "
        "show them, or to `stored` if they were drawn before turning"
    )
    others = f"{common[1]} other photograph{'' if common[1] == 1 else 's'}"
    notes = {
        "stored": "The boxes of {} are turned, because an EXIF orientation turns the photographs, "
        "and the listed size is the one before turning. If the boxes are right without it, set "
        f"{key} in params.yaml to `upright`",
        "followed": f"The boxes of {{}} are read as `{common[0]}`, like those of {others}: an "
        "EXIF orientation turns the photographs, and the listed size does not tell whether "
        f"boxes were drawn before or after turning. {choice}",
        "undecided": "The boxes of {} are left out, because an EXIF orientation turns the "
        "photographs, and nothing tells whether boxes were drawn before or after turning. "
        f"{choice}",
        "resized": "The boxes of {} are scaled: the file has another size than listed, but the "
        "same shape",
        "misfit": "The boxes of {} are left out, because the listed size is not the file's. Put "
        "the files there that were annotated, or correct the sizes. If width and height are "
        f"exchanged, set {key} in params.yaml to `upright`. Sizes of the first",
        "without size": "The boxes of {} are left out, because no size is listed, and the file "
        "can't be read. Fix the files, then prepare the data set again",
    }
    paths = [image.path for image in images]
    found: list[str] = []
    for case, text in notes.items():
        rows = [row for row in drawn if placements[row].case == case]
        if case == "misfit" and rows:
            first = images[rows[0]]
            assert first.header  # otherwise it would be another case
            sizes = *(first.listed or ()), *first.header.size("upright")
            text += ": {} x {} listed, {} x {} in the file".format(*sizes)
        found += _note(rows, paths, text)
    return found


def _note(rows: Sequence[int] | np.ndarray, paths: Sequence[str], text: str) -> list[str]:
    """A note about images, if there are any; ``{}`` stands for their number and names."""
    images = np.unique(rows).tolist()
    if not images:
        return []
    names = ", ".join(paths[row] for row in images[:_SHOWN])
    more = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
    noun = "photograph" if len(images) == 1 else "photographs"
    return [text.replace("{}", f"{len(images)} {noun} ({names}{more})", 1) + "."]


# --- boxes ---------------------------------------------------------------------------------------


def _unit_boxes(
    rows: np.ndarray,
    objects: ListedBoxes,
    placements: Sequence[_Placement],
    paths: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Boxes in [0,1] of their upright picture, clipped to it.

    Args:
        rows: (n,), the image of each object in the manifest.
        objects: the n objects.

    Returns:
        (n, 4) float32, xyxy; (n,) bool, which of them are known and cover a part of the image; and
        notes on the others.
    """
    known = np.array([one.size is not None for one in placements], dtype=bool)
    sizes = np.array([one.size or (1, 1) for one in placements], dtype=np.int64).reshape(-1, 2)
    turns = np.array([one.turn for one in placements], dtype=np.int64)
    pixels, scales = objects.pixels, np.tile(sizes[rows], 2)
    if objects.relative is not None:
        scales[objects.relative] = 1
    boxes = turn_boxes(np.clip(pixels / scales, 0, 1), turns[rows]).astype(np.float32)
    drawn = known[rows] & ~np.isnan(pixels).any(axis=1)
    covers = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    beyond = drawn & covers & ((pixels < -1) | (pixels > scales + 1)).any(axis=1)
    notes = [
        *_note(
            rows[beyond],
            paths,
            "Some boxes of {} reach more than a pixel beyond the picture, and are cut off there",
        ),
        *_note(
            rows[drawn & ~covers],
            paths,
            "Some boxes of {} cover nothing of the picture. Their objects count as labels only",
        ),
    ]
    return boxes, drawn & covers, notes


def _grouped(
    images: Sequence[str], rows: np.ndarray, classes: np.ndarray, boxes: np.ndarray
) -> dict[str, ImageBoxes]:
    """The objects of each image, in the given order."""
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(len(images)), side="right")
    parts = np.split(order, ends[:-1])
    return {
        image: ImageBoxes(classes[part], boxes[part])
        for image, part in zip(images, parts, strict=True)
    }


def _with_sizes(manifest: Manifest, headers: Sequence[Header | None]) -> Manifest:
    """The manifest with the sizes of the upright pictures, where their headers give them."""
    table: pa.Table = manifest.table
    for side, name in enumerate(_SIDES):
        values = [
            header.size("upright")[side] if header else listed
            for header, listed in zip(headers, table.column(name).to_pylist(), strict=True)
        ]
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.schema.field(name), pa.array(values, pa.int32()))
    return replace(manifest, table=table)
