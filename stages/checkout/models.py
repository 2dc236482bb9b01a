"""Open a detector or a trained run, with the commands that fix what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DamagedError, MismatchError, MissingError, advising
from pipeline.formats.text import first_few
from pipeline.inference.bundle import check_bundle, is_bundle
from pipeline.inference.new_labels import new_labels, with_labels
from pipeline.inference.trained import TrainedRun, attach_detector
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.prediction import NotFinite
from pipeline.regions.detector import DetectorDescription, read_description
from stages.checkout.layout import CHECKPOINT_FILE, detector_folder
from stages.console.messages import note


def dataset_detector(dataset: str) -> DetectorDescription:
    """Read the description of the detector that `detector` made for a data set.

    Raises:
        MissingError, DamagedError, MismatchError: as `read_description`.
    """
    command = f"`gmpipe detector --dataset {dataset}`"
    with (
        advising(f"Run {command}.", MissingError, DamagedError),
        advising(
            f"Set `detector.{dataset}.source` in params.yaml and run {command}.", MismatchError
        ),
    ):
        return read_description(detector_folder(dataset))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint of the run in ``folder``.

    Raises:
        MissingError, DamagedError: as `load_checkpoint`.
    """
    remedy = (
        "Name the folder of a trained run, which `gmpipe runs list` shows, or train this one with "
        "`gmpipe train`."
    )
    with advising(remedy, MissingError, DamagedError):
        return load_checkpoint(folder / CHECKPOINT_FILE)


def open_run(folder: Path, detector: Path | None, labels: Sequence[str] = ()) -> TrainedRun:
    """Load a trained run for new images.

    Args:
        folder: of the run, or a bundle of it.
        detector: folder of its detector; None for that of the bundle or of the run's checkout.
        labels: names, of which those that are not labels of the run are added to it.

    Raises:
        GmpipeError: as `load_run`, `load_bundle` and `with_labels`.
    """
    if detector is None and is_bundle(folder):
        detector = check_bundle(folder)
    checkpoint = open_checkpoint(folder)
    if new := new_labels(checkpoint, labels):
        checkpoint = _with_new(checkpoint, folder, new)
    make = f"Run `gmpipe detector --dataset {checkpoint.dataset}` in the checkout of the run"
    with (
        advising(f"{make}, or name the detector with `--detector`.", MissingError, DamagedError),
        advising(
            f"Restore the detector that {folder} was trained with, name it with `--detector`, or "
            "train the run again with `gmpipe train`.",
            MismatchError,
        ),
    ):
        return attach_detector(checkpoint, folder, detector)


def _with_new(checkpoint: Checkpoint, folder: Path, new: Sequence[str]) -> Checkpoint:
    """`with_labels`, with a note on what the scores of new labels are worth."""
    source = checkpoint.settings.label_vectors
    remedy = (
        f"New labels get their vectors from {source}, the run's `label_vectors`: put it where it "
        "was, or leave out the labels that the run was not trained with."
    )
    with advising(remedy, MissingError):
        added = with_labels(checkpoint, new)
    note(
        f"{folder} was not trained with {first_few(new)}, and scores "
        f"{'it' if len(new) == 1 else 'them'} by the label vector alone. Such scores can sort "
        "photographs, but often little better than chance, and whether one is over 0.5 means "
        "nothing (docs/guides/new-labels.md)."
    )
    return added


def note_undecided(run: TrainedRun, instead: str) -> None:
    """Note that the scores of a run don't say which labels a photograph has, if that is so.

    Args:
        run: with which labels are predicted.
        instead: a sentence on what to do.
    """
    settings = run.checkpoint.settings
    if not settings.decides and run.checkpoint.decisions is None:
        note(
            f"with the head `{settings.network.head}` and the loss `{settings.loss.name}`, scores "
            "only tell which labels are more likely than others, so that a score above 0.5 does "
            f"not mean that the photograph has the label. {instead}"
        )


@contextmanager
def advising_on_scores(dataset: str) -> Iterator[None]:
    """Name the commands that fix a run whose scores or weights are not finite."""
    remedy = (
        "Restore the run's checkpoint, or train the run again with `gmpipe train`. If the numbers "
        f"are the detector's, make it again with `gmpipe detector --dataset {dataset}`."
    )
    with advising(remedy, NotFinite):
        yield
