"""Command `runs show`: how a run or an entry was made, what it reached, and what is out of date."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from pipeline.datasets.difficult import describe_treatments
from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.evaluation.entries import EntryEvaluation
from pipeline.evaluation.metrics import Evaluation, read_evaluation, shown
from pipeline.evaluation.tables import HEADLINES
from pipeline.files import canonical_json
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.splits import validation_size
from pipeline.shards.schema import fingerprint
from stages.checkout.keys import flat
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    entry_folder,
    is_entry_folder,
    runs_folder,
)
from stages.checkout.models import open_checkpoint
from stages.checkout.params import Request, has_variant, read_request, variant_settings
from stages.checkout.plans import differing_settings
from stages.checkout.results import read_metrics_of
from stages.checkout.times import read_times
from stages.commands.runs.listing import check_run, shown_commit
from stages.commands.verification.entries import entry_findings
from stages.commands.verification.runs import RunFiles, Today

_Rows = Sequence[tuple[str, object]]


def show(path: Path) -> str:
    """Show a run, or an entry.

    Args:
        path: of its folder.

    Returns:
        tables of facts, of settings and of the recipe of its regions, and what is out of date.

    Raises:
        MissingError: there is no such run or entry.
        InputError: it is in another checkout.
        DamagedError: its checkpoint is damaged, or the metrics of the entry are.
    """
    folder = _in_checkout(path)
    if is_entry_folder(folder):
        return _show_entry(folder)
    check_run(folder)
    request = read_request(folder.parent.name)
    checkpoint = open_checkpoint(folder)
    evaluation, problem = _evaluation(folder, checkpoint)
    today = Today(request.dataset)
    parts = [
        str(folder),
        _table(_facts(request, folder, checkpoint, today, evaluation, problem)),
        _settings(request, checkpoint),
        _table([("regions made with", "value"), *sorted(checkpoint.recipe.items())]),
        _out_of_date(request, today, folder),
    ]
    return "\n\n".join(parts)


def _show_entry(folder: Path) -> str:
    evaluation = read_metrics_of(folder)
    facts: _Rows = [
        ("data set", evaluation.dataset),
        ("entry", evaluation.name),
        *_measured(evaluation),
        ("scores", evaluation.describe()),
        *((name, f"sha256 {sha256}") for name, sha256 in evaluation.made_of.items()),
    ]
    by_label = [(label, shown(ap)) for label, ap in evaluation.metrics.AP.items()]
    findings = entry_findings(folder, Today(evaluation.dataset).manifest)
    parts = [str(folder), _table(facts), _table([("label", "AP"), *by_label])]
    return "\n\n".join([*parts, "\n".join(map(str, findings))])


def _in_checkout(path: Path) -> Path:
    """The path of the folder of a run or an entry from the checkout.

    Raises:
        InputError: it is in another checkout.
    """
    if not path.exists():
        return path
    whole = path.absolute()
    run = runs_folder(whole.parent.name) / whole.name
    entry = entry_folder(whole.parent.parent.name, whole.name)
    for folder in (run, entry):
        if folder.exists() and folder.samefile(path):
            return folder
    raise InputError(
        f"{path} is not in the folder runs/ of this checkout.",
        "Name a folder such as runs/<dataset>/full-s0, or change to the run's checkout.",
    )


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
    today: Today,
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
        rows += [
            ("validation images", _validated(checkpoint, today)),
            ("validation mAP", f"{validation:.2f}"),
        ]
    if checkpoint.chosen_precision:
        rows.append(("precision of training", f"auto, {checkpoint.chosen_precision}"))
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


def _validated(checkpoint: Checkpoint, today: Today) -> str:
    """On which images a run was validated, and on how many if that can be known.

    The checkpoint does not hold the number. It is known while manifest and cache are those that the
    run was trained on.
    """
    share = checkpoint.settings.validation
    of = f"of the training split, by `validation: {share:g}`"
    if not share:
        of = "of the split `val`; the setting `validation` is for data sets without one"
    manifest, index = today.manifest, today.index
    if (
        manifest is None
        or index is None
        or manifest.train_sha256 != checkpoint.train_sha256
        or index.fingerprint != fingerprint(checkpoint.recipe)
    ):
        return of
    held = {image_id.decode() for image_id in index.image_ids.tolist()}
    images = manifest.image_ids("train" if share else "val")
    number = sum(image_id in held for image_id in images)
    return f"{validation_size(number, share) if share else number} {of}"


def _times(dataset: str, run: str) -> Iterator[tuple[str, object]]:
    for one in read_times(dataset):
        if one.run == run:
            done = {"train": "trained", "evaluate": "evaluated"}.get(one.stage, one.stage)
            yield done, f"{one.finished}, in {one.seconds:.1f} s"


def _measured(evaluation: Evaluation | EntryEvaluation) -> Iterator[tuple[str, object]]:
    left_out = f", {evaluation.left_out} without regions left out" if evaluation.left_out else ""
    yield "test images", f"{evaluation.images} of {evaluation.split}{left_out}"
    if evaluation.difficult:
        yield "difficult labels", describe_treatments(evaluation.difficult)
    for name in HEADLINES:
        yield f"test {name}", shown(evaluation.metrics.number(name))
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


def _out_of_date(request: Request, today: Today, folder: Path) -> str:
    """What `verify` finds about the run's files."""
    findings = RunFiles(request, today, folder).findings()
    lines = [str(finding) for finding in findings if finding.status != "sound"]
    return "\n".join(lines) or "Every file of the run is sound and up to date."


def _table(rows: Sequence[tuple[object, ...]]) -> str:
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True))
