"""What lies there where listed images are missing, and what to do about them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pipeline.formats.text import composed
from pipeline.images import UNSUPPORTED, suffixes
from pipeline.settings import ListedSettings, NuswideSettings, TableSettings

_MOST_LOOKED_AT = 200_000
"""Files among which a missing image is searched: more would take minutes on a network disk."""


@dataclass(frozen=True)
class _Difference:
    """How a missing image and what lies there differ, and what to change.

    Attributes:
        images: the value of the setting `images` that the remedy names, if it names one.
    """

    how: str
    remedy: str
    images: str | None = None


def locate_missing(
    root: Path, missing: Sequence[tuple[str, str]], settings: ListedSettings
) -> str | None:
    """Search for files that resemble missing images: in name, apart from case, suffix and folder.

    A missing image may also be a link that leads nowhere, or have a name that a tool changed.

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
    nowhere: list[str] = []
    for image_id, path in missing:
        found = similar.to(path)
        if os.path.lexists(root / path):
            kinds[_NO_REGULAR_FILE] += 1
            examples.setdefault(_NO_REGULAR_FILE, ("", path))
        elif found is None:
            nowhere.append(path)
        else:
            difference = _difference(root, image_id, path, found, settings)
            kinds[difference] += 1
            examples.setdefault(difference, (found, path))
    kinds, examples = _one_folder(root, kinds, examples, settings)
    sentences = []
    for difference, number in kinds.most_common(2):
        found, path = examples[difference]
        if difference == _NO_REGULAR_FILE:
            sentences.append(_not_regular(root / path, number))
            continue
        sentences.append(
            f"{_share(number, len(missing))} there {difference.how}: there is a file "
            f"{root / found}, but {path!r} is listed. {difference.remedy}"
        )
    if sentences and nowhere:
        more = f" and {len(nowhere) - 1} more have" if len(nowhere) > 1 else " has"
        sentences.append(f"{nowhere[0]!r}{more} no similar file.")
    return " ".join(sentences) or None


_NO_REGULAR_FILE = _Difference("", "")


def _not_regular(path: Path, number: int) -> str:
    """What there is instead of a regular file, and what to do."""
    if path.is_symlink() and not path.exists():
        what = f"a link to {os.readlink(path)}, which does not exist"  # noqa: PTH115
        remedy = "Fetch the files that the links lead to (as `dvc pull` or `git annex get` do)."
    elif path.is_dir():
        what, remedy = "a folder", "Put the photograph there."
    else:
        what, remedy = "not a regular file", "Put a copy of the photograph there."
    more = f", and {number - 1} more are no regular files either" if number > 1 else ""
    return f"{path} is {what}{more}. {remedy}"


def _one_folder(
    root: Path,
    kinds: Counter[_Difference],
    examples: dict[_Difference, tuple[str, str]],
    settings: ListedSettings,
) -> tuple[Counter[_Difference], dict[_Difference, tuple[str, str]]]:
    """The same, but with one remedy for images in several folders: `images` can name only one.

    The folder that it names now counts if it has photographs.
    """
    elsewhere = [kind for kind in kinds if kind.images is not None]
    if not elsewhere or not isinstance(settings, TableSettings | NuswideSettings):
        return kinds, examples
    now = root / settings.images
    used = now.is_dir() and any(_suffix(name) for name in os.listdir(now))  # noqa: PTH208
    if len(elsewhere) + used < 2:
        return kinds, examples
    found, path = examples[elsewhere[0]]
    several = _Difference(
        "in several folders",
        f"Write the folder of each in the list, such as {found!r} instead of "
        f"{path.rpartition('/')[2]!r}, with `images: .` in params.yaml.",
    )
    merged = Counter({kind: number for kind, number in kinds.items() if kind not in elsewhere})
    merged[several] = sum(kinds[kind] for kind in elsewhere)
    return merged, {**examples, several: (found, path)}


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
    if found.endswith(_PLACEHOLDER):
        return _Difference(
            "as placeholders of iCloud", "Download the photographs in the Finder first."
        )
    if not _same_name(found, path):
        return _Difference(
            "under a name that a tool changed",
            "Correct the names in the list, or rename the files.",
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
            "in another folder",
            f"Set `prepare.{root.name}.images: {images}` in params.yaml.",
            images,
        )
    if not where:
        return _Difference(
            "with other upper and lower case, and with a suffix", "Correct the paths in the list."
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
    return composed(path if whole else path.rpartition("/")[2]).casefold()


_PLACEHOLDER = ".icloud"


def _same_name(found: str, path: str) -> bool:
    """Whether two names are equal apart from case and suffix."""
    return not {_key(found), _key(_stem(found))}.isdisjoint({_key(path), _key(_stem(path))})


def _loose(path: str) -> str:
    """The last name of a path without suffix, without what tools change in names.

    These are: the form of blanks, `%20`, blanks at the ends, zeros at the beginning, and the eight
    digits that Label Studio writes before a name.
    """
    name = unquote(path.rpartition("/")[2])
    if name.endswith(_PLACEHOLDER):  # .IMG_0001.jpg.icloud
        name = name.removesuffix(_PLACEHOLDER).removeprefix(".")
    stem = re.sub(r"\s+", " ", _stem(name.strip())).strip()
    stem = re.sub(r"^[0-9a-f]{8}-(?=.)", "", stem)
    return composed(re.sub(r"^0+(?=[0-9]+$)", "", stem)).casefold()


class _Similar:
    """The files that have the name of a missing image, apart from case, suffix and folder."""

    def __init__(self, root: Path, missing: Sequence[str]) -> None:
        wanted = {_key(name) for path in missing for name in (path, _stem(path))}
        loosely = {_loose(path) for path in missing}
        self._anywhere: dict[str, str] = {}  # name -> file
        self._in_folder: dict[tuple[str, str], str] = {}  # folder and name -> file
        self._loosely: dict[str, list[str]] = {}  # name without what tools change -> files
        for found in _files_below(root) if wanted else ():
            for name in dict.fromkeys([_key(found), _key(_stem(found))]):
                if name in wanted and (root / found).is_file():
                    self._anywhere.setdefault(name, found)
                    self._in_folder.setdefault((_folder(found), name), found)
            photograph = _suffix(found) or found.endswith(_PLACEHOLDER)
            if photograph and _loose(found) in loosely and (root / found).is_file():
                self._loosely.setdefault(_loose(found), []).append(found)

    def to(self, path: str) -> str | None:
        """The file that is most like a missing one: of the same name, then in the same folder."""
        for name in (_key(path), _key(_stem(path))):
            found = self._in_folder.get((_folder(path), name)) or self._anywhere.get(name)
            if found is not None:
                return found
        alike = self._loosely.get(_loose(path), ())
        return alike[0] if len(alike) == 1 and _loose(path) else None


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


def missing_remedy(
    dataset: str,
    root: Path,
    missing: Sequence[tuple[str, str]],
    settings: ListedSettings,
    empty: str | None,
) -> str:
    """What to do about images that may not be left out, in whole sentences.

    Args:
        dataset: its name in params.yaml.
        root: the folder that paths are relative to.
        missing: image id and path of each missing image, in order.
        settings: of the data set.
        empty: a split that has no image without them, if there is one.
    """
    image_id, path = missing[0]
    more = f", and {len(missing) - 1} more at their paths" if len(missing) > 1 else ""
    put = f"Put {image_id!r} at {root / path}{more}."
    hint = locate_missing(root, missing, settings)
    if empty is None:
        drop = (
            f"Or set `prepare.{dataset}.drop_missing: true` in params.yaml to leave out what is "
            "missing: it is then counted, and listed in missing.csv beside the manifest."
        )
    else:
        drop = f"Without the missing images, the split {empty!r} has none."
    return f"{hint or put} {drop}"
