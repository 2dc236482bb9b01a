"""Command `predict`: the labels of photographs by a trained run, as table, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tabulate import tabulate
from tqdm import tqdm

from pipeline.errors import GmpipeError
from pipeline.files import replacing
from pipeline.images import images_below
from pipeline.inference.trained import Prediction, TrainedRun, load_run
from stages.console.messages import say
from stages.console.progress import progress_bar

COLUMNS = pa.schema(
    [
        ("image", pa.string()),  # path as it was named or found
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("score", pa.float32()),  # probability
        ("predicted", pa.bool_()),
        ("region", pa.int16()),  # the one that won the label, from 0, in the order of the detector
        *(
            (side, pa.float32()) for side in ("left", "top", "right", "bottom")
        ),  # its box, in pixels
        ("detector_class", pa.string()),  # what the detector takes the region for
        ("detector_score", pa.float32()),
    ]
)
"""What every written form has of a label of an image, in the order of scores, best first."""

_WRITTEN_ROWS = 1 << 16  # rows of a row group
Row = dict[str, Any]
Write = Callable[[list[Row]], None]
"""Takes the rows of one image."""


def predict(
    names: Sequence[str],
    run_folder: Path,
    detector: Path | None,
    *,
    threshold: float,
    top: int | None,
    batch_size: int,
    stdout: str | None,
    output: Path | None,
) -> tuple[int, int]:
    """Print or write the labels of photographs; name on stderr those that can't be read.

    Args:
        names: photographs, folders and patterns.
        run_folder, detector: as `load_run` takes them.
        threshold: a label is predicted if its score is above; of 0, every label is.
        top: and if it is among so many best ones of its image; None: any number.
        batch_size: images that the detector takes at once.
        stdout: `json` or `csv`; None: a table, unless a file is written.
        output: file to write: .json, .csv or .parquet.

    Returns:
        how many photographs were labelled, and how many could not be read.

    Raises:
        GmpipeError: a folder or pattern holds no photograph, or the run can't be loaded.
    """
    paths = find_images(names)
    run = load_run(run_folder, detector)
    labelled = failures = 0
    with ExitStack() as stack:
        writers: list[Write] = []
        if stdout is not None:
            writers.append(stack.enter_context(_TEXTS[stdout](sys.stdout)))
        elif output is None:
            writers.append(stack.enter_context(_table(sys.stdout)))
        if output is not None:
            writers.append(stack.enter_context(_file(output)))
        bar = stack.enter_context(progress_bar(total=len(paths), desc="predict", unit="image"))
        for path, outcome in run.predict_files(paths, batch_size=batch_size):
            bar.update(1)
            if isinstance(outcome, GmpipeError):
                failures += 1
                tqdm.write(str(outcome), file=sys.stderr)
                continue
            rows = _rows(path, outcome, run, threshold, top)
            for write in writers:
                write(rows)
            labelled += 1
        bar.close()  # before anything that is kept for the end is printed
    if output is not None and stdout is None:  # or the line would stand among what is printed
        say(f"{output}: {labelled} {'image' if labelled == 1 else 'images'}")
    return labelled, failures


def find_images(names: Sequence[str]) -> list[Path]:
    """The photographs that names stand for, each once, in their order.

    A folder stands for the photographs in it and its subfolders; a pattern (`*`, `?`, `[...]`,
    `**`) that is no file's name, for what it matches. Any other name stands for itself, whether
    there is such a file or not.

    Raises:
        GmpipeError: a folder or pattern stands for none.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        matches = [path]
        if glob.has_magic(name) and not path.exists():
            # Path.glob takes no absolute patterns.
            matches = [Path(m) for m in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        images = [
            image
            for match in matches
            for image in (images_below(match) if match.is_dir() else [match])
        ]
        if not images:
            what = "a folder without a photograph" if path.is_dir() else "a pattern without a match"
            raise GmpipeError(f"{name}: {what}. Name photographs, or a folder that has some.")
        found.update(dict.fromkeys(images))
    return list(found)


def _rows(
    path: Path, found: Prediction, run: TrainedRun, threshold: float, top: int | None
) -> list[Row]:
    """A row a label, as `COLUMNS`."""
    rows: list[Row] = []
    order = np.argsort(-found.scores, kind="stable")
    for place, label in enumerate(order.tolist()):
        score, region = float(found.scores[label]), int(found.regions[label])
        left, top_side, right, bottom = found.pixel_box(region)
        rows.append(
            {
                "image": str(path),
                "width": found.size[0],
                "height": found.size[1],
                "label": run.vocabulary[label],
                "score": score,
                "predicted": (score > threshold or not threshold) and (top is None or place < top),
                "region": region,
                "left": left,
                "top": top_side,
                "right": right,
                "bottom": bottom,
                "detector_class": run.class_name(int(found.detector_classes[region])),
                "detector_score": float(found.detector_scores[region]),
            }
        )
    return rows


@contextmanager
def _table(stream: TextIO) -> Iterator[Write]:
    """Predicted labels only; of an image without any, the best one and that it is none."""
    lines: list[list[str]] = []

    def write(rows: list[Row]) -> None:
        predicted = [row for row in rows if row["predicted"]]
        for row in predicted:
            lines.append([row["image"], row["label"], f"{row['score']:.3f}"])
        if not predicted:
            best = rows[0]
            lines.append([best["image"], f"none; best: {best['label']}", f"{best['score']:.3f}"])

    yield write
    if lines:
        table = tabulate(
            lines, ["image", "label", "score"], tablefmt="github", disable_numparse=True
        )
        stream.write(f"{table}\n")


@contextmanager
def _json(stream: TextIO) -> Iterator[Write]:
    """A list of objects, one an image, a line each."""
    separator = "["

    def write(rows: list[Row]) -> None:
        nonlocal separator
        image = {name: rows[0][name] for name in ("image", "width", "height")}
        labels = [
            {
                "label": row["label"],
                "score": _short(row["score"]),
                "predicted": row["predicted"],
                "region": row["region"],
                "box": [_short(row[side]) for side in ("left", "top", "right", "bottom")],
                "detector_class": row["detector_class"],
                "detector_score": _short(row["detector_score"]),
            }
            for row in rows
        ]
        stream.write(f"{separator}\n{json.dumps({**image, 'labels': labels})}")
        separator = ","

    yield write
    stream.write("[]\n" if separator == "[" else "\n]\n")


@contextmanager
def _csv(stream: TextIO) -> Iterator[Write]:
    writer = csv.DictWriter(stream, COLUMNS.names, lineterminator="\n")
    writer.writeheader()

    def write(rows: list[Row]) -> None:
        for row in rows:
            short = {name: _short(v) if isinstance(v, float) else v for name, v in row.items()}
            writer.writerow({**short, "predicted": str(row["predicted"]).lower()})

    yield write


def _short(value: float) -> float:
    """With the six digits that a float32 has."""
    return float(f"{value:.6g}")


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    with pq.ParquetWriter(path, COLUMNS) as file:
        waiting: list[Row] = []

        def write(rows: list[Row]) -> None:
            waiting.extend(rows)
            if len(waiting) >= _WRITTEN_ROWS:
                flush()

        def flush() -> None:
            file.write_table(pa.Table.from_pylist(waiting, schema=COLUMNS))
            waiting.clear()

        yield write
        flush()


@contextmanager
def _file(path: Path) -> Iterator[Write]:
    """By the suffix, whole or not at all."""
    with replacing(path) as temporary, ExitStack() as stack:
        if path.suffix == ".parquet":
            yield stack.enter_context(_parquet(temporary))
            return
        stream = stack.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        yield stack.enter_context(_TEXTS[path.suffix.removeprefix(".")](stream))


_TEXTS = {"json": _json, "csv": _csv}
