"""Command `runs show`: what one run was made with, what it reached, and what is out of date."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.evaluation.metrics import Evaluation, read_evaluation
from pipeline.evaluation.tables import HEADLINES
from pipeline.files import canonical_json
from pipeline.learning.checkpoint import Checkpoint
from pipeline.shards.schema import fingerprint
from stages.checkout.keys import flat
from stages.checkout.layout import CHECKPOINT_FILE, METRICS_FILE, runs_folder
from stages.checkout.models import open_checkpoint
from stages.checkout.params import Request, has_variant, read_request, variant_settings
from stages.checkout.plans import differing_settings
from stages.checkout.times import read_times
from stages.commands.runs.listing import check_run, shown_commit
from stages.commands.verification.runs import RunFiles, Today

_Rows = Sequence[tuple[str, object]]


def show(named: str) -> str:
    """Show a run.

    Args:
        named: its folder, or the folder's name if only one data set has a run of that name.

    Returns:
        tables of facts, of settings and of the recipe of its regions, and what is out of date.

    Raises:
        MissingError, InputError: there is no such run, or several.
        DamagedError: its checkpoint is damaged.
    """
    folder = _find(named)
    check_run(folder)
    request = read_request(folder.parent.name)
    checkpoint = open_checkpoint(folder)
    evaluation, problem = _evaluation(folder, checkpoint)
    parts = [
        str(folder),
        _table(_facts(request, folder, checkpoint, evaluation, problem)),
        _settings(request, checkpoint),
        _table([("regions made with", "value"), *sorted(checkpoint.recipe.items())]),
        _out_of_date(request, folder),
    ]
    return "\n\n".join(parts)


def _find(named: str) -> Path:
    """Find the folder of a run.

    Raises:
        MissingError, InputError: there is none, it is in another checkout, or there are several.
    """
    path = Path(named)
    if len(path.parts) > 1:
        folder = runs_folder(path.parent.name) / path.name
        if path.exists() and not (folder.exists() and folder.samefile(path)):
            raise InputError(
                f"{path} is not in the folder runs/ of this checkout.",
                "Name a folder such as runs/<dataset>/full-s0, or change to the run's checkout.",
            )
        return folder if path.exists() else path
    found = sorted(str(one) for one in Path("runs").glob("*/*") if one.name == named)
    if not found:
        raise MissingError(
            f"There is no run {named!r} in runs/.",
            "`gmpipe runs list --dataset NAME` lists the runs of a data set.",
        )
    if len(found) > 1:
        raise InputError(f"Several data sets have a run {named!r}.", f"Name {' or '.join(found)}.")
    return Path(found[0])


def _evaluation(folder: Path, checkpoint: Checkpoint) -> tuple[Evaluation | None, str]:
    """The metrics of a checkpoint; or None, and why there are none."""
    try:
        found = read_evaluation(folder / METRICS_FILE)
    except MissingError:
        return None, "not evaluated"
    except DamagedError as error:
        return None, error.problem
    if found.checkpoint_sha256 != checkpoint.sha256:
        return None, f"those in {METRICS_FILE} are of another {CHECKPOINT_FILE}"
    return found, ""


def _facts(
    request: Request,
    folder: Path,
    checkpoint: Checkpoint,
    evaluation: Evaluation | None,
    problem: str,
) -> _Rows:
    epochs = f"{checkpoint.epoch} of {len(checkpoint.history)}"
    rows: list[tuple[str, object]] = [
        ("data set", f"{checkpoint.dataset} ({request.prepare.source})"),
        ("variant", checkpoint.variant),
        ("seed", checkpoint.seed),
        *_times(checkpoint.dataset, folder.name),
        ("training images", checkpoint.trained_images),
        ("epoch of the weights", epochs),
    ]
    validation = checkpoint.history[checkpoint.epoch - 1].get("validation_mAP")
    if validation is not None:
        rows.append(("validation mAP", f"{validation:.2f}"))
    if evaluation is None:
        rows.append(("metrics", problem))
    else:
        rows += _measured(evaluation)
    return [
        *rows,
        ("fingerprint of regions", fingerprint(checkpoint.recipe)),
        (
            "label vectors",
            f"{checkpoint.settings.label_vectors}, {checkpoint.label_vectors_sha256}",
        ),
        ("checkpoint", checkpoint.sha256),
    ]


def _times(dataset: str, run: str) -> Iterator[tuple[str, object]]:
    for one in read_times(dataset):
        if one.run == run:
            done = {"train": "trained", "evaluate": "evaluated"}.get(one.stage, one.stage)
            yield done, f"{one.finished}, in {one.seconds:.1f} s"


def _measured(evaluation: Evaluation) -> Iterator[tuple[str, object]]:
    left_out = f", {evaluation.left_out} without regions left out" if evaluation.left_out else ""
    yield "test images", f"{evaluation.images} of {evaluation.split}{left_out}"
    numbers = {name: evaluation.metrics.number(name) for name in HEADLINES}
    for name, number in numbers.items():
        yield f"test {name}", "-" if number is None else f"{number:.2f}"
    if evaluation.commit is not None:
        yield "commit", shown_commit(evaluation.commit, evaluation.uncommitted)


def _settings(request: Request, checkpoint: Checkpoint) -> str:
    """All settings, and beside each what params.yaml has, if that is another value."""
    used = {**checkpoint.settings.model_dump(mode="json"), "views": checkpoint.views}
    header, differences = "params.yaml has", {}
    if has_variant(request.train, checkpoint.variant):
        described = variant_settings(request.train, checkpoint.variant)
        differences = differing_settings(checkpoint, described, request.extract.views)
    else:
        header = f"params.yaml has no variant {checkpoint.variant}"
    rows = [
        (
            key,
            canonical_json(value),
            canonical_json(differences[key][1]) if key in differences else "",
        )
        for key, value in flat(used).items()
    ]
    return _table([("setting", "value", header), *rows])


def _out_of_date(request: Request, folder: Path) -> str:
    """What `verify` finds about the run's files."""
    findings = RunFiles(request, Today(request.dataset), folder).findings()
    lines = [str(finding) for finding in findings if finding.status != "sound"]
    return "\n".join(lines) or "Every file of the run is sound and up to date."


def _table(rows: Sequence[tuple[object, ...]]) -> str:
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))
