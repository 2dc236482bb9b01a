"""pipeline.labels: published label names (VOC, COCO, NUS-WIDE) and their published vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from refusals import refused
from vector_files import glove_line, write_glove

from pipeline.errors import InputError
from pipeline.labels.vectors import load_label_vectors

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
        with refused(InputError, repr(word)):
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
def test_published_vectors_of_two_words_equal_our_means(
    shared: Path, tmp_path: Path, label: str, known: tuple[str, str], other: str
) -> None:
    """Bit for bit. The files have the vector of one of the two words (`diningtable` there is
    `table`, `pottedplant` is `plant`). The other word's vector follows from the mean, and has the
    5 digits that GloVe prints.
    """

    def published(name: str, entry: str) -> NDArray[np.float64]:
        with np.load(shared / "data" / "label-vectors" / f"{name}.npz") as archive:
            row = archive["labels"].tolist().index(entry)
            return archive["vectors"][row].astype(np.float64)

    mean, first = published("coco", label), published(*known)
    (word,) = set(label.split()) - {other}
    source = write_glove(tmp_path / "g.txt", {other: 2 * mean - first, word: first, "x": mean})
    np.testing.assert_array_equal(load_label_vectors([label], source).vectors[0], mean)


@pytest.mark.parametrize(("name", "count"), [("voc2007", 20), ("coco", 80), ("nuswide", 81)])
def test_published_npz_files(shared: Path, name: str, count: int) -> None:
    path = shared / "data" / "label-vectors" / f"{name}.npz"
    with np.load(path, allow_pickle=False) as archive:
        labels, vectors = archive["labels"].tolist(), archive["vectors"]
    loaded = load_label_vectors(labels, str(path))
    assert loaded.vectors.shape == (count, 300)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    spelled = [label.title().replace(" ", "_") for label in labels]
    np.testing.assert_array_equal(load_label_vectors(spelled, str(path)).vectors, vectors)
    assert load_label_vectors(labels, "wordllama").vectors.shape == (count, 256)
