"""Label names -> the vectors w_j of the paper's label graph (equation 2).

Letters: C labels, W size of a vector.

Names are compared as they *read*: lower-cased, with `_`, `-` and runs of blanks as one space, so
that `Traffic_Light`, `traffic-light` and `traffic light` are one name. Vectors are raw, as their
source has them: nothing here normalises or centres.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GmpipeError
from pipeline.files import canonical_json

WORDLLAMA = "wordllama"
"""The source that needs no file and no network."""

# The only weights in wordllama's wheel: 32,000 tokens of Llama 2's tokenizer, 256 numbers each.
_WORDLLAMA_CONFIG = "l2_supercat"
_WORDLLAMA_SIZE = 256


@dataclass(frozen=True, eq=False)
class LabelVectors:
    """The vectors of a vocabulary. Two are the same if their `sha256` is.

    Attributes:
        names: C label names, in the vocabulary's order and spelling.
        vectors: (C, W) float32, row j the vector of `names[j]`; finite, none of length zero.
        source: `wordllama`, or the path of the npz file as it was given.
    """

    names: tuple[str, ...]
    vectors: NDArray[np.float32]
    source: str

    @property
    def sha256(self) -> str:
        """Hex sha256 over names, shape and the vectors' little-endian bytes, not over `source`."""
        head = canonical_json({"names": self.names, "shape": self.vectors.shape})
        digest = hashlib.sha256(head.encode())
        digest.update(self.vectors.astype("<f4").tobytes())
        return digest.hexdigest()


def load_label_vectors(labels: Sequence[str], source: str) -> LabelVectors:
    """The vector of every label, from one of two sources.

    `wordllama`: the static token embeddings in the wheel of the package of that name (W = 256).
    A label's vector is the plain mean of the embeddings of the tokens of its name as it reads;
    no network, the same numbers in every process.

    The path of an npz with arrays `labels` (C' strings) and `vectors` (C', W) of numbers: a label
    takes the entry that reads the same, be it spelled exactly like it or not. Entries that read
    the same must hold the same vector; entries that no label asks for are not looked at further.

    Args:
        labels: C names, no two of which read the same.
        source: `wordllama` or a path.

    Raises:
        GmpipeError: no labels, or two that read the same; labels without a vector (all are
            named), or whose vector has length zero or is not finite; a file that is missing, is
            not such an npz, or has different vectors for names that read the same.
    """
    if not labels:
        raise GmpipeError("there are no labels to find vectors for. Prepare the data set first.")
    seen: dict[str, str] = {}
    for label in labels:
        if _read(label) in seen:
            raise GmpipeError(
                f"the labels {seen[_read(label)]!r} and {label!r} read the same, and would get "
                "the same vector. Rename or merge them in the data set."
            )
        seen[_read(label)] = label
    vectors = _from_wordllama(labels) if source == WORDLLAMA else _from_npz(labels, Path(source))
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    useless = ~np.isfinite(lengths) | (lengths == 0)
    if useless.any():
        raise GmpipeError(
            f"{source}: vectors that are zero or not finite as float32: "
            f"{_quoted(label for label, bad in zip(labels, useless, strict=True) if bad)}. "
            "Put real vectors there, or set `label_vectors: wordllama`."
        )
    return LabelVectors(tuple(labels), vectors, source)


def _read(name: str) -> str:
    """A name as it reads; see the module's first lines."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _from_wordllama(labels: Sequence[str]) -> NDArray[np.float32]:
    """(C, 256) means of token embeddings."""
    # wordllama configures the root logger when it is imported, which would put every library's
    # INFO lines on stderr; `basicConfig` leaves a root logger alone that has a handler.
    guard = logging.NullHandler()
    logging.root.addHandler(guard)
    try:
        import wordllama
    finally:
        logging.root.removeHandler(guard)

    try:
        model = wordllama.WordLlama.load(
            config=_WORDLLAMA_CONFIG,
            dim=_WORDLLAMA_SIZE,
            # It finds the weights of its wheel without this, but not the tokenizer.
            cache_dir=Path(wordllama.__file__).parent,
            disable_download=True,
        )
    except FileNotFoundError as error:
        raise GmpipeError(
            f"the installed wordllama lacks its embeddings ({error}). Install it again "
            "(`pip install --force-reinstall wordllama`), or give an npz as `label_vectors`."
        ) from error

    # One name at a time: encoding a batch starts tokenizers' thread pool, which then warns on
    # every fork of a data loader.
    tokens = [model.tokenizer.encode(_read(name), add_special_tokens=False).ids for name in labels]
    wordless = [label for label, ids in zip(labels, tokens, strict=True) if not ids]
    if wordless:
        raise GmpipeError(
            f"wordllama has no vector for {_quoted(wordless)}: no word is left of the name. "
            "Rename the label in the data set."
        )
    embedding: NDArray[np.float32] = model.embedding
    return np.stack([embedding[ids].mean(axis=0, dtype=np.float64) for ids in tokens]).astype(
        np.float32
    )


def _from_npz(labels: Sequence[str], path: Path) -> NDArray[np.float32]:
    """(C, W) rows of an npz file's `vectors`."""
    names, vectors = _read_npz(path)
    reads: dict[str, int] = {}
    for row, name in enumerate(names):
        other = reads.setdefault(_read(name), row)
        if not np.array_equal(vectors[row], vectors[other], equal_nan=True):
            raise GmpipeError(
                f"{path}: {names[other]!r} (entry {other}) and {name!r} (entry {row}) read the "
                "same but have different vectors. Remove one of them."
            )
    missing = [label for label in labels if _read(label) not in reads]
    if missing:
        raise GmpipeError(
            f"{path} has no vector for {len(missing)} of {len(labels)} labels: {_quoted(missing)}. "
            "Add them to the file, or set `label_vectors: wordllama`."
        )
    rows = [reads[_read(label)] for label in labels]
    with np.errstate(over="ignore"):  # what overflows becomes inf, which the caller refuses
        return vectors[rows].astype(np.float32)


def _read_npz(path: Path) -> tuple[list[str], NDArray[np.generic]]:
    """The C' names and (C', W) numbers of an npz file."""
    form = (
        "Expected an npz with arrays `labels` (n strings) and `vectors` (n, size), as "
        "`numpy.savez(path, labels=names, vectors=vectors)` writes it."
    )
    if not path.is_file():
        raise GmpipeError(
            f"there is no file {path} to read label vectors from. Correct `label_vectors`, or set "
            f"it to `wordllama`, which needs no file. {form}"
        )
    if not zipfile.is_zipfile(path):
        raise GmpipeError(f"{path} is not an npz file. {form}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = {"labels", "vectors"} - set(archive.files)
            if absent:
                raise GmpipeError(f"{path} has no array {_quoted(sorted(absent))}. {form}")
            names, vectors = archive["labels"], archive["vectors"]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise GmpipeError(f"{path} can't be read ({error}). {form}") from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise GmpipeError(f"{path}: `labels` is {names.dtype} of shape {names.shape}. {form}")
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or vectors.shape[1] == 0:
        raise GmpipeError(f"{path}: `vectors` is {vectors.dtype} of shape {vectors.shape}. {form}")
    if len(names) != len(vectors):
        raise GmpipeError(f"{path}: {len(names)} labels but {len(vectors)} vectors. {form}")
    return [str(name) for name in names], vectors


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
