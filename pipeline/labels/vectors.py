"""From label names to the vectors w_j of the paper's label graph (equation 2).

Letters: C labels, W size of a vector.

The rule, for every source:

1. A name is *normalised*: it is lower-cased, and `_`, `-` and runs of blanks become one space, so
   that `Traffic_Light`, `traffic-light` and `traffic light` are one name. So are names that look
   alike (`plain_text`). A name in `SPELLINGS` is then replaced by the spelling there, so that
   `diningtable` becomes `dining table`.
2. Its words are separated by the spaces. GloVe has one vector per word, and a name of several words
   gets their plain mean. wordllama has one vector per token, and a name gets the plain mean of its
   tokens. An npz has one vector per name.
3. A name of which a word has no vector has none itself, which is an error.

Vectors are raw, as in their source: nothing here normalises or centres them.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, MissingError
from pipeline.files import canonical_json, home_advice, read_bytes
from pipeline.formats.encodings import plain_text
from pipeline.formats.npz import decoded_texts, naming_damage, npy_array, npy_header
from pipeline.formats.text import first_few
from pipeline.labels.glove import archive_of, read_words

WORDLLAMA = "wordllama"
"""The source that needs neither a file nor the network."""

SPELLINGS = {
    # VOC's classes; no vocabulary has these words.
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
    # COCO's; a hot dog is not a kind of dog, and both are words of their own in GloVe.
    "hot dog": "hotdog",
    "cell phone": "cellphone",
}
"""Names, lower-cased and with single spaces, whose words are spelled differently. All other names
of VOC, COCO and NUS-WIDE are made of the words that they are written with."""

# The only weights in wordllama's wheel: 32,000 tokens of Llama 2's tokenizer, 256 numbers each.
_WORDLLAMA_CONFIG = "l2_supercat"
_WORDLLAMA_SIZE = 256
_WORD = "\u2581"  # SentencePiece's mark of a blank, before the first token of a word


@dataclass(frozen=True, eq=False)
class LabelVectors:
    """The vectors of a vocabulary. Two objects are equal if their `sha256` are.

    Attributes:
        names: C label names, in the order and spelling of the vocabulary.
        vectors: (C, W) float32, row j the vector of `names[j]`; finite, and none of length zero.
        source: `wordllama`, or the path as it was given.
        resolution: C descriptions of what each vector was made from: the words of the mean, with
            ` + ` between them (and `-` between the tokens of a word that has several), or the name
            of the npz's entry. Empty if the vectors were not looked up.
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
    """Look up the vector of every label, by the rule in the module's docstring.

    Args:
        labels: C names, no two of which are equal after normalisation.
        source: one of
            `wordllama`: the static token embeddings in the wheel of the package with that name
            (W = 256); without network, and equal in every process.
            The path of GloVe's text (`*.txt`), of a zip with one text in it (`*.zip`), or of a
            text in a zip (`data/glove/glove.6B.zip/glove.6B.300d.txt`). Words are looked up in
            lower case, which cased vocabularies have, too. The values of a word are rounded to
            float32 first, and the mean of several words is rounded once.
            The path of an npz (`*.npz`) with the arrays `labels` (C' strings) and `vectors`
            (C', W) of numbers. Entries of one name must have the same vector. Entries that no label
            needs are not checked further.

    Raises:
        MissingError: the file, or wordllama's embeddings, do not exist.
        InputError: there are no labels, two have the same name, or one has no word; labels have no
            vector (all are named), or one of length zero or not finite; the source is none of the
            above; or the file is damaged, of another kind, or has different vectors for one name or
            word.
    """
    if not labels:
        raise InputError("There are no labels to look up vectors for.", "Give at least one label.")
    check_label_names(labels)
    vectors, resolution = _lookup(source)(labels)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    invalid = ~np.isfinite(lengths) | (lengths == 0)
    if invalid.any():
        raise InputError(
            f"{source} has vectors that are zero or not finite in float32, for these labels: "
            f"{_quoted(label for label, bad in zip(labels, invalid, strict=True) if bad)}.",
            "Put other vectors there, or set `label_vectors: wordllama`.",
        )
    return LabelVectors(tuple(labels), vectors, source, tuple(resolution))


def check_label_names(labels: Sequence[str]) -> None:
    """Check that each label can have a vector of its own, whatever its source.

    Raises:
        InputError: two labels have the same name, one has no word, or one has half a character.
    """
    names: dict[str, str] = {}
    for label in labels:
        name = normalised(label)
        if label != label.encode(errors="replace").decode():
            raise InputError(
                f"The label {label!r} has a lone surrogate, which is half a character.",
                "Rename the label in the data set.",
            )
        if not name:
            raise InputError(
                f"The label {label!r} gets no vector: its name has no word.",
                "Rename the label in the data set.",
            )
        if name in names:
            raise InputError(
                f"The labels {names[name]!r} and {label!r} are the same name, up to case, Unicode "
                "form, `_`, `-` and blanks, and would get the same vector.",
                "Rename or merge them in the data set.",
            )
        names[name] = label


def source_file(source: str) -> Path | None:
    """The file from which `load_label_vectors` reads a source; None for `wordllama`."""
    path = Path(source)
    return None if source == WORDLLAMA else archive_of(path) or path


def normalised(name: str) -> str:
    """A name by step 1 of the rule in the module's docstring: equal ones are one label."""
    lower = plain_text(name.lower())
    plain = " ".join(lower.replace("_", " ").replace("-", " ").split())
    return SPELLINGS.get(plain, plain)


_Vectors = tuple[NDArray[np.float32], list[str]]
"""(C, W) vectors, and `LabelVectors.resolution`."""


def _lookup(source: str) -> Callable[[Sequence[str]], _Vectors]:
    """The function that looks labels up in a source."""
    if source == WORDLLAMA:
        return _from_wordllama
    if "\0" in source:
        raise InputError(f"`label_vectors: {source!r}` has a null byte.", "Change the setting.")
    path = Path(source)
    if path.suffix.lower() == ".npz":
        return partial(_from_npz, path=path)
    if path.suffix.lower() == ".txt" or any(part.lower().endswith(".zip") for part in path.parts):
        return partial(_from_glove, path=path)
    raise InputError(
        f"`label_vectors: {source}`: unknown kind of source. Expected `{WORDLLAMA}`; GloVe's text "
        "(*.txt), a zip with it (*.zip), or a path through a zip "
        "(glove.6B.zip/glove.6B.300d.txt); or an npz with names and vectors (*.npz).",
        "Change the setting.",
    )


def _from_glove(labels: Sequence[str], path: Path) -> _Vectors:
    """Means of the vectors of each name's words."""
    words = {label: normalised(label).split() for label in labels}
    known = read_words(path, {word for several in words.values() for word in several})
    missing = [
        f"{label[:100]!r} (the word {word[:100]!r})"
        for label, several in words.items()
        for word in several
        if word not in known
    ]
    if missing:
        raise InputError(
            f"{path} has no vector for these labels: {first_few(missing, most=_MOST_NAMED)}.",
            "Rename them in the data set, set `label_vectors` to an npz, or set "
            "`label_vectors: wordllama`.",
        )
    vectors = [
        np.mean([known[word] for word in several], axis=0, dtype=np.float64)
        for several in words.values()
    ]
    return np.stack(vectors).astype(np.float32), [" + ".join(words[label]) for label in labels]


@cache
def _wordllama() -> Any:
    """Load wordllama's embeddings and tokenizer, once for all runs that a process makes."""
    # wordllama configures the root logger when it is imported, and then the INFO lines of every
    # library would appear on stderr. `basicConfig` does nothing if the root logger has a handler.
    guard = logging.NullHandler()
    logging.root.addHandler(guard)
    try:
        import wordllama
    finally:
        logging.root.removeHandler(guard)

    try:
        return wordllama.WordLlama.load(
            config=_WORDLLAMA_CONFIG,
            dim=_WORDLLAMA_SIZE,
            # Without this it finds the weights in its wheel, but not the tokenizer.
            cache_dir=Path(wordllama.__file__).parent,
            disable_download=True,
        )
    except FileNotFoundError as error:
        raise MissingError(
            f"The installed package wordllama lacks its embeddings ({error}).",
            "Install it again (`pip install --force-reinstall wordllama`), or set `label_vectors` "
            "to an npz.",
        ) from error


def _from_wordllama(labels: Sequence[str]) -> _Vectors:
    """Means of the embeddings of each name's tokens."""
    model = _wordllama()
    # One name at a time: encoding a batch starts a thread pool of tokenizers, which then warns at
    # every fork of a data loader.
    encoded = [
        model.tokenizer.encode(normalised(name), add_special_tokens=False) for name in labels
    ]
    embedding: NDArray[np.float32] = model.embedding
    vectors = [embedding[tokens.ids].mean(axis=0, dtype=np.float64) for tokens in encoded]
    return np.stack(vectors).astype(np.float32), [_words_of(name.tokens) for name in encoded]


def _words_of(tokens: Sequence[str]) -> str:
    """Join tokens of Llama's tokenizer, which marks the beginning of a word: `d-ining + table`.

    A letter that it does not know is the tokens of its bytes, such as `<0xE7>`.
    """
    pieces = "-".join(tokens).replace(f"{_WORD}-", _WORD).removeprefix(_WORD)
    pieces = pieces.replace(f"-{_WORD}", " + ")
    return re.sub("(?:<0x[0-9A-F]{2}>-?)+", _letters, pieces)


def _letters(found: re.Match[str]) -> str:
    """The letters that tokens of bytes spell, each as one piece."""
    content = bytes.fromhex("".join(re.findall("0x(..)", found[0])))
    after = "-" if found[0].endswith("-") else ""
    return "-".join(f"{letter} (bytes)" for letter in content.decode(errors="replace")) + after


def _from_npz(labels: Sequence[str], path: Path) -> _Vectors:
    """Rows of the array `vectors` of an npz file."""
    names, vectors = _read_npz(path)
    entries: dict[str, int] = {}
    for row, name in enumerate(names):
        first = entries.setdefault(normalised(name), row)
        if not np.array_equal(vectors[row], vectors[first], equal_nan=True):
            raise InputError(
                f"{path}: {names[first]!r} (entry {first}) and {name!r} (entry {row}) are the same "
                "name but have different vectors.",
                "Remove one of them.",
            )
    missing = [label for label in labels if normalised(label) not in entries]
    if missing:
        raise InputError(
            f"{path} has no vector for {len(missing)} of {len(labels)} labels: {_quoted(missing)}.",
            "Add them to the file, or set `label_vectors: wordllama`.",
        )
    rows = [entries[normalised(label)] for label in labels]
    with np.errstate(over="ignore"):  # an overflow becomes inf, which the caller refuses
        return vectors[rows].astype(np.float32, order="C"), [names[row] for row in rows]


def _read_npz(path: Path) -> tuple[list[str], NDArray[np.generic]]:
    """The C' names and the (C', W) numbers of an npz file."""
    form = (
        "Expected an npz with the arrays `labels` (n strings) and `vectors` (n, size), as "
        "`numpy.savez(path, labels=names, vectors=vectors)` writes it."
    )
    try:
        stored = io.BytesIO(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(
            f"There is no file {path} to read label vectors from. {form}",
            f"{home_advice(path)}Change `label_vectors`, or set it to `wordllama`, which needs no "
            "file.",
        ) from None
    except InputError as error:
        raise InputError(f"{error.problem} {form}", "Change `label_vectors`.") from None
    if not zipfile.is_zipfile(stored):
        raise InputError(f"{path} is not an npz file.", form)
    with naming_damage(path, form), zipfile.ZipFile(stored) as archive:
        absent = [name for name in ("labels", "vectors") if f"{name}.npy" not in archive.namelist()]
        if absent:
            raise InputError(f"{path} has no array {_quoted(absent)}.", form)
        arrays = {}
        for name in ("labels", "vectors"):
            header, size = npy_header(archive, name), archive.getinfo(f"{name}.npy").file_size
            if header.dtype.hasobject:
                cast = "str" if name == "labels" else "numpy.float32"
                raise InputError(
                    f"{path}: `{name}` is an array of objects, which would have to be unpickled; "
                    "that can run code of the file.",
                    f"Save it as `numpy.savez(path, ..., {name}={name}.astype({cast}))`.",
                )
            if size != header.size:
                raise InputError(
                    f"{path}: `{name}` is {header.dtype} of shape {header.shape} in {size} bytes.",
                    form,
                )
            arrays[name] = npy_array(archive, name)
    names, vectors = arrays["labels"], arrays["vectors"]
    if names.ndim != 1 or names.dtype.kind not in "US" or names.dtype.itemsize == 0:
        raise InputError(f"{path}: `labels` is {names.dtype} of shape {names.shape}.", form)
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or vectors.shape[1] == 0:
        raise InputError(f"{path}: `vectors` is {vectors.dtype} of shape {vectors.shape}.", form)
    if len(names) != len(vectors):
        raise InputError(f"{path} has {len(names)} labels but {len(vectors)} vectors.", form)
    try:
        return decoded_texts(names), vectors
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: `labels` is not Unicode ({error}).", form) from error


_MOST_NAMED = 20


def _quoted(names: Iterable[str]) -> str:
    return first_few([repr(name[:100]) for name in names], most=_MOST_NAMED)
