"""Commands `runs list` and `runs prune`: the runs in runs/<dataset>/, and which of them can go.

params.yaml names a run by its variant and seed. Runs with other settings (`--set`, `sweep`), other
variants or other seeds lie in folders that it does not name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.errors import AccessError, BusyError, DamagedError, InputError, MissingError
from pipeline.files import access_error, canonical_json, exists, folder_lock, sha256_file
from pipeline.formats.sealed import read_sealed_json
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    METRICS_FILE,
    SETTINGS_FILE,
    SWEEP_FIGURE_STEM,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    TENSORBOARD_FOLDER,
    run_folder,
    run_of_folder,
    runs_folder,
)
from stages.checkout.params import Request, has_variant, variant_settings
from stages.checkout.resolved import read_run_settings
from stages.console.progress import progress_bar

_TEMPORARY = r"\.[0-9a-f]{8}\.tmp"
_OUT_OF_DATE = "out of date"  # of another checkpoint, which a killed training has replaced
_UNREADABLE = "unreadable"  # by this user
_MOST_SETTINGS = 4  # that the list shows of a run


def _one_of(*names: str) -> re.Pattern[str]:
    """Match files of these names, and the temporary files that a killed process left of them."""
    return re.compile(rf"({'|'.join(map(re.escape, names))})({_TEMPORARY})?")


_RUN_FILE = _one_of(CHECKPOINT_FILE, LAST_GOOD_FILE, HISTORY_FILE, SETTINGS_FILE, *EVALUATION_FILES)
_BOARD_FILE = re.compile(r"events\.out\.tfevents\..+")  # TensorBoard's
_SWEEP_FILE = _one_of(
    SWEEP_FILE, SWEEP_RESULTS_FILE, *(f"{SWEEP_FIGURE_STEM}.{suffix}" for suffix in ("svg", "png"))
)


def check_run(folder: Path) -> None:
    """Check that a folder holds a trained run.

    Raises:
        MissingError: it does not; the remedy names runs in folders of the same name, if any.
    """
    checkpoint = folder / CHECKPOINT_FILE
    if exists(checkpoint):
        return
    same_name = sorted(
        str(path)
        for path in Path("runs").glob("*/*")
        if path.name == folder.name and (path / CHECKPOINT_FILE).is_file()
    )
    remedy = "Run `gmpipe train` for its data set, variant, seed and `--set` options."
    if same_name:
        remedy = f"Did you mean {' or '.join(same_name)}?"
    raise MissingError(f"There is no checkpoint at {checkpoint}.", remedy)


def list_runs(request: Request, variants: Sequence[str], seeds: Sequence[int]) -> str:
    """Tabulate the runs of a data set, with the settings of those that params.yaml does not name.

    Args:
        request: for the data set.
        variants, seeds: that params.yaml names.
    """
    dataset = request.dataset
    top = runs_folder(dataset)
    named = _named(dataset, [name for name in variants if has_variant(request.train, name)], seeds)
    rows = []
    for folder in progress_bar([*_entries(top)], desc="read runs", unit="run", delay=1):
        try:
            if not _is_run(folder):
                continue
            checkpoint = folder / CHECKPOINT_FILE
            sha256 = sha256_file(checkpoint) if exists(checkpoint) else None
        except (AccessError, InputError, OSError):
            rows.append([str(folder), _UNREADABLE, "", "yes" if folder in named else "no", ""])
            continue
        made_with = _made_with(folder, sha256)
        named_and_made_with = _named_and_made_with(
            folder, made_with, request, named=folder in named
        )
        epochs = _epochs(sha256, made_with)
        rows.append([str(folder), _map(folder, sha256), epochs, *named_and_made_with])
    if not rows:
        return f"There are no runs in {top}. Run `gmpipe train --dataset {dataset}`."
    headers = ["run", "mAP", "epochs", "named by params.yaml", "made with"]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def prune(
    dataset: str, variants: Sequence[str], seeds: Sequence[int], *, dry_run: bool = False
) -> str:
    """Remove all runs but variants x seeds, all sweeps, and what killed runs left.

    Runs that are being written stay, and so does everything that is no run by its name and files.

    Args:
        dataset: whose runs to prune.
        variants, seeds: that params.yaml names.
        dry_run: only say what would be removed.

    Returns:
        One line per removed folder or file, and their total size.

    Raises:
        AccessError: something can't be removed.
    """
    top = runs_folder(dataset)
    named = _named(dataset, variants, seeds)
    lines, total = [], 0
    for folder, removable in list(_removable(top, named)):  # looked at before any is removed
        lock = folder.parent / f".{folder.name}.lock"
        with ExitStack() as stack:
            if exists(lock) or (removable and not dry_run):
                try:
                    stack.enter_context(folder_lock(folder))
                except BusyError:
                    lines.append(f"{folder}: is being written, stays")
                    continue
            for path in removable:
                size = _size(path)
                total += size
                lines.append(f"{path}: {size / 1e6:.1f} MB")
            if not dry_run:
                # The lock last, while it is held: nobody can hold a lock that is gone.
                _remove([*removable, *([lock] if folder not in named else [])])
    if not dry_run and (top / SWEEPS).is_dir() and not any((top / SWEEPS).iterdir()):
        (top / SWEEPS).rmdir()
    lines.append(f"{total / 1e6:.1f} MB {'would be ' if dry_run else ''}removed from {top}")
    return "\n".join(lines)


def _named(dataset: str, variants: Sequence[str], seeds: Sequence[int]) -> set[Path]:
    return {run_folder(dataset, variant, seed) for variant in variants for seed in seeds}


def _removable(top: Path, named: set[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder of a run or sweep with what can be removed of it.

    That is nothing where only the lock of a folder is left.
    """
    folders = [*_entries(top), *_entries(top / SWEEPS)]
    for folder in folders:
        if _is_run(folder) and folder in named:
            yield folder, [path for path in _entries(folder) if path.suffix == ".tmp"]
        elif _is_run(folder) or _is_sweep(folder):
            yield folder, [folder]
    for lock in folders:
        folder = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
        ours = folder.parent.name == SWEEPS or run_of_folder(folder.name)
        stale = lock.name == f".{folder.name}.lock" and not exists(folder)
        if stale and ours and folder not in named:
            yield folder, []


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise access_error(error, folder) from error


def _is_run(folder: Path) -> bool:
    return run_of_folder(folder.name) is not None and _holds_only(
        folder, _RUN_FILE, TENSORBOARD_FOLDER
    )


def _is_sweep(folder: Path) -> bool:
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
            for path in _entries(folder)
        )
    )


def _map(folder: Path, checkpoint: str | None) -> str:
    """The mAP of a run, or a word, given the sha256 of its checkpoint."""
    try:
        metrics = read_sealed_json(folder / METRICS_FILE)
        if metrics["checkpoint_sha256"] != checkpoint:
            return _OUT_OF_DATE
        return f"{metrics['mAP']:.1f}"
    except FileNotFoundError:
        return "-"
    except OSError:
        return _UNREADABLE
    except (DamagedError, InputError, KeyError, TypeError, ValueError):
        return "damaged"


def _made_with(folder: Path, checkpoint: str | None) -> Mapping[str, Any] | str:
    """What a run was made with, or the word for the table if that is not known.

    Args:
        folder: of the run.
        checkpoint: the sha256 of its checkpoint; None if there is none.
    """
    try:
        made_with = read_run_settings(folder)
        if checkpoint not in (None, made_with.get("checkpoint_sha256")):
            return _OUT_OF_DATE
        return made_with
    except MissingError:
        return "-"
    except OSError:
        return _UNREADABLE
    except (DamagedError, InputError):
        return "damaged"


def _epochs(checkpoint: str | None, made_with: Mapping[str, Any] | str) -> str:
    """How many epochs a run was trained for."""
    if isinstance(made_with, str):
        return made_with
    return "-" if checkpoint is None else str(made_with["settings"]["epochs"])


def _named_and_made_with(
    folder: Path, made_with: Mapping[str, Any] | str, request: Request, *, named: bool
) -> tuple[str, str]:
    """Whether params.yaml describes a run, and the settings in which an unnamed run differs."""
    run = run_of_folder(folder.name)
    if not named and not (run and run.hashed):
        return "no", ""
    if isinstance(made_with, str):
        return ("yes" if named else "no"), made_with
    differences = _differences(made_with, request)
    if named:
        return f"yes, but other settings: {differences}" if differences else "yes", ""
    return "no", differences


def _differences(made_with: Mapping[str, Any], request: Request) -> str:
    """The settings of a run that differ from those in params.yaml, as `key=value`."""
    if not has_variant(request.train, made_with["variant"]):
        return "a variant that params.yaml lacks"
    described = dict(_flat(variant_settings(request.train, made_with["variant"]).model_dump()))
    described["views"] = request.extract.views
    used = {**dict(_flat(made_with["settings"])), "views": made_with["views"]}
    differences = [
        f"{key}={canonical_json(used[key])}"
        for key in {**described, **used}  # in the order of the settings' documentation
        if key in used and (key not in described or used[key] != described[key])
    ]
    if len(differences) > _MOST_SETTINGS:
        differences[_MOST_SETTINGS:] = [f"and {len(differences) - _MOST_SETTINGS} more"]
    return ", ".join(differences)


def _flat(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all settings but those of variants."""
    for name, value in block.items():
        if isinstance(value, Mapping) and name != "variants":
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "variants":
            yield f"{prefix}{name}", value


def _size(path: Path) -> int:
    """Size in bytes; of a link into DVC's cache, that of the link."""
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
            # rmtree names what it can't remove by its last part alone.
            named = OSError(error.errno, error.strerror, str(path))
            raise access_error(named) from error
