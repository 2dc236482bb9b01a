"""pipeline.labels and the command `labels`: the sources, the rule, and what is refused."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts, write_manifest
from pipeline.datasets.scenes import VOCABULARY
from pipeline.errors import GmpipeError
from pipeline.labels.vectors import SPELLINGS, LabelVectors, load_label_vectors
from stages.cli.main import cli
from stages.commands.labels import describe

ROOT = Path(__file__).resolve().parents[2]
DEMO = ["sun", "traffic light", "night"]


def write_npz(path: Path, **vectors: Any) -> str:
    """An npz with one entry a keyword; the path as a source."""
    np.savez(path, labels=np.array(list(vectors)), vectors=np.array(list(vectors.values())))
    return str(path)


def glove_line(word: str, values: Sequence[float]) -> bytes:
    """As GloVe's program writes it."""
    return " ".join([word, *(f"{value:.5g}" for value in values)]).encode() + b"\n"


def write_glove(path: Path, vectors: Mapping[str, Sequence[float]]) -> str:
    """A text with one line a word; the path as a source."""
    path.write_bytes(b"".join(glove_line(*entry) for entry in vectors.items()))
    return str(path)


def zip_glove(path: Path, members: Mapping[str, bytes], compression: int = 8) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return str(path)


def parse_all(text: bytes, size: int) -> dict[str, NDArray[np.float32]]:
    """The oracle: every line of a sound text, split from the right, in memory."""
    rows = [line.rsplit(" ", size) for line in text.decode().split("\n") if line.count(" ") > 1]
    return {word: np.array(values, dtype=np.float64).astype(np.float32) for word, *values in rows}


# wordllama ---------------------------------------------------------------------------------------


def test_wordllama_is_the_mean_of_token_embeddings() -> None:
    loaded = load_label_vectors(DEMO, "wordllama")
    assert loaded.names == tuple(DEMO)
    assert loaded.source == "wordllama"
    assert loaded.vectors.dtype == np.float32
    import wordllama  # not above: a first import of it, unguarded, sets up the root logger

    folder = Path(wordllama.__file__).parent
    model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    np.testing.assert_allclose(loaded.vectors, model.embed(DEMO), rtol=1e-5, atol=1e-6)
    assert (np.linalg.norm(loaded.vectors, axis=1) > 2).all()  # raw: nothing is normalised


def test_wordllama_reads_names_as_words() -> None:
    plain = load_label_vectors(["traffic light"], "wordllama")
    for spelling in ("Traffic_Light", "traffic-light", " traffic  light "):
        other = load_label_vectors([spelling], "wordllama")
        np.testing.assert_array_equal(other.vectors, plain.vectors)
        assert other.names == (spelling,)
    assert not np.array_equal(
        load_label_vectors(["trafficlight"], "wordllama").vectors, plain.vectors
    )


def test_a_label_has_one_vector_whatever_the_others_are() -> None:
    together = load_label_vectors(DEMO, "wordllama").vectors
    alone = [load_label_vectors([label], "wordllama").vectors[0] for label in DEMO]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_wordllama_is_silent_offline_and_the_same_in_every_process() -> None:
    """A fresh process: no network, no line on stderr, the root logger as it was, a safe fork."""
    code = f"""
import logging, os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from pipeline.labels.vectors import load_label_vectors
loaded = load_label_vectors({DEMO!r}, "wordllama")
assert not logging.root.handlers and logging.root.level == logging.WARNING
logging.getLogger("somebody").info("noise")
child = os.fork()
if child == 0:
    load_label_vectors({DEMO!r}, "wordllama")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert "torch" not in sys.modules
print(loaded.sha256)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip() == load_label_vectors(DEMO, "wordllama").sha256


def test_wordllama_says_its_tokens_and_joins_spelled_names() -> None:
    loaded = load_label_vectors(["Sun", "traffic light", "diningtable"], "wordllama")
    assert loaded.resolution == ("▁sun", "▁traffic + ▁light", "▁d + ining + ▁table")
    spelled = load_label_vectors(["sun", "traffic light", "dining table"], "wordllama")
    np.testing.assert_array_equal(loaded.vectors, spelled.vectors)


def test_no_label_of_the_demo_is_spelled_otherwise() -> None:
    assert not set(VOCABULARY) & set(SPELLINGS)


@pytest.mark.parametrize("label", ["", "_", " - "])
def test_wordllama_refuses_names_without_a_word(label: str) -> None:
    with pytest.raises(GmpipeError, match=f"no vector for {label!r}: no word is left .* Rename"):
        load_label_vectors(["sun", label], "wordllama")


# GloVe -------------------------------------------------------------------------------------------

SMALL = {"the": [0.1, 0.2, 0.3], "sun": [1, -2, 3e-5], "traffic": [4, 5, 6], "light": [6, 5, -4]}


def test_glove_gives_words_and_means_of_words(tmp_path: Path) -> None:
    source = write_glove(tmp_path / "g.txt", SMALL)
    loaded = load_label_vectors(["Traffic_Light", "sun"], source)
    assert loaded.names == ("Traffic_Light", "sun")
    assert loaded.source == source
    assert loaded.resolution == ("traffic + light", "sun")
    assert loaded.vectors.dtype == np.float32
    np.testing.assert_array_equal(loaded.vectors, np.float32([[5, 5, 1], [1, -2, 3e-5]]))


def test_glove_is_found_in_a_text_in_a_zip_and_through_a_zip(tmp_path: Path) -> None:
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
    vocabulary=st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=3, max_size=30),
    header=st.booleans(),
    end=st.sampled_from([b"\n", b" \n", b"\r\n"]),
    data=st.data(),
)
def test_glove_gives_what_parsing_all_gives(
    tmp_path_factory: pytest.TempPathFactory,
    vocabulary: list[list[str]],
    header: bool,
    end: bytes,
    data: st.DataObject,
) -> None:
    """Texts with words of any script, some with blanks, which are never taken for their first."""
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


def test_a_word_with_blanks_is_not_its_first_word(tmp_path: Path) -> None:
    """As in glove.840B: `. . .` and `at name@domain.com`, before and behind the word itself."""
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


def test_a_first_line_of_count_and_size_is_no_word(tmp_path: Path) -> None:
    lines = {"2": [5, 6, 7], "sun": [1, 2, 3]}
    source = write_glove(tmp_path / "g.txt", lines)
    Path(source).write_bytes(b"2 3\n" + Path(source).read_bytes())
    np.testing.assert_array_equal(
        load_label_vectors(["sun", "2"], source).vectors, [[1, 2, 3], [5, 6, 7]]
    )
    Path(source).write_bytes(b"2 300\n" + Path(source).read_bytes()[4:])
    with pytest.raises(GmpipeError, match="line 1 says 300 values a line, the next have 3"):
        load_label_vectors(["sun"], source)


def test_a_word_twice_must_have_one_vector(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(b"sun 1 2\nmoon 3 4\nsun 1 2\nmoon 3 5\nstar 1 1\n")
    np.testing.assert_array_equal(load_label_vectors(["sun"], str(path)).vectors, [[1, 2]])
    with pytest.raises(GmpipeError, match=r"'moon' has one vector in line 2 and another in line 4"):
        load_label_vectors(["sun", "moon"], str(path))


def test_bytes_that_are_no_utf8_disturb_nobody(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(
        b"\xff\xfe 1 2\nsun\xa0 3 4\n\x85 5 6\n\xc2\xa0 1 1\n" + "café 7 8\nsun 9 9\n".encode()
    )
    loaded = load_label_vectors(["Café", "sun"], str(path))
    np.testing.assert_array_equal(loaded.vectors, [[7, 8], [9, 9]])


def test_a_last_line_without_an_end_is_never_trusted(tmp_path: Path) -> None:
    """However a text is cut: the right vectors, or an error that says where it ends."""
    text = Path(write_glove(tmp_path / "g.txt", SMALL)).read_bytes()
    expected = load_label_vectors(["light", "sun"], str(tmp_path / "g.txt"))
    start = text.index(b"light")
    for size in range(start, len(text)):
        (tmp_path / "cut.txt").write_bytes(text[:size])
        np.testing.assert_array_equal(
            load_label_vectors(["sun"], str(tmp_path / "cut.txt")).vectors, expected.vectors[1:]
        )
        where = "ends within line 4, and the words 'light' were .* fetch it again"
        if size == start:
            where = r"no vector for these labels: 'light' \(the word 'light'\)"
        with pytest.raises(GmpipeError, match=where):
            load_label_vectors(["light", "sun"], str(tmp_path / "cut.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b"sun 1 2",
            r"line 3, word 'sun': 2 values, expected 3 as in other lines.* fetch it again",
        ),
        (b"sun", r"line 3, word 'sun': 0 values, expected 3"),
        (b"sun 1 2 x", r"line 3, word 'sun': could not convert .* b'x', expected a number"),
        (b"sun 1  2", r"line 3, word 'sun': could not convert .* b'', expected a number"),
        (b"sun 1 2 nan", r"not finite as float32: 'sun'\."),
        (b"sun 1 2 1e39", r"not finite as float32: 'sun'\."),
        (b"sun 0 0 0", r"not finite as float32: 'sun'\."),
        (b"sun 1 2 3 4", r"no vector for these labels: 'sun'"),
    ],
)
def test_damaged_lines_of_wanted_words_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "g.txt"
    path.write_bytes(b"the 1 2 3\nof 4 5 6\n" + line + b"\nand 7 8 9\n")
    np.testing.assert_array_equal(load_label_vectors(["and"], str(path)).vectors, [[7, 8, 9]])
    with pytest.raises(GmpipeError, match=message):
        load_label_vectors(["and", "sun"], str(path))


def test_missing_words_are_all_named_with_their_labels(tmp_path: Path) -> None:
    source = write_glove(tmp_path / "g.txt", SMALL)
    message = (
        r"g\.txt has no vector for these labels: 'Moon' \(the word 'moon'\), 'sun light box' "
        r"\(the word 'box'\)\. Rename them .* an npz as `label_vectors`, or set .*wordllama`\."
    )
    with pytest.raises(GmpipeError, match=message):
        load_label_vectors(["Moon", "traffic light", "sun light box"], source)
    with pytest.raises(GmpipeError, match=r"'tvmonitor' \(the word 'tv'\), 'tvmonitor' \(the word"):
        load_label_vectors(["tvmonitor"], source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it has no lines with vectors"),
        (b"\n\n", "it has no lines with vectors"),
        (b"400000 300\n", "it has no lines with vectors"),
        (b"the 1061396\nof 593677\n", "most of its first lines have 2 fields"),
        (b"the\t0.1\t0.2\n", "most of its first lines have 1 fields"),
        (b"Once upon a time\nthere lived a hen\n", "line 1: could not convert .* b'upon'"),
        ("the 0.1 0.2\nsun 1 2\n".encode("utf-16"), "line 1: could not convert"),
        (b"\x00" * (1 << 20), "most of its first lines have 1 fields"),
        (b"the 1 2\n" * 200 + b"x" * (1 << 20), "line 201 is longer than 524287 bytes"),
    ],
)
def test_texts_that_are_not_glove(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "g.txt").write_bytes(text)
    with pytest.raises(GmpipeError, match=f"not a text file of GloVe vectors: {message}.*Correct"):
        load_label_vectors(["sun"], str(tmp_path / "g.txt"))


def test_a_zip_of_several_texts_lists_the_settings_to_choose_from(tmp_path: Path) -> None:
    sizes = (2, 3, 4)
    texts = {f"g.{size}d.txt": glove_line("sun", range(1, size + 1)) for size in sizes}
    source = zip_glove(tmp_path / "g.zip", {**texts, "notes.md": b"x"})
    for wrong, finding in [
        (source, "g.zip holds 3 text files, and none is named"),
        (f"{source}/g.5d.txt", r"g.zip has no file g\.5d\.txt"),
    ]:
        with pytest.raises(GmpipeError, match=rf"{finding}\. Choose one: ") as caught:
            load_label_vectors(["sun"], wrong)
        choices = re.findall("`label_vectors: (.+?)`", str(caught.value))
        found = [load_label_vectors(["sun"], choice).vectors.shape for choice in choices]
        assert found == [(1, size) for size in sizes]
    empty = zip_glove(tmp_path / "empty.zip", {"notes.md": b"x"})
    with pytest.raises(GmpipeError, match=r"holds 0 text files.* Expected a zip with a GloVe text"):
        load_label_vectors(["sun"], empty)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_never_gives_other_vectors(tmp_path: Path, compression: int) -> None:
    """Also where the damage is behind the last wanted word: the checksum is at the end."""
    rng = np.random.default_rng(3)
    words = [f"w{number}" for number in range(50)]
    text = b"".join(glove_line(word, rng.normal(size=6)) for word in words)
    path = tmp_path / "g.zip"
    whole = Path(zip_glove(path, {"g.txt": text}, compression)).read_bytes()
    expected = load_label_vectors(words[:30], str(path))
    seeded = random.Random(4)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[seeded.randrange(len(whole))] ^= 1 << seeded.randrange(8)
        path.write_bytes(damaged)
        try:
            assert load_label_vectors(words[:30], str(path)).sha256 == expected.sha256
        except GmpipeError:
            refused += 1
    assert refused > 200
    behind = bytearray(whole)
    behind[whole.index(b"PK\x01\x02") - 3] ^= 1  # the last line of the text
    path.write_bytes(behind)
    with pytest.raises(GmpipeError, match=r"g\.zip can't be read .*fetch it again"):
        load_label_vectors(words[:30], str(path))
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(GmpipeError, match=r"g\.zip can't be read .*fetch it again"):
            load_label_vectors(words[:30], str(path))


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = Path(zip_glove(tmp_path / "g.zip", {"g.txt": glove_line("sun", [1, 2])}))
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flags of the member, here and in the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(GmpipeError, match=r"g\.zip can't be read \(.*encrypted"):
        load_label_vectors(["sun"], str(path))


def test_a_glove_file_that_is_missing_says_where_it_is_from(tmp_path: Path) -> None:
    places = ["g.txt", "g.zip", "g.zip/g.txt"]
    for place in places:
        file = tmp_path / place.partition("/")[0]
        message = (
            rf"there is no file {file} to read .* glove\.6B\.zip \(822 MB\).*nlp\.stanford\.edu.* "
            r"put it at data/glove/glove\.6B\.zip.*`label_vectors: wordllama`, which needs no d"
        )
        with pytest.raises(GmpipeError, match=message):
            load_label_vectors(["sun"], str(tmp_path / place))
    for name in ("g.txt", "g.zip"):
        (tmp_path / name).mkdir()
        with pytest.raises(GmpipeError, match=f"{name} is a folder, .*Name the file in it"):
            load_label_vectors(["sun"], str(tmp_path / name))
    with pytest.raises(GmpipeError, match=r"can't be read .*name too long"):
        load_label_vectors(["sun"], str(tmp_path / ("g" * 300 + ".txt")))


@pytest.mark.parametrize("source", ["glove", "", "data/glove", "g.txt.gz", "g.npy", "Wordllama"])
def test_a_source_of_no_known_kind_is_refused(source: str) -> None:
    message = rf"`label_vectors: {re.escape(source)}` is none of: `wordllama`; .*npz.* Correct it"
    with pytest.raises(GmpipeError, match=message):
        load_label_vectors(["sun"], source)


def test_reading_glove_takes_memory_for_the_words_alone(tmp_path: Path) -> None:
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


# Names of the published data sets ----------------------------------------------------------------

SPELLED = {
    "diningtable": "dining + table",
    "pottedplant": "potted + plant",
    "tvmonitor": "tv + monitor",
    "hot dog": "hotdog",
    "cell phone": "cellphone",
}


@pytest.mark.parametrize("name", ["voc2007", "coco", "nuswide"])
def test_published_labels_resolve_to_words(shared: Path, tmp_path: Path, name: str) -> None:
    with np.load(shared / "data" / "label-vectors" / f"{name}.npz") as archive:
        labels: list[str] = archive["labels"].tolist()
    resolution = tuple(SPELLED.get(label, label.replace(" ", " + ")) for label in labels)
    words = sorted({word for entry in resolution for word in entry.split(" + ")})
    source = write_glove(tmp_path / "g.txt", {word: [row + 1, 1] for row, word in enumerate(words)})
    assert load_label_vectors(labels, source).resolution == resolution
    for word in words:
        Path(source).write_bytes(
            b"".join(glove_line(other, [1, 2]) for other in words if other != word) + b"x 1 2\n"
        )
        with pytest.raises(GmpipeError, match=rf"\(the word '{word}'\)"):
            load_label_vectors(labels, source)


@pytest.mark.parametrize(
    ("label", "known", "other"),
    [
        ("dining table", ("voc2007", "diningtable"), "dining"),
        ("potted plant", ("voc2007", "pottedplant"), "potted"),
        ("teddy bear", ("coco", "bear"), "teddy"),
        ("stop sign", ("nuswide", "sign"), "stop"),
        ("sports ball", ("nuswide", "sports"), "ball"),
    ],
)
def test_published_vectors_of_several_words_are_our_means(
    shared: Path, tmp_path: Path, label: str, known: tuple[str, str], other: str
) -> None:
    """Bit for bit. Of two words one's vector is in the files (`diningtable` there is `table`,
    `pottedplant` is `plant`); the other's follows from the mean, and is 5 digits long as printed.
    """

    def published(name: str, entry: str) -> NDArray[np.float64]:
        with np.load(shared / "data" / "label-vectors" / f"{name}.npz") as archive:
            row = archive["labels"].tolist().index(entry)
            return archive["vectors"][row].astype(np.float64)

    mean, first = published("coco", label), published(*known)
    (word,) = set(label.split()) - {other}
    source = write_glove(tmp_path / "g.txt", {other: 2 * mean - first, word: first, "x": mean})
    np.testing.assert_array_equal(load_label_vectors([label], source).vectors[0], mean)


# npz ---------------------------------------------------------------------------------------------


def test_npz_keeps_the_order_of_labels_and_ignores_the_rest(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1.0, 2], b=[3, 4], c=[np.nan, 0])
    loaded = load_label_vectors(["b", "a"], source)
    assert loaded.names == ("b", "a")
    assert loaded.source == source
    assert loaded.vectors.dtype == np.float32
    np.testing.assert_array_equal(loaded.vectors, [[3, 4], [1, 2]])


def test_npz_entries_are_named_as_the_file_spells_them(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", Dining_Table=[1.0, 2], Sun=[3, 4])
    loaded = load_label_vectors(["sun", "diningtable"], source)
    assert loaded.resolution == ("Sun", "Dining_Table")
    np.testing.assert_array_equal(loaded.vectors, [[3, 4], [1, 2]])


@pytest.mark.parametrize("entry", ["traffic light", "Traffic_Light", "TRAFFIC-LIGHT"])
@pytest.mark.parametrize("label", ["traffic light", "Traffic_Light", "TRAFFIC-LIGHT"])
def test_npz_entries_are_found_as_they_read(tmp_path: Path, entry: str, label: str) -> None:
    source = write_npz(tmp_path / "v.npz", **{"light": [5, 6], entry: [1, 2]})
    np.testing.assert_array_equal(load_label_vectors([label], source).vectors, [[1, 2]])


def test_npz_entries_that_read_the_same_must_agree(tmp_path: Path) -> None:
    same = write_npz(tmp_path / "same.npz", Sun=[1, 2], sun=[1, 2])
    np.testing.assert_array_equal(load_label_vectors(["sun"], same).vectors, [[1, 2]])
    differ = write_npz(tmp_path / "differ.npz", Sun=[1, 2], sun=[1, 3])
    with pytest.raises(GmpipeError, match=r"'Sun' \(entry 0\) and 'sun' \(entry 1\) read the same"):
        load_label_vectors(["sun"], differ)


def test_missing_labels_are_all_named(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1, 2])
    with pytest.raises(GmpipeError, match=r"no vector for 2 of 3 labels: 'b', 'c d'\. Add them"):
        load_label_vectors(["b", "a", "c d"], source)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e300])
def test_useless_vectors_are_named(tmp_path: Path, value: float) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1, 2], b=[value, 0])
    with pytest.raises(GmpipeError, match=r"not finite as float32: 'b'\."):
        load_label_vectors(["a", "b"], source)


@pytest.mark.parametrize(
    ("labels", "vectors", "message"),
    [
        (["a"], [[1.0], [2.0]], "1 labels but 2 vectors"),
        (["a"], [1.0], r"`vectors` is float64 of shape \(1,\)"),
        (["a"], np.ones((1, 0)), r"`vectors` is float64 of shape \(1, 0\)"),
        (["a"], [["x"]], "`vectors` is <U1"),
        ([["a"]], [[1.0]], r"`labels` is <U1 of shape \(1, 1\)"),
        ([1], [[1.0]], "`labels` is int64"),
        (np.array(["a"], dtype=object), [[1.0]], "can't be read .*allow_pickle"),
    ],
)
def test_wrong_arrays(tmp_path: Path, labels: Any, vectors: Any, message: str) -> None:
    np.savez(tmp_path / "v.npz", labels=labels, vectors=vectors)
    with pytest.raises(GmpipeError, match=message):
        load_label_vectors(["a"], str(tmp_path / "v.npz"))


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(GmpipeError, match=r"there is no file .*glove.*set it to `wordllama`"):
        load_label_vectors(["a"], str(tmp_path / "glove.npz"))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(GmpipeError, match=r"folder\.npz is a folder\. Expected an npz .*Correct"):
        load_label_vectors(["a"], str(tmp_path / "folder.npz"))
    (tmp_path / "text.npz").write_text("a 1 2\n")
    with pytest.raises(GmpipeError, match="is not an npz file"):
        load_label_vectors(["a"], str(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", words=["a"])
    with pytest.raises(GmpipeError, match="has no array 'labels', 'vectors'"):
        load_label_vectors(["a"], str(tmp_path / "other.npz"))
    good = write_npz(tmp_path / "good.npz", a=np.arange(1000.0))
    damaged = bytearray(Path(good).read_bytes())
    damaged[4000] ^= 1
    (tmp_path / "bad.npz").write_bytes(damaged)
    with pytest.raises(GmpipeError, match=r"can't be read .*CRC"):
        load_label_vectors(["a"], str(tmp_path / "bad.npz"))


# All sources --------------------------------------------------------------------------------------


def test_labels_that_read_the_same_are_refused() -> None:
    for pair in (["sun", "sun"], ["fire truck", "Fire-Truck"], ["tvmonitor", "TV monitor"]):
        with pytest.raises(GmpipeError, match=f"{pair[0]!r} and {pair[1]!r} read the same"):
            load_label_vectors(["moon", *pair], "wordllama")
    with pytest.raises(GmpipeError, match="no labels"):
        load_label_vectors([], "wordllama")


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


@pytest.mark.parametrize(("name", "count"), [("voc2007", 20), ("coco", 80), ("nuswide", 81)])
def test_real_glove_vectors(shared: Path, name: str, count: int) -> None:
    path = shared / "data" / "label-vectors" / f"{name}.npz"
    with np.load(path, allow_pickle=False) as archive:
        labels, vectors = archive["labels"].tolist(), archive["vectors"]
    loaded = load_label_vectors(labels, str(path))
    assert loaded.vectors.shape == (count, 300)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    spelled = [label.title().replace(" ", "_") for label in labels]
    np.testing.assert_array_equal(load_label_vectors(spelled, str(path)).vectors, vectors)
    assert load_label_vectors(labels, "wordllama").vectors.shape == (count, 256)


# The command -------------------------------------------------------------------------------------


def test_description_names_the_nearest_other_label() -> None:
    vectors = np.array([[1, 0], [3, 4], [0, -2]], dtype=np.float32)
    described = describe(LabelVectors(("a", "b c", "d"), vectors, "v.npz", ("A", "b + c", "d")))
    table, line = described.split("\n\n")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert rows[0] == ["label", "vector of", "nearest label", "cosine"]
    # Between a and b c 3/5, a and d 0, b c and d -4/5.
    assert rows[2:] == [
        ["a", "A", "b c", "0.60"],
        ["b c", "b + c", "a", "0.60"],
        ["d"] * 2 + ["a", "0.00"],
    ]
    sha256 = LabelVectors(("a", "b c", "d"), vectors, "").sha256
    assert line == f"3 labels, vectors of size 2 from v.npz, sha256 {sha256}"


def test_description_of_a_single_label() -> None:
    one = LabelVectors(("a",), np.ones((1, 2), dtype=np.float32), "v.npz", ("a",))
    assert re.search(r"\| a +\| a +\| - +\| - +\|\n\n1 labels", describe(one))


def test_command_reads_manifest_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    rows = [
        {"image_id": split, "path": f"{split}.png", "split": split, "labels": [0], "ignored": []}
        for split in ("train", "test")
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("demo", "own", ("traffic light", "sun"), {}, full_counts(table), table)
    write_manifest(tmp_path / "data" / "demo" / "prepared" / "manifest.parquet", manifest)
    write_glove(tmp_path / "g.txt", SMALL)

    ran = CliRunner().invoke(
        cli, ["labels", "--dataset", "demo", "--set", "train.demo.label_vectors=g.txt"]
    )
    assert (ran.exit_code, ran.stderr) == (0, "")
    loaded = load_label_vectors(["traffic light", "sun"], "g.txt")
    assert ran.stdout == describe(loaded) + "\n"
    offline = CliRunner().invoke(cli, ["labels"])
    assert "▁traffic + ▁light" in offline.stdout
    assert "vectors of size 256 from wordllama" in offline.stdout
    absent = CliRunner().invoke(cli, ["labels", "--set", "train.demo.label_vectors=h.txt"])
    assert isinstance(absent.exception, GmpipeError)
    assert "there is no file h.txt" in str(absent.exception)
