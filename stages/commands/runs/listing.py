"""Command `runs list`: the runs in runs/<dataset>/, and what each was made with.

params.yaml names a run by its variant and seed. Runs with other settings (`--set`, `sweep`), other
variants or other seeds lie in folders that it does not name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.errors import AccessError, DamagedError, InputError, MissingError
from pipeline.evaluation.entries import read_entry
from pipeline.evaluation.metrics import shown
from pipeline.files import canonical_json, exists, matching, sha256_file
from pipeline.formats.sealed import read_sealed_json
from pipeline.formats.text import first_few
from stages.checkout.keys import differing, flat
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    ENTRIES,
    METRICS_FILE,
    entry_folder,
    is_entry_folder,
    run_folder,
    run_of_folder,
    runs_folder,
)
from stages.checkout.params import Request, has_variant, read_request, variant_settings
from stages.checkout.resolved import read_run_settings
from stages.checkout.times import read_times
from stages.commands.runs.entries import entries, is_run
from stages.console.progress import progress_bar

_OUT_OF_DATE = "out of date"  # of another checkpoint, which a killed training has replaced
_UNREADABLE = "unreadable"  # by this user
_RUN_STAGES = ("train", "evaluate")


def find_run(named: str, dataset: str | None) -> Path:
    """Find the folder of a run, or of an entry.

    Args:
        named: a folder, or the name of a run or of an entry.
        dataset: whose run is meant by a name; None for the first of ``datasets`` in params.yaml.

    Raises:
        MissingError: the data set has no run of this name.
        InputError: the data set is unknown, or is given beside a folder.
    """
    path = Path(named)
    if len(path.parts) != 1 or path.exists():
        if dataset is not None:
            raise InputError(
                f"--dataset {dataset} says whose run a name means, but {named} is a folder.",
                "Leave the option out, or give the run's name.",
            )
        return path
    return folder_of_name(read_request(dataset).dataset, named)


def folder_of_name(dataset: str, name: str) -> Path:
    """The folder of a run, or of an entry, of a data set by its name.

    Raises:
        MissingError: the data set has neither.
    """
    folder, entry = runs_folder(dataset) / name, entry_folder(dataset, name)
    if not exists(folder) and exists(entry):
        return entry
    if not exists(folder):
        raise MissingError(
            f"The data set {dataset} has no run {name!r}.",
            _same_name(folder) or f"`gmpipe runs list --dataset {dataset}` lists its runs.",
        )
    return folder


def check_run(folder: Path) -> None:
    """Check that a folder holds a trained run.

    Raises:
        MissingError: it does not; the remedy names runs in folders of the same name, if any.
    """
    checkpoint = folder / CHECKPOINT_FILE
    if exists(checkpoint):
        return
    remedy = "Run `gmpipe train` for its data set, variant, seed and `--set` options."
    if is_entry_folder(folder):
        remedy = "An entry has none, only scores: name a run."
    raise MissingError(f"There is no checkpoint at {checkpoint}.", _same_name(folder) or remedy)


def _same_name(folder: Path) -> str:
    """Suggest the trained runs in folders of the same name; an empty string if there are none."""
    same_name = sorted(
        str(path)
        for path in Path("runs").glob("*/*")
        if path.name == folder.name and (path / CHECKPOINT_FILE).is_file()
    )
    return f"Did you mean {' or '.join(same_name)}?" if same_name else ""


def list_runs(request: Request, *, times: bool = False) -> str:
    """Tabulate the runs of a data set, with the settings of those that params.yaml does not name.

    Args:
        request: for the data set.
        times: also give the times of the runs, of stage one, and their total.
    """
    dataset, params = request.dataset, request.params
    top = runs_folder(dataset)
    variants = [name for name in params.variants if has_variant(request.train, name)]
    named = {run_folder(dataset, variant, seed) for variant in variants for seed in params.seeds}
    rows = []
    for folder in progress_bar([*entries(top)], desc="read runs", unit="run", delay=1):
        try:
            if not is_run(folder):
                continue
            checkpoint = folder / CHECKPOINT_FILE
            sha256 = sha256_file(checkpoint) if exists(checkpoint) else None
        except (AccessError, InputError, OSError):
            is_named = "yes" if folder in named else "no"
            rows.append([str(folder), _UNREADABLE, "", is_named, "", ""])
            continue
        made_with = _made_with(folder, sha256)
        named_and_made_with = _named_and_made_with(
            folder, made_with, request, named=folder in named
        )
        metrics = _metrics(folder, sha256)
        value = metrics if isinstance(metrics, str) else shown(metrics["mAP"], digits=1)
        epochs = _epochs(sha256, made_with)
        rows.append([str(folder), value, epochs, *named_and_made_with, _commit(metrics)])
    rows += map(_entry_row, matching(top / ENTRIES, "[!.]*"))
    if not rows:
        return f"There are no runs in {top}. Run `gmpipe train --dataset {dataset}`."
    headers = ["run", "mAP", "epochs", "named by params.yaml", "made with", "commit"]
    total = _add_times(dataset, headers, rows) if times else ""
    return f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}{total}"


def _entry_row(folder: Path) -> list[str]:
    """The row of an entry, which no training made and params.yaml does not name."""
    try:
        found = read_entry(folder / METRICS_FILE)
    except MissingError:
        return [str(folder), "-", "", "no", "", ""]
    except OSError:
        return [str(folder), _UNREADABLE, "", "no", "", ""]
    except (DamagedError, InputError):
        return [str(folder), "damaged", "", "no", "", ""]
    mean = shown(found.metrics.mAP, digits=1)
    commit = _commit({"commit": found.commit, "uncommitted": found.uncommitted})
    return [str(folder), mean, "-", "no", found.describe(), commit]


def _add_times(dataset: str, headers: list[str], rows: Sequence[list[str]]) -> str:
    """Add columns with the seconds of each run; return lines with those of stage one and of all."""
    stages: dict[str, float] = {}
    runs: dict[tuple[str, str], float] = {}
    for one in read_times(dataset):
        if one.run:
            runs[one.stage, one.run] = one.seconds
        else:
            stages[one.stage] = one.seconds
    headers += [f"{stage} (s)" for stage in _RUN_STAGES]
    for row in rows:
        of_run = [runs.get((stage, Path(row[0]).name)) for stage in _RUN_STAGES]
        row += ["-" if seconds is None else f"{seconds:.1f}" for seconds in of_run]
    listed = {Path(row[0]).name for row in rows}
    for stage in _RUN_STAGES:
        stages[stage] = sum(
            seconds for (of, run), seconds in runs.items() if of == stage and run in listed
        )
    lines = [f"{stage}: {seconds:.1f} s" for stage, seconds in stages.items()]
    return "\n\n" + "\n".join([*lines, f"in total: {sum(stages.values()):.1f} s"])


def _metrics(folder: Path, checkpoint: str | None) -> Mapping[str, Any] | str:
    """The metrics of a run, or a word, given the sha256 of its checkpoint.

    Its mAP is a number, or None for a predictor of sets.
    """
    try:
        metrics: dict[str, Any] = read_sealed_json(folder / METRICS_FILE)
        if metrics["checkpoint_sha256"] != checkpoint:
            return _OUT_OF_DATE
        return {**metrics, "mAP": float(metrics["mAP"]) if "mAP" in metrics else None}
    except FileNotFoundError:
        return "-"
    except OSError:
        return _UNREADABLE
    except (DamagedError, InputError, KeyError, TypeError, ValueError):
        return "damaged"


def _commit(metrics: Mapping[str, Any] | str) -> str:
    """The commit that evaluated a run, and whether there were uncommitted changes."""
    if isinstance(metrics, str) or not metrics.get("commit"):
        return ""
    return shown_commit(metrics["commit"], metrics.get("uncommitted"))


def shown_commit(commit: str, uncommitted: bool | None) -> str:
    """A commit as people read it."""
    return f"{commit[:12]}{', uncommitted changes' if uncommitted else ''}"


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
    described = variant_settings(request.train, made_with["variant"]).model_dump()
    used = {**made_with["settings"], "views": made_with["views"]}
    differences = differing(used, {**described, "views": request.extract.views})
    # An earlier version's settings may lack some that there are now.
    recorded = flat(used)
    return first_few(
        [f"{key}={canonical_json(recorded[key])}" for key in differences if key in recorded], ", "
    )
