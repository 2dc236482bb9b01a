"""What `verify` finds about an entry: scores beside the runs, without a checkpoint of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.manifest import Manifest
from pipeline.errors import MismatchError
from pipeline.evaluation.entries import EntryEvaluation, read_entry
from pipeline.evaluation.metrics import read_evaluation, shown
from pipeline.files import sha256_file
from stages.checkout.layout import METRICS_FILE, SUMMARY_FILE, runs_folder
from stages.checkout.results import entry_command, read_entry_of
from stages.commands.verification.findings import Finding, look, sound, there
from stages.commands.verification.runs import check_summary


def entry_findings(folder: Path, manifest: Manifest | None) -> Iterator[Finding]:
    """Look at an entry and at what it was made of, as far as that is there; and at its summary.

    Args:
        manifest: of the data set; None if it is not sound.
    """

    def entry() -> str:
        evaluation = read_entry_of(folder, manifest).evaluation
        for name, sha256 in evaluation.made_of.items():
            if _today(evaluation, name) not in (None, sha256):
                raise MismatchError(
                    f"{name} has changed since.",
                    f"Run {entry_command(evaluation)}, or delete {folder}.",
                )
        return f"{evaluation.describe()}, mAP {shown(evaluation.metrics.mAP)}"

    def summary() -> str:
        check_summary(folder / SUMMARY_FILE, sound(lambda: read_entry(folder / METRICS_FILE)))
        return f"as {METRICS_FILE}"

    yield look(folder, entry)
    if there(folder / SUMMARY_FILE):
        yield look(folder / SUMMARY_FILE, summary)


def _today(evaluation: EntryEvaluation, name: str) -> str | None:
    """The sha256 that a file, or the checkpoint of a run, has now; None if it is not known."""
    if evaluation.kind == "average":
        metrics = runs_folder(evaluation.dataset) / name / METRICS_FILE
        return sound(lambda: read_evaluation(metrics).checkpoint_sha256)
    return sound(lambda: sha256_file(Path(name)))
