"""How long each stage took, in `.state/times/<dataset>.csv`.

A stage appends one line whenever it has made something. It appends none if everything was up to
date, or if it failed, with one exception: an extraction that failed only because of broken
photographs, after it had extracted all others, appends a line as well.

Nothing depends on this file, and it may be removed at any time: wall-clock times stay out of
everything that a later stage reads.

The seconds are those of the execution that finished, without the time of earlier ones that were
killed. A training or fitting that was resumed is timed from there on; for an extraction, `rows`
says how many rows the time is for.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from pipeline.files import read_bytes
from stages.checkout.layout import times_file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageTime:
    """A line of the file; its fields are the columns.

    Attributes:
        stage: `prepare`, `detector`, `extract`, `train` or `evaluate`.
        run: name of the run's folder; empty for the first three stages.
        seconds: wall-clock time.
        finished: UTC time of the end, in ISO 8601 to the second.
        rows: number of rows that `extract` extracted; None for the other stages.
    """

    stage: str
    run: str
    seconds: float
    finished: str
    rows: int | None = None


_HEADING = ",".join([*(field.name for field in fields(StageTime)), "crc32"])


def record_time(
    dataset: str, stage: str, began: float, *, run: str = "", rows: int | None = None
) -> None:
    """Append a line for a stage that has just made something.

    If the file can't be written, a warning is logged: the stage itself has succeeded.

    Args:
        dataset: name of the data set.
        stage, run, rows: as in `StageTime`.
        began: `time.monotonic()` at the start of the stage.
    """
    seconds = round(time.monotonic() - began, 3)
    _log.info("%s took %.1f s", f"{stage} of {run}" if run else stage, seconds)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    path = times_file(dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, astuple(StageTime(stage, run, seconds, finished, rows)))
    except OSError as error:
        _log.warning("the time of %s could not be written to %s (%s).", stage, path, error)


def _append(path: Path, values: tuple[object, ...]) -> None:
    """Append a line in a single write, so that lines of several processes do not mix."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if not path.exists():
        lines.write(f"{_HEADING}\n")
    writer.writerow([*values, _crc32(values)])
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        os.write(descriptor, lines.getvalue().encode())
    finally:
        os.close(descriptor)


def _crc32(values: Iterable[object]) -> str:
    """The checksum of a line's other values, as they are written."""
    text = "\n".join("" if value is None else str(value) for value in values)
    return f"{zlib.crc32(text.encode()):08x}"


def read_times(dataset: str) -> list[StageTime]:
    """Return the latest line of each stage and run, in the order of the file.

    The list is empty if there is no file, or none that can be read. Damaged lines are skipped, and
    said in a warning: a full disk cuts a line off, and a changed one does not have its crc32.
    """
    entries, damaged = _read(times_file(dataset))
    if damaged:
        _log.warning(
            "%s: %d damaged lines are left out, the first is line %d.",
            times_file(dataset),
            len(damaged),
            damaged[0],
        )
    latest: dict[tuple[str, str], StageTime] = {}
    for entry in entries:
        latest.pop((entry.stage, entry.run), None)
        latest[entry.stage, entry.run] = entry
    return list(latest.values())


def damaged_lines(dataset: str) -> list[int]:
    """The numbers, from 1, of the lines that `read_times` leaves out."""
    return _read(times_file(dataset))[1]


def _read(path: Path) -> tuple[list[StageTime], list[int]]:
    """The sound lines of a file, and the numbers of the damaged ones.

    Headings are skipped; two processes that create the file at the same time write two.
    """
    try:
        text = read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        _log.warning("the times in %s can't be read (%s).", path, error.strerror)
        return [], []
    entries: list[StageTime] = []
    damaged: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line in ("", _HEADING):
            continue
        try:
            *values, checksum = next(csv.reader([line]))
            stage, run, seconds, finished, rows = values
            entry = StageTime(stage, run, float(seconds), finished, int(rows) if rows else None)
            datetime.fromisoformat(finished)
            sound = checksum == _crc32(values) and math.isfinite(entry.seconds)
        except (StopIteration, ValueError, csv.Error):
            sound = False
        if sound:
            entries.append(entry)
        else:
            damaged.append(number)
    return entries, damaged
