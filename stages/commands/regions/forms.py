"""The forms in which `import-regions` reads regions, and how a file shows its form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.shards.imports import (
    IDS,
    BottomUpFiles,
    ImageRegions,
    Line,
    NpyFolder,
    NpzFile,
    NpzFolder,
    ParquetFiles,
)
from pipeline.shards.imports.image_regions import OnBytes

Form = Literal["npz", "bottom-up", "parquet", "npz-folder", "npy-folder"]
FORMS: tuple[Form, ...] = get_args(Form)

_SUFFIXES: dict[str, Form] = {".npz": "npz", ".tsv": "bottom-up", ".parquet": "parquet"}
_ONE_ONLY = ("npz", "npy-folder")


class ListedSource(Protocol):
    """Regions without labels, whose N images are matched to a manifest; see `BottomUpFiles`."""

    @property
    def sha256(self) -> str: ...

    @property
    def whole_sha256(self) -> str | None: ...

    @property
    def lines(self) -> Sequence[Line]: ...

    @property
    def counts(self) -> npt.NDArray[np.int64]: ...

    @property
    def feature_size(self) -> int: ...

    def read(self, images: npt.NDArray[np.int64]) -> Iterator[ImageRegions]: ...


Source = NpzFile | ListedSource


def form_of(files: Sequence[Path], form: Form | None) -> Form:
    """The form of files: ``form``, or else the one that all of them show.

    Raises:
        InputError: they show none, or several; or only one of this form can be imported.
    """
    forms = {form or _shown(path) for path in files}
    if len(forms) != 1 or None in forms:
        names = ", ".join(map(str, files))
        raise InputError(
            f"{names}: expected files that end in .npz, or all in .tsv or .parquet, or folders.",
            f"Name files of one form, or say which it is: {', '.join(map(_option, FORMS))}.",
        )
    (chosen,) = forms
    assert chosen is not None
    if chosen in _ONE_ONLY and len(files) != 1:
        raise InputError(
            f"found {len(files)} of the form {chosen}; expected one, since it holds the whole data "
            "set.",
            "Name one. If each file is of one image, name their folder.",
        )
    return chosen


def _option(form: Form) -> str:
    return f"`--form {form}`"


def _shown(path: Path) -> Form | None:
    """The form that a folder shows by its files, and a file by its suffix."""
    if path.is_dir():
        return "npy-folder" if (path / IDS).exists() else "npz-folder"
    return _SUFFIXES.get(path.suffix.lower())


def open_source(files: Sequence[Path], form: Form, on_bytes: OnBytes, *, whole: bool) -> Source:
    """Read files through.

    Args:
        files: as `form_of` accepts them.
        form: of them.
        on_bytes: called with the progress.
        whole: whether to read the features of whole images if they are there.

    Raises:
        InputError: a file is missing, damaged, or of another form.
    """
    if form == "npz":
        return NpzFile.open(files[0], on_bytes, whole=whole)
    if form == "bottom-up":
        return BottomUpFiles.open(files, on_bytes)
    if form == "parquet":
        return ParquetFiles.open(files, on_bytes, whole=whole)
    if form == "npz-folder":
        return NpzFolder.open(files, on_bytes)
    return NpyFolder.open(files[0], on_bytes, whole=whole)
