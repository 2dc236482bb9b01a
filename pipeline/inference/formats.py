"""Predictions as JSON, CSV and Parquet.

Each form has one row per image and label, with the columns of `COLUMNS`; in JSON the labels are
nested in their image. Texts are as `pipeline.formats.text.storable` gives them. A writer is a
context manager that gives a function, which takes the rows of one image. So memory does not grow
with the number of images.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import replacing
from pipeline.formats.text import csv_cell, storable
from pipeline.inference.trained import Prediction, TrainedRun

COLUMNS = pa.schema(
    [
        ("image", pa.string()),  # path as it was given or found
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("score", pa.float32()),  # the sigmoid of the logit
        ("probability", pa.float32()),  # calibrated, if the run has a calibration; else the score
        ("threshold", pa.float32()),  # what the probability of a predicted label exceeds
        ("predicted", pa.bool_()),
        # The one that says most for the label, from 0, in the detector's order. Where that is the
        # image as a whole, it is null, and so is all that follows.
        ("region", pa.int16()),
        *((side, pa.float32()) for side in ("left", "top", "right", "bottom")),  # box, in pixels
        ("detector_class", pa.string()),  # the detector's class of the region
        ("detector_score", pa.float32()),
    ]
)
"""Columns of every form. Labels of an image are in the order of their scores, best first."""

_ROW_GROUP_ROWS = 1 << 16
Row = dict[str, Any]
Write = Callable[[list[Row]], None]
"""Takes the rows of one image."""


def label_rows(
    path: Path,
    prediction: Prediction,
    run: TrainedRun,
    threshold: float | None,
    top: int | None,
    only: Collection[str] = (),
) -> list[Row]:
    """Make a row for each label of an image, as `COLUMNS`.

    Args:
        path: of the image.
        prediction: of the image, by ``run``.
        threshold: a label is predicted if its probability is higher; at 0 every label is. None for
            the thresholds that the run fitted, or 0.5.
        top: a label is predicted only if it is among this many best labels; None for no limit.
        only: names of the labels to make rows for; empty for all.
    """
    rows: list[Row] = []
    probabilities, thresholds = prediction.probabilities, prediction.thresholds
    decided = prediction.predicted
    if threshold is not None:
        thresholds = np.full_like(thresholds, threshold)
        decided = (probabilities.astype(np.float64) > threshold) | (threshold == 0)
    listed = [label for label in prediction.order if not only or run.vocabulary[label] in only]
    for rank, label in enumerate(listed):
        region = prediction.region_of(label)
        rows.append(
            {
                "image": str(path),
                "width": prediction.size[0],
                "height": prediction.size[1],
                "label": run.vocabulary[label],
                "score": float(prediction.scores[label]),
                "probability": float(probabilities[label]),
                "threshold": float(thresholds[label]),
                "predicted": bool(decided[label]) and (top is None or rank < top),
                "region": region,
                **_about_region(region, prediction, run),
            }
        )
    return rows


_SIDES = ("left", "top", "right", "bottom")
_OF_REGION = (*_SIDES, "detector_class", "detector_score")


def _about_region(region: int | None, prediction: Prediction, run: TrainedRun) -> Row:
    if region is None:
        return dict.fromkeys(_OF_REGION)
    return {
        **dict(zip(_SIDES, prediction.pixel_box(region), strict=True)),
        "detector_class": run.class_name(int(prediction.detector_classes[region])),
        "detector_score": float(prediction.detector_scores[region]),
    }


def image_json(rows: list[Row]) -> Row:
    """Make the JSON object of an image: its labels are nested in it.

    Args:
        rows: of `label_rows`, for one image.
    """
    rows = _storable(rows)
    image = {name: rows[0][name] for name in ("image", "width", "height")}
    labels = [
        {
            "label": row["label"],
            **{name: _short(row[name]) for name in ("score", "probability", "threshold")},
            "predicted": row["predicted"],
            "region": row["region"],
            "box": None if row["region"] is None else [_short(row[side]) for side in _SIDES],
            "detector_class": row["detector_class"],
            "detector_score": _short(row["detector_score"]),
        }
        for row in rows
    ]
    return {**image, "labels": labels}


@contextmanager
def json_writer(stream: TextIO) -> Iterator[Write]:
    """Write a list of objects as `image_json` makes them, each on a line."""
    separator = "["

    def write(rows: list[Row]) -> None:
        nonlocal separator
        stream.write(f"{separator}\n{json.dumps(image_json(rows))}")
        separator = ","

    yield write
    stream.write("[]\n" if separator == "[" else "\n]\n")


@contextmanager
def csv_writer(stream: TextIO) -> Iterator[Write]:
    """Write a header, then one line per image and label, with texts as `csv_cell` gives them.

    The cell of what is null is empty.
    """
    writer = csv.DictWriter(stream, COLUMNS.names, lineterminator="\n")
    writer.writeheader()

    def write(rows: list[Row]) -> None:
        for row in _storable(rows):
            texts = {name: csv_cell(v) for name, v in row.items() if isinstance(v, str)}
            short = {name: _short(v) for name, v in row.items() if isinstance(v, float)}
            predicted = str(row["predicted"]).lower()
            writer.writerow({**row, **texts, **short, "predicted": predicted})

    yield write


TEXT_WRITERS = {"json": json_writer, "csv": csv_writer}
"""Writers to a text stream, by the suffix of their files."""


@contextmanager
def file_writer(path: Path) -> Iterator[Write]:
    """Write a .json, .csv or .parquet file, whole or not at all."""
    with replacing(path) as temporary, ExitStack() as stack:
        if path.suffix == ".parquet":
            yield stack.enter_context(_parquet_writer(temporary))
            return
        stream = stack.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        yield stack.enter_context(TEXT_WRITERS[path.suffix.removeprefix(".")](stream))


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Write]:
    # pyarrow itself opens no file whose name is not UTF-8.
    with path.open("wb") as stream, pq.ParquetWriter(stream, COLUMNS) as file:
        waiting: list[Row] = []

        def write(rows: list[Row]) -> None:
            waiting.extend(_storable(rows))
            if len(waiting) >= _ROW_GROUP_ROWS:
                flush()

        def flush() -> None:
            file.write_table(pa.Table.from_pylist(waiting, schema=COLUMNS))
            waiting.clear()

        yield write
        flush()


def _storable(rows: list[Row]) -> list[Row]:
    return [
        {name: storable(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows
    ]


def _short(value: float | None) -> float | None:
    """Round to the six digits that a float32 has."""
    return None if value is None else float(f"{value:.6g}")
