"""Label names -> the vectors w_j of the paper's label graph (equation 2).

Letters: C labels, W size of a vector.

The rule, for every source:

1. A name is taken as it *reads*: lower-cased, with `_`, `-` and runs of blanks as one space, so
   that `Traffic_Light`, `traffic-light` and `traffic light` are one name; and a name that
   `SPELLINGS` has is spelled as there, so that `diningtable` reads `dining table`.
2. Its words are what the blanks leave. GloVe has a vector a word; a name of several words has
   their plain mean. wordllama has a vector a token; a name has the plain mean of its tokens. An
   npz has a vector a name.
3. A name that lacks a vector for one of its words has none, and that is an error.

Vectors are raw, as their source has them: nothing here normalises or centres.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GmpipeError
from pipeline.files import canonical_json
from pipeline.labels.glove import archive_of, read_words

WORDLLAMA = "wordllama"
"""The source that needs no file and no network."""

SPELLINGS = {
    # VOC's classes; no vocabulary has these words.
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
    # COCO's; a hot dog is no kind of dog, and both are words of their own in GloVe.
    "hot dog": "hotdog",
    "cell phone": "cellphone",
}
"""Names, lower-cased and with single spaces, that read otherwise than they are written. All other
names of VOC, COCO and NUS-WIDE read as they are written."""

# The only weights in wordllama's wheel: 32,000 tokens of Llama 2's tokenizer, 256 numbers each.
_WORDLLAMA_CONFIG = "l2_supercat"
_WORDLLAMA_SIZE = 256


@dataclass(frozen=True, eq=False)
class LabelVectors:
    """The vectors of a vocabulary. Two are the same if their `sha256` is.

    Attributes:
        names: C label names, in the vocabulary's order and spelling.
        vectors: (C, W) float32, row j the vector of `names[j]`; finite, none of length zero.
        source: `wordllama`, or the path as it was given.
        resolution: C descriptions of what each vector was taken from: the words or tokens whose
            mean it is, with ` + ` between them, or the npz's entry. Empty where the vectors
            were not looked up.
    """

    names: tuple[str, ...]
    vectors: NDArray[np.float32]
    source: str
    resolution: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hex sha256 over names, shape and the vectors' little-endian bytes, and nothing else."""
        head = canonical_json({"names": self.names, "shape": self.vectors.shape})
        digest = hashlib.sha256(head.encode())
        digest.update(self.vectors.astype("<f4").tobytes())
        return digest.hexdigest()


def load_label_vectors(labels: Sequence[str], source: str) -> LabelVectors:
    """The vector of every label, by the rule in this module's first lines.

    Args:
        labels: C names, no two of which read the same.
        source: one of
            `wordllama`: the static token embeddings in the wheel of the package of that name
            (W = 256); no network, the same numbers in every process.
            The path of GloVe's text (`*.txt`), of a zip with one text in it (`*.zip`), or of a
            text in a zip (`data/glove/glove.6B.zip/glove.6B.300d.txt`). Words are looked up in
            lower case, which cased vocabularies have too. A word's values are rounded to float32
            first, and the mean of several is rounded once.
            The path of an npz (`*.npz`) with arrays `labels` (C' strings) and `vectors` (C', W)
            of numbers. Entries that read the same must hold the same vector; entries that no
            label asks for are not looked at further.

    Raises:
        GmpipeError: no labels, two that read the same, or one without a word; labels without a
            vector (all are named), or whose vector has length zero or is not finite; a source
            that is none of the above; a file that is missing, damaged, not of its kind, or has
            different vectors for one name or word.
    """
    if not labels:
        raise GmpipeError("there are no labels to find vectors for. Prepare the data set first.")
    seen: dict[str, str] = {}
    for label in labels:
        if not _read(label):
            raise GmpipeError(
                f"there is no vector for {label!r}: no word is left of the name. Rename the label "
                "in the data set."
            )
        if _read(label) in seen:
            raise GmpipeError(
                f"the labels {seen[_read(label)]!r} and {label!r} read the same, and would get "
                "the same vector. Rename or merge them in the data set."
            )
        seen[_read(label)] = label
    vectors, resolution = _source(source)(labels)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    useless = ~np.isfinite(lengths) | (lengths == 0)
    if useless.any():
        raise GmpipeError(
            f"{source}: vectors that are zero or not finite as float32: "
            f"{_quoted(label for label, bad in zip(labels, useless, strict=True) if bad)}. "
            "Put real vectors there, or set `label_vectors: wordllama`."
        )
    return LabelVectors(tuple(labels), vectors, source, tuple(resolution))


def source_file(source: str) -> Path | None:
    """The file that a source of `load_label_vectors` is read from; None for `wordllama`."""
    path = Path(source)
    return None if source == WORDLLAMA else archive_of(path) or path


def _read(name: str) -> str:
    """A name as it reads; see the module's first lines."""
    plain = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    return SPELLINGS.get(plain, plain)


_Found = tuple[NDArray[np.float32], list[str]]
"""(C, W) vectors, and what each was taken from."""


def _source(source: str) -> Callable[[Sequence[str]], _Found]:
    """How the labels' vectors are found."""
    if source == WORDLLAMA:
        return _from_wordllama
    path = Path(source)
    if path.suffix.lower() == ".npz":
        return partial(_from_npz, path=path)
    if path.suffix.lower() == ".txt" or any(part.lower().endswith(".zip") for part in path.parts):
        return partial(_from_glove, path=path)
    raise GmpipeError(
        f"`label_vectors: {source}` is none of: `{WORDLLAMA}`; GloVe's text (*.txt), a zip with "
        "it (*.zip), or a path through a zip (glove.6B.zip/glove.6B.300d.txt); an npz with names "
        "and vectors (*.npz). Correct it."
    )


def _from_glove(labels: Sequence[str], path: Path) -> _Found:
    """Means of the vectors of each name's words."""
    words = {label: _read(label).split() for label in labels}
    found = read_words(path, {word for several in words.values() for word in several})
    missing = [
        f"{label!r} (the word {word!r})"
        for label, several in words.items()
        for word in several
        if word not in found
    ]
    if missing:
        raise GmpipeError(
            f"{path} has no vector for these labels: {', '.join(missing)}. Rename them in the "
            "data set, give an npz as `label_vectors`, or set `label_vectors: wordllama`."
        )
    vectors = [
        np.mean([found[word] for word in several], axis=0, dtype=np.float64)
        for several in words.values()
    ]
    return np.stack(vectors).astype(np.float32), [" + ".join(words[label]) for label in labels]


def _from_wordllama(labels: Sequence[str]) -> _Found:
    """Means of the embeddings of each name's tokens."""
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
    encoded = [model.tokenizer.encode(_read(name), add_special_tokens=False) for name in labels]
    embedding: NDArray[np.float32] = model.embedding
    vectors = [embedding[tokens.ids].mean(axis=0, dtype=np.float64) for tokens in encoded]
    return np.stack(vectors).astype(np.float32), [" + ".join(one.tokens) for one in encoded]


def _from_npz(labels: Sequence[str], path: Path) -> _Found:
    """Rows of an npz file's `vectors`."""
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
        return vectors[rows].astype(np.float32), [names[row] for row in rows]


def _read_npz(path: Path) -> tuple[list[str], NDArray[np.generic]]:
    """The C' names and (C', W) numbers of an npz file."""
    form = (
        "Expected an npz with arrays `labels` (n strings) and `vectors` (n, size), as "
        "`numpy.savez(path, labels=names, vectors=vectors)` writes it."
    )
    if path.is_dir():
        raise GmpipeError(f"{path} is a folder. {form} Correct `label_vectors`.")
    if not path.exists():
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
