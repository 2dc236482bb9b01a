"""pipeline.labels.vectors: both sources, the lookup rule, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import GmpipeError
from pipeline.labels.vectors import LabelVectors, load_label_vectors

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["sun", "traffic light", "night"]


def write_npz(path: Path, **vectors: Any) -> str:
    """An npz with one entry a keyword; the path as a source."""
    np.savez(path, labels=np.array(list(vectors)), vectors=np.array(list(vectors.values())))
    return str(path)


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


@pytest.mark.parametrize("label", ["", "_", " - "])
def test_wordllama_refuses_names_without_a_word(label: str) -> None:
    with pytest.raises(GmpipeError, match=f"no vector for {label!r}"):
        load_label_vectors(["sun", label], "wordllama")


# npz ---------------------------------------------------------------------------------------------


def test_npz_keeps_the_order_of_labels_and_ignores_the_rest(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "v.npz", a=[1.0, 2], b=[3, 4], c=[np.nan, 0])
    loaded = load_label_vectors(["b", "a"], source)
    assert loaded.names == ("b", "a")
    assert loaded.source == source
    assert loaded.vectors.dtype == np.float32
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
    with pytest.raises(GmpipeError, match="there is no file"):
        load_label_vectors(["a"], str(tmp_path))
    np.save(tmp_path / "v.npy", np.ones(3))
    with pytest.raises(GmpipeError, match="is not an npz file"):
        load_label_vectors(["a"], str(tmp_path / "v.npy"))
    np.savez(tmp_path / "other.npz", words=["a"])
    with pytest.raises(GmpipeError, match="has no array 'labels', 'vectors'"):
        load_label_vectors(["a"], str(tmp_path / "other.npz"))
    good = write_npz(tmp_path / "good.npz", a=np.arange(1000.0))
    damaged = bytearray(Path(good).read_bytes())
    damaged[4000] ^= 1
    (tmp_path / "bad.npz").write_bytes(damaged)
    with pytest.raises(GmpipeError, match=r"can't be read .*CRC"):
        load_label_vectors(["a"], str(tmp_path / "bad.npz"))


# Both --------------------------------------------------------------------------------------------


def test_labels_that_read_the_same_are_refused() -> None:
    for pair in (["sun", "sun"], ["fire truck", "Fire-Truck"]):
        with pytest.raises(GmpipeError, match=f"{pair[0]!r} and {pair[1]!r} read the same"):
            load_label_vectors(["moon", *pair], "wordllama")
    with pytest.raises(GmpipeError, match="no labels"):
        load_label_vectors([], "wordllama")


def test_sha256_covers_names_shape_and_bytes() -> None:
    def sha256(names: tuple[str, ...], vectors: NDArray[Any], source: str = "x") -> str:
        return LabelVectors(names, vectors, source).sha256

    ones = np.ones((2, 2), dtype=np.float32)
    base = sha256(("a", "b"), ones)
    assert base == sha256(("a", "b"), np.asfortranarray(ones), "another file")
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
