"""What `verify` finds about a thing, and how errors become findings."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.errors import AccessError, DamagedError, GmpipeError, MismatchError, MissingError
from pipeline.files import access_error, read_bytes

Status = Literal["sound", "damaged", "unreadable", "out of date", "missing"]

_T = TypeVar("_T")

_LINES = 10  # of a list of damages


@dataclass(frozen=True)
class Finding:
    """What was found about a thing: its path, its status, and why, with the next step."""

    thing: Path
    status: Status
    about: str

    def __str__(self) -> str:
        return f"{self.thing}: {self.status}{f': {self.about}' if self.about else ''}"


def look(thing: Path, check: Callable[[], str]) -> Finding:
    """Check a thing; ``check`` says what it is, or raises what is wrong with it."""
    try:
        return Finding(thing, "sound", check())
    except MissingError as error:
        return Finding(thing, "missing", _brief(error))
    except MismatchError as error:
        return Finding(thing, "out of date", _brief(error))
    except AccessError as error:
        return Finding(thing, "unreadable", _brief(error))
    except GmpipeError as error:
        return Finding(thing, "damaged", _brief(error))
    except OSError as error:
        return unreadable(thing, error)


def unreadable(thing: Path, error: OSError) -> Finding:
    """The finding about a thing that the system can't read."""
    return Finding(thing, "unreadable", _brief(access_error(error)))


def _brief(error: GmpipeError) -> str:
    """An error in one line."""
    first, *others = error.problem.splitlines()
    if len(others) > _LINES:
        others[_LINES:] = [f"and {len(others) - _LINES} more"]
    return " ".join([*map(str.strip, [first, *others]), error.remedy]).strip()


def sound(read: Callable[[], _T]) -> _T | None:
    """Read something that another thing is compared with.

    Returns:
        None if it is missing, damaged or unreadable: that is a finding about it alone.
    """
    try:
        return read()
    except (GmpipeError, OSError):
        return None


def there(path: Path) -> bool:
    """Whether there is something, be it a broken link or something that can't be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header.

    Raises:
        DamagedError: it is no such table, or has no rows.
        InputError, OSError: as `read_bytes`.
    """
    stored = read_bytes(path)
    try:
        rows = list(csv.DictReader(io.StringIO(stored.decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DamagedError(f"it is no CSV ({error}).") from error
    if not rows or any(None in (*row, *row.values()) for row in rows):
        raise DamagedError("it is no table with the same columns in each of its rows.")
    return rows
