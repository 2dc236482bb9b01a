"""Where everything lies, relative to the checkout that gmpipe runs in."""

from __future__ import annotations

from pathlib import Path

from pipeline.files import sha256_json
from pipeline.learning import CHECKPOINT_FILE as CHECKPOINT_FILE

# In a run's folder, by `train`, beside the checkpoint:
LAST_GOOD_FILE = "checkpoint-last-good.pt"
HISTORY_FILE = "history.csv"
TENSORBOARD_FOLDER = "tensorboard"
# and by `evaluate`:
METRICS_FILE = "metrics.json"
SUMMARY_FILE = "summary.json"
PREDICTIONS_FILE = "predictions.parquet"
EVALUATION_FILES = (METRICS_FILE, SUMMARY_FILE, PREDICTIONS_FILE)
# In a sweep's folder:
SWEEP_RESULTS_FILE = "results.csv"
SWEEP_FIGURE_STEM = "figure"


def data_root(dataset: str) -> Path:
    """The root that a manifest's paths are relative to."""
    return Path("data") / dataset


def prepared_folder(dataset: str) -> Path:
    """Output of `prepare`."""
    return data_root(dataset) / "prepared"


def manifest_file(dataset: str) -> Path:
    """The manifest, in `prepared_folder`."""
    return prepared_folder(dataset) / "manifest.parquet"


def boxes_file(dataset: str) -> Path:
    """Annotated boxes, where the data set has any, in `prepared_folder`."""
    return prepared_folder(dataset) / "boxes.parquet"


def detector_folder(dataset: str) -> Path:
    """Output of `detector`."""
    return data_root(dataset) / "detector"


def cache_folder(dataset: str) -> Path:
    """Output of `extract`: shards and their index."""
    return Path("cache") / dataset


def runs_folder(dataset: str) -> Path:
    """Where the runs of a data set are."""
    return Path("runs") / dataset


def run_folder(dataset: str, variant: str, seed: int, overridden: object = None) -> Path:
    """Output of `train` and `evaluate`.

    Args:
        dataset, variant, seed: what the run is.
        overridden: what it is made with (JSON), where that is not what params.yaml says; its hash
            keeps such a run apart from the one that DVC tracks.
    """
    name = f"{variant}-s{seed}"
    if overridden is not None:
        name += f"-{sha256_json(overridden)[:8]}"
    return runs_folder(dataset) / name


SWEEPS = "sweeps"


def sweep_folder(dataset: str, variant: str, key: str) -> Path:
    """Output of `sweep`, beside the runs; a folder of its own for each variant but `full`."""
    return runs_folder(dataset) / SWEEPS / (key if variant == "full" else f"{variant}-{key}")


def report_folder(dataset: str) -> Path:
    """Output of `report`."""
    return Path("reports") / dataset


def state_file(purpose: str, key: object) -> Path:
    """What a killed fit or training resumes from, keyed by all that decides its result.

    It does not lie with the outputs: DVC deletes those before it runs a stage again.
    """
    return Path(".state") / f"{purpose}-{sha256_json(key)[:16]}.pt"


def times_file(dataset: str) -> Path:
    """How long the stages of a data set took; `stages.checkout.times` describes the file."""
    return Path(".state") / "times" / f"{dataset}.csv"
