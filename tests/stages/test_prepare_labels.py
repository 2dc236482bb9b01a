"""`gmpipe prepare` counts the images of each label and notes labels that may be wrong."""

from __future__ import annotations

import re
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
    untested, rare, similar, unusable = notes_of(rest)
    assert untested.endswith(": Dog, dog")
    assert "test" in untested
    assert rare.endswith(": Dog (labels.csv, line 3), sofa (labels.csv, line 4)")
    assert "2 " in rare
    assert "train" in rare
    assert similar.endswith(": 'Dog' (labels.csv, line 3) and 'dog'")
    assert re.search("training .*'Dog' and 'dog'.* same vector.*Rename or merge", unusable)
    code, out, _ = Checkout(tmp_path / "a").run("--dataset", "coco")
    without_places = [re.sub(r" \(labels.csv, line \d+\)", "", line) for line in rest]
    assert (code, out.splitlines()[1:]) == (0, without_places)  # the table is not read again
    _, out, _ = Checkout(tmp_path / "a").run("--dataset", "coco", "--check")
    assert set(notes_of(rest)) <= set(out.splitlines())
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
    untested, rare, _ = notes_of(lines)  # the last: labels are numbers
    assert untested.endswith(": 080")
    assert rare.endswith(": 079 (labels.csv, line 2), 080 (labels.csv, line 2)")


@pytest.mark.parametrize("mark", ["|", ", ", "/", " "])
def test_wrong_separator_is_guessed(tmp_path: Path, mark: str) -> None:
    cells = ["cat", "dog", f"cat{mark}sofa", f"sofa{mark}cat", f"dog{mark}sofa"]
    rows = [
        f'{number}.jpg,"{cell}",{"test" if number % 2 else "train"}'
        for number, cell in enumerate(cells)
    ]
    notes = notes_of(lines_of(tmp_path / "a", rows))
    sign = mark.strip() or " "
    for part in ("3 of 5", f"'cat{mark}sofa' (labels.csv, line 4)", f"'{sign}'"):
        assert part in notes[-1]
    assert f'`prepare.coco.separator: "{sign}"`' in notes[-1]
    assert not any("spelling" in note for note in notes)
    right = lines_of(tmp_path / "b", rows, separator=sign)
    assert not any("separat" in line for line in right)
    assert table_of(right)[1:] == [["cat", "2", "1"], ["dog", "1", "1"], ["sofa", "2", "1"]]


def test_misspelt_label_of_a_table_is_shown_with_its_row(tmp_path: Path) -> None:
    rows = ["a.jpg,window,train", "b.jpg,window,test", "c.jpg,windwo,train"]
    notes = notes_of(lines_of(tmp_path, rows))
    assert notes[-1].endswith(": 'window' and 'windwo' (labels.csv, line 4)")


def test_notes_on_the_table_are_printed_by_every_run(tmp_path: Path) -> None:
    rows = ["a.jpg,nan,train", "b.jpg,cat,train", "c.jpg,cat,train", "d.jpg,cat,test"]
    lines = lines_of(tmp_path, rows)
    [note] = notes_of(lines)
    for part in ("(1 cell,", "'nan'", "labels.csv, line 2", "`prepare.coco.vocabulary`"):
        assert part in note
    code, out, _ = Checkout(tmp_path).run("--dataset", "coco")
    assert (code, out.splitlines()[1:]) == (0, lines[1:])
    assert "unchanged" in out
    _, out, _ = Checkout(tmp_path).run("--dataset", "coco", "--check")
    assert note in out.splitlines()


def test_columns_of_labels_are_a_setting(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    root = checkout / "data/coco"
    root.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        draw_image(root / name)
    (root / "labels.csv").write_text(
        "image,cat,big,sofa,split\na.jpg,1,x,0,train\nb.jpg,0,y,1,test\n"
    )
    checkout.params(coco={"source": "table"})
    checkout.refused("'big'", "line 2", "`prepare.coco.labels: [cat, sofa]`", dataset="coco")
    option = ("--set", "prepare.coco.labels=[sofa, cat]")
    code, out, err = checkout.run("--dataset", "coco", *option)
    assert code == 0, err
    assert table_of(out.splitlines())[1:] == [["sofa", "0", "1"], ["cat", "1", "0"]]
    for wrong in ("5", "[]", "[1, 2]", "[cat, cat]", "null"):
        option = ("--set", f"prepare.coco.labels={wrong}")
        checkout.refused("`prepare.coco.labels`", "column", dataset="coco", options=option)
