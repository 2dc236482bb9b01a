"""Which files and folders gmpipe wrote, by their names.

`entries` lists a folder; `is_run`, `is_sweep` and `is_entry` are about runs/<dataset>/, and
`sort_out` about the folders that hold one output, by the patterns below.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.files import access_error, exists
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    DOUBTS_FILE,
    DOUBTS_TABLE_FILE,
    EVALUATION_FILES,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    SETTINGS_FILE,
    SWEEP_FIGURE_STEM,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    TENSORBOARD_FOLDER,
    is_entry_folder,
    run_of_folder,
)

_TEMPORARY = r"\.[0-9a-f]{8}\.tmp"


def _one_of(*names: str) -> re.Pattern[str]:
    """Match files of these names, and the temporary files that a killed process left of them."""
    return re.compile(rf"({'|'.join(map(re.escape, names))})({_TEMPORARY})?")


_RUN_FILE = _one_of(CHECKPOINT_FILE, LAST_GOOD_FILE, HISTORY_FILE, SETTINGS_FILE, *EVALUATION_FILES)
_BOARD_FILE = re.compile(r"events\.out\.tfevents\..+")  # TensorBoard's
_ENTRY_FILE = _one_of(*EVALUATION_FILES)
_SWEEP_FILE = _one_of(
    SWEEP_FILE, SWEEP_RESULTS_FILE, *(f"{SWEEP_FIGURE_STEM}.{suffix}" for suffix in ("svg", "png"))
)

PREPARED_FILE = re.compile(
    r"(manifest\.parquet|boxes\.parquet|missing\.csv)"
    rf"({_TEMPORARY})?|images/(train|test)-\d{{5,}}\.png"
)
SETTINGS_OF_VARIANT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]*\.yaml({_TEMPORARY})?")
DETECTOR_FILE = _one_of("weights.pt", "detector.json", "metrics.json")
FILE_OF_DOUBTS = _one_of(DOUBTS_FILE, DOUBTS_TABLE_FILE)
CACHE_FILE = re.compile(rf"(regions-\d{{5,}}\.h5|index\.parquet|failures\.parquet)({_TEMPORARY})?")


def entries(folder: Path) -> list[Path]:
    """List a folder in the order of the names; empty if there is none.

    Raises:
        AccessError: the system can't list it.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise access_error(error, folder) from error


def sort_out(
    folder: Path, written: re.Pattern[str], below: str = ""
) -> tuple[list[Path], list[Path]]:
    """Sort what lies in a folder into what gmpipe wrote and what it did not.

    Args:
        folder: to look through.
        written: the paths in the folder of the files that gmpipe writes.
        below: the path of ``folder`` in the folder that ``written`` is about.

    Returns:
        the files that gmpipe wrote, or a folder instead of all that it holds if these are all; and
        the other files. Nothing if there is no such folder.
    """
    ours: list[Path] = []
    others: list[Path] = []
    for path in entries(folder):
        name = below + path.name
        if path.is_dir() and not path.is_symlink():
            parts = sort_out(path, written, f"{name}/")
            ours += parts[0]
            others += parts[1]
        else:
            is_ours = written.fullmatch(name) and not path.is_dir()
            (ours if is_ours else others).append(path)
    if not others and exists(folder):
        return [folder], []
    return ours, others


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's by its name, and has nothing but a run's files."""
    return run_of_folder(folder.name) is not None and _holds_only(
        folder, _RUN_FILE, TENSORBOARD_FOLDER
    )


def is_sweep(folder: Path) -> bool:
    """Whether a folder is where sweeps lie, and has nothing but a sweep's files."""
    return folder.parent.name == SWEEPS and _holds_only(folder, _SWEEP_FILE)


def is_entry(folder: Path) -> bool:
    """Whether a folder is where scores beside the runs lie, and has nothing but their files."""
    return is_entry_folder(folder) and _holds_only(folder, _ENTRY_FILE)


def _holds_only(folder: Path, name: re.Pattern[str], board: str = "") -> bool:
    """Whether it is a folder with only files of this name, and at ``board`` TensorBoard's."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(
            _holds_only(path, _BOARD_FILE)
            if path.name == board
            else name.fullmatch(path.name) and not path.is_dir()
            for path in entries(folder)
        )
    )
