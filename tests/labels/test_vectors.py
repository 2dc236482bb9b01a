"""pipeline.labels.vectors: wordllama, npz files, and what every source must fulfil."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flows import ROOT
from numpy.typing import NDArray
from refusals import refused
from vector_files import write_glove, write_npz

from pipeline.datasets.scenes import VOCABULARY
from pipeline.errors import InputError, MissingError
from pipeline.labels.vectors import SPELLINGS, LabelVectors, load_label_vectors

NAMES = ["sun", "traffic light", "night"]
NO_FILE = "`label_vectors: wordllama`"
"""The setting that needs no file, which most messages offer."""


# --- wordllama -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    """(3, W): wordllama's vectors of `NAMES`."""
    return load_label_vectors(NAMES, "wordllama").vectors


def test_wordllama_takes_the_mean_of_token_embeddings() -> None:
    loaded = load_label_vectors(NAMES, "wordllama")
    assert loaded.names == tuple(NAMES)
    assert loaded.source == "wordllama"
    assert loaded.vectors.dtype == np.float32
    import wordllama  # not above: a first import of it, unguarded, sets up the root logger

    folder = Path(wordllama.__file__).parent
    model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    np.testing.assert_allclose(loaded.vectors, model.embed(NAMES), rtol=1e-5, atol=1e-6)
    assert (np.linalg.norm(loaded.vectors, axis=1) > 2).all()  # raw: nothing is normalised


def test_wordllama_splits_names_into_words(vectors: NDArray[np.float32]) -> None:
    names = ["traffic light", "trafficlight"]
    for spelling in ("Traffic_Light", "traffic-light", " traffic  light "):
        loaded = load_label_vectors([spelling, names[1]], "wordllama")
        np.testing.assert_array_equal(loaded.vectors[0], vectors[1])
        assert loaded.names == (spelling, names[1])
    assert not np.array_equal(loaded.vectors[1], vectors[1])


def test_vector_does_not_depend_on_the_other_labels(vectors: NDArray[np.float32]) -> None:
    for row, label in enumerate(NAMES):
        alone = load_label_vectors([label], "wordllama").vectors
        np.testing.assert_array_equal(alone[0], vectors[row])


def test_wordllama_is_silent_offline_and_equal_in_every_process() -> None:
    """A new process: no network, no line on stderr, the root logger unchanged, a safe fork."""
    code = f"""
import logging, os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from pipeline.labels.vectors import load_label_vectors
loaded = load_label_vectors({NAMES!r}, "wordllama")
assert not logging.root.handlers and logging.root.level == logging.WARNING
logging.getLogger("somebody").info("noise")
child = os.fork()
if child == 0:
    load_label_vectors({NAMES!r}, "wordllama")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert "torch" not in sys.modules
print(loaded.sha256)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip() == load_label_vectors(NAMES, "wordllama").sha256


def test_wordllama_is_loaded_once_in_a_process(vectors: NDArray[np.float32]) -> None:
    import wordllama

    with mock.patch.object(wordllama.WordLlama, "load", side_effect=AssertionError):
        again = load_label_vectors(NAMES, "wordllama").vectors
    np.testing.assert_array_equal(again, vectors)


def test_wordllama_describes_tokens_and_replaces_spellings() -> None:
    loaded = load_label_vectors(["Sun", "traffic light", "diningtable"], "wordllama")
    assert loaded.resolution == ("sun", "traffic + light", "d-ining + table")
    unknown = load_label_vectors(["\u72d7", "a \u72d7\u732b b"], "wordllama")
    assert unknown.resolution == ("\u72d7 (bytes)", "a + \u72d7 (bytes)-\u732b (bytes) + b")
    spelled = load_label_vectors(["sun", "traffic light", "dining table"], "wordllama")
    np.testing.assert_array_equal(loaded.vectors, spelled.vectors)


def test_no_label_of_the_demo_has_another_spelling() -> None:
    assert not set(VOCABULARY) & set(SPELLINGS)


# --- npz -----------------------------------------------------------------------------------------


def test_npz_keeps_the_order_of_labels_and_ignores_other_entries(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1.0, 2], b=[3, 4], c=[np.nan, 0])
    loaded = load_label_vectors(["b", "a"], source)
    assert loaded.names == ("b", "a")
    assert loaded.source == source
    assert loaded.vectors.dtype == np.float32
    np.testing.assert_array_equal(loaded.vectors, [[3, 4], [1, 2]])


def test_npz_entries_are_described_as_the_file_spells_them(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", Dining_Table=[1.0, 2], Sun=[3, 4])
    loaded = load_label_vectors(["sun", "diningtable"], source)
    assert loaded.resolution == ("Sun", "Dining_Table")
    np.testing.assert_array_equal(loaded.vectors, [[3, 4], [1, 2]])


@pytest.mark.parametrize("entry", ["traffic light", "Traffic_Light", "TRAFFIC-LIGHT"])
@pytest.mark.parametrize("label", ["traffic light", "Traffic_Light", "TRAFFIC-LIGHT"])
def test_npz_entries_match_in_any_spelling(tmp_path: Path, entry: str, label: str) -> None:
    source = write_npz(tmp_path / "v.npz", **{"light": [5, 6], entry: [1, 2]})
    np.testing.assert_array_equal(load_label_vectors([label], source).vectors, [[1, 2]])


def test_npz_entries_of_one_name_must_agree(tmp_path: Path) -> None:
    same = write_npz(tmp_path / "same.npz", Sun=[1, 2], sun=[1, 2])
    np.testing.assert_array_equal(load_label_vectors(["sun"], same).vectors, [[1, 2]])
    differ = write_npz(tmp_path / "differ.npz", Sun=[1, 2], sun=[1, 3])
    with refused(InputError, "differ.npz", "'Sun' (entry 0)", "'sun' (entry 1)"):
        load_label_vectors(["sun"], differ)


def test_npz_arrays_of_any_order_and_width_are_read(tmp_path: Path) -> None:
    names, vectors = np.array(["sun", "dog"]), np.arange(1.0, 7).reshape(2, 3)
    first = write_npz(tmp_path / "a.npz", sun=[1, 2, 3], dog=[4, 5, 6])
    expected = load_label_vectors(["dog", "sun"], first)
    for labels, array in (
        (names, np.asfortranarray(vectors)),
        (names, vectors.astype(">f4")),
        (names.astype(">U3"), vectors.astype(">i2")),
        (names.astype(np.bytes_), vectors.astype(np.float16)),
    ):
        np.savez_compressed(tmp_path / "b.npz", labels=labels, vectors=array)
        loaded = load_label_vectors(["dog", "sun"], str(tmp_path / "b.npz"))
        assert loaded.sha256 == expected.sha256
        assert loaded.vectors.flags.c_contiguous
        assert loaded.resolution == expected.resolution


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("label", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("stored", [COMPOSED, DECOMPOSED, f"\ufeff{DECOMPOSED}"])
def test_unicode_forms_are_one_name(tmp_path: Path, label: str, stored: str) -> None:
    expected = [[1, 2]]
    npz = write_npz(tmp_path / "v.npz", **{stored: [1, 2], "sun": [3, 4]})
    glove = write_glove(tmp_path / "g.txt", {stored: [1, 2], "sun": [3, 4]})
    for source in (npz, glove):
        np.testing.assert_array_equal(load_label_vectors([label], source).vectors, expected)
    with refused(InputError, repr(COMPOSED), repr(DECOMPOSED)):
        load_label_vectors([COMPOSED, DECOMPOSED], npz)


def test_names_that_look_alike_are_one_name(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", **{"hot\u200b dog\u200e": [1, 2], "sun": [3, 4]})
    for label in ("hot dog", "\u2060Hot\u00a0dog"):
        np.testing.assert_array_equal(load_label_vectors([label], source).vectors, [[1, 2]])


def test_the_composed_form_goes_first(tmp_path: Path) -> None:
    source = write_glove(tmp_path / "g.txt", {DECOMPOSED: [3, 4], COMPOSED: [1, 2]})
    for label in (COMPOSED, DECOMPOSED):
        np.testing.assert_array_equal(load_label_vectors([label], source).vectors, [[1, 2]])


def test_a_mark_of_byte_order_before_a_header_of_word2vec(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(b"\xef\xbb\xbf2 3\nsun 1 2 3\ndog 4 5 6\n")
    np.testing.assert_array_equal(load_label_vectors(["dog"], str(path)).vectors, [[4, 5, 6]])


def test_all_missing_labels_are_named(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1, 2])
    with refused(InputError, "v.npz", "2 of 3", "'b', 'c d'", NO_FILE):
        load_label_vectors(["b", "a", "c d"], source)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e300])
def test_zero_and_infinite_vectors_are_refused(tmp_path: Path, value: float) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1, 2], b=[value, 0])
    with refused(InputError, "v.npz", "'b'", NO_FILE):
        load_label_vectors(["a", "b"], source)


@pytest.mark.parametrize(
    ("labels", "vectors", "parts"),
    [
        (["a"], [[1.0], [2.0]], ["1 labels", "2 vectors"]),
        (["a"], [1.0], ["`vectors`", "float64", "(1,)"]),
        (["a"], np.ones((1, 0)), ["`vectors`", "float64", "(1, 0)"]),
        (["a"], [["x"]], ["`vectors`", "<U1"]),
        ([["a"]], [[1.0]], ["`labels`", "<U1", "(1, 1)"]),
        ([1], [[1.0]], ["`labels`", "int64"]),
        (
            np.array(["a"], dtype=object),
            [[1.0]],
            ["`labels`", "objects", "labels=labels.astype(str)"],
        ),
        (
            ["a"],
            np.array([[1.0]], dtype=object),
            ["`vectors`", "objects", "vectors=vectors.astype(numpy.float32)"],
        ),
    ],
)
def test_wrong_arrays_of_an_npz(
    tmp_path: Path, labels: Any, vectors: Any, parts: list[str]
) -> None:
    np.savez(tmp_path / "v.npz", labels=labels, vectors=vectors)
    with refused(InputError, "v.npz", *parts):
        load_label_vectors(["a"], str(tmp_path / "v.npz"))


def test_missing_and_damaged_npz(tmp_path: Path) -> None:
    with refused(MissingError, "glove.npz", "`wordllama`"):
        load_label_vectors(["a"], str(tmp_path / "glove.npz"))
    (tmp_path / "folder.npz").mkdir()
    with refused(InputError, "folder.npz", "folder", "`label_vectors`"):
        load_label_vectors(["a"], str(tmp_path / "folder.npz"))
    (tmp_path / "text.npz").write_text("a 1 2\n")
    with refused(InputError, "text.npz", "npz file"):
        load_label_vectors(["a"], str(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", words=["a"])
    with refused(InputError, "other.npz", "'labels', 'vectors'"):
        load_label_vectors(["a"], str(tmp_path / "other.npz"))
    good = write_npz(tmp_path / "good.npz", a=np.arange(1000.0))
    damaged = bytearray(Path(good).read_bytes())
    damaged[4000] ^= 1
    (tmp_path / "bad.npz").write_bytes(damaged)
    with refused(InputError, "bad.npz", "CRC"):
        load_label_vectors(["a"], str(tmp_path / "bad.npz"))


# --- all sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["", "_", " - "])
def test_name_without_a_word_is_refused(label: str) -> None:
    with refused(InputError, repr(label)):
        load_label_vectors(["sun", label], "wordllama")


def test_labels_with_equal_names_are_refused() -> None:
    for pair in (["sun", "sun"], ["fire truck", "Fire-Truck"], ["tvmonitor", "TV monitor"]):
        with refused(InputError, *map(repr, pair)):
            load_label_vectors(["moon", *pair], "wordllama")
    with refused(InputError, "label"):
        load_label_vectors([], "wordllama")


@pytest.mark.parametrize("source", ["glove", "", "data/glove", "g.txt.gz", "g.npy", "Wordllama"])
def test_unknown_kind_of_source_is_refused(source: str) -> None:
    parts = [f"`label_vectors: {source}`", "`wordllama`", "*.txt", "*.zip", "*.npz"]
    with refused(InputError, *parts):
        load_label_vectors(["sun"], source)


def test_sha256_covers_names_shape_and_bytes() -> None:
    def sha256(names: tuple[str, ...], vectors: NDArray[Any], *rest: Any) -> str:
        return LabelVectors(names, vectors, *(rest or ("x",))).sha256

    ones = np.ones((2, 2), dtype=np.float32)
    base = sha256(("a", "b"), ones)
    assert base == sha256(("a", "b"), np.asfortranarray(ones), "another file", ("c", "d"))
    assert base == sha256(("a", "b"), ones.astype(">f4"))
    others = {
        sha256(("b", "a"), ones),
        sha256(("a", "b"), ones.reshape(1, 4)),
        sha256(("a", "b"), np.nextafter(ones, np.float32(2))),
    }
    assert len(others | {base}) == 4


@pytest.mark.parametrize("name", ["v.npz", "glove.6B.50d.txt", "glove.6B.zip/glove.6B.50d.txt"])
def test_a_path_from_the_home_folder_is_written_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    file = name.split("/")[0]
    with refused(MissingError, f"~/{file}", f"`/home/ada/{file}`", "`label_vectors"):
        load_label_vectors(["cat"], f"~/{name}")
