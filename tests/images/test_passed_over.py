"""Files that are no photographs which can be read: what `predict` and `explain` say about them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from flows import Flow
from trees import check_contents, draw_image

from pipeline.errors import InputError
from pipeline.images import describe_passed_over
from pipeline.regions.transforms import load_image
from stages.commands.predict import find_images

RUN = ("--run", "runs/tiny/full-s0")

# How files of other formats begin.
OTHERS = {
    "a.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    "renamed.jpg": (b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic", "HEIC"),
    "a.avif": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
    "a.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    "a.psd": (b"8BPS\0\1", "Photoshop"),
    "a.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw"),
    "a.raf": (b"FUJIFILMCCD-RAW 0201", "raw"),
    "a.orf": (b"IIRO\x08\0\0\0", "raw"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    """By its content, whatever its name; `prepare --check` says the same as extraction."""
    content, form = OTHERS[name]
    findings = check_contents(tmp_path, {name: content + bytes(200), "other.jpg": b"text"})
    (_, reason), _ = findings.unreadable
    for part in (form, "convert", "JPEG"):
        assert part in reason
    with pytest.raises(InputError) as caught:
        load_image(tmp_path / "i" / name)
    assert reason in str(caught.value)


def test_passed_over_files_are_counted_by_suffix() -> None:
    line = describe_passed_over(Counter({".heic": 2, ".txt": 5, "": 1, ".nef": 7}))
    assert "\n" not in line
    assert line.startswith("15 files ")
    unsupported, others = line.split("; ")
    for part in ("7 .nef, 2 .heic", "convert", "JPEG"):
        assert part in unsupported
    assert "5 .txt, 1 without a suffix" in others
    assert "convert" not in describe_passed_over({".txt": 1})


def test_a_folder_without_any_photograph_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.HEIC", "b.heic", "sub/c.nef", "notes.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError) as caught:
        find_images([str(tmp_path)])
    for part in (str(tmp_path), "4 files", "2 .heic, 1 .nef", "1 .txt", "convert"):
        assert part in str(caught.value)


def test_predict_says_what_it_passed_over(made: Flow, tmp_path: Path) -> None:
    """In one line on stderr, so that JSON on stdout stays JSON."""
    draw_image(tmp_path / "a.jpg")
    for name in ("b.heic", "c.CR2", "notes.txt"):
        (tmp_path / name).touch()
    outcome = made.gmpipe("predict", str(tmp_path), *RUN, "--json")
    assert outcome.code == 0
    assert len(json.loads(outcome.out)) == 1
    [line] = [line for line in outcome.err.splitlines() if "passed over" in line]
    for part in ("Note: 3 files", "1 .cr2, 1 .heic", "1 .txt"):
        assert part in line
    outcome = made.gmpipe("predict", str(tmp_path / "a.jpg"), *RUN)
    assert "passed over" not in outcome.err


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_one_file_of_another_format_is_refused_with_what_to_do(
    made: Flow, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(OTHERS["a.heic"][0])
    output = ("-o", str(tmp_path / "out.png")) if command == "explain" else ()
    outcome = made.gmpipe(command, str(path), *RUN, *output)
    assert outcome.code == 1
    for part in (path.name, "HEIC", "convert", "JPEG"):
        assert part in outcome.err


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_damaged_exif_is_no_obstacle(made: Flow, tmp_path: Path, command: str) -> None:
    path = tmp_path / os.fsdecode(b"not-utf-8-\xff.jpg")
    draw_image(path)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1\0\x0fExif\0\0no TIFF" + content[2:])
    output = ("-o", str(tmp_path / "out.png")) if command == "explain" else ()
    outcome = made.gmpipe(command, str(path), *RUN, *output)
    assert outcome.code == 0, outcome.err
