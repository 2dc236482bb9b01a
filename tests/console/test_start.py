"""Commands that compute nothing start without torch, which takes a second or more to import."""

from __future__ import annotations

from pathlib import Path

from flows import ROOT, script, write_params

COMMANDS = (
    ("prepare",),
    ("prepare", "--check"),
    ("runs", "list"),
    ("clean", "tiny"),
    ("train", "--help"),
)
CODE = """
import sys
from pathlib import Path
from stages.checkout.params import load_params
from stages.cli.main import main

load_params(file=Path({root!r}) / "params.yaml")
assert "torch" not in sys.modules, "reading params.yaml"
for command in {commands!r}:
    sys.argv = ["gmpipe", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
    assert "torch" not in sys.modules, command
"""


def test_commands_that_compute_nothing_do_not_import_torch(tmp_path: Path) -> None:
    write_params(tmp_path)
    script(tmp_path, CODE.format(root=str(ROOT), commands=COMMANDS))


def test_completion_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    code = CODE.format(root=str(ROOT), commands=[()])
    for typed in ("gmpipe train --variant c", "gmpipe train --set train.demo.network.h"):
        words = {"COMP_WORDS": typed, "COMP_CWORD": "3", "_GMPIPE_COMPLETE": "bash_complete"}
        said = script(tmp_path, code, **words).stdout
        assert "plain," in said
