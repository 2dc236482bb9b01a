"""Which files listed paths mean.

A path is that of a file, or else of the only file whose path differs from it in Unicode form (some
systems write an accent on its own) or, if it has no suffix, of the only photograph that has the
path but for its suffix. What else resembles a missing image is only named (`missing`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import InputError
from pipeline.files import access_error
from pipeline.formats.text import composed
from pipeline.images import suffixes


def is_inside(path: str) -> bool:
    """Whether a path can be that of a file below a folder: relative, without `..`."""
    return bool(path) and not path.startswith("/") and ".." not in path.split("/")


def without_suffix(path: str) -> str:
    """A path without the suffix of its file, which may have other dots in its name."""
    return os.path.splitext(path)[0]  # noqa: PTH122


def find_files(root: Path, paths: Sequence[str]) -> np.ndarray:
    """(N,) bool: which of the paths below ``root`` are files; as `Disk.are_files`."""
    return Disk(root).are_files(paths)


def note_on_names(
    source: Path | str, different: Sequence[tuple[str, str]], listed: int
) -> list[str]:
    """A note on names that are not quite those of their files, if there are any.

    Args:
        source: what lists them.
        different: the listed path and the file of each.
        listed: the number of all listed paths.
    """
    if not different:
        return []
    path, file = different[0]
    one = len(different) == 1
    return [
        f"{source}: {len(different)} of {listed} listed paths {'differs' if one else 'differ'} "
        f"from a file's name only in a missing suffix or in Unicode form"
        f"{':' if one else ', for example'} {path!r} from {file!r}. "
        f"{'This file is' if one else 'These files are'} read."
    ]


class Disk:
    """The files below a folder. Paths are relative to it, with forward slashes.

    Every folder is listed once, when it is needed. Asking the file system about each of 270,000
    images would take minutes on a network disk.

    Every method raises an AccessError if a folder can't be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._suffixes = suffixes()
        self._entries: dict[str, tuple[set[str], set[str]]] = {}
        self._forms: dict[str, Mapping[str, list[str]]] = {}
        self._stems: dict[str, Mapping[str, list[str]]] = {}
        self._meant: dict[str, list[str]] = {"": [""]}

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted; none if there is no such folder."""
        return sorted(self._list(folder)[0])

    def are_files(self, paths: Sequence[str]) -> np.ndarray:
        """(N,) bool: which of N paths are those of files, letter by letter."""
        return np.array([self._is_file(path) for path in paths], dtype=bool)

    def file(self, path: str) -> str | None:
        """The file of a path, in its Unicode form or else in another; None if there is none.

        Raises:
            InputError: there are two in other forms.
        """
        if not is_inside(path):
            return None
        return path if self._is_file(path) else self._only(path, self._in(path, self._by_form))

    def photographs(self, path: str) -> list[str]:
        """The photographs that have a path but for its suffix, sorted."""
        return self._in(path, self._by_stem) if is_inside(path) else []

    def find(self, path: str) -> str | None:
        """The file that a listed path means: see the module. None if there is none.

        Raises:
            InputError: there are two.
        """
        return self.file(path) or self._only(path, self.photographs(path))

    def is_photograph(self, name: str) -> bool:
        """Whether a name has the suffix of a photograph."""
        return os.path.splitext(name)[1].lower() in self._suffixes  # noqa: PTH122

    def _list(self, folder: str) -> tuple[set[str], set[str]]:
        """The names of files and of folders in a folder."""
        if folder not in self._entries:
            self._entries[folder] = _scan(self.root / folder)
        return self._entries[folder]

    def _is_file(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self._list(folder)[0]

    def _by_form(self, folder: str) -> Mapping[str, list[str]]:
        """The files of a folder by their names in one Unicode form."""
        if folder not in self._forms:
            self._forms[folder] = _grouped((composed(name), name) for name in self.names(folder))
        return self._forms[folder]

    def _by_stem(self, folder: str) -> Mapping[str, list[str]]:
        """The photographs of a folder by their names without suffix, in one Unicode form."""
        if folder not in self._stems:
            self._stems[folder] = _grouped(
                (without_suffix(composed(name)), name)
                for name in self.names(folder)
                if self.is_photograph(name)
            )
        return self._stems[folder]

    def _in(self, path: str, by_name: Callable[[str], Mapping[str, list[str]]]) -> list[str]:
        """The files of a name in the folder of a path, or else in those of its other forms."""
        folder, slash, name = path.rpartition("/")
        form = composed(name)
        found = {
            real: [f"{real}{slash}{file}" for file in by_name(real).get(form, ())]
            for real in self._folders(folder)
        }
        return found.get(folder) or [file for files in found.values() for file in files]

    def _folders(self, folder: str) -> list[str]:
        """The folders of a path, in any Unicode form."""
        if folder not in self._meant:
            above, slash, name = folder.rpartition("/")
            self._meant[folder] = [
                f"{real}{slash}{found}"
                for real in self._folders(above)
                for found in ([name] if name in ("", ".") else sorted(self._list(real)[1]))
                if composed(found) == composed(name)
            ]
        return self._meant[folder]

    def _only(self, path: str, found: Sequence[str]) -> str | None:
        if len(found) > 1:
            raise InputError(
                f"{self.root}: {path!r} can be the file {found[0]} or {found[1]}, expected one "
                "file that it can be.",
                f"If {found[0]} is meant, move {found[1]} to another folder, else the other way "
                "round. In a table or in COCO's JSON, you can write the suffix instead.",
            )
        return found[0] if found else None


def _grouped(pairs: Iterable[tuple[str, str]]) -> Mapping[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _scan(folder: Path) -> tuple[set[str], set[str]]:
    files: set[str] = set()
    folders: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (files if entry.is_file() else folders).add(entry.name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass  # ValueError: a null byte, which no folder's name has
    except OSError as error:
        raise access_error(error, folder) from error
    return files, folders
