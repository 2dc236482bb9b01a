"""The limits that keep the house readable: the size of a file, of a function, of a folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "stages", "tests", "benchmarks", "docs")
LONGEST_FILE = 500
LONGEST_FUNCTION = 60
"""Lines, from `def` to the last one; decorators don't count."""
FULLEST_FOLDER = 12
"""Files, without `__init__.py`."""

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
FULL_FOLDERS: dict[str, str] = {}
"""Exceptions, each with its reason."""


def sources() -> Iterator[Path]:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_is_too_long() -> None:
    code = [path for path in sources() if path.suffix in (".py", ".js", ".css", ".html")]
    assert len(code) > 100
    long = {named(path) for path in code if len(path.read_text().splitlines()) > LONGEST_FILE}
    assert long == LONG_FILES.keys()


def test_no_function_is_too_long() -> None:
    long = {
        f"{named(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in sources()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert long.keys() == LONG_FUNCTIONS.keys(), long


def test_no_folder_is_too_full() -> None:
    files: dict[str, int] = {}
    for path in sources():
        if path.name == "__init__.py":
            continue
        folder = named(path.parent)
        files[folder] = files.get(folder, 0) + 1
    full = {folder for folder, count in files.items() if count > FULLEST_FOLDER}
    assert full == FULL_FOLDERS.keys()
