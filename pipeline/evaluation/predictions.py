"""predictions.parquet: what a run predicts for each image of the test split.

Letters: N images, C labels.

One row per image, in the manifest's order:
    image_id string
    scores   fixed-size list of C float32: probabilities.
    regions  fixed-size list of C int16: for each label the index of the region that won the maximum
             over the regions, equation (14) of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.evaluation.metrics import Floats, Integers
from pipeline.files import replacing


@dataclass(frozen=True)
class Scores:
    """What runs predict for the test images.

    Attributes:
        image_ids: N, the images of the split that have regions.
        truth: (N, C) int8: 1 positive, 0 negative, -1 ignored.
        runs: variant -> (N, C) float32 probabilities of each of its runs.
    """

    image_ids: list[str]
    truth: np.ndarray
    runs: dict[str, list[np.ndarray]]


def write_predictions(
    path: Path, image_ids: Sequence[str], scores: Floats, regions: Integers
) -> None:
    """Write the file, whole or not at all.

    Args:
        image_ids: N.
        scores, regions: (N, C).
    """
    labels = scores.shape[1]
    table = pa.table(
        {
            "image_id": pa.array(image_ids, pa.string()),
            "scores": pa.FixedSizeListArray.from_arrays(scores.ravel(), labels),
            "regions": pa.FixedSizeListArray.from_arrays(regions.ravel(), labels),
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_scores(path: Path, image_ids: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Read the image ids (N) and the scores (N, C) of a file.

    Args:
        image_ids: the images that it must be for; None if any will do.

    Raises:
        MissingError: there is no such file.
        DamagedError: it is not a Parquet file, or it lacks a column.
        MismatchError: it is for other images.
    """
    remedy = "Evaluate the run again."
    if not path.is_file():
        raise MissingError(f"There are no predictions at {path}.", remedy)
    try:
        table = pq.read_table(path, columns=["image_id", "scores"])
        own_ids: list[str] = table.column("image_id").to_pylist()
        flat = np.asarray(table.column("scores").combine_chunks().flatten())
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DamagedError(f"{path} can't be read ({error}).", remedy) from error
    if image_ids is not None and own_ids != list(image_ids):
        raise MismatchError(
            f"{path} has {len(own_ids)} images, which are not the {len(image_ids)} images of the "
            "other runs, or not in their order.",
            remedy,
        )
    return own_ids, flat.reshape(len(own_ids), -1)
