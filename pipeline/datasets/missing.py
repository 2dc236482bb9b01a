"""Which listed images are files, and what lies there where one is missing.

A path is found under another Unicode form of its name (some systems write an accent on its own)
and, if it has no suffix, with the only suffix of photographs that lies there. Everything else that
resembles a missing image is only named, with what to change.

Letters: N listed images.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import MissingError
from pipeline.files import access_error
from pipeline.images import UNSUPPORTED, suffixes
from pipeline.settings import ListedSettings, NuswideSettings, TableSettings

_MOST_LOOKED_AT = 200_000
"""Files among which a missing image is searched: more would take minutes on a network disk."""


def find_files(root: Path, paths: Sequence[str]) -> np.ndarray:
    """(N,) bool: which of the paths below ``root`` are files.

    Every folder is listed once. Asking the file system about each of 270,000 images would take
    minutes on a network disk.

    Raises:
        AccessError: a folder can't be read.
    """
    disk = _Disk(root)
    return np.array([disk.is_file(path) for path in paths], dtype=bool)


def paths_on_disk(root: Path, paths: Sequence[str]) -> list[str]:
    """The paths of the files that ``paths`` mean: see the module; as they are where there is none.

    Args:
        root: the folder that they are relative to.
        paths: with forward slashes. Those that lead out of ``root`` stay as they are.

    Raises:
        AccessError: a folder can't be read.
    """
    disk = _Disk(root)
    return [
        path if _leads_out(path) or disk.is_file(path) else disk.meant_by(path) or path
        for path in paths
    ]


def _leads_out(path: str) -> bool:
    return path.startswith("/") or ".." in path.split("/")


class _Disk:
    """What is in folders below a root; each is listed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[str, tuple[set[str], set[str]]] = {}
        self._meant: dict[str, dict[str, list[str]]] = {}

    def _list(self, folder: str) -> tuple[set[str], set[str]]:
        """The names of files and of folders in a folder."""
        if folder not in self._names:
            self._names[folder] = _scan(self._root / folder)
        return self._names[folder]

    def is_file(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self._list(folder)[0]

    def meant_by(self, path: str) -> str | None:
        """The only file whose path differs in Unicode form, or in a suffix that ``path`` lacks."""
        folder, slash, name = path.rpartition("/")
        real = self._folder_meant_by(folder)
        if real is None:
            return None
        if real not in self._meant:
            self._meant[real] = self._keyed(real)
        files = self._meant[real].get(_form(name), [])
        return f"{real}{slash}{files[0]}" if len(files) == 1 else None

    def _keyed(self, folder: str) -> dict[str, list[str]]:
        """The files of a folder by the names that may mean them."""
        keyed = defaultdict(list)
        whole = {_form(name): name for name in self._list(folder)[0]}
        for name in sorted(self._list(folder)[0]):
            keyed[_form(name)].append(name)
            stem, suffix = os.path.splitext(_form(name))  # noqa: PTH122
            if suffix.lower() in suffixes() and stem not in whole:
                keyed[stem].append(name)
        return keyed

    def _folder_meant_by(self, folder: str) -> str | None:
        if not folder or any(self._list(folder)):
            return folder
        above, slash, name = folder.rpartition("/")
        real = self._folder_meant_by(above)
        if real is None:
            return None
        found = [other for other in self._list(real)[1] if _form(other) == _form(name)]
        return f"{real}{slash}{found[0]}" if len(found) == 1 else None


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


def file_names(folder: Path) -> set[str]:
    """The names of the files in a folder; empty if there is no such folder.

    Raises:
        AccessError: the folder can't be read.
    """
    return _scan(folder)[0]


def _form(name: str) -> str:
    """A name in one Unicode form: equal for names that look the same."""
    return unicodedata.normalize("NFC", name)


# --- what lies there -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    """How a missing image and what lies there differ, and what to change."""

    how: str
    remedy: str


def locate_missing(
    root: Path, missing: Sequence[tuple[str, str]], settings: ListedSettings
) -> str | None:
    """Search for files that resemble missing images: in name, apart from case, suffix and folder.

    Args:
        root: the data set's root. It is searched with linked folders, up to some 200,000 files.
        missing: image id and path of each missing image, in order.

    Returns:
        sentences that say how many of the images are there in another way, in which, and what to
        change; None if there is no such file.
    """
    similar = _Similar(root, [path for _, path in missing])
    kinds: Counter[_Difference] = Counter()
    examples: dict[_Difference, tuple[str, str]] = {}
    for image_id, path in missing:
        found = similar.to(path)
        if found is not None:
            difference = _difference(root, image_id, path, found, settings)
            kinds[difference] += 1
            examples.setdefault(difference, (found, path))
    sentences = []
    for difference, number in kinds.most_common(2):
        found, path = examples[difference]
        sentences.append(
            f"{_share(number, len(missing))} there {difference.how}: there is a file "
            f"{root / found}, but {path!r} is listed. {difference.remedy}"
        )
    return " ".join(sentences) or None


def _share(number: int, missing: int) -> str:
    if number < missing:
        return f"{number} of the {missing} missing images {'is' if number == 1 else 'are'}"
    return "The missing image is" if missing == 1 else f"All {missing} missing images are"


def _difference(
    root: Path, image_id: str, path: str, found: str, settings: ListedSettings
) -> _Difference:
    if _key(found, whole=True) == _key(path, whole=True):
        return _Difference(
            "with other upper and lower case",
            "Correct upper and lower case in the list, or in the files' names.",
        )
    suffix, other = _suffix(path), _suffix(found)
    where = "" if _folder(found) == _folder(path) else " and in another folder"
    if other.lower() in UNSUPPORTED:
        return _Difference(
            f"as {other}{where}",
            "Files of this format are not read: convert them to JPEG, with the listed names.",
        )
    if suffix and _key(found) != _key(path):
        there = f"with the suffix {other} instead of {suffix}" if other else "without a suffix"
        return _Difference(
            f"{there}{where}",
            "Correct the paths in the list, or rename the files: their suffix does not decide how "
            "they are read.",
        )
    meant = found if suffix else found.removesuffix(other)
    parts = image_id.count("/") + 1  # of the path, from its end
    is_id = _key("/".join(meant.split("/")[-parts:]), whole=True) == _key(image_id, whole=True)
    if where and is_id and isinstance(settings, TableSettings | NuswideSettings):
        images = "/".join(found.split("/")[:-parts]) or "."
        return _Difference(
            "in another folder", f"Set `prepare.{root.name}.images: {images}` in params.yaml."
        )
    if not where:
        return _Difference(
            f"with more than one suffix, {other} among them", "Add the right suffix in the list."
        )
    return _Difference("in another folder", "Correct the paths in the list, or move the files.")


def _stem(path: str) -> str:
    """The last name of a path without the suffix of a photograph."""
    name = path.rpartition("/")[2]
    return name.removesuffix(_suffix(path))


def _suffix(path: str) -> str:
    """The suffix of a photograph that a path has; empty if it has none, or another one."""
    suffix = os.path.splitext(path)[1]  # noqa: PTH122
    return suffix if suffix.lower() in suffixes() | UNSUPPORTED else ""


def _folder(path: str) -> str:
    """The folder of a path, in one case and Unicode form."""
    return _key(path.rpartition("/")[0], whole=True)


def _key(path: str, *, whole: bool = False) -> str:
    """A path or, by default, its last name, in one case and Unicode form."""
    return _form(path if whole else path.rpartition("/")[2]).casefold()


class _Similar:
    """The files that have the name of a missing image, apart from case, suffix and folder."""

    def __init__(self, root: Path, missing: Sequence[str]) -> None:
        wanted = {_key(name) for path in missing for name in (path, _stem(path))}
        self._anywhere: dict[str, str] = {}  # name -> file
        self._in_folder: dict[tuple[str, str], str] = {}  # folder and name -> file
        for found in _files_below(root) if wanted else ():
            for name in dict.fromkeys([_key(found), _key(_stem(found))]):
                if name in wanted:
                    self._anywhere.setdefault(name, found)
                    self._in_folder.setdefault((_folder(found), name), found)

    def to(self, path: str) -> str | None:
        """The file that is most like a missing one: of the same name, then in the same folder."""
        for name in (_key(path), _key(_stem(path))):
            found = self._in_folder.get((_folder(path), name)) or self._anywhere.get(name)
            if found is not None:
                return found
        return None


def _files_below(root: Path) -> Iterator[str]:
    """The files in a folder and its subfolders, up to `_MOST_LOOKED_AT` files."""
    visited = {root.resolve()}  # a link can lead in circles
    looked_at = 0
    for folder, folders, names in os.walk(root, followlinks=True):
        resolved = {name: (Path(folder) / name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, target in resolved.items() if target not in visited]
        visited.update(resolved.values())
        above = Path(folder).relative_to(root)
        for name in sorted(names):
            yield (above / name).as_posix()
        looked_at += len(names) + 1
        if looked_at > _MOST_LOOKED_AT:
            return


def missing_images(
    dataset: str, listed: int, missing: pa.Table, root: Path, settings: ListedSettings
) -> MissingError:
    """Make the error about images that may not be left out.

    Args:
        dataset: its name in params.yaml.
        listed: number of listed images.
        missing: rows of `Listing.table`.
        root: the folder that paths are relative to.
    """
    first = missing.slice(0, 1).to_pylist()[0]
    hint = location_hint(root, missing, settings)
    put = f"Put it at {root / first['path']}, and the others accordingly"
    drop = (
        f"set `prepare.{dataset}.drop_missing: true` in params.yaml to leave them out; they are "
        "then counted, and listed in missing.csv beside the manifest"
    )
    steps = [hint] if hint else [f"{put}."]
    if missing.num_rows < listed:
        steps.append(f"Or {drop}.")
    return MissingError(
        f"{missing.num_rows} of {listed} images that {dataset} lists "
        f"{'is' if missing.num_rows == 1 else 'are'} missing. The first is "
        f"{first['image_id']!r}, expected at {root / first['path']}.",
        " ".join(steps),
    )


def location_hint(root: Path, missing: pa.Table, settings: ListedSettings) -> str:
    """`locate_missing` for rows of `Listing.table`; empty if there is no file."""
    images = (missing.column(name).to_pylist() for name in ("image_id", "path"))
    return locate_missing(root, list(zip(*images, strict=True)), settings) or ""
