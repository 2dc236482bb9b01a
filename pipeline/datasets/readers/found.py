"""Files below a data set's root, found by the names that lists and labelling tools give them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pipeline.datasets.missing import file_names
from pipeline.formats.text import composed
from pipeline.images import suffixes


class FoundFiles:
    """The files below a folder. Each folder is listed once.

    Names that differ in their Unicode form only are one (macOS writes another form than Linux).
    Paths are relative to the folder, with forward slashes.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._suffixes = suffixes()
        self._names: dict[str, dict[str, str]] = {}
        self._photographs: dict[str, dict[str, list[str]]] = {}

    def path(self, path: str) -> str | None:
        """The path of a file as it is on disk; None if there is no such file.

        Raises:
            AccessError: the system can't list its folder.
        """
        folder, _, name = path.rpartition("/")
        names = self._folder(folder)
        found = names.get(name) or names.get(composed(name))
        return None if found is None else f"{folder}/{found}" if folder else found

    def photographs(self, path: str) -> list[str]:
        """The photographs that have a path but for its suffix, as they are on disk, sorted.

        Raises:
            AccessError: the system can't list its folder.
        """
        folder, _, stem = path.rpartition("/")
        if folder not in self._photographs:
            stems: defaultdict[str, list[str]] = defaultdict(list)
            for name in sorted(set(self._folder(folder).values())):
                if self.is_photograph(name):
                    stems[composed(without_suffix(name))].append(f"{folder}/{name}")
            self._photographs[folder] = stems
        return self._photographs[folder].get(composed(stem), [])

    def hint(self, folder: PurePosixPath, name: str) -> str:
        """A sentence about a file that has a name in other letters, after a blank; else empty."""
        for other in self._folder(str(folder)).values():
            if other != name and other.casefold() == name.casefold():
                return f" There is {folder / other}: correct upper and lower case."
        return ""

    def is_photograph(self, name: str) -> bool:
        """Whether a name has the suffix of a photograph."""
        return PurePosixPath(name).suffix.lower() in self._suffixes

    def _folder(self, folder: str) -> dict[str, str]:
        """Name -> name on disk, for the names on disk and for their composed forms."""
        if folder not in self._names:
            names = sorted(file_names(self._root / folder))
            self._names[folder] = {composed(name): name for name in names} | {
                name: name for name in names
            }
        return self._names[folder]


def without_suffix(path: str) -> str:
    """A path without the suffix of its file, which may have other dots in its name."""
    return path.removesuffix(PurePosixPath(path).suffix)


def is_inside(path: str) -> bool:
    """Whether a path can be that of a file below a folder: relative, without `..`."""
    return bool(path) and not path.startswith("/") and ".." not in path.split("/")


def find_photographs(
    root: Path, folder: str, names: Mapping[str, str], source: Path
) -> tuple[list[str], list[str]]:
    """Find photographs by the names and paths that a tool wrote, perhaps on another machine.

    A path may have backslashes, and lead through folders that don't exist here. The longest end of
    it that is a file below ``folder``, or else below the root, is the photograph.

    Args:
        root: of the data set; results are relative to it, with forward slashes.
        folder: where the photographs should be, relative to the root.
        names: image id -> name or path.
        source: the file that has the names, for messages.

    Returns:
        a path for each image; where there is no file, the place in ``folder`` to put it at. And
        notes.
    """
    files = FoundFiles(root)
    paths, shortened = [], []
    for image_id, name in names.items():
        path = name.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")] or [name]
        inner = parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts
        found = next(filter(None, map(files.path, _ends(folder, inner))), None)
        if found is not None and not composed(found).endswith(composed("/".join(parts))):
            shortened.append((image_id, found))
        foreign = inner != parts or re.match(r"/|[A-Za-z]:/", path)
        paths.append(found or f"{folder}/{'/'.join(parts[-1:] if foreign else parts)}")
    if not shortened:
        return paths, []
    image_id, found = shortened[0]
    others = len(shortened) - 1
    more = f", and {others} more in the same way" if others else ""
    return paths, [
        f"{source}: of the path {names[image_id]!r}, only the end is that of a file: {found} is "
        f"read{more}."
    ]


def _ends(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """The places where the file of a path can be, the most likely first."""
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        yield f"{folder}/{end}"
        yield end
