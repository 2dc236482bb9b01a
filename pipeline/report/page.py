"""The page in reports/<dataset>/: a folder that opens from disk, without a server or network.

A page that was opened from disk can't fetch, so its data are scripts: each calls
`gmpipe.receive(name, value)`. Large arrays travel as base64 of their bytes.

    index.html      what to open
    assets/         styles and scripts, the same for every data set
    data/           what they show
    pictures/       small pictures of the test images
    figures/        SVG and PNG
    tables/         CSV, and results.md

Letters: N images, M regions of an image, C labels, T best labels of a region.
"""

from __future__ import annotations

import base64
import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.gallery import ShownRegions, ShownScores

DATA, FIGURES, PICTURES, TABLES = "data", "figures", "pictures", "tables"

_STEPS = 65534
"""A probability travels as a whole number of this many steps: even, so that 0.5 is one of them."""


def write_frame(folder: Path) -> None:
    """Put index.html and its assets into an empty folder, and make the folders for the rest."""
    with as_file(files("pipeline.report") / "assets") as assets:
        shutil.copytree(assets, folder / "assets")
    (folder / "assets/index.html").rename(folder / "index.html")
    for name in (DATA, FIGURES, TABLES):
        (folder / name).mkdir()


def write_data(folder: Path, name: str, value: Any) -> None:
    """Write a JSON value where the page's scripts find it under ``name``."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
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
    """Probabilities as uint16. What is over 0.5 stays over it, and nothing else does."""
    steps = np.rint(probabilities.astype(np.float64) * _STEPS).astype(np.uint16)
    over = probabilities > 0.5
    steps[over] = np.maximum(steps[over], _STEPS // 2 + 1)
    return steps


def write_images(
    folder: Path,
    image_ids: list[str],
    sizes: NDArray[np.int32],
    pictures: NDArray[np.bool_],
    truth: NDArray[np.int8],
    regions: ShownRegions,
) -> None:
    """What is the same for every network.

    Args:
        image_ids: N.
        sizes: (N, 2) width and height, whose ratio is that of the picture; 0 if unknown.
        pictures: (N,) whether there is a picture.
        truth: (N, C) in {1, 0, -1}.
        regions: theirs.
    """
    write_data(
        folder,
        "images",
        {
            "ids": image_ids,
            "sizes": packed(sizes.astype(np.int32)),
            "pictures": packed(pictures.astype(np.uint8)),
            "truth": packed(truth.astype(np.int8)),
            "boxes": packed(in_steps(regions.boxes)),
            "scores": packed(in_steps(regions.scores)),
            "classes": packed(regions.classes.astype(np.int16)),
            "count": packed(regions.count.astype(np.int16)),
        },
    )


def write_scores(folder: Path, place: int, found: ShownScores) -> None:
    """What one network says; of the regions in a script of its own, which is wanted later.

    Args:
        place: of the network among those that the page shows.
    """
    write_data(
        folder,
        f"scores-{place}",
        {
            "scores": packed(in_steps(found.scores)),
            "winners": packed(found.winners.astype(np.uint16)),
        },
    )
    write_data(
        folder,
        f"regions-{place}",
        {
            "labels": packed(found.region_labels.astype(np.uint16)),
            "scores": packed(in_steps(found.region_scores)),
        },
    )
