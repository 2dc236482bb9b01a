"""The project's own params.yaml, and copies of it with changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from flows import ROOT
from ruamel.yaml import YAML

SHIPPED = ROOT / "params.yaml"
MISSING = object()


def changed_params(folder: Path, changes: dict[str, Any]) -> Path:
    """Write the shipped params.yaml with dotted keys set, or removed where they are `MISSING`."""
    raw = YAML(typ="safe").load(SHIPPED)
    for key, value in changes.items():
        *path, last = key.split(".")
        block = raw
        for part in path:
            block = block.setdefault(part, {})
        if value is MISSING:
            del block[last]
        else:
            block[last] = copy.deepcopy(value)
    file = folder / "params.yaml"
    with file.open("w") as stream:
        YAML(typ="safe").dump(raw, stream)
    return file
