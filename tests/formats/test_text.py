r"""Texts of the user are made safe, and nothing of them is lost."""

from __future__ import annotations

import os
import re
import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.formats.text import (
    counted,
    csv_cell,
    legible,
    markdown,
    markdown_table,
    printable,
    printable_json,
    printable_lines,
    storable,
)

NAMES = st.binary(max_size=12).map(os.fsdecode)
"""File names as Python reads them; bytes that are not UTF-8 are lone surrogates."""
TEXTS = st.text(max_size=20) | st.text("\\x5cf0=+-@\t\r'_*|<&$`\n\x1b\x00\u202e", max_size=12)


def original(text: str) -> bytes:
    r"""Replace each `\xHH` by its byte, as the documentation says."""
    return re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), text.encode())


@pytest.mark.parametrize("safe", [storable, printable])
@given(NAMES | TEXTS)
def test_a_name_can_be_restored(safe: object, name: str) -> None:
    assert callable(safe)
    assert original(safe(name)) == os.fsencode(name)


@given(NAMES | TEXTS)
def test_what_is_printed_is_one_line_of_valid_xml(name: str) -> None:
    shown = printable(name)
    assert shown.isascii() or not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown)
    assert len(f"{shown}.".splitlines()) == 1
    element = ElementTree.Element("text")
    element.text = shown
    [parsed] = ElementTree.fromstring(b"<a>" + ElementTree.tostring(element) + b"</a>")
    assert (parsed.text or "") == shown


@pytest.mark.parametrize(
    ("name", "stored", "printed"),
    [
        ("plain name.jpg", "plain name.jpg", "plain name.jpg"),
        ("a\udcffb", r"a\xffb", r"a\xffb"),
        (r"a\xffb", r"a\x5cxffb", r"a\x5cxffb"),
        (r"C:\new", r"C:\new", r"C:\new"),
        ("a\nb\tc\x1b[31m", "a\nb\tc\x1b[31m", r"a\x0ab\x09c\x1b[31m"),
        ("a\u202eb\u2028", "a\u202eb\u2028", r"a\xe2\x80\xaeb\xe2\x80\xa8"),
        ("\ud800", r"\xed\xa0\x80", r"\xed\xa0\x80"),
        ("نص 猫 👩\u200d🚀", "نص 猫 👩\u200d🚀", "نص 猫 👩\u200d🚀"),
    ],
)
def test_escapes(name: str, stored: str, printed: str) -> None:
    assert storable(name) == stored
    assert printable(name) == printed


def test_messages_keep_their_lines_and_escapes() -> None:
    assert printable_lines("one\ntwo\x1b[2J \udcff \\xff") == "one\ntwo\\x1b[2J \\xff \\xff"


def test_long_names_are_cut_in_figures() -> None:
    assert legible("x" * 32) == "x" * 32
    assert legible("x" * 33) == "x" * 31 + "…"


@pytest.mark.parametrize("mark", ["=", "+", "-", "@", "\t", "\r"])
def test_a_spreadsheet_computes_no_text(mark: str) -> None:
    assert csv_cell(f"{mark}cmd|' /C calc'!A0") == f"'{mark}cmd|' /C calc'!A0"
    assert csv_cell(f"a{mark}b") == f"a{mark}b"


def test_numbers_are_no_formulas() -> None:
    for number in ("-1", "+0.5", "-1e-3", "-inf"):
        assert csv_cell(number) == number
    assert csv_cell("-1+1") == "'-1+1"


@given(TEXTS, TEXTS)
def test_two_texts_are_never_the_same_cell(one: str, other: str) -> None:
    assert (csv_cell(one) == csv_cell(other)) == (one == other)
    assert csv_cell(f"'{one}") != csv_cell(one)


@given(TEXTS)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    table = markdown_table(["label", "x"], [[text, "end"]])
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(table)
    root = ElementTree.fromstring(html)
    cells = ["".join(cell.itertext()) for cell in root.iter("td")]
    shown = printable(text)
    # Markdown removes blanks at the ends, and tabulate too.
    assert [" ".join(cell.split()) for cell in cells] == [" ".join(shown.split()), "end"]
    assert {element.tag for element in root.iter()} <= {"table", "thead", "tbody", "tr", "th", "td"}


def test_markup_and_entities_are_escaped() -> None:
    assert markdown("<script>|`x`|</script>") == r"&lt;script>\|\`x\`\|&lt;/script>"
    assert markdown("&amp; AT&T &#60;") == "&amp;amp; AT&T &amp;#60;"
    assert markdown("traffic_light _x_ $5$") == r"traffic_light \_x\_ \$5\$"


def test_json_is_printable_inside_too() -> None:
    value = {"a\n": ["\x1b", 1, None, ("\udcff", {"b": "c\t"})]}
    expected = {r"a\x0a": [r"\x1b", 1, None, [r"\xff", {"b": r"c\x09"}]]}
    assert printable_json(value) == expected


def test_one_thing_has_no_s() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
