"""gmpipe from Python: a trained run for images in memory, a cache as a torch dataset, metrics.

docs/python.md has an example of each.
"""

from __future__ import annotations

from pipeline.evaluation.metrics import Metrics, evaluate
from pipeline.inference.bundle import load_bundle
from pipeline.inference.explain import Explanation, LabelExplanation, explain
from pipeline.inference.trained import Prediction, TrainedRun, load_run
from pipeline.learning.torch_dataset import RegionDataset, open_cache

__all__ = [
    "Explanation",
    "LabelExplanation",
    "Metrics",
    "Prediction",
    "RegionDataset",
    "TrainedRun",
    "evaluate",
    "explain",
    "load_bundle",
    "load_run",
    "open_cache",
]
