"""The photographs that a labelling tool names, perhaps by their paths on another machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.datasets.disk import Disk, note_on_names, without_suffix
from pipeline.formats.text import composed


def find_photographs(
    disk: Disk, folder: str, names: Mapping[str, str], source: Path
) -> tuple[list[str], list[str]]:
    """Find photographs by the names and paths that a tool wrote.

    A path may have backslashes, and lead through folders that don't exist here. The longest end of
    it that is a file below ``folder``, or else below the root, is the photograph.

    Args:
        disk: the files of the data set. Results are relative to its root, with forward slashes.
        folder: where the photographs should be, relative to the root.
        names: image id -> name or path.
        source: the file that has the names, for messages.

    Returns:
        a path for each image; where there is no file, the place in ``folder`` to put it at. And
        notes.

    Raises:
        AccessError: a folder can't be read.
        InputError: a path can be that of two files.
    """
    paths = []
    shortened, completed = [], []
    for name in names.values():
        path = name.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")] or [name]
        inner = parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts
        found = next(filter(None, map(disk.find, _ends(folder, inner))), None)
        if found is not None:
            listed, end = composed("/".join(parts)), composed(found)
            if not f"/{end}".endswith(f"/{composed(inner[-1])}"):
                completed.append((name, found))
                end = without_suffix(end)
            if not f"/{end}".endswith(f"/{listed}"):
                shortened.append((name, found))
        foreign = inner != parts or re.match(r"/|[A-Za-z]:/", path)
        paths.append(found or f"{folder}/{'/'.join(parts[-1:] if foreign else parts)}")
    return paths, [
        *note_on_names(source, completed, len(paths)),
        *_note_shortened(source, shortened),
    ]


def _note_shortened(source: Path, shortened: Sequence[tuple[str, str]]) -> list[str]:
    if not shortened:
        return []
    name, found = shortened[0]
    others = len(shortened) - 1
    more = f", and {others} more in the same way" if others else ""
    return [f"{source}: of the path {name!r}, only the end is a file's: {found} is read{more}."]


def _ends(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """The places where the file of a path can be, the most likely first."""
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        yield f"{folder}/{end}"
        yield end
