"""Whether scores and truth can be measured; `pipeline.evaluation.metrics` measures them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, MismatchError


def check_scores(
    logits: NDArray[np.floating[Any]],
    truth: NDArray[np.integer[Any]],
    labels: Sequence[str],
) -> None:
    """Refuse arrays that have no metrics.

    Args:
        logits, truth, labels: as `pipeline.evaluation.metrics.evaluate` takes them.

    Raises:
        MismatchError, InputError: as `evaluate` lists them.
    """
    if logits.ndim != 2 or logits.shape != truth.shape or logits.shape[1] != len(labels):
        raise MismatchError(
            f"The logits have the shape {logits.shape}, the truth has {truth.shape}, and there are "
            f"{len(labels)} labels; expected (images, labels) for both.",
            "Evaluate the predictions with the manifest that they were made from.",
        )
    twice = [name for name, count in Counter(labels).items() if count > 1]
    if twice:
        raise InputError(
            f"These labels appear more than once: {', '.join(twice)}.", "Rename or merge them."
        )
    if logits.shape[0] == 0:
        raise InputError(
            "The split to evaluate has no images.", "Prepare a data set with test images."
        )
    bad = np.argwhere(~np.isfinite(logits))
    if bad.size:
        row, column = bad[0]
        raise InputError(
            f"The logit of image {row}, label {labels[column]!r} is {logits[row, column]}, not a "
            f"finite number; {len(bad)} logits are not finite.",
            "The training diverged, or its inputs are damaged: check the regions, or train with a "
            "lower learning rate.",
        )
    bad = np.argwhere(~np.isin(truth, (1, 0, -1)))
    if bad.size:
        row, column = bad[0]
        raise InputError(
            f"The truth of image {row}, label {labels[column]!r} is {truth[row, column]}; expected "
            "1 (positive), 0 (negative) or -1 (ignored).",
            "Prepare the data set again.",
        )
    if not (truth == 1).any():
        raise InputError(
            f"None of the {logits.shape[0]} images has a positive label, so no metric is defined.",
            "Evaluate a split with labels; images without labels can only be predicted.",
        )
