"""What the instance graph joins: how many of a region's nearest neighbours show the same object.

    python -m benchmarks.neighbors --dataset imported

It reads the regions of a data set's training images (view 0, as many of an image as `full` reads),
and trains nothing. A row of the table is about the K nearest neighbours of every region, and its
last row about all pairs of regions of an image. The columns are

- `neighbours`: the mean number of neighbours of a region, which is less than K where an image has
  fewer others;
- `overlapping %`: neighbours whose IoU with the region is over 0.5;
- `overlapping alike %`: those of them that have the region's class, too; none if the detector
  suppressed such regions (`nms_threshold` 0.5 or less), and then the others are further guesses at
  the class of the same object;
- `same class %`: neighbours that have the region's class, wherever they are;
- `distance`: the mean distance of the centres, where the view is 1 wide and 1 high.

It prints the table and, last, a line of JSON with the same numbers.

Letters: B images of a batch, M regions, K neighbours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching.graphs import instance_neighbors
from pipeline.learning.splits import SplitData, open_split
from stages.checkout.caches import open_cache
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import read_request

OVERLAPPING = 0.5
"""The IoU above which two regions overlap, in the columns of the table."""
BATCH = 256

Row = dict[str, float | str]


@dataclass
class Count:
    """What has been counted of some pairs of regions, each seen from one of the two.

    Attributes:
        regions: from which they are seen.
        pairs: how many there are.
        overlapping, alike, both: how many of them overlap, have one class, and do both.
        distance: sum over the pairs.
    """

    regions: int = 0
    pairs: int = 0
    overlapping: int = 0
    alike: int = 0
    both: int = 0
    distance: float = 0.0

    def add(self, batch: RegionBatch, chosen: Tensor) -> None:
        """Count the chosen pairs (B, M, M) of a batch."""
        centers = (batch.boxes[..., :2] + batch.boxes[..., 2:]).double() / 2
        iou = torch.stack([box_iou(boxes, boxes) for boxes in batch.boxes])
        overlapping = chosen & (iou > OVERLAPPING)
        alike = chosen & (batch.classes[:, :, None] == batch.classes[:, None])
        self.regions += int(batch.mask.sum())
        self.pairs += int(chosen.sum())
        self.overlapping += int(overlapping.sum())
        self.both += int((overlapping & alike).sum())
        self.alike += int(alike.sum())
        self.distance += float(torch.cdist(centers, centers)[chosen].sum())

    def row(self) -> Row:
        """The columns of the table; those of no pairs at all are 0."""
        pairs = max(self.pairs, 1)
        return {
            "neighbours": self.pairs / max(self.regions, 1),
            "overlapping %": 100 * self.overlapping / pairs,
            "overlapping alike %": 100 * self.both / pairs,
            "same class %": 100 * self.alike / pairs,
            "distance": self.distance / pairs,
        }


def measure(batches: Iterable[RegionBatch], neighbors: Sequence[int]) -> list[Row]:
    """Measure the rows of the table, for each K in ``neighbors`` and for all pairs."""
    counts = {k: Count() for k in neighbors}
    of_all = Count()
    for batch in batches:
        for k, count in counts.items():
            count.add(batch, _joined(batch, k))
        of_all.add(batch, _joined(batch, batch.mask.shape[1]))
    rows: list[Row] = [{"K": k, **count.row()} for k, count in counts.items()]
    return [*rows, {"K": "all", **of_all.row()}]


def _joined(batch: RegionBatch, neighbors: int) -> Tensor:
    """Which regions (B, M, M) are neighbours of which: row i has those of region i."""
    found = instance_neighbors(batch, neighbors)
    nothing = batch.mask[:, :, None] & torch.zeros_like(batch.mask)[:, None]
    return nothing.scatter(2, found.index, found.mask)


def batches_of(images: SplitData) -> Iterator[RegionBatch]:
    """Read all images of a split."""
    for start in range(0, len(images), BATCH):
        yield images.instances(np.arange(start, min(start + BATCH, len(images))))


def main(arguments: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", help="default: the first of params.yaml")
    parser.add_argument("--neighbors", type=int, nargs="+", default=[1, 3, 5, 9])
    options = parser.parse_args(arguments)
    request = read_request(options.dataset)
    manifest, cache = dataset_manifest(request.dataset), open_cache(request.dataset)
    images = open_split(cache, manifest, "train", regions=request.variant("full").regions)
    rows = measure(batches_of(images), options.neighbors)
    say(
        tabulate(
            rows,
            headers="keys",
            floatfmt=("", ".1f", ".1f", ".1f", ".1f", ".3f"),
            tablefmt="github",
        )
        + "\n"
    )
    of = {"dataset": request.dataset, "images": len(images), "regions": images.regions}
    say(json.dumps({**of, "rows": rows}))


if __name__ == "__main__":
    main()
