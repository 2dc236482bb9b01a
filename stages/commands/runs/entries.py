"""Which entries of runs/<dataset>/ are runs and sweeps that gmpipe wrote, with nothing else in."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.files import access_error
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    SETTINGS_FILE,
    SWEEP_FIGURE_STEM,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    TENSORBOARD_FOLDER,
    run_of_folder,
)

_TEMPORARY = r"\.[0-9a-f]{8}\.tmp"


def _one_of(*names: str) -> re.Pattern[str]:
    """Match files of these names, and the temporary files that a killed process left of them."""
    return re.compile(rf"({'|'.join(map(re.escape, names))})({_TEMPORARY})?")


_RUN_FILE = _one_of(CHECKPOINT_FILE, LAST_GOOD_FILE, HISTORY_FILE, SETTINGS_FILE, *EVALUATION_FILES)
_BOARD_FILE = re.compile(r"events\.out\.tfevents\..+")  # TensorBoard's
_SWEEP_FILE = _one_of(
    SWEEP_FILE, SWEEP_RESULTS_FILE, *(f"{SWEEP_FIGURE_STEM}.{suffix}" for suffix in ("svg", "png"))
)


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


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's by its name, and has nothing but a run's files."""
    return run_of_folder(folder.name) is not None and _holds_only(
        folder, _RUN_FILE, TENSORBOARD_FOLDER
    )


def is_sweep(folder: Path) -> bool:
    """Whether a folder is where sweeps lie, and has nothing but a sweep's files."""
    return folder.parent.name == SWEEPS and _holds_only(folder, _SWEEP_FILE)


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
