"""How long each stage took: `.state/times/<dataset>.csv`, a line whenever one made something.

Nothing depends on this file, and it may be removed at any time: wall-clock times stay out of all
that a later stage reads. A stage that found everything up to date, or failed, leaves no line; but
an extraction that extracted all it could and failed for the broken photographs alone does.

The seconds are those of the execution that finished. What an earlier one spent before it was killed
is not in them: a training or fitting that was resumed counts from there, and an extraction has, in
`rows`, how many rows the time is for.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import time
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from stages.checkout.layout import times_file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageTime:
    """A line of the file; the fields are its columns.

    Attributes:
        stage: `prepare`, `detector`, `extract`, `train` or `evaluate`.
        run: name of the run's folder; empty for the first three.
        seconds: wall-clock time.
        finished: when, in UTC, ISO 8601 to the second.
        rows: of `extract`, how many it extracted; None for all others.
    """

    stage: str
    run: str
    seconds: float
    finished: str
    rows: int | None = None


def record_time(
    dataset: str, stage: str, began: float, *, run: str = "", rows: int | None = None
) -> None:
    """Append a line for a stage that has just made something.

    A file that can't be written costs the line, not the stage: what it made is there.

    Args:
        began: `time.monotonic()` of its beginning.
        run, rows: as in `StageTime`.
    """
    seconds = round(time.monotonic() - began, 3)
    _log.info("%s took %.1f s", f"{stage} of {run}" if run else stage, seconds)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    path = times_file(dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, astuple(StageTime(stage, run, seconds, finished, rows)))
    except OSError as error:
        _log.warning("the time of %s is not noted in %s (%s).", stage, path, error)


def _append(path: Path, values: tuple[object, ...]) -> None:
    """One write, so that lines of several processes don't mix."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if not path.exists():
        writer.writerow(field.name for field in fields(StageTime))
    writer.writerow(values)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, lines.getvalue().encode())
    finally:
        os.close(descriptor)


def read_times(dataset: str) -> list[StageTime]:
    """The latest line of each stage and run, in the order of the file; none without a file.

    Lines that are damaged (a full disk cuts them off) are skipped, and so is the heading, of which
    two processes that begin the file at once leave two.
    """
    try:
        text = times_file(dataset).read_text(errors="replace")
    except FileNotFoundError:
        return []
    latest: dict[tuple[str, str], StageTime] = {}
    for line in text.splitlines():
        try:
            stage, run, seconds, finished, rows = next(csv.reader([line]))
            found = StageTime(stage, run, float(seconds), finished, int(rows) if rows else None)
            datetime.fromisoformat(finished)
        except (StopIteration, ValueError, csv.Error):
            continue
        if math.isfinite(found.seconds):
            latest.pop((stage, run), None)
            latest[stage, run] = found
    return list(latest.values())
