"""Files of label vectors that are damaged, or made to do damage: errors that name the file."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from vector_files import SMALL, write_glove, write_npz

from pipeline.errors import InputError
from pipeline.labels.vectors import load_label_vectors


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def with_header(text: str, data: bytes = bytes(48), version: tuple[int, int] = (1, 0)) -> bytes:
    """A member whose header is any text."""
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text.encode() + data


def declared(descr: str, shape: str) -> bytes:
    return with_header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n")


NAMES, VECTORS = npy(np.array(["sun", "dog"])), npy(np.arange(1.0, 7).reshape(2, 3))
ODD = {
    "terabytes": declared("<f8", "(2, 1000000000000)"),
    "more than 64 bits": declared("<f8", "(1000000000000000000, 1000000000000000000)"),
    "negative": declared("<f8", "(-2, -3)"),
    "truth": declared("<f8", "(True, 6)"),
    "text": declared("<U1000000000", "(2,)"),
    "no type": declared("x", "(2, 3)"),
    "no header": b"not npy",
    "nothing": b"",
    "open brace": with_header("{\n"),
    "deep": with_header("[" * 5000 + "\n"),
    "parentheses": with_header("(" * 150 + ")" * 150 + "\n"),
    "digits": with_header("9" * 5000 + "\n"),
    "code": with_header("__import__('os').abort()\n"),
    "version": with_header("{}\n", version=(9, 9)),
    "too long": VECTORS + b"x",
    "too short": VECTORS[:-1],
}


@pytest.mark.parametrize("member", ["labels", "vectors"])
@pytest.mark.parametrize("name", ODD)
def test_odd_members(tmp_path: Path, name: str, member: str) -> None:
    path = tmp_path / "v.npz"
    members = {"labels": NAMES, "vectors": VECTORS, member: ODD[name]}
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)
    with refused(InputError, str(path)):
        load_label_vectors(["sun"], str(path))


def test_codes_that_are_no_characters(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    names = np.frombuffer(b"\xff" * 24, "<U3")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", npy(names))
        archive.writestr("vectors.npy", VECTORS)
    with refused(InputError, str(path), "`labels`", "Unicode"):
        load_label_vectors(["sun"], str(path))


def test_a_header_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    data = np.arange(1.0, 7).tobytes()
    old = with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 3L)}\n", data)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", NAMES)
        archive.writestr("vectors.npy", old)
    assert load_label_vectors(["dog"], str(path)).vectors.tolist() == [[4, 5, 6]]


def test_messages_name_some_of_many_labels(tmp_path: Path) -> None:
    labels = [f"label{number}" for number in range(20_000)]
    npz = write_npz(tmp_path / "v.npz", sun=[1.0, 2], dog=[3.0, 4])
    glove = write_glove(tmp_path / "g.txt", SMALL)
    for source in (npz, glove):
        with pytest.raises(InputError, match=r"'label0'.*'label19'.*19980 more") as caught:
            load_label_vectors(labels, source)
        assert len(str(caught.value)) < 3000
    path = tmp_path / "zero.npz"
    np.savez(path, labels=np.array(labels), vectors=np.zeros((len(labels), 2)))
    with pytest.raises(InputError, match=r"'label0'.*19980 more"):
        load_label_vectors(labels, str(path))
    with zipfile.ZipFile(tmp_path / "g.zip", "w") as archive:
        for number in range(1000):
            archive.writestr(f"{number}.txt", "x")
    with pytest.raises(InputError, match=r"1000 text.*/0\.txt") as caught:
        load_label_vectors(["sun"], str(tmp_path / "g.zip"))
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("source", ["wordllama", "v.npz", "g.txt"])
def test_half_a_character_in_a_label(source: str) -> None:
    with refused(InputError, "surrogate", r"\ud800"):
        load_label_vectors(["sun", "\ud800"], source)


def test_a_first_line_of_many_digits(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(b"9" * 5000 + b" " + b"9" * 5000 + b"\n")
    with refused(InputError, str(path)):
        load_label_vectors(["sun"], str(path))
