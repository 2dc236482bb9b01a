"""Paths of all inputs and outputs, relative to the checkout that gmpipe runs in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.files import matching, sha256_json
from pipeline.learning import CHECKPOINT_FILE as CHECKPOINT_FILE
from pipeline.names import check_name

# Files in the folder of a run: what `train` writes beside the checkpoint,
LAST_GOOD_FILE = "checkpoint-last-good.pt"
HISTORY_FILE = "history.csv"
SETTINGS_FILE = "settings.yaml"
TENSORBOARD_FOLDER = "tensorboard"
# what `evaluate` writes,
METRICS_FILE = "metrics.json"
SUMMARY_FILE = "summary.json"
PREDICTIONS_FILE = "predictions.parquet"
EVALUATION_FILES = (METRICS_FILE, SUMMARY_FILE, PREDICTIONS_FILE)
# files in the folder of a sweep,
SWEEP_RESULTS_FILE = "results.csv"
SWEEP_FIGURE_STEM = "figure"
SWEEP_FILE = "sweep.json"
# and of the doubtful labels.
DOUBTS_FILE = "doubts.parquet"
DOUBTS_TABLE_FILE = "doubts.csv"


def data_root(dataset: str) -> Path:
    """Folder that the paths in a manifest are relative to."""
    return Path("data") / dataset


def prepared_folder(dataset: str) -> Path:
    """Output of `prepare`."""
    return data_root(dataset) / "prepared"


def manifest_file(dataset: str) -> Path:
    """The manifest, in `prepared_folder`."""
    return prepared_folder(dataset) / "manifest.parquet"


def boxes_file(dataset: str) -> Path:
    """Annotated boxes in `prepared_folder`, if the data set has any."""
    return prepared_folder(dataset) / "boxes.parquet"


def settings_folder(dataset: str) -> Path:
    """Output of `prepare`: the resolved train settings, one file per variant."""
    return data_root(dataset) / "settings"


def detector_folder(dataset: str) -> Path:
    """Output of `detector`."""
    return data_root(dataset) / "detector"


def cache_folder(dataset: str) -> Path:
    """Output of `extract`: shards and their index."""
    return Path("cache") / dataset


def runs_folder(dataset: str) -> Path:
    """Folder of the runs of a data set."""
    return Path("runs") / dataset


def run_folder(dataset: str, variant: str, seed: int, overridden: object = None) -> Path:
    """Output of `train` and `evaluate`.

    Args:
        dataset, variant, seed: identify the run.
        overridden: the settings of a run that differs from params.yaml (JSON). Their hash gives it
            another folder than the run that DVC tracks.
    """
    name = f"{variant}-s{seed}"
    if overridden is not None:
        name += f"-{sha256_json(overridden)[:8]}"
    return runs_folder(dataset) / name


class RunName(NamedTuple):
    """What the name of a run's folder says.

    Attributes:
        variant, seed: of the run.
        hashed: whether its settings differ from params.yaml, so that their hash ends the name.
    """

    variant: str
    seed: int
    hashed: bool


_RUN_NAME = re.compile(  # the first part takes all it can, since a variant may hold `-s1` too
    r"(?P<variant>.+)-s(?P<seed>0|[1-9][0-9]*)(?P<hash>-[0-9a-f]{8})?"
)


def run_of_folder(name: str) -> RunName | None:
    """Return the run whose folder `run_folder` gives this name; None if there is no such run."""
    match = _RUN_NAME.fullmatch(name)
    if match is None:
        return None
    try:
        check_name(match["variant"])
    except ValueError:
        return None
    return RunName(match["variant"], int(match["seed"]), match["hash"] is not None)


SWEEPS = "sweeps"


def sweep_folder(dataset: str, variant: str, key: str) -> Path:
    """Output of `sweep`, beside the runs. The name includes the variant unless it is `full`."""
    return runs_folder(dataset) / SWEEPS / (key if variant == "full" else f"{variant}-{key}")


def doubts_folder(dataset: str) -> Path:
    """Output of `doubts`, beside the runs."""
    return runs_folder(dataset) / "doubts"


ENTRIES = "entries"


def entry_folder(dataset: str, name: str) -> Path:
    """Scores of another model, or the average of some runs, beside the runs."""
    return runs_folder(dataset) / ENTRIES / name


def is_entry_folder(folder: Path) -> bool:
    """Whether `entry_folder` gives this path, which a run of a data set `entries` does not have."""
    return folder == entry_folder(folder.parent.parent.name, folder.name)


def report_folder(dataset: str) -> Path:
    """Output of `report`."""
    return Path("reports") / dataset


_STATES = Path(".state")


def state_file(purpose: str, dataset: str, key: object) -> Path:
    """File from which a killed fit or training resumes.

    It is not kept with the outputs, which DVC deletes before it runs a stage again.

    Args:
        purpose: begins the name of the file.
        dataset: name of the data set.
        key: everything that decides the result (JSON), so that only the same work is resumed.
    """
    return _STATES / f"{purpose}-{dataset}-{sha256_json(key)[:16]}.pt"


def state_files(dataset: str) -> list[Path]:
    """The files from which killed fits and trainings of a data set resume."""
    name = re.compile(rf"[a-z]+-{re.escape(dataset)}-[0-9a-f]{{16}}\.pt(\.[0-9a-f]{{8}}\.tmp)?")
    return [path for path in matching(_STATES, "*") if name.fullmatch(path.name)]


def times_file(dataset: str) -> Path:
    """File with the times that the stages of a data set took, see `stages.checkout.times`."""
    return _STATES / "times" / f"{dataset}.csv"
