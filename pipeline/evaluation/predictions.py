"""predictions.parquet: what a run predicts for each image of the test split.

Letters: N images, C labels.

One row per image, in the manifest's order:
    image_id string
    logits   list of C float32: the probability of a label is the sigmoid 1 / (1 + exp(-logit)).
             Probabilities near 1 would be equal in floating point, and lose the images' order.
    regions  list of C int16: for each label the index of the region that says most for it
             (`HeadOutput.winners`); -1 for none, where that is the image as a whole. For GM-MLIC it
             is the region that won the maximum over the regions, equation (14) of the paper.

The file is sealed (`pipeline.formats.sealed`), and names the checkpoint that predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.errors import DamagedError, MismatchError, MissingError, advising
from pipeline.evaluation.metrics import Floats, Integers
from pipeline.formats.sealed import read_sealed_table, write_sealed_table

_COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("logits", pa.list_(pa.float32())),
        ("regions", pa.list_(pa.int16())),
    ]
)


@dataclass(frozen=True)
class Scores:
    """What runs, and the entries beside them, predict for the test images.

    Attributes:
        image_ids: N, the images of the split that have regions.
        truth: (N, C) int8: 1 positive, 0 negative, -1 ignored.
        logits: variant -> (N, C) float32 of each of its runs; name of an entry -> its own.
    """

    image_ids: list[str]
    truth: np.ndarray
    logits: dict[str, list[np.ndarray]]


def probabilities(logits: Floats) -> NDArray[np.float64]:
    """The sigmoid of each logit, in float64."""
    array: NDArray[np.float64] = torch.from_numpy(logits).double().sigmoid().numpy()
    return array


def write_predictions(
    path: Path,
    image_ids: Sequence[str],
    logits: Floats,
    regions: Integers,
    *,
    checkpoint_sha256: str,
) -> None:
    """Write the file, whole or not at all.

    Args:
        image_ids: N.
        logits, regions: (N, C); a region of -1 is none.
        checkpoint_sha256: of the file of the network that predicted; of an entry, which has no
            network, `EntryEvaluation.sha256`.
    """
    images, labels = logits.shape
    starts = pa.array(np.arange(images + 1, dtype=np.int32) * np.int32(labels))
    lists = [
        pa.ListArray.from_arrays(starts, pa.array(values.ravel()))
        for values in (logits.astype(np.float32), regions.astype(np.int16))
    ]
    table = pa.table([pa.array(image_ids, pa.string()), *lists], schema=_COLUMNS)
    write_sealed_table(path, table, {"checkpoint_sha256": checkpoint_sha256})


def read_logits(
    path: Path, *, checkpoint_sha256: str, labels: int, image_ids: Sequence[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Read the image ids (N) and the logits (N, C) of a file.

    Args:
        checkpoint_sha256: of what must have predicted, as in `write_predictions`.
        labels: C.
        image_ids: the images that it must be for; None if any will do.

    Raises:
        MissingError: there is no such file.
        DamagedError: it was changed, or is not such a file.
        MismatchError: it is of another network, or for other images.
    """
    remedy = "Evaluate the run again."
    try:
        with advising(remedy, DamagedError):
            table, about = read_sealed_table(path, _COLUMNS)
    except FileNotFoundError:
        raise MissingError(f"There are no predictions at {path}.", remedy) from None
    if (used := about.get("checkpoint_sha256")) != checkpoint_sha256:
        raise MismatchError(
            f"{path} was predicted by the checkpoint {used}, expected {checkpoint_sha256}.", remedy
        )
    own_ids: list[str] = table.column("image_id").to_pylist()
    if image_ids is not None and own_ids != list(image_ids):
        raise MismatchError(
            f"{path} has {len(own_ids)} images, which are not the {len(image_ids)} images of the "
            "other runs, or not in their order.",
            remedy,
        )
    flat = np.asarray(table.column("logits").combine_chunks().flatten())
    if len(flat) != len(own_ids) * labels or not np.isfinite(flat).all():
        raise DamagedError(
            f"{path} does not hold {labels} finite logits for each of {len(own_ids)} images.",
            remedy,
        )
    return own_ids, flat.reshape(len(own_ids), labels)
