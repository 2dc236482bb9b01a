"""How well heads know a label from its context: scores without the regions that show it best.

    python -m benchmarks.context --dataset imported --variants full,max-pool,csra --seeds 0,1,2

It reads runs that `gmpipe train` made, and trains nothing. Each test image is scored again without
each of its regions, and without all others whose IoU with that one is over `--overlap`. A label's
second score is the one without its best region, the argmax of the head's attribution. The table has
the mAP of three kinds of scores, and the percentage of them for which no region was left:

- `all regions`: the scores as `gmpipe evaluate` gives them;
- `own hidden`: each head loses its own best region; heads without attribution have none;
- `same hidden`: all heads lose the best region of `--reference`, in its run of the same seed.

Every image has at least one region: one in which a detector finds nothing has the whole view, with
score 0 and class 0. That stands in where no region is left, with the mean feature of the training
regions, since the whole view's own feature would show what is hidden. For the same reason the table
marks heads that read this feature: hidden regions are hidden from them only as regions.

It prints the table, one of the AP of each label (both with the spread over the seeds) and, last, a
line of JSON with the numbers of each seed.

Letters: N test images, B images of a batch, M regions, C labels, D feature size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.errors import InputError
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.tables import cell
from pipeline.heads.contract import RegionBatch
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import SplitData, open_split
from pipeline.settings import TrainSettings
from stages.checkout.params import Request, read_request
from stages.checkout.plans import open_inputs, plan_run, read_checkpoint
from stages.evaluate import check_same_inputs

KINDS = ("all regions", "own hidden", "same hidden")


class Trained(NamedTuple):
    """A trained run, and the test images as it reads them."""

    settings: TrainSettings
    scorer: Scorer
    images: SplitData


Row = dict[str, Any]
"""The numbers of one kind of scores of a run, in percent: mAP, AP by label, and `nothing left`."""


def open_run(request: Request, variant: str, seed: int) -> Trained:
    """Open a run as `gmpipe evaluate` does."""
    plan = plan_run(request, variant, seed)
    checkpoint = read_checkpoint(plan)
    manifest, cache, vectors = open_inputs(plan.dataset, checkpoint.settings)
    check_same_inputs(plan, checkpoint, manifest, cache, vectors)
    images = open_split(cache, manifest, "test", regions=checkpoint.settings.regions)
    scorer = Scorer.of_checkpoint(checkpoint, str(plan.folder))
    return Trained(checkpoint.settings, scorer, images)


def first_scores(scorer: Scorer, images: SplitData) -> tuple[np.ndarray, np.ndarray | None]:
    """Score the images with all of their regions.

    Returns:
        (N, C) logits; and (N, C) each label's best region, the first of those that tie, or None for
        a head that does not tell regions apart.
    """
    logits, best = [], []
    with closing(scorer.outputs(images)) as batches:
        for batch, output in batches:
            logits.append(output.image.cpu().numpy())
            if output.regions is not None:
                said = output.regions.masked_fill(~batch.mask[..., None], -torch.inf)
                best.append(said.argmax(dim=1).cpu().numpy())
    return np.concatenate(logits), np.concatenate(best) if best else None


def scores_without_each(
    scorer: Scorer, images: SplitData, overlap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Score the images without each of their regions and what overlaps it.

    Returns:
        (N, M, C) logits without region m; and (N, M) bool, where no region was left.
    """

    def compute(batch: RegionBatch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        feature = scorer.network.inputs.feature_mean
        logits, empty = [], []
        for region in range(batch.mask.shape[1]):
            left, is_empty = without(batch, region, overlap, feature)
            logits.append(scorer.network(left, scorer.labels).image)
            empty.append(is_empty)
        stacked = torch.stack(logits, dim=1)
        return (stacked, torch.stack(empty, dim=1)), stacked.isfinite().all(dim=1)

    with closing(scorer.over(images, compute)) as batches:
        found = [(logits.cpu().numpy(), empty.cpu().numpy()) for logits, empty in batches]
    logits, empty = zip(*found, strict=True)
    return np.concatenate(logits), np.concatenate(empty)


def without(
    batch: RegionBatch, region: int, overlap: float, feature: Tensor
) -> tuple[RegionBatch, Tensor]:
    """Hide a region of each image, and those whose IoU with it is over ``overlap``.

    Returns:
        What is left; and (B,) bool, where that is the stand-in alone, which has the ``feature``
        (D,).
    """
    hidden = torch.vmap(box_iou)(batch.boxes, batch.boxes[:, region, None])[..., 0] > overlap
    hidden[:, region] = True  # also a box without an area
    mask = batch.mask & ~hidden
    empty = ~mask.any(dim=1)
    left = replace(batch, mask=mask).each(torch.clone)
    left.features[empty, 0] = feature
    left.boxes[empty, 0] = left.boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    left.scores[empty, 0], left.classes[empty, 0], left.mask[empty, 0] = 0, 0, True
    return left, empty


def measure(run: Trained, same: np.ndarray, overlap: float) -> Iterator[Row]:
    """Yield the numbers of the scores that a run has; ``same`` (N, C) are what all heads lose."""
    logits, own = first_scores(run.scorer, run.images)
    without_each, empty = scores_without_each(run.scorer, run.images, overlap)
    scores = {KINDS[0]: (logits, 0.0)}
    for kind, best in zip(KINDS[1:], (own, same), strict=True):
        if best is not None:
            picked = np.take_along_axis(without_each, best[:, None], axis=1)[:, 0]
            scores[kind] = picked, 100 * float(np.take_along_axis(empty, best, axis=1).mean())
    truth, names, ranks = run.images.truth, run.scorer.names, run.settings.ranks
    for kind, (logits, nothing_left) in scores.items():
        metrics = evaluate(logits, truth, names, ranks=ranks, decides=False)
        named = {"kind": kind, "mAP": metrics.mAP, "AP": dict(metrics.AP)}
        yield {**named, "nothing left": nothing_left}


def check_reference(
    reference: str, best: np.ndarray | None, of_reference: Trained, variant: str, run: Trained
) -> None:
    """Refuse a reference that has no best regions, or others than the variant's.

    Raises:
        InputError: one of these.
    """
    if best is None:
        raise InputError(
            f"{reference} does not tell regions apart.", "Name a variant that does: `--reference`."
        )
    theirs, own = of_reference.images.regions, run.images.regions
    if theirs != own:
        raise InputError(
            f"{variant} reads {own} regions of an image, and {reference} reads {theirs}.",
            "Train both with the same `regions`, or name another variant with `--reference`.",
        )


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the tables and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("dataset", "variants", "seeds"):
        parser.add_argument(f"--{name}", help="default: as in params.yaml")
    parser.add_argument("--reference", default="max-pool")
    parser.add_argument("--overlap", type=float, default=0.5)
    options = parser.parse_args(arguments)
    request = read_request(options.dataset)
    variants = options.variants.split(",") if options.variants else request.params.variants
    seeds = options.seeds.split(",") if options.seeds else request.params.seeds
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for seed in map(int, seeds):
        reference = open_run(request, options.reference, seed)
        same = first_scores(reference.scorer, reference.images)[1]
        for variant in variants:
            run = open_run(request, variant, seed)
            check_reference(options.reference, same, reference, variant, run)
            reads = "yes" if run.settings.network.needs_whole else "no"
            for row in measure(run, same, options.overlap):
                row = {"variant": variant, "seed": seed, "reads whole": reads, **row}
                groups.setdefault((variant, reads, row["kind"]), []).append(row)
    lines = [
        [*of, *(cell(row[number] for row in group) for number in ("mAP", "nothing left"))]
        for of, group in groups.items()
    ]
    headers = ["variant", "reads whole", "scores", "mAP", "nothing left %"]
    say(tabulate(lines, headers, "github", disable_numparse=True) + "\n")
    columns = {f"{variant}, {kind}": group for (variant, _, kind), group in groups.items()}
    lines = [
        [label, *(cell(row["AP"][label] for row in group) for group in columns.values())]
        for label in next(iter(columns.values()))[0]["AP"]
    ]
    say(tabulate(lines, ["AP", *columns], "github", disable_numparse=True) + "\n")
    rows = [row for group in groups.values() for row in group]
    say(json.dumps({"reference": options.reference, "overlap": options.overlap, "rows": rows}))


if __name__ == "__main__":
    main()
