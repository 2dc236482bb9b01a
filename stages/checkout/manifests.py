"""The manifest of a data set and the boxes of its regions, for every stage that reads them.

If the files that the manifest was made from have changed since, a note says so. It is no error,
because the manifest is sound. To stay cheap, only files are compared, not folders such as VOC's
10,000 annotations, and no file above `_LARGEST`. `prepare` compares all.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal

from pipeline.datasets.manifest import Manifest, read_boxes, read_manifest
from pipeline.errors import (
    DamagedError,
    GmpipeError,
    InputError,
    MismatchError,
    MissingError,
    advising,
)
from pipeline.files import exists, sha256_file
from pipeline.formats.text import first_few
from pipeline.regions.given_boxes import GivenBoxes, annotated_boxes, read_box_file
from pipeline.settings import TREATMENTS, Treatment
from pipeline.shards.schema import Recipe
from stages.checkout.layout import boxes_file, data_root, manifest_file
from stages.checkout.params import Request
from stages.console.messages import note

_log = logging.getLogger(__name__)

_LARGEST = 20_000_000  # bytes, which are hashed in some 20 ms

HashName = Literal["train_sha256", "test_sha256"]
"""A hash of a manifest's labels, which runs hold."""


def dataset_manifest(dataset: str) -> Manifest:
    """Read the manifest that `prepare` wrote for a data set; note if its sources have changed.

    Raises:
        MissingError, DamagedError: as `read_manifest`. The remedy names the command that writes it.
        MismatchError: it is the manifest of another data set.
    """
    path = manifest_file(dataset)
    prepare = f"Run `gmpipe prepare --dataset {dataset}`."
    with advising(prepare, MissingError, DamagedError):
        manifest = read_manifest(path)
    if manifest.dataset != dataset:
        raise MismatchError(
            f"{path} is the manifest of the data set {manifest.dataset!r}, expected {dataset!r}.",
            prepare,
        )
    _log.info("read %s: %d images, %d labels", path, len(manifest), len(manifest.vocabulary))
    if changed := _changed_sources(manifest):
        note(
            f"{changed[0]} has changed since {path} was made from it"
            f"{f', and {len(changed) - 1} more files' if len(changed) > 1 else ''}. To use what it "
            f"holds now, run `gmpipe prepare --dataset {dataset}` first."
        )
    return manifest


def changed_treatment(manifest: Manifest, name: HashName, found: str) -> str | None:
    """Say which settings of difficult labels changed since a run was made, if nothing else did.

    Args:
        manifest: of today.
        name: of the hash that differs.
        found: that hash of the run.

    Returns:
        e.g. "`prepare.voc2007.difficult.train` was `ignored` and is `positive` now"; None if the
        hash differs for another reason.
    """
    of_hash = {"test"} if name == "test_sha256" else {"train", "val"}
    now = {split: own for split, own in manifest.treatments.items() if split in of_hash}
    for treatments in product(TREATMENTS, repeat=len(now)):
        before: dict[str, Treatment] = dict(zip(now, treatments, strict=True))
        difficult = manifest.difficult.model_copy(update=before)
        if getattr(replace(manifest, difficult=difficult), name) == found:
            return ", and ".join(
                f"`prepare.{manifest.dataset}.difficult.{split}` was `{treatment}` and is "
                f"`{now[split]}` now"
                for split, treatment in before.items()
                if treatment != now[split]
            )
    return None


def _changed_sources(manifest: Manifest) -> list[Path]:
    """The files that a manifest was made from and that have another content now.

    Files that are gone or can't be read are left out: nothing but `prepare` needs them.
    """
    changed = []
    for name, digest in manifest.sources.items():
        path = data_root(manifest.dataset) / name
        with suppress(GmpipeError, OSError):
            is_small = path.is_file() and path.stat().st_size <= _LARGEST
            if is_small and sha256_file(path) != digest:
                changed.append(path)
    return changed


def dataset_boxes(request: Request, manifest: Manifest) -> GivenBoxes | None:
    """Read the boxes that `extract.DATASET.boxes` asks for; None where the detector finds them.

    A note says which images have none.

    Raises:
        InputError: the data set has no boxes, or as `read_box_file`.
        DamagedError: its boxes can't be read.
    """
    boxes = _given_boxes(request, manifest)
    if boxes is None:
        return None
    image_ids = manifest.table.column("image_id").to_pylist()
    without = [repr(image_id) for image_id in image_ids if image_id not in boxes.images]
    if without:
        note(
            f"{len(without)} of {len(image_ids)} images of {request.dataset} have no box: "
            f"{first_few(without)}. The only region of such an image is the whole view."
        )
    return boxes


def _given_boxes(request: Request, manifest: Manifest) -> GivenBoxes | None:
    dataset, settings = request.dataset, request.extract
    if settings.boxes_file is not None:
        root = data_root(dataset)
        return read_box_file(root / settings.boxes_file, manifest, root)
    if settings.boxes == "detector":
        return None
    others = (
        f"Set `extract.{dataset}.boxes` in params.yaml to `detector`; or set it to `file`, and "
        "`boxes_file` to a file of boxes."
    )
    path = boxes_file(dataset)
    if not exists(path):
        raise InputError(
            f"`extract.{dataset}.boxes` is `annotations`, but {dataset} has no boxes: there is no "
            f"{path}. Only the sources `coco`, `yolo` and `scenes` have them, and `voc` with "
            "`labels: annotations`.",
            others,
        )
    with (
        advising(f"Run `gmpipe prepare --dataset {dataset}`.", DamagedError),
        advising(others, InputError),
    ):
        image_ids = manifest.table.column("image_id").to_pylist()
        return annotated_boxes(read_boxes(path, image_ids), manifest)


def check_boxes_unread(request: Request) -> None:
    """Refuse boxes for a data set whose regions are imported.

    Raises:
        InputError: its settings ask for them.
    """
    dataset, boxes = request.dataset, request.extract.boxes
    if boxes != "detector":
        raise InputError(
            f"`extract.{dataset}.boxes` is `{boxes}`, but the regions of {dataset} are imported: "
            "no detector is known that could describe other ones.",
            f"Remove `boxes` from `extract.{dataset}` in params.yaml, or set `source` in "
            f"`detector.{dataset}`.",
        )


def given_classes(request: Request, manifest: Manifest, recipe: Recipe) -> tuple[str, ...] | None:
    """Name the class numbers of regions at given boxes.

    Args:
        request, manifest: of the data set.
        recipe: of the regions.

    Returns:
        the name of every number; None if the boxes have no names, are others now, or can't be
        read, or if a detector found the regions.
    """
    with suppress(GmpipeError, OSError):
        boxes = _given_boxes(request, manifest)
        if boxes is not None and boxes.sha256 == recipe.get("boxes_sha256"):
            return boxes.classes
    return None
