"""The page's gallery: small pictures of test images, their regions, and what networks predict.

Letters: N images, M regions of an image, C labels, T best labels of a region, H size of a label's
node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.predictions import probabilities
from pipeline.evaluation.runs import deciding
from pipeline.heads.contract import Attribution, RegionBatch
from pipeline.heads.matching.network import GmMlic
from pipeline.learning.prediction import Scorer, shown_attribution
from pipeline.learning.splits import SplitData, open_split
from pipeline.machine import cores
from pipeline.report.folder import PICTURES, in_steps, packed, write_data
from pipeline.report.inputs import PageInputs, Phase, load_evaluated
from pipeline.report.photographs import about_photographs, with_its_suffix, write_pictures

BEST_LABELS = 5
"""T, how many labels are kept for each region."""

_BATCH = 64
_log = logging.getLogger(__name__)


def write_gallery(folder: Path, inputs: PageInputs, phase: Phase) -> dict[str, Any]:
    """Write pictures, regions, and what the first run of each variant and each entry predicts.

    Args:
        phase: as in `assemble.write_page`.

    Returns:
        what the page must know before it loads any of these.
    """
    split = shown_split(inputs, None)
    decided = deciding(inputs.evaluations)
    rows = {row["image_id"]: row for row in inputs.manifest.rows("test").to_pylist()}
    photographs = [rows[image_id] for image_id in split.image_ids]
    paths = [inputs.root / photograph["path"] for photograph in photographs]
    imported_to = inputs.root / "images" if inputs.source == "imported" else None
    if imported_to is not None:
        paths = [with_its_suffix(path) for path in paths]
    with phase("pictures", len(paths), "image") as on_images:
        sizes = write_pictures(paths, folder / PICTURES, threads=cores(), on_images=on_images)
    readable = np.asarray(sizes.all(axis=1))
    about = about_photographs(paths, readable, imported_to)
    if about.problem:
        _log.warning("%s", about.problem)
    for image in np.flatnonzero(~readable):
        sizes[image] = [photographs[image][name] or 0 for name in ("width", "height")]
    attributions: list[Attribution | None] = []
    regions = read_regions(split)
    write_images(folder, list(split.image_ids), sizes, readable, split.truth, regions)
    for number, variant in enumerate(inputs.variants):
        if variant not in inputs.runs:
            write_scores(folder, number, entry_scores(inputs, variant, split.image_ids))
            attributions.append(None)
            continue
        checkpoint = load_evaluated(inputs.runs[variant][0])
        used = shown_split(inputs, checkpoint.settings.regions)
        scorer = Scorer.of_checkpoint(checkpoint, inputs.runs[variant][0].name)
        with phase(f"scores of {variant}", len(used), "image") as on_images:
            write_scores(folder, number, region_scores(scorer, used, on_images))
        attributions.append(scorer.network.attribution)
    return {
        "images": len(split),
        "photographs": asdict(about),
        "classes": inputs.classes,
        "of": len(inputs.scores.image_ids),
        "seed": inputs.shown.evaluation.seed,
        # Of each network, in the order of the variants.
        "attributions": attributions,
        "decides": [variant in decided for variant in inputs.variants],
    }


def shown_split(inputs: PageInputs, regions: int | None) -> SplitData:
    """The test images of the gallery.

    Args:
        regions: how many of each image; None for all that the cache holds.
    """
    split = open_split(inputs.cache, inputs.manifest, "test", regions=regions)
    return split.take(chosen_images(len(split), inputs.images))


def chosen_images(images: int, wanted: int) -> NDArray[np.int64]:
    """Indices of the images to show: all of them, or a random sample that is always the same."""
    if images <= wanted:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).choice(images, wanted, replace=False))


@dataclass(frozen=True)
class ShownRegions:
    """The regions of N images, as the cache holds them.

    Attributes:
        boxes: (N, M, 4) float32, xyxy in [0,1] of the image.
        scores: (N, M) float32, the detector's scores, descending.
        classes: (N, M) int16, the detector's class numbers.
        count: (N,) int16, how many regions are real; the rest is padding.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int16]
    count: NDArray[np.int16]


def read_regions(split: SplitData) -> ShownRegions:
    """Read the regions of a split's images in view 0."""
    parts = [split.instances(images) for images in _batches(len(split))]
    boxes, scores, classes, mask = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("boxes", "scores", "classes", "mask")
    )
    count = mask.sum(dim=1).numpy().astype(np.int16)
    return ShownRegions(boxes.numpy(), scores.numpy(), classes.numpy(), count)


def _batches(images: int) -> list[NDArray[np.int64]]:
    return [np.arange(at, min(at + _BATCH, images)) for at in range(0, images, _BATCH)]


@dataclass(frozen=True)
class ShownScores:
    """What one network predicts for N images, and for each of their regions.

    Attributes:
        scores: (N, C) float32, probabilities for the image.
        winners: (N, C) int16, the region that says most for each label; -1 where that is the image
            as a whole.
        region_labels: (N, M, T) int16, the best labels of each region, best first. M is the number
            of regions that the network uses; padding has labels too. None for a network that does
            not tell regions apart.
        region_scores: (N, M, T) float32 in [0, 1], what the region says for these labels: their
            probabilities, or the weights by which the network reads it for them
            (`Head.attribution`); 0 for padding. None where ``region_labels`` is.
    """

    scores: NDArray[np.float32]
    winners: NDArray[np.int16]
    region_labels: NDArray[np.int16] | None
    region_scores: NDArray[np.float32] | None


def region_scores(
    scorer: Scorer, split: SplitData, on_images: Callable[[int], object] = lambda images: None
) -> ShownScores:
    """Run a network on a split in view 0.

    Args:
        on_images: called after each batch with its number of images.

    Raises:
        NotFinite, DamagedError: as `Scorer.outputs`.
    """
    batches_of_scores: list[tuple[Tensor, ...]] = []
    best = min(BEST_LABELS, len(scorer.names))
    with closing(scorer.outputs(split)) as batches:
        for _, output in batches:
            parts = [output.image.sigmoid(), output.winners().short()]
            said = shown_attribution(scorer.network, output)
            if said is not None:
                top: Any = said.topk(best, dim=-1)
                parts += [top.indices.short(), top.values]
            batches_of_scores.append(tuple(part.cpu() for part in parts))
            on_images(len(output.image))
    scores, winners, *of_regions = (
        torch.cat(column).numpy() for column in zip(*batches_of_scores, strict=True)
    )
    labels, values = of_regions or (None, None)
    return ShownScores(scores, winners, labels, values)


def entry_scores(inputs: PageInputs, name: str, image_ids: Sequence[str]) -> ShownScores:
    """What an entry predicts for N images; no region of theirs says anything about it."""
    rows = {image_id: row for row, image_id in enumerate(inputs.scores.image_ids)}
    logits = inputs.scores.logits[name][0][[rows[image_id] for image_id in image_ids]]
    winners = np.full(logits.shape, -1, dtype=np.int16)
    return ShownScores(probabilities(logits).astype(np.float32), winners, None, None)


def mean_label_nodes(
    scorer: Scorer, split: SplitData, on_images: Callable[[int], object] = lambda images: None
) -> NDArray[np.float32]:
    """Average the label nodes after the last convolution module over the images.

    Args:
        scorer: of GM-MLIC, the only head that has such nodes.
        split: N images, taken in view 0.
        on_images: as in `region_scores`.

    Returns:
        (C, H).

    Raises:
        NotFinite, DamagedError: as `Scorer.outputs`.
    """
    network = scorer.network
    assert isinstance(network, GmMlic)

    def compute(batch: RegionBatch) -> tuple[Tensor, Tensor]:
        nodes = network.label_nodes(batch, scorer.labels.vectors)
        return nodes, nodes.isfinite().all(dim=-1)

    total = torch.zeros((), dtype=torch.float64, device=scorer.device)
    with closing(scorer.over(split, compute)) as batches:
        for nodes in batches:
            total = total + nodes.double().sum(dim=0)
            on_images(len(nodes))
    mean: NDArray[np.float32] = (total / len(split)).float().cpu().numpy()
    return mean


def write_images(
    folder: Path,
    image_ids: list[str],
    sizes: NDArray[np.int32],
    pictures: NDArray[np.bool_],
    truth: NDArray[np.int8],
    regions: ShownRegions,
) -> None:
    """Write what is the same for every network.

    Args:
        folder: of the page.
        image_ids: N.
        sizes: (N, 2) width and height, in the ratio of the picture; 0 if unknown.
        pictures: (N,) whether there is a picture.
        truth: (N, C) in {1, 0, -1}.
        regions: of the N images.
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


def write_scores(folder: Path, number: int, shown: ShownScores) -> None:
    """Write what one network predicts; for regions in a script of its own, which is loaded later.

    There is no such script for a network that does not tell regions apart.

    Args:
        folder: of the page.
        number: of the network among those that the page shows, from 0.
    """
    write_data(
        folder,
        f"scores-{number}",
        {
            "scores": packed(in_steps(shown.scores)),
            "winners": packed(shown.winners),
        },
    )
    if shown.region_labels is not None and shown.region_scores is not None:
        write_data(
            folder,
            f"regions-{number}",
            {
                "labels": packed(shown.region_labels.astype(np.uint16)),
                "scores": packed(in_steps(shown.region_scores)),
            },
        )
