"""YAML that a user wrote holds plain values, and every other one is refused in words of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import refused

from pipeline.errors import InputError
from stages.checkout.params import load_params, read_params
from stages.checkout.yaml_text import load_yaml

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines whose lists have 9**9 entries."""

CHAINED = "z0: &z0 [x]\n" + "".join(f"z{n}: &z{n} [*z{n - 1}]\n" for n in range(1, 3000))

ODD = {
    "deep flow": ("a: " + "[" * 800, "deep"),
    "deep closed flow": ("a: " + "[" * 100 + "]" * 100, "deep"),
    "deep blocks in braces": ("a: " + "{a: " * 300 + "}" * 300, "deep"),
    "deep blocks": ("\n".join(" " * depth + "a:" for depth in range(300)), "deep"),
    "21 levels": ("a: " + "[" * 21 + "]" * 21, "deep"),
    "chained aliases": (CHAINED, "deep"),
    "in itself": ("a: &x [*x]", "deep"),
    "section twice": ("a:\n  x: 1\nb: 2\na:\n  y: 1", "`a` is defined twice, lines 1 and 4"),
    "key twice": ("a: 1\nb:\n  c: 1\n  d: 0\n  c: 2", "`c` is defined twice, lines 3 and 5"),
    "merge twice": ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x", "lines 3 and 4", "`<<`"),
    "number twice": ("1: a\ntrue: b", "line 2", "`True`"),
    "lines in a key": ("? |\n  x\n  y\n: 1\n? |\n  x\n  y\n: 2", "lines 1 and 5", "`x y`"),
    "twice in a list of aliases": (
        "a: &a [x, *a]\nb: [*a, {c: 1,\n  c: 2}]",
        "`c` is defined twice, lines 2 and 3",
    ),
    "anchor twice": ("a: &x 1\nb: &x 2", "`&x` is defined twice, lines 1 and 2"),
    "key of lists": ("? {a: b}\n: 1", "line 1"),
    "tuple as key": ("? [a, b]\n: 1", "tuple", "quotes"),
    "no anchor": ("a: *x", "line 1, column 4", "'*x'", "quotes"),
    "anchor without a name": ("a: & b", "line 1, column 5", "quotes"),
    "double quote": ('a: "b\nc: 1\n', "quote", "line 1, column 4"),
    "single quote": ("a: 1\nb: 'c\nd: 1\n", "quote", "line 2, column 4"),
    "text after quotes": ("a: 'it's'", "line 1, column 8", "quotes"),
    "list not closed": ("a: [b, c\nd:\n  e: 1", "line 2, column 2", "`]`", "line 1, column 4"),
    "list not closed, at the end": ("a: [1, 2\n", "`]`", "line 1, column 4"),
    "braces not closed": ("a: {b: 1\nc: 2", "`}`", "line 1, column 4"),
    "bracket too many": ("a: [1]]", "line 1, column 7", "`]`"),
    "no colon": ("a: [b]\nprepare\nc: 1", "`prepare`", "line 2, column 1", "`:`"),
    "no blank": ("a:\n  epochs:1\n  b: 2", "line 3", "`epochs:`", "blank"),
    "indented more": ("a:\n  b: 1\n    c: 2", "line 3, column 6", "indented more"),
    "indented less": ("a:\n    b:\n      c: 1\n   d: 2", "line 4, column 4", "indented"),
    "key after a list": ("a:\n  - b\n  c: 1", "line 3, column 3", "line 2, column 3"),
    "entry after a key": ("a: 1\n- b", "line 2, column 1", "entry"),
    "colon in a value": ("a: b: c", "line 1, column 5", "quotes"),
    "no-break space": ("a:\u00a01\nb: 1", "line 2", "U+00A0"),
    "at": ("a: @b", "line 1, column 4", "`@`", "quotes"),
    "backslash": ('a: "C:\\data"', "line 1, column 8", "'d'", "single quotes"),
    "folded": ("a: >x", "line 1, column 5", "`>`"),
    "directive": ("%YAML 3.0\n---\na: 1", "line 1", "`%`"),
    "line breaks of other systems": ("a: 1\r  b: 2\u2028", "line 2", "indented more"),
    "merge of a number": ("a: {<<: 5}", "line 1", "`<<`"),
    "tab": ("a:\n\tb: 1", "line 2, column 1", "tab"),
    "binary": ("a: !!binary aGk=", "`a`", "bytes"),
    "bad binary": ("a: !!binary x", "line 1"),
    "binary key": ("!!binary aGk=: 1", "bytes"),
    "python": ("a: !!python/name:os.system", "line 1", "python/name:os.system"),
    "set": ("datasets: !!set {demo, b}", "`datasets`", "set"),
    "date": ("a: 2024-01-01", "`a`", "date", "quotes"),
    "date as key": ("a:\n  2024-01-01: x", "`a`", "date"),
    "no date": ("a: 2024-13-45", "month"),
    "own tag": ("a: !foo 1", "line 1", "foo"),
    "no integer": ("a: !!int x", "'x'"),
    "empty integer": ("a: !!int ''", "YAML"),
    "no truth": ("a: !!bool x", "'x'"),
    "no character": ('a: "\\UFFFFFFFF"', "YAML"),
    "half a character": ('a: "\\ud800"', "`a`", "surrogate"),
    "null byte in quotes": ('a: "x\\0y"', "`a`", "null byte"),
    "half a character in a key": ('"\\ud800": 1', "surrogate"),
    "long number": ("a: " + "9" * 5000, "YAML"),
    "long hexadecimal": ("a: 0x" + "f" * 5000, "`a`", "20000 bits"),
    "65 bits": ("a: [1, 9223372036854775808]", "`a.1`", "64 bits", "9223372036854775807"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
    "null byte": ("a: 1\nb: \0", "line 2, column 4", "U+0000"),
    "escape": ("a: \x1b[2J", "line 1, column 4", "U+001B"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_yaml_is_refused(tmp_path: Path, name: str) -> None:
    text, *parts = ODD[name]
    file = tmp_path / "params.yaml"
    file.write_text(text, newline="")
    with pytest.raises(InputError) as caught:
        read_params(file)
    assert [part for part in (str(file), *parts) if part not in str(caught.value)] == []
    foreign = (
        "ruamel",
        "constructor",
        "unicode string",
        "set_int_max",
        "stream",
        "scalar",
        "while ",
    )
    for word in foreign:
        assert word not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_aliases_repeat_is_neither_followed_nor_shown(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(ALIASES.replace("i: &i", "datasets: &i"))
    with pytest.raises(InputError, match="datasets") as caught:
        load_params(file=file)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * 20 + "]" * 20, None),
        ("{a: &x [1, 2.5, null], b: *x}", {"a": [1, 2.5, None], "b": [1, 2.5, None]}),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775807", -(2**63) + 1),
        ("yes", "yes"),
        ("", None),
        ("{a: &a {x: 1}, b: {<<: *a, y: 2}}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("犬: cat 🐈", {"犬": "cat 🐈"}),
    ],
)
def test_plain_values_are_read(text: str, value: object) -> None:
    assert value is None or load_yaml(text, "here", "") == value
    load_yaml(text, "here", "")


@pytest.mark.parametrize("value", ["[" * 99, "{a: 1, a: 2}", "!!set {a}", "9" * 30, "!!int x"])
def test_odd_values_of_overrides(tmp_path: Path, value: str) -> None:
    with refused(InputError, f"--set train.demo.epochs={value[:5]}"):
        load_params([f"train.demo.epochs={value}"])
