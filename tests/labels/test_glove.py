"""pipeline.labels.glove: vectors from GloVe's text, from zips of it, and damage to either."""

from __future__ import annotations

import random
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from refusals import refused
from vector_files import SMALL, glove_line, write_glove, zip_glove

from pipeline.errors import GmpipeError, InputError, MissingError
from pipeline.labels.vectors import load_label_vectors

NO_FILE = "`label_vectors: wordllama`"


def parse_all(text: bytes, size: int) -> dict[str, NDArray[np.float32]]:
    """An oracle: parse every line of a valid text in memory, split from the right."""
    rows = [line.rsplit(" ", size) for line in text.decode().split("\n") if line.count(" ") > 1]
    return {word: np.array(values, dtype=np.float64).astype(np.float32) for word, *values in rows}


# --- words and files -----------------------------------------------------------------------------


def test_vector_of_a_name_is_the_mean_of_its_words(tmp_path: Path) -> None:
    source = write_glove(tmp_path / "g.txt", SMALL)
    loaded = load_label_vectors(["Traffic_Light", "sun"], source)
    assert loaded.names == ("Traffic_Light", "sun")
    assert loaded.source == source
    assert loaded.resolution == ("traffic + light", "sun")
    assert loaded.vectors.dtype == np.float32
    np.testing.assert_array_equal(loaded.vectors, np.float32([[5, 5, 1], [1, -2, 3e-5]]))


def test_text_zip_and_path_through_a_zip(tmp_path: Path) -> None:
    source = write_glove(tmp_path / "g.TXT", SMALL)
    text = Path(source).read_bytes()
    expected = load_label_vectors(["sun", "light"], source)
    other = b"sun 7 7\nlight 8 8\n"
    (tmp_path / "folder.zip").mkdir()
    sources = [
        zip_glove(tmp_path / "one.ZIP", {"g.txt": text, "readme.md": b"x"}),
        zip_glove(tmp_path / "stored.zip", {"a/g.txt": text}, zipfile.ZIP_STORED),
        zip_glove(tmp_path / "two.zip", {"g.2.txt": other, "g.3.txt": text}) + "/g.3.txt",
        zip_glove(tmp_path / "deep.zip", {"a/g.txt": text, "g.txt": other}) + "/a/g.txt",
        zip_glove(tmp_path / "dot.zip", {"./g.txt": text, "h.txt": other}) + "/g.txt",
        write_glove(tmp_path / "folder.zip" / "g.txt", SMALL),
    ]
    for source in sources:
        loaded = load_label_vectors(["sun", "light"], source)
        assert (loaded.sha256, loaded.resolution) == (expected.sha256, expected.resolution)
        assert loaded.source == source


WORDS = st.text("abcé.'", min_size=1, max_size=3)
NUMBERS = st.floats(-9, 9, width=32).filter(lambda value: abs(value) > 1e-3)


@given(
    vocabulary=st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=3, max_size=20),
    header=st.booleans(),
    end=st.sampled_from([b"\n", b" \n", b"\r\n"]),
    data=st.data(),
)
@hypothesis_settings(max_examples=40)
def test_vectors_equal_those_of_a_complete_parse(
    tmp_path_factory: pytest.TempPathFactory,
    vocabulary: list[list[str]],
    header: bool,
    end: bytes,
    data: st.DataObject,
) -> None:
    """Words of any script, some with blanks, which must not be taken for their first part."""
    entries = list(dict.fromkeys(" ".join(words) for words in vocabulary))
    lines = [
        glove_line(entry, data.draw(st.lists(NUMBERS, min_size=4, max_size=4)))
        for entry in [*entries, "plain"]
    ]
    # Most lines have a word without blanks, as in every GloVe file.
    lines += [glove_line(f"w{number}", [1, 2, 3, 4]) for number in range(len(lines))]
    parsed = parse_all(b"".join(lines), 4)
    text = b"".join(lines).replace(b"\n", end)
    if header:
        text = f"{len(lines)} 4".encode() + end + text
    path = tmp_path_factory.mktemp("glove") / "g.txt"
    path.write_bytes(text)
    plain = [entry for entry in entries if " " not in entry] + ["plain", "w0"]
    several = data.draw(st.lists(st.sampled_from(plain), min_size=2, max_size=3))
    labels = [*plain, " ".join(several)]
    loaded = load_label_vectors(labels, str(path))
    for label, vector, words in zip(labels, loaded.vectors, loaded.resolution, strict=True):
        expected = np.mean([parsed[word] for word in label.split()], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(vector, expected.astype(np.float32))
        assert words == " + ".join(label.split())


def test_word_with_blanks_is_not_its_first_word(tmp_path: Path) -> None:
    """As `. . .` and `at name@domain.com` in glove.840B, before and after the word itself."""
    entries = [
        ("at name@domain.com", [7, 7]),
        (". . .", [8, 8]),
        ("at", [1, 2]),
        (".", [3, 4]),
        ("at name@domain.com", [9, 9]),
        ("dining table", [9, 9]),
        ("dining", [1, 1]),
        ("table", [2, 3]),
    ]
    (tmp_path / "g.txt").write_bytes(b"".join(glove_line(*entry) for entry in entries))
    loaded = load_label_vectors(["at", ".", "dining table"], str(tmp_path / "g.txt"))
    np.testing.assert_array_equal(loaded.vectors, [[1, 2], [3, 4], [1.5, 2]])
    (tmp_path / "g.txt").write_bytes(b". . . 8 8\nat 1 2\n")  # as many lines of either length
    np.testing.assert_array_equal(
        load_label_vectors(["at"], str(tmp_path / "g.txt")).vectors, [[1, 2]]
    )


def test_header_of_word2vec_is_not_a_word(tmp_path: Path) -> None:
    lines = {"2": [5, 6, 7], "sun": [1, 2, 3]}
    source = write_glove(tmp_path / "g.txt", lines)
    Path(source).write_bytes(b"2 3\n" + Path(source).read_bytes())
    np.testing.assert_array_equal(
        load_label_vectors(["sun", "2"], source).vectors, [[1, 2, 3], [5, 6, 7]]
    )
    Path(source).write_bytes(b"2 300\n" + Path(source).read_bytes()[4:])
    with refused(InputError, "g.txt", "300", "3"):
        load_label_vectors(["sun"], source)


def test_repeated_word_must_have_one_vector(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(b"sun 1 2\nmoon 3 4\nsun 1 2\nmoon 3 5\nstar 1 1\n")
    np.testing.assert_array_equal(load_label_vectors(["sun"], str(path)).vectors, [[1, 2]])
    with refused(InputError, "g.txt", "'moon'", "line 2", "line 4"):
        load_label_vectors(["sun", "moon"], str(path))


def test_invalid_utf8_in_other_lines_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(
        b"\xff\xfe 1 2\nsun\xa0 3 4\n\x85 5 6\n\xc2\xa0 1 1\n" + "café 7 8\nsun 9 9\n".encode()
    )
    loaded = load_label_vectors(["Café", "sun"], str(path))
    np.testing.assert_array_equal(loaded.vectors, [[7, 8], [9, 9]])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    line = glove_line("", np.linspace(0.1, 1, 300))
    with path.open("wb") as stream:
        for number in range(6000):
            stream.write(b"w%d" % number + line)
    assert path.stat().st_size > 12e6
    for source in (str(path), zip_glove(tmp_path / "g.zip", {"g.txt": path.read_bytes()})):
        tracemalloc.start()
        load_label_vectors(["w0", "w5999"], source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6


# --- missing words and damaged lines -------------------------------------------------------------


def test_all_missing_words_are_named_with_their_labels(tmp_path: Path) -> None:
    source = write_glove(tmp_path / "g.txt", SMALL)
    parts = ["'Moon' (the word 'moon')", "'sun light box' (the word 'box')", NO_FILE]
    with refused(InputError, "g.txt", *parts):
        load_label_vectors(["Moon", "traffic light", "sun light box"], source)
    with refused(InputError, "'tvmonitor' (the word 'tv')", "'tvmonitor' (the word 'monitor')"):
        load_label_vectors(["tvmonitor"], source)


def test_last_line_without_a_line_end_is_not_used(tmp_path: Path) -> None:
    """Wherever a text is cut: the right vectors, or an error that says where it ends."""
    text = Path(write_glove(tmp_path / "g.txt", SMALL)).read_bytes()
    expected = load_label_vectors(["light", "sun"], str(tmp_path / "g.txt"))
    start = text.index(b"light")
    for size in range(start, len(text)):
        (tmp_path / "cut.txt").write_bytes(text[:size])
        np.testing.assert_array_equal(
            load_label_vectors(["sun"], str(tmp_path / "cut.txt")).vectors, expected.vectors[1:]
        )
        parts = ["'light' (the word 'light')"] if size == start else ["line 4", "'light'"]
        with refused(InputError, "cut.txt", *parts):
            load_label_vectors(["light", "sun"], str(tmp_path / "cut.txt"))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"sun 1 2", ["line 3", "'sun'", "2 values", "expected 3"]),
        (b"sun", ["line 3", "'sun'", "0 values", "expected 3"]),
        (b"sun 1 2 x", ["line 3", "'sun'", "b'x'"]),
        (b"sun 1  2", ["line 3", "'sun'", "b''"]),
        (b"sun 1 2 nan", ["'sun'", "finite"]),
        (b"sun 1 2 1e39", ["'sun'", "finite"]),
        (b"sun 0 0 0", ["'sun'", "zero"]),
        (b"sun 1 2 3 4", ["'sun' (the word 'sun')"]),
    ],
)
def test_damaged_line_of_a_wanted_word_is_named(
    tmp_path: Path, line: bytes, parts: list[str]
) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(b"the 1 2 3\nof 4 5 6\n" + line + b"\nand 7 8 9\n")
    np.testing.assert_array_equal(load_label_vectors(["and"], str(path)).vectors, [[7, 8, 9]])
    with refused(InputError, "g.txt", *parts):
        load_label_vectors(["and", "sun"], str(path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"400000 300\n", []),
        (b"the 1061396\nof 593677\n", ["2 fields"]),
        (b"the\t0.1\t0.2\n", ["1 fields"]),
        (b"Once upon a time\nthere lived a hen\n", ["line 1", "b'upon'"]),
        ("the 0.1 0.2\nsun 1 2\n".encode("utf-16"), ["line 1"]),
        (b"\x00" * (1 << 20), ["1 fields"]),
        (b"the 1 2\n" * 200 + b"x" * (1 << 20), ["line 201", "524287 bytes"]),
    ],
)
def test_text_that_is_not_glove_is_refused(tmp_path: Path, text: bytes, parts: list[str]) -> None:
    (tmp_path / "g.txt").write_bytes(text)
    with refused(InputError, "g.txt", *parts, "`label_vectors`"):
        load_label_vectors(["sun"], str(tmp_path / "g.txt"))


# --- missing files and damaged zips --------------------------------------------------------------


def test_zip_of_several_texts_lists_the_settings_to_choose_from(tmp_path: Path) -> None:
    sizes = (2, 3, 4)
    texts = {f"g.{size}d.txt": glove_line("sun", range(1, size + 1)) for size in sizes}
    source = zip_glove(tmp_path / "g.zip", {**texts, "notes.md": b"x"})
    for wrong, part in [(source, "3 text files"), (f"{source}/g.5d.txt", "g.5d.txt")]:
        with pytest.raises(InputError, match=r"g\.zip") as caught:
            load_label_vectors(["sun"], wrong)
        assert part in str(caught.value)
        choices = re.findall("`label_vectors: (.+?)`", str(caught.value))
        shapes = [load_label_vectors(["sun"], choice).vectors.shape for choice in choices]
        assert shapes == [(1, size) for size in sizes]
    empty = zip_glove(tmp_path / "empty.zip", {"notes.md": b"x"})
    with refused(InputError, "empty.zip", "0 text files"):
        load_label_vectors(["sun"], empty)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_never_gives_other_vectors(tmp_path: Path, compression: int) -> None:
    """Not even with damage after the last wanted word: the checksum is at the end."""
    rng = np.random.default_rng(3)
    words = [f"w{number}" for number in range(50)]
    text = b"".join(glove_line(word, rng.normal(size=6)) for word in words)
    path = tmp_path / "g.zip"
    whole = Path(zip_glove(path, {"g.txt": text}, compression)).read_bytes()
    expected = load_label_vectors(words[:30], str(path))
    seeded = random.Random(4)
    errors = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[seeded.randrange(len(whole))] ^= 1 << seeded.randrange(8)
        path.write_bytes(damaged)
        try:
            assert load_label_vectors(words[:30], str(path)).sha256 == expected.sha256
        except GmpipeError:
            errors += 1
    assert errors > 100
    behind = bytearray(whole)
    behind[whole.index(b"PK\x01\x02") - 3] ^= 1  # the last line of the text
    path.write_bytes(behind)
    with refused(InputError, str(path)):
        load_label_vectors(words[:30], str(path))
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with refused(InputError, str(path)):
            load_label_vectors(words[:30], str(path))


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = Path(zip_glove(tmp_path / "g.zip", {"g.txt": glove_line("sun", [1, 2])}))
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flags of the member, here and in the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with refused(InputError, "g.zip", "encrypted"):
        load_label_vectors(["sun"], str(path))


@pytest.mark.parametrize("source", ["g.txt", "g.zip", "g.zip/g.txt"])
def test_missing_file_says_where_to_get_it(tmp_path: Path, source: str) -> None:
    file = tmp_path / source.partition("/")[0]
    parts = [
        *("glove.6B.zip (822 MB)", "https://nlp.stanford.edu/projects/glove/"),
        *("data/glove/glove.6B.zip", "`label_vectors: data/glove/glove.6B.zip/glove.6B.300d.txt`"),
    ]
    with refused(MissingError, str(file), *parts, NO_FILE):
        load_label_vectors(["sun"], str(tmp_path / source))


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for name in ("g.txt", "g.zip"):
        (tmp_path / name).mkdir()
        with refused(InputError, name, "folder", "`label_vectors`"):
            load_label_vectors(["sun"], str(tmp_path / name))
    with pytest.raises(OSError, match="name too long"):
        load_label_vectors(["sun"], str(tmp_path / ("g" * 300 + ".txt")))
