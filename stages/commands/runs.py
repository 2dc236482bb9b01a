"""Commands `runs list` and `runs prune`: what lies in runs/<dataset>/, and what of it may go.

params.yaml names a run by its variant and seed. Runs with other settings (`--set`, `sweep`), of
other variants or of other seeds are in folders that it does not name.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pipeline.errors import GmpipeError
from pipeline.files import canonical_json, folder_lock
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    METRICS_FILE,
    SWEEP_FIGURE_STEM,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    TENSORBOARD_FOLDER,
    run_folder,
    runs_folder,
)
from stages.checkout.params import Request, has_variant, variant_settings

if TYPE_CHECKING:
    from pipeline.learning.checkpoint import Checkpoint

_TEMPORARY = r"\.[0-9a-f]{8}\.tmp"
_HASHED = re.compile(r"-s[0-9]+-[0-9a-f]{8}$")
_SHOWN = 4  # settings of a run
_RUN_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*-s[0-9]+(-[0-9a-f]{8})?")


def _one_of(*names: str) -> re.Pattern[str]:
    """Files of these names, or what a killed process left of them."""
    return re.compile(rf"({'|'.join(map(re.escape, names))})({_TEMPORARY})?")


_RUN_FILE = _one_of(CHECKPOINT_FILE, LAST_GOOD_FILE, HISTORY_FILE, *EVALUATION_FILES)
_BOARD_FILE = re.compile(r"events\.out\.tfevents\..+")  # TensorBoard's
_SWEEP_FILE = _one_of(
    SWEEP_RESULTS_FILE, *(f"{SWEEP_FIGURE_STEM}.{suffix}" for suffix in ("svg", "png"))
)


def check_run(folder: Path) -> None:
    """Suggest the runs of the same name where there is no such folder.

    Raises:
        GmpipeError: there are some.
    """
    if folder.exists():
        return
    near = sorted(
        str(path)
        for path in Path("runs").glob("*/*")
        if path.name == folder.name and (path / CHECKPOINT_FILE).is_file()
    )
    if near:
        raise GmpipeError(f"there is no {folder}. Did you mean {' or '.join(near)}?")


def list_runs(request: Request, variants: Sequence[str], seeds: Sequence[int]) -> str:
    """A table of the runs of a data set; of those with a hash, what they were made with."""
    dataset = request.dataset
    top = runs_folder(dataset)
    named = _named(dataset, [name for name in variants if has_variant(request.train, name)], seeds)
    rows = [
        [
            str(folder),
            _map(folder),
            _epochs(folder),
            *_named_and_made_with(folder, request, named=folder in named),
        ]
        for folder in _entries(top)
        if _is_run(folder)
    ]
    if not rows:
        return f"{top} holds no run. Run `gmpipe train --dataset {dataset}`."
    headers = ["run", "mAP", "epochs", "named by params.yaml", "made with"]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def prune(
    dataset: str, variants: Sequence[str], seeds: Sequence[int], *, dry_run: bool = False
) -> str:
    """Remove the runs that variants x seeds don't name, all sweeps, and what killed runs left.

    What is being written stays, and so does everything that is no run by its name and files.

    Args:
        dry_run: only say what would go.

    Returns:
        a line on each, and how much space they take.

    Raises:
        GmpipeError: something can't be removed.
    """
    top = runs_folder(dataset)
    named = _named(dataset, variants, seeds)
    lines, total = [], 0
    for folder, going in _removable(top, named):
        lock = folder.parent / f".{folder.name}.lock"
        with ExitStack() as stack:
            if lock.exists() or (going and not dry_run):
                try:
                    stack.enter_context(folder_lock(folder))
                except GmpipeError:
                    lines.append(f"{folder}: is being written, stays")
                    continue
            for path in going:
                size = _size(path)
                total += size
                lines.append(f"{path}: {size / 1e6:.1f} MB")
            if not dry_run:
                # The lock last, while it is held: nobody else holds what is gone.
                _remove([*going, *([lock] if folder not in named else [])])
    if not dry_run and (top / SWEEPS).is_dir() and not any((top / SWEEPS).iterdir()):
        (top / SWEEPS).rmdir()
    lines.append(f"{total / 1e6:.1f} MB {'would be ' if dry_run else ''}removed from {top}")
    return "\n".join(lines)


def _named(dataset: str, variants: Sequence[str], seeds: Sequence[int]) -> set[Path]:
    return {run_folder(dataset, variant, seed) for variant in variants for seed in seeds}


def _removable(top: Path, named: set[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """(a folder of a run or sweep, what of it may go); of a stale lock nothing else may."""
    folders = [*_entries(top), *_entries(top / SWEEPS)]
    for folder in folders:
        if _is_run(folder) and folder in named:
            yield folder, [path for path in _entries(folder) if path.suffix == ".tmp"]
        elif _is_run(folder) or _is_sweep(folder):
            yield folder, [folder]
    for lock in folders:
        folder = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
        ours = folder.parent.name == SWEEPS or _RUN_NAME.fullmatch(folder.name)
        stale = lock.name == f".{folder.name}.lock" and not folder.exists()
        if stale and ours and folder not in named:
            yield folder, []


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise GmpipeError(f"{folder} can't be listed ({error}). Mend or remove it.") from error


def _is_run(folder: Path) -> bool:
    return bool(_RUN_NAME.fullmatch(folder.name)) and _holds_only(
        folder, _RUN_FILE, TENSORBOARD_FOLDER
    )


def _is_sweep(folder: Path) -> bool:
    return folder.parent.name == SWEEPS and _holds_only(folder, _SWEEP_FILE)


def _holds_only(folder: Path, name: re.Pattern[str], board: str = "") -> bool:
    """Whether it is a folder of such files, and of one of TensorBoard's at ``board``."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(
            _holds_only(path, _BOARD_FILE)
            if path.name == board
            else name.fullmatch(path.name) and not path.is_dir()
            for path in _entries(folder)
        )
    )


def _map(folder: Path) -> str:
    try:
        return f"{json.loads((folder / METRICS_FILE).read_text())['mAP']:.1f}"
    except FileNotFoundError:
        return "-"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


def _named_and_made_with(folder: Path, request: Request, *, named: bool) -> tuple[str, str]:
    """Whether params.yaml describes a run; of one with a hash, what else it was made with."""
    answer = "yes" if named else "no"
    if not named and not _HASHED.search(folder.name):
        return answer, ""
    from pipeline.learning.checkpoint import load_checkpoint  # torch, for such runs only

    try:
        checkpoint = load_checkpoint(folder / CHECKPOINT_FILE)
    except GmpipeError:
        return answer, "damaged" if (folder / CHECKPOINT_FILE).exists() else "-"
    differences = _differences(checkpoint, request)
    if named:
        return f"yes, but other settings: {differences}" if differences else "yes", ""
    return "no", differences or "other views"  # all else that decides the hash


def _differences(checkpoint: Checkpoint, request: Request) -> str:
    """The settings of a run that are not those of params.yaml, as `key=value`."""
    if not has_variant(request.train, checkpoint.variant):
        return "a variant that params.yaml lacks"
    plain = dict(_flat(variant_settings(request.train, checkpoint.variant).model_dump()))
    found = [
        f"{key}={canonical_json(value)}"
        for key, value in _flat(checkpoint.settings.model_dump())
        if value != plain[key]
    ]
    if len(found) > _SHOWN:
        found[_SHOWN:] = [f"and {len(found) - _SHOWN} more"]
    return ", ".join(found)


def _flat(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all settings but the variants' own."""
    for name, value in block.items():
        if isinstance(value, Mapping) and name != "variants":
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "variants":
            yield f"{prefix}{name}", value


def _epochs(folder: Path) -> str:
    try:
        with (folder / HISTORY_FILE).open(newline="") as stream:
            return str(sum(1 for _ in csv.DictReader(stream)))
    except FileNotFoundError:
        return "-"
    except (OSError, ValueError, csv.Error):
        return "damaged"


def _size(path: Path) -> int:
    """Bytes; of a link into DVC's cache those of the link."""
    if path.is_dir() and not path.is_symlink():
        return sum(_size(entry) for entry in _entries(path))
    return path.lstat().st_size


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise GmpipeError(
                f"{path} can't be removed ({error}). Give yourself the right to write in its "
                "folder, and run the same command again."
            ) from error
