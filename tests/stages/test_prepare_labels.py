"""`gmpipe prepare` counts the images of each label and notes labels that may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkouts import Checkout
from trees import draw_image


def lines_of(folder: Path, rows: Sequence[str], *options: str, **source: Any) -> list[str]:
    """What a run prints for a table `image,labels,split` whose images all exist."""
    checkout = Checkout(folder)
    root = checkout / "data/coco"
    root.mkdir(parents=True)
    for row in rows:
        draw_image(root / row.partition(",")[0])
    (root / "labels.csv").write_text("\n".join(["image,labels,split", *rows]))
    checkout.params(coco={"source": "table", **source})
    code, out, err = checkout.run("--dataset", "coco", *options)
    assert code == 0, err
    return out.splitlines()


def notes_of(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith("Note: ")]


def table_of(lines: Sequence[str]) -> list[list[str]]:
    """The cells of the table of labels, header first."""
    rows = [line.split() for line in lines]
    start = rows.index(["label", "train", "test"])
    end = start + 1
    while end < len(rows) and len(rows[end]) == 3 and rows[end][2].isdigit():
        end += 1
    return rows[start:end]


PETS = ["a.jpg,cat;dog,train", "b.jpg,cat;Dog,train", "c.jpg,cat;sofa,test", "d.jpg,dog,train"]


def test_labels_are_counted_and_oddities_noted(tmp_path: Path) -> None:
    first, *rest = lines_of(tmp_path / "a", PETS)
    for part in ("data/coco/prepared: ", "3 train", "1 test", "4 labels"):
        assert part in first
    assert table_of(rest) == [
        ["label", "train", "test"],
        ["Dog", "1", "0"],
        ["cat", "2", "1"],
        ["dog", "2", "0"],
        ["sofa", "0", "1"],
    ]
    untested, rare, similar = notes_of(rest)
    assert untested.endswith(": Dog, dog")
    assert "test" in untested
    assert rare.endswith(": Dog, sofa")
    assert "2 " in rare
    assert "train" in rare
    assert similar.endswith(": 'Dog' and 'dog'")
    code, out, _ = Checkout(tmp_path / "a").run("--dataset", "coco")
    assert (code, out.splitlines()[1:]) == (0, rest)
    lines = lines_of(tmp_path / "b", PETS, "--check")
    assert lines[-1 - len(rest) : -1] == rest
    assert "  a.jpg (train) = b.jpg (train)" in "\n".join(lines)  # a path equal to the id: once
    assert lines_of(tmp_path / "c", PETS, "--quiet") == []


def test_ordinary_labels_get_no_note(tmp_path: Path) -> None:
    rows = [f"{number}.jpg,cat;dog,{'train' if number else 'test'}" for number in range(3)]
    lines = lines_of(tmp_path, [*rows, "3.jpg,,train"])
    assert table_of(lines) == [["label", "train", "test"], ["cat", "2", "1"], ["dog", "2", "1"]]
    assert len(lines) == 4


def test_only_the_rarest_of_many_labels_are_shown(tmp_path: Path) -> None:
    names = [f"{number:03d}" for number in range(81)]
    rows = [
        f"{image}.jpg,{';'.join(names[: 81 - image])},{'test' if image == 1 else 'train'}"
        for image in range(12)
    ]
    lines = lines_of(tmp_path, [*rows, "12.jpg,,train"])
    table = table_of(lines)
    assert table[1:3] == [["080", "1", "0"], ["079", "1", "1"]]
    assert table[-1] == ["071", "9", "1"]
    assert len(table) == 11
    assert "71 " in lines[12]
    assert "11 " in lines[12]
    untested, rare = notes_of(lines)
    assert untested.endswith(": 080")
    assert rare.endswith(": 079, 080")


@pytest.mark.parametrize(("mark", "cell"), [("|", "cat|dog"), ("/", "a / b"), (",", '"x, y"')])
def test_wrong_separator_is_guessed(tmp_path: Path, mark: str, cell: str) -> None:
    rows = [f"a.jpg,{cell},train", f"b.jpg,{cell},train", f"c.jpg,{cell},test", "d.jpg,z,test"]
    note = lines_of(tmp_path / "a", rows[:3])[-1]
    for part in ("1 of 1", f"'{mark}'", f'`prepare.coco.separator: "{mark}"`'):
        assert part in note
    assert not any("separat" in line for line in lines_of(tmp_path / "b", rows))  # one of two
    assert not any("separat" in line for line in lines_of(tmp_path / "c", rows, separator=mark))
