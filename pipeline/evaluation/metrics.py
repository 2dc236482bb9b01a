"""The metrics of the paper's section 4.1: computed from scores and truth, and kept as JSON.

Letters: N images, C labels, T distinct scores of one label, P positives of one label.

Two arrays go through the whole file:
    logits (N, C) float32 or float64: finite; the sigmoid of a logit is the label's probability.
        Images are ranked by logits, since probabilities near 1 are equal in floating point.
    truth (N, C) integers: 1 positive, 0 negative, -1 ignored (neither; by default in VOC, a class
        of which an image shows only difficult objects).

Names: `average_precision*` are fractions for one label; everything in `Metrics` is in percent. The
fields of the dataclasses are spelled as in the paper and in metrics.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DamagedError, MissingError, advising
from pipeline.evaluation.checks import check_scores
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.settings import TREATMENTS

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]

THRESHOLD = 0.5
"""A label is predicted where its probability is greater than this (the paper's section 4.1), that
is where its logit is greater than 0."""

BEST = 3
"""How many labels of an image the `top3` numbers consider."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision, recall and F1 for one way to choose the labels of an image, in percent.

    For each label c let T_c be the images where it is rightly predicted, N_c those where it is
    predicted and P_c those where it is positive ("correct", "predicted" and "ground-truth" images
    in Chen et al., 2019). Then:

        CP = mean of T_c / N_c      CR = mean of T_c / P_c      CF1 = 2 CP CR / (CP + CR)
        OP = sum T_c / sum N_c      OR = sum T_c / sum P_c      OF1 = 2 OP OR / (OP + OR)

    CP and CR average over the labels with a positive in the split (P_c > 0). OP and OR sum over all
    labels, so a false alarm counts whatever its label. 0 / 0 is taken as 0: the precision of a
    label that is never predicted, OP where nothing is predicted, F1 of 0 and 0.

    Attributes:
        CP, CR, CF1: per class, that is averaged over the labels.
        OP, OR, OF1: overall, that is summed over the labels.
    """

    CP: float
    CR: float
    CF1: float
    OP: float
    OR: float
    OF1: float


SIX = tuple(field.name for field in fields(PrecisionRecall))

GROUPS = {"": "all", "top-3": "top3", "top-3 forced": "top3_forced", "decided": "decided"}
"""How the columns of tables name a way to choose labels -> the field of `Metrics`."""


@dataclass(frozen=True)
class CalibrationErrors:
    """How far probabilities are from the truth, before and after calibration, in percent.

    Attributes:
        before, after: the expected calibration error (`diagnostics.calibration`) of all labels.
        before_by_label, after_by_label: its mean over the labels with a positive in the split.
    """

    before: float
    after: float
    before_by_label: float
    after_by_label: float


@dataclass(frozen=True)
class Metrics:
    """All metrics of a split, in percent. A number that is not defined is None.

    Attributes:
        mAP: mean of AP over the labels with a positive in the split; None if scores do not rank.
        all: for every label with a probability over 0.5; None if scores only rank.
        top3: for those of an image's three best labels that are over 0.5; None if scores only rank.
        top3_forced: for an image's three best labels, whatever their probability; None if scores do
            not rank.
        AP: average precision of each label, in the vocabulary's order; None for a label without
            a positive, and for every label if scores do not rank.
        mAP11: the same mean of the 11-point average precision; None where it was not asked for,
            and if scores do not rank.
        decided: at the thresholds that the run fitted; None if it fitted nothing.
        calibration_error: before and after the calibration that it fitted; None as `decided`.
    """

    mAP: float | None
    all: PrecisionRecall | None
    top3: PrecisionRecall | None
    top3_forced: PrecisionRecall | None
    AP: Mapping[str, float | None]
    mAP11: float | None = None
    decided: PrecisionRecall | None = None
    calibration_error: CalibrationErrors | None = None

    def number(self, column: str) -> float | None:
        """The number in a column of a table, e.g. `mAP`, `CF1`, `top-3 CF1` or `top-3 forced OR`.

        The columns of the paper's tables have these names too.
        """
        if column == "mAP":
            return self.mAP
        if column == "mAP11":
            return self.mAP11
        group, _, name = column.rpartition(" ")
        numbers: PrecisionRecall | None = getattr(self, GROUPS[group])
        number: float | None = None if numbers is None else getattr(numbers, name)
        return number

    def to_json(self) -> dict[str, Any]:
        """The value of metrics.json: `all` at the top level, no key for what is not defined."""
        alone = {"mAP": self.mAP, "mAP11": self.mAP11}
        groups = {
            name: None if (numbers := getattr(self, name)) is None else asdict(numbers)
            for name in ("top3", "top3_forced", "decided", "calibration_error")
        }
        numbers = {**alone, **(asdict(self.all) if self.all else {}), **groups}
        return {**_defined(numbers), "AP": dict(self.AP)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_json`; keys that belong to others are left alone.

        Raises:
            KeyError, TypeError, ValueError: a number is missing beside others that are defined only
                together with it, or is not one.
        """

        def number(percent: Any) -> float:
            if type(percent) not in (int, float) or not 0 <= percent <= 100 + 1e-9:
                raise ValueError(f"{percent!r} is not a number of percent")
            return float(percent)

        def numbers(group: Mapping[str, Any]) -> PrecisionRecall:
            return PrecisionRecall(**{name: number(group[name]) for name in SIX})

        ap = {
            label: None if one is None else number(one) for label, one in dict(value["AP"]).items()
        }
        # Scores that rank have all of the first three; those that decide have both of the others.
        ranks = any(name in value for name in ("mAP", "mAP11", "top3_forced")) or any(
            one is not None for one in ap.values()
        )
        decides = "top3" in value or any(name in value for name in SIX)
        if not ranks and not decides:
            raise KeyError("mAP")
        errors = None
        if (group := value.get("calibration_error")) is not None:
            names = (one.name for one in fields(CalibrationErrors))
            errors = CalibrationErrors(**{name: number(group[name]) for name in names})
        return cls(
            mAP=number(value["mAP"]) if ranks else None,
            all=numbers(value) if decides else None,
            top3=numbers(value["top3"]) if decides else None,
            top3_forced=numbers(value["top3_forced"]) if ranks else None,
            AP=ap,
            mAP11=number(value["mAP11"]) if "mAP11" in value else None,
            decided=numbers(value["decided"]) if "decided" in value else None,
            calibration_error=errors,
        )

    def summary(self) -> dict[str, Any]:
        """The five numbers that summary.json holds, to be compared between runs at a glance.

        There is no key for a number that is not defined.
        """
        top3 = {"CF1": self.top3.CF1, "OF1": self.top3.OF1} if self.top3 else None
        alone = {name: self.number(name) for name in ("mAP", "CF1", "OF1")}
        return _defined({**alone, "top3": top3})


def _defined(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def shown(number: float | None, digits: int = 2) -> str:
    """A number as people read it: "-" if it is not defined."""
    return "-" if number is None else f"{number:.{digits}f}"


@dataclass(frozen=True)
class Evaluation:
    """The content of metrics.json: the metrics of a run, and what they were measured on.

    Attributes:
        metrics: of the split below.
        dataset, variant, seed: the run.
        split: name of the split, e.g. `drawn/test`.
        epoch: after which the weights were taken, from 1.
        trained_images: how many images the run was trained on.
        images: N, the images that were scored.
        left_out: further images of the split, which have no regions.
        counts: how many images each split has, by kind (`Manifest.counts`).
        commit: of the code that evaluated; None outside of git.
        uncommitted: whether files that git tracks differed from the commit; None outside of git.
        fingerprint: of the regions.
        train_sha256, test_sha256: of the images that a training reads, of those that were scored,
            and of their labels (see `Manifest`).
        checkpoint_sha256: of the file of the network that was evaluated.
        difficult: split -> what its difficult labels counted as (`Manifest.treatments`). There is
            no key for a split without any, and no such field in JSON if no split has any.
    """

    metrics: Metrics
    dataset: str
    split: str
    variant: str
    seed: int
    epoch: int
    trained_images: int
    images: int
    left_out: int
    counts: Mapping[str, Mapping[str, int]]
    commit: str | None
    uncommitted: bool | None
    fingerprint: str
    train_sha256: str
    test_sha256: str
    checkpoint_sha256: str
    difficult: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The value that metrics.json holds."""
        difficult = {"difficult": dict(self.difficult)} if self.difficult else {}
        record = {name: getattr(self, name) for name in _RECORD}
        return {**self.metrics.to_json(), **record, **difficult}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or of the wrong kind.
        """
        for name, kinds in _RECORD.items():
            if type(value[name]) not in kinds:
                raise TypeError(f"`{name}` is {value[name]!r}")
        difficult = dict(value.get("difficult", {}))
        if not set(difficult.values()) <= set(TREATMENTS):
            raise ValueError(f"`difficult` is {difficult!r}")
        record = {name: value[name] for name in _RECORD}
        return cls(Metrics.from_json(value), **record, difficult=difficult)


_RECORD: dict[str, tuple[type, ...]] = {
    "dataset": (str,),
    "split": (str,),
    "variant": (str,),
    "seed": (int,),
    "epoch": (int,),
    "trained_images": (int,),
    "images": (int,),
    "left_out": (int,),
    "counts": (dict,),
    "commit": (str, type(None)),
    "uncommitted": (bool, type(None)),
    "fingerprint": (str,),
    "train_sha256": (str,),
    "test_sha256": (str,),
    "checkpoint_sha256": (str,),
}
"""The fields of `Evaluation` besides the metrics and `difficult`, and their types in JSON."""


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write metrics.json, sealed, whole or not at all."""
    write_sealed_json(path, evaluation.to_json())


def read_evaluation(path: Path) -> Evaluation:
    """Read metrics.json.

    Raises:
        MissingError: there is no such file.
        DamagedError: it was changed, or a field is missing or of the wrong kind.
    """
    remedy = "Evaluate the run again."
    try:
        with advising(remedy, DamagedError):
            return Evaluation.from_json(read_sealed_json(path))
    except FileNotFoundError:
        raise MissingError(f"There are no metrics at {path}.", remedy) from None
    except KeyError as error:
        raise DamagedError(f"{path} is damaged: the key {error} is missing.", remedy) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}.", remedy) from error


def average_precision(logits: Floats, truth: Integers) -> float:
    """Compute the average precision of one label, as scikit-learn's `average_precision_score`.

    AP = sum over t of (R_t - R_(t-1)) * P_t, where P_t and R_t are precision and recall among the
    images that score at least the t-th highest distinct score, and R_0 = 0. Images with equal
    scores are counted together, so their order never matters.

    Args:
        logits: (N,).
        truth: (N,) in {1, 0, -1}; entries of -1 are left out.

    Returns:
        A fraction in [0, 1]; nan if no entry is positive.
    """
    hits, precision = _curve(logits, truth)
    if hits.size == 0 or hits[-1] == 0:
        return float("nan")
    return float(np.sum(np.diff(hits, prepend=0) * precision) / hits[-1])


def average_precision_11(logits: Floats, truth: Integers) -> float:
    """Compute the 11-point average precision of one label (VOC2007 devkit, `VOCevalcls.m`).

    AP = 1/11 * sum over r in {0, 0.1, ..., 1} of max {P_t : R_t >= r}, with P_t and R_t as in
    `average_precision`. Two details differ from the devkit. Images with equal scores are one point
    of the curve, where the devkit takes them in the order of its list. And R_t >= r is decided in
    integers: in floating point 3 * 0.1 exceeds 3/10, so the devkit's loop misses a recall of
    exactly 0.3.

    Args:
        logits: (N,).
        truth: (N,) in {1, 0, -1}; entries of -1 are left out.

    Returns:
        A fraction in [0, 1]; nan if no entry is positive.
    """
    hits, precision = _curve(logits, truth)
    if hits.size == 0 or hits[-1] == 0:
        return float("nan")
    best = [precision[10 * hits >= tenths * hits[-1]].max() for tenths in range(11)]
    return float(np.mean(best))


def evaluate(
    logits: Floats,
    truth: Integers,
    labels: Sequence[str],
    *,
    voc11: bool = False,
    ranks: bool = True,
    decides: bool = True,
) -> Metrics:
    """Compute all metrics of a split; `PrecisionRecall` defines CP to OF1.

    An image's predicted labels are, for `all`, every label with a probability over 0.5; for `top3`,
    those over 0.5 among its three best; for `top3_forced`, its three best. An ignored label is
    removed from its image before anything is counted or ranked: it is neither predicted nor true
    and takes none of the three places. Where fewer than three labels remain, all of them are best.
    If labels tie for the last place, the one that comes first in `labels` takes it.

    Args:
        logits: (N, C), finite.
        truth: (N, C) in {1, 0, -1}.
        labels: C names.
        voc11: whether to compute `mAP11`, the mean of `average_precision_11`.
        ranks: whether a higher score means a likelier label. The scores of a network that predicts
            sets of labels only say which labels are in the set: without ``ranks``, `mAP`, `AP`,
            `mAP11` and `top3_forced` are not defined.
        decides: whether a label is predicted where its logit is over 0. Scores that were trained
            with a softmax only rank: without ``decides``, `all` and `top3` are not defined.

    Returns:
        Finite numbers, ready for JSON; None for those that are not defined.

    Raises:
        MismatchError: the shapes do not fit together.
        InputError: a label appears twice, the split is empty, a logit is not finite, a truth is
            none of 1, 0, -1, or nothing is positive.
    """
    check_scores(logits, truth, labels)
    by_label = list(zip(logits.T, truth.T, strict=True))
    ap = np.full(len(labels), np.nan)
    if ranks:
        ap = 100 * np.array([average_precision(x, t) for x, t in by_label])
    map_11 = None
    if voc11 and ranks:
        ap_11 = 100 * np.array([average_precision_11(x, t) for x, t in by_label])
        map_11 = float(np.nanmean(ap_11))
    over = (logits > 0) & (truth != -1)
    best = _best(logits, truth)
    return Metrics(
        mAP=float(np.nanmean(ap)) if ranks else None,
        all=six_numbers(over, truth) if decides else None,
        top3=six_numbers(over & best, truth) if decides else None,
        top3_forced=six_numbers(best, truth) if ranks else None,
        AP={
            name: None if np.isnan(value) else float(value)
            for name, value in zip(labels, ap, strict=True)
        },
        mAP11=map_11,
    )


def precision_recall(
    logits: Floats, truth: Integers
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute recall and precision of one label at each distinct score, from the highest down.

    Args:
        logits: (N,).
        truth: (N,) in {1, 0, -1}; entries of -1 are left out.

    Returns:
        R_t and P_t of `average_precision`, (T,) each; empty if no entry is positive.
    """
    hits, precision = _curve(logits, truth)
    if hits.size == 0 or hits[-1] == 0:
        return np.empty(0), np.empty(0)
    return hits / hits[-1], precision


def _curve(logits: Floats, truth: Integers) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Hits (T,) and precision (T,) of the images at or above each distinct score, descending."""
    kept = truth != -1
    logits, positive = logits[kept], truth[kept] == 1
    order = np.argsort(-logits, kind="stable")
    logits = logits[order]
    last_of_equals = np.flatnonzero(np.append(logits[1:] != logits[:-1], logits.size > 0))
    hits = np.cumsum(positive[order], dtype=np.int64)[last_of_equals]
    return hits, hits / (last_of_equals + 1)


def _best(logits: Floats, truth: Integers) -> Mask:
    """(N, C), true at the `BEST` best labels of each image, ignored ones left out."""
    ranked = np.where(truth == -1, -np.inf, logits)
    columns = np.argsort(-ranked, axis=1, kind="stable")[:, :BEST]
    best: Mask = np.zeros(truth.shape, dtype=np.bool_)
    np.put_along_axis(best, columns, True, axis=1)
    best &= truth != -1
    return best


def six_numbers(predicted: Mask, truth: Integers) -> PrecisionRecall:
    """Compute CP to OF1 of (N, C) predictions that hold no ignored label."""
    counts_right = (predicted & (truth == 1)).sum(axis=0)
    counts_predicted = predicted.sum(axis=0)
    counts_positive = (truth == 1).sum(axis=0)
    known = counts_positive > 0
    # A maximum of 1 under the fraction makes 0 / 0 a 0.
    cp = 100 * float(np.mean((counts_right / np.maximum(counts_predicted, 1))[known]))
    cr = 100 * float(np.mean(counts_right[known] / counts_positive[known]))
    overall_p = 100 * float(counts_right.sum() / max(counts_predicted.sum(), 1))
    overall_r = 100 * float(counts_right.sum() / counts_positive.sum())
    return PrecisionRecall(
        CP=cp,
        CR=cr,
        CF1=_harmonic_mean(cp, cr),
        OP=overall_p,
        OR=overall_r,
        OF1=_harmonic_mean(overall_p, overall_r),
    )


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
