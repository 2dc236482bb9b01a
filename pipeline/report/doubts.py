"""The page's section on doubtful labels: the first of each kind, with their photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.doubts.listing import DoubtList, Given
from pipeline.machine import cores
from pipeline.report.folder import PICTURES
from pipeline.report.inputs import PageInputs, Phase
from pipeline.report.photographs import with_its_suffix, write_pictures

SHOWN = 24
"""How many doubtful labels of each kind the page shows at most."""

_GIVEN: tuple[Given, ...] = ("present", "absent")


def write_doubt_pictures(folder: Path, inputs: PageInputs, phase: Phase) -> dict[str, Any] | None:
    """Write the pictures of the most doubtful labels.

    Args:
        folder: of the page, in which the gallery's pictures lie already.
        phase: as in `assemble.write_page`.

    Returns:
        what the page shows of each kind, and sentences on where it comes from; None if nobody has
        looked for doubtful labels.
    """
    found = inputs.doubts
    if found is None:
        return None
    kinds = {given: found.of(given, SHOWN) for given in _GIVEN}
    rows = [row for shown in kinds.values() for row in shown]
    paths = [inputs.root / row["path"] for row in rows]
    if inputs.source == "imported":
        paths = [with_its_suffix(path) for path in paths]
    pictures = Path(PICTURES, "doubts")
    with phase("pictures of doubtful labels", len(paths), "image") as on_images:
        sizes = write_pictures(paths, folder / pictures, threads=cores(), on_images=on_images)
    for number, (row, size) in enumerate(zip(rows, sizes.tolist(), strict=True)):
        row["picture"] = f"{pictures.as_posix()}/{number}.jpg" if all(size) else None
        row["size"] = size
    return {
        "about": _about(found),
        **{given: {"count": found.count(given), "shown": kinds[given]} for given in _GIVEN},
    }


def _about(found: DoubtList) -> list[str]:
    sentences = [
        f"Each image of the training split was scored by a network ({found.variant}) that was not "
        f"trained on it, images of the other splits by the mean of {found.folds} such networks, or "
        "by one if a copy of the image is in the training split. "
        f"Of {found.judged:,} labels of images, {len(found):,} are doubtful: the networks are "
        "confident of the opposite. Many of them are right all the same: look before you change "
        "one.",
        f"The numbers are the places in the list, which is runs/{found.dataset}/doubts/doubts.csv.",
    ]
    if found.across:
        groups = "; ".join(" = ".join(group) for group in found.across)
        sentences.append(f"Photographs that are the same file in different splits: {groups}.")
    if found.not_judged:
        sentences.append(f"Not judged, for lack of images: {', '.join(found.not_judged)}.")
    return sentences
