"""Evaluations of made-up runs, with numbers that can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.metrics import SIX, Evaluation, Metrics, PrecisionRecall


def make_six(first: float, **others: float) -> PrecisionRecall:
    """Six numbers: ``first``, ``first`` + 1, ... in the order of `SIX`, except ``others``."""
    numbers = {name: first + index for index, name in enumerate(SIX)}
    return PrecisionRecall(**{**numbers, **others})


def make_metrics(value: float, ap: Mapping[str, float | None] | None = None) -> Metrics:
    """mAP is ``value``; CF1, OF1, top-3 CF1 and top-3 OF1 are the numbers that follow it."""
    return Metrics(
        mAP=value,
        all=make_six(value + 100, CF1=value + 1, OF1=value + 2),
        top3=make_six(value + 200, CF1=value + 3, OF1=value + 4),
        top3_forced=make_six(value + 300),
        AP=ap or {},
    )


def make_evaluation(metrics: Metrics, *, seed: int = 0, **others: Any) -> Evaluation:
    """Metrics with a record of what they were measured on; ``others`` are fields of it."""
    record: dict[str, Any] = {
        "dataset": "tiny",
        "split": "drawn/test",
        "variant": "full",
        "epoch": 2,
        "trained_images": 24,
        "images": 12,
        "left_out": 0,
        "counts": {"train": {"images": 24}, "test": {"images": 12}},
        "commit": None,
        "uncommitted": None,
        "fingerprint": "f",
        "train_sha256": "t",
        "test_sha256": "u",
        "checkpoint_sha256": "c",
    }
    return Evaluation(metrics, **{**record, "seed": seed, **others})
