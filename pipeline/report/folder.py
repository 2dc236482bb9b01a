"""The folder of a page: it opens from disk, without a server or network.

A page that was opened from disk can't fetch files, so its data are scripts: each of them calls
`gmpipe.receive(name, value)`. Large arrays travel as base64 of their bytes.

    index.html      the file to open
    assets/         styles and scripts, the same for every data set
    data/           the data that they show
    pictures/       small pictures of the test images, and in doubts/ of those with doubtful labels
    figures/        SVG and PNG
    tables/         CSV, and results.md
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.text import printable_json

PAGE = "index.html"
DATA, FIGURES, PICTURES, TABLES = "data", "figures", "pictures", "tables"

_FIGURE = (
    "average-precision|gains-and-losses|learning-curves|precision-recall|calibration|co-occurrence"
    "|label-map|sweep-[A-Za-z0-9_-]+"
)
PAGE_FILE = re.compile(
    r"index\.html"
    r"|assets/(core\.js|page\.js|tables\.js|gallery\.js|doubts\.js|page\.css)"
    r"|data/(overview|curves|times|images|scores-\d+|regions-\d+)\.js"
    r"|pictures/(doubts/)?\d+\.jpg"
    rf"|figures/({_FIGURE})\.(svg|png)"
    rf"|tables/({_FIGURE}|results|labels)\.csv|tables/results\.md"
)
"""The files of a page, by their path in its folder. All others are somebody else's."""

_STEPS = 65534
"""A probability travels as a whole number of this many steps. It is even, so 0.5 is one of them."""


def write_frame(folder: Path) -> None:
    """Put index.html and its assets into an empty folder, and make the folders for the rest."""
    with as_file(files("pipeline.report") / "assets") as assets:
        shutil.copytree(assets, folder / "assets")
    (folder / "assets" / PAGE).rename(folder / PAGE)
    for name in (DATA, FIGURES, TABLES):
        (folder / name).mkdir()


def write_data(folder: Path, name: str, value: Any) -> None:
    """Write a JSON value that the page's scripts find under ``name``, with printable texts."""
    text = json.dumps(printable_json(value), separators=(",", ":"), allow_nan=False)
    (folder / DATA / f"{name}.js").write_text(f"gmpipe.receive({json.dumps(name)},{text});\n")


def packed(array: NDArray[Any]) -> dict[str, Any]:
    """An array of integers as a JSON value: type, shape, and base64 of its little-endian bytes."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "type": array.dtype.name,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


def in_steps(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Probabilities as uint16. Exactly those over 0.5 are over half of the steps."""
    steps = np.rint(probabilities.astype(np.float64) * _STEPS).astype(np.uint16)
    over = probabilities > 0.5
    steps[over] = np.maximum(steps[over], _STEPS // 2 + 1)
    return steps
