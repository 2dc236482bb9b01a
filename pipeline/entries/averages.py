"""The average of several runs' scores.

Letters: N images, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Floats


def average_of(runs: Sequence[Floats]) -> NDArray[np.float64]:
    """Average the probabilities of runs: (N, C) logits of each -> (N, C) logits of the mean.

    The logit of the mean is log(sum of s(x)) - log(sum of s(-x)) over the logits x of the runs,
    where s is the sigmoid. In this form it is finite and exact where probabilities are near 1.
    """
    numbers = [logits.astype(np.float64) for logits in runs]
    # log s(x) = -log(1 + exp(-x))
    positive, negative = (
        np.logaddexp.reduce([-np.logaddexp(0, -sign * x) for x in numbers], axis=0)
        for sign in (1, -1)
    )
    mean: NDArray[np.float64] = positive - negative
    return mean
