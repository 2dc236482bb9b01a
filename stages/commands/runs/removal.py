"""Commands `runs prune` and `clean`: remove runs, or all that gmpipe made for a data set.

Both only list what they would remove until they are told to remove it. What another process is
writing stays, and so does everything that gmpipe did not write.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import BusyError, MissingError
from pipeline.files import access_error, exists, folder_lock
from pipeline.formats.text import counted
from pipeline.report.folder import PAGE_FILE
from stages.checkout.disk import shown_bytes
from stages.checkout.layout import (
    ENTRIES,
    SWEEPS,
    cache_folder,
    data_root,
    detector_folder,
    doubts_folder,
    is_entry_folder,
    prepared_folder,
    report_folder,
    run_of_folder,
    runs_folder,
    settings_folder,
    state_files,
    times_file,
)
from stages.checkout.params import Request, check_dataset_name, has_variant
from stages.commands.runs.entries import (
    CACHE_FILE,
    DETECTOR_FILE,
    FILE_OF_DOUBTS,
    PREPARED_FILE,
    SETTINGS_OF_VARIANT,
    entries,
    is_entry,
    is_run,
    is_sweep,
    sort_out,
)


@dataclass(frozen=True)
class _Part:
    """Something to remove.

    Attributes:
        folder: whose lock is held for it.
        paths: what is removed; nothing if only the lock of a folder is left.
        goes: whether the folder is removed, and its lock with it.
        others: what lies there and stays, since gmpipe did not write it.
    """

    folder: Path
    paths: Sequence[Path]
    goes: bool = True
    others: Sequence[Path] = ()


def prune(request: Request, *, unlisted: bool = False, remove: bool = False) -> str:
    """Remove the runs that params.yaml does not describe, all sweeps, and what killed runs left.

    A run is described if it has the settings of params.yaml and a variant that exists, whatever its
    seed. So the runs of `compare` stay. So do entries, which may be of files that are gone.

    Args:
        request: for the data set.
        unlisted: also remove entries, and runs that are not variants x seeds of the lists in
            params.yaml.
        remove: whether to remove them; otherwise this only says what would be removed.

    Returns:
        One line per folder or file, their total size, and the next step.

    Raises:
        AccessError: something can't be removed.
    """
    dataset, params = request.dataset, request.params
    top = runs_folder(dataset)

    def is_listed(folder: Path) -> bool:
        run = run_of_folder(folder.name)
        return run is not None and run.variant in params.variants and run.seed in params.seeds

    def is_kept(folder: Path) -> bool:
        if is_entry_folder(folder):
            return not unlisted
        run = run_of_folder(folder.name)
        if run is None or run.hashed:
            return False
        return is_listed(folder) if unlisted else has_variant(request.train, run.variant)

    lines, total, _ = _take_away(list(_of_runs(top, is_kept)), remove=remove)
    if remove:
        _remove_empty(top / SWEEPS, top / ENTRIES)
    lines.append(f"{shown_bytes(total)} {'' if remove else 'would be '}removed from {top}")
    if not remove and len(lines) > 1:
        options = " --unlisted" if unlisted else ""
        lines.append(f"Run `gmpipe runs prune --dataset {dataset}{options} --yes` to remove this.")
    others = [folder for folder in entries(top) if is_run(folder) and is_kept(folder)]
    if more := sum(not is_listed(folder) for folder in others):
        lines.append(
            f"Kept: {counted(more, 'run')} of variants or seeds that params.yaml does not list. "
            "`--unlisted` removes them, too."
        )
    if more := sum(is_entry(folder) and is_kept(folder) for folder in entries(top / ENTRIES)):
        lines.append(
            f"Kept, beside the runs: {more} of {top / ENTRIES}. `--unlisted` removes them."
        )
    return "\n".join(lines)


def clean(dataset: str, *, remove: bool = False) -> str:
    """Remove all that gmpipe made for a data set, which params.yaml need not describe any more.

    Args:
        dataset: its name.
        remove: whether to remove it; otherwise this only says what would be removed.

    Returns:
        One line per folder or file, their total size, what stays, and the next step.

    Raises:
        InputError: no data set can have the name.
        MissingError: nothing was made for a data set of this name.
        AccessError: something can't be removed.
    """
    check_dataset_name(dataset, "DATASET")
    parts = list(_of_dataset(dataset))
    files = _there(*state_files(dataset), times_file(dataset))
    if not files and not any(part.paths for part in parts):
        raise MissingError(
            f"Nothing was made for a data set {dataset!r}, so there is nothing to remove.",
            _made_for(dataset),
        )
    lines, total, is_busy = _take_away(parts, remove=remove)
    if not is_busy:  # nobody writes these files then: a training or fit holds its folder's lock
        total += sum(map(_size, files))
        lines += [f"{path}: {shown_bytes(_size(path))}" for path in files]
        if remove:
            _remove(files)
    lines.append(f"{shown_bytes(total)} {'' if remove else 'would be '}removed")
    lines.append(
        "params.yaml and what you put into data/ stay, for example photographs and tables."
    )
    if Path(".dvc").is_dir():
        lines.append(
            f"DVC's store may keep copies. Once `datasets` in params.yaml does not list {dataset}, "
            "`dvc gc --workspace` removes them, and all else that the workspace does not use."
        )
    if remove:
        runs = runs_folder(dataset)
        _remove_empty(runs / SWEEPS, runs / ENTRIES, runs, data_root(dataset))
    else:
        lines.append(f"Run `gmpipe clean {dataset} --yes` to remove this.")
    return "\n".join(lines)


def _of_dataset(dataset: str) -> Iterator[_Part]:
    """Yield all that was made for a data set, but for what lies in .state."""
    prepared, cache = prepared_folder(dataset), cache_folder(dataset)
    manifest = _of_folder(prepared, PREPARED_FILE)
    settings = _of_folder(settings_folder(dataset), SETTINGS_OF_VARIANT)
    yield _Part(  # `prepare` writes both under one lock
        prepared,
        [*manifest.paths, *settings.paths],
        others=[*manifest.others, *settings.others],
    )
    yield _of_folder(detector_folder(dataset), DETECTOR_FILE)
    of_cache = _of_folder(cache, CACHE_FILE)
    workers = cache.parent / f".{cache.name}.workers.lock"
    yield replace(of_cache, paths=[*of_cache.paths, *_there(workers)])
    yield from _of_runs(runs_folder(dataset), lambda folder: False)
    yield _of_folder(doubts_folder(dataset), FILE_OF_DOUBTS)
    yield _of_folder(report_folder(dataset), PAGE_FILE)


def _of_folder(folder: Path, written: re.Pattern[str]) -> _Part:
    """What gmpipe wrote into a folder: all of it, or the files whose paths match ``written``."""
    if folder.is_symlink() or not folder.is_dir():
        return _Part(folder, _there(folder))
    ours, others = sort_out(folder, written)
    return _Part(folder, ours, others=others)


def _there(*paths: Path) -> list[Path]:
    return [path for path in paths if exists(path) or path.is_symlink()]


def _made_for(asked: str) -> str:
    """Name the other data sets that something was made for; an empty string if there are none."""
    made = {path.parent.name for path in Path("data").glob("*/prepared")}
    made |= {path.name for top in ("cache", "runs", "reports") for path in Path(top).glob("[!.]*/")}
    made.discard(asked)  # what is left there was made by others
    return f"Something was made for {', '.join(sorted(made))}." if made else ""


def _of_runs(top: Path, is_kept: Callable[[Path], bool]) -> Iterator[_Part]:
    """Yield the runs and sweeps of a folder, and the locks of those that are gone.

    Of a run that is kept, what killed processes left in it.
    """
    folders = [*entries(top), *entries(top / SWEEPS), *entries(top / ENTRIES)]
    for folder in folders:
        if (is_run(folder) or is_entry(folder)) and is_kept(folder):
            left = [path for path in entries(folder) if path.suffix == ".tmp"]
            yield _Part(folder, left, goes=False)
        elif is_run(folder) or is_sweep(folder) or is_entry(folder):
            yield _Part(folder, [folder])
        elif _is_run_of_others(folder) and not is_kept(folder):
            yield _Part(folder, [], goes=False, others=[folder])
    for lock in folders:
        folder = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
        ours = _is_named(folder)
        stale = lock.name == f".{folder.name}.lock" and not exists(folder)
        if stale and ours and not is_kept(folder):
            yield _Part(folder, [])


def _is_run_of_others(folder: Path) -> bool:
    """Whether a folder has a run's name or lies with sweeps or entries, but has more files."""
    return _is_named(folder) and folder.is_dir() and not folder.is_symlink()


def _is_named(folder: Path) -> bool:
    """Whether a path is one of a run, a sweep or an entry."""
    return (
        folder.parent.name == SWEEPS
        or is_entry_folder(folder)
        or run_of_folder(folder.name) is not None
    )


def _take_away(parts: Sequence[_Part], *, remove: bool) -> tuple[list[str], int, bool]:
    """Remove parts, or only look at them.

    Returns:
        a line per removed thing; the bytes of all; and whether a part is being written, so that it
        stays.
    """
    lines: list[str] = []
    total, is_busy = 0, False
    for part in parts:
        lock = part.folder.parent / f".{part.folder.name}.lock"
        with ExitStack() as stack:
            if exists(lock) or (part.paths and remove):
                try:
                    stack.enter_context(folder_lock(part.folder))
                except BusyError:
                    lines.append(f"{part.folder}: is being written, stays")
                    is_busy = True
                    continue
            for path in part.others:
                what = "all of it" if path.is_dir() else "it"
                lines.append(f"{path}: stays, since gmpipe did not write {what}")
            going = []
            for path in part.paths:
                if path.is_symlink() and path.is_dir():
                    lines.append(f"{path}: a link to {path.resolve()}, stays; remove both yourself")
                    continue
                going.append(path)
                total += _size(path)
                if path.suffix != ".lock":
                    lines.append(f"{path}: {shown_bytes(_size(path))}")
            if remove:
                # The lock last, while it is held: nobody can hold a lock that is gone.
                _remove([*going, *([lock] if part.goes else [])])
    return lines, total, is_busy


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty, or there is none
            folder.rmdir()


def _size(path: Path) -> int:
    """Size in bytes; of a link into DVC's cache, that of the link."""
    if path.is_dir() and not path.is_symlink():
        return sum(_size(entry) for entry in entries(path))
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
