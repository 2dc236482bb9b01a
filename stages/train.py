"""Stage `train`: cached regions -> runs/<dataset>/<variant>-s<seed>/, with checkpoint and history.

The run's folder also gets `settings.yaml`, which says what the run was made with.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.datasets.label_counts import LabelCounts, check_learnable
from pipeline.datasets.manifest import Manifest
from pipeline.decisions.decisions import Decisions
from pipeline.decisions.fitting import ENOUGH, fit_decisions
from pipeline.errors import InputError, advising
from pipeline.files import (
    check_writable,
    exists,
    folder_lock,
    remove_temporaries,
    replacing,
    tidy,
)
from pipeline.formats.text import counted, first_few
from pipeline.interrupts import Interrupted
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.checkpoint import CHOSEN_PRECISIONS, Checkpoint, save_checkpoint
from pipeline.learning.distributed import Processes, joined_processes
from pipeline.learning.loop import (
    Diverged,
    History,
    Training,
    Weights,
    steps_per_epoch,
)
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import SplitData, open_split, split_validation, training_part
from pipeline.learning.training import known_labels, train_network, with_precision
from pipeline.settings import TrainSettings
from pipeline.shards.reader import RegionCache
from pipeline.tensors import has_bfloat16_units
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    SETTINGS_FILE,
    TENSORBOARD_FOLDER,
    manifest_file,
    state_file,
)
from stages.checkout.plans import RunPlan, check_run_regions, open_inputs
from stages.checkout.resolved import write_run_settings
from stages.checkout.times import record_time
from stages.console.messages import note, stopped
from stages.console.training import TrainingDisplay, displayed_training

ENOUGH_STEPS = 500
"""With far fewer steps than these, a network learns little (docs/own-data.md)."""
FEW_STEPS = 400
"""A training of fewer steps than these is noted."""


@dataclass(frozen=True)
class _Inputs:
    """What a run is trained on.

    Attributes:
        manifest, cache, vectors: of the data set.
        split: the images to train on.
        validation: the images to validate on, if any.
        settings: the run's, with the precision that `auto` means here.
        state: file that a killed training resumes from.
    """

    manifest: Manifest
    cache: RegionCache
    vectors: LabelVectors
    split: SplitData
    validation: SplitData | None
    settings: TrainSettings
    state: Path


def train(run: RunPlan, *, tensorboard: bool = False) -> str | None:
    """Train a run, and write its checkpoint, history and settings.

    If `torchrun` started several processes, each calls this, and the first one writes.

    Args:
        run: what to train.
        tensorboard: also write each epoch's row of the history for TensorBoard.

    Returns:
        A line that says where the results are; None in all processes but the first.

    Raises:
        GmpipeError: an input is missing or damaged, the run's folder can't be written, or the
            training diverged; then `checkpoint-last-good.pt` holds the weights of the last finished
            epoch.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        start = (
            "Start with `torchrun --no-python --nproc-per-node N gmpipe train`, with N at most the "
            "number of CUDA devices if there are any, or unset WORLD_SIZE."
        )
        with advising(start, InputError):
            processes = stack.enter_context(joined_processes())
        if processes.rank:
            try:
                _learn(run, _open(run, processes), processes)
            except Diverged:  # the first process meets the same error, and reports it
                sys.exit(1)
            return None
        # Before anything is read: what two trainings of a run read and write must not mix.
        stack.enter_context(folder_lock(run.folder))
        tidy(run.folder)
        inputs = _open(run, processes)
        remove_temporaries(inputs.state.parent, inputs.state.name)
        # Before hours are spent on the training.
        check_writable(
            run.folder, (CHECKPOINT_FILE, HISTORY_FILE, SETTINGS_FILE, *EVALUATION_FILES)
        )
        check_writable(inputs.state.parent)
        per_epoch = steps_per_epoch(len(inputs.split), run.settings.batch_size, processes.count)
        _note_few_steps(run, per_epoch)
        _note_precision(run, inputs.settings.precision, processes.device)
        board = run.folder / TENSORBOARD_FOLDER if tensorboard else None
        display = displayed_training(run.folder.name, run.settings.epochs, per_epoch, board)
        shown = stack.enter_context(display)
        try:
            training = _learn(run, inputs, processes, shown)
        except Diverged as error:
            raise _reported(error, run, inputs) from error
        except Interrupted as interrupted:
            raise stopped(interrupted, per_epoch * run.settings.epochs) from None
        shown.end()
        _write(run, inputs, training)
    record_time(run.dataset, "train", began, run=run.folder.name)
    left_out = inputs.split.left_out
    ending = f"; {counted(left_out, 'image')} without regions left out" if left_out else ""
    return f"{run.folder}: {_summary(training, run.settings)}{ending}"


def _open(run: RunPlan, processes: Processes) -> _Inputs:
    manifest, cache, vectors = open_inputs(run.dataset, run.settings)
    check_run_regions([run], cache)
    with advising_on_cache(run.dataset):
        whole, validation = _parts(run, cache, manifest)
    split = training_part(whole, run.settings.training_share, run.seed)
    _check_labels(run, whole, split, manifest.vocabulary)
    if validation is not None and not LabelCounts.of_truth(validation.truth).tells_apart:
        raise _can_not_validate(run, validation, of_split="val" in manifest.splits)

    def state_of(settings: TrainSettings) -> Path:
        key = {
            "run": str(run.folder),  # so that its lock holds for the state, too
            "seed": run.seed,
            "settings": settings.model_dump(mode="json"),
            "views": run.views,
            "cache": cache.fingerprint,
            "vectors": vectors.sha256,
            "labels": manifest.train_sha256,
        }
        return state_file("train", run.dataset, key)

    settings = _with_precision(run.settings, state_of, processes)
    return _Inputs(manifest, cache, vectors, split, validation, settings, state_of(settings))


def _with_precision(
    settings: TrainSettings, state_of: Callable[[TrainSettings], Path], processes: Processes
) -> TrainSettings:
    """Replace the precision `auto`: by that of a killed training, or by that of the device.

    Args:
        settings: of the run.
        state_of: the file that a killed training with some settings resumes from.
        processes: which all get the same.
    """
    if settings.precision != "auto":
        return settings
    of_device = with_precision(settings, processes)
    choices = [settings.model_copy(update={"precision": one}) for one in CHOSEN_PRECISIONS]
    left = [choice.precision for choice in choices if exists(state_of(choice))]
    chosen = processes.of_first((left or [of_device.precision])[0])
    return settings.model_copy(update={"precision": chosen})


def _check_labels(
    run: RunPlan, whole: SplitData, split: SplitData, vocabulary: Sequence[str]
) -> None:
    """Check that something can be learned, and note the labels that can't be.

    Args:
        run: the plan.
        whole: the images that could be trained on.
        split: those of them that are.
        vocabulary: the labels.

    Raises:
        InputError: no label has both a positive and a negative image.
    """
    of_whole, counts = (LabelCounts.of_truth(images.truth) for images in (whole, split))
    images = f"{len(whole)} training images of {manifest_file(run.dataset)}"
    check_learnable(of_whole, vocabulary, images)
    drawn = f"{counted(len(split), 'image')} of {len(whole)}"
    setting, share = f"train.{run.dataset}.training_share", run.settings.training_share
    if not counts.tells_apart:
        raise InputError(
            f"{setting} is {share}, which draws {drawn} to train on: among them, no label has both "
            "a positive and a negative image, so that there is nothing to learn.",
            f"Raise `{setting}`, or take another seed.",
        )
    if (without := counts.without_negative).any():
        note(
            f"labels that can't be learned, since each of the {len(split)} training images of "
            f"{run.dataset} has or ignores them: {_names(vocabulary, without)}."
        )
    if (lost := (counts.positive == 0) & (of_whole.positive > 0)).any():
        note(
            f"labels that can't be learned, since {setting} {share} draws {drawn}, and none of "
            f"them has these labels: {_names(vocabulary, lost)}."
        )


def _names(vocabulary: Sequence[str], chosen: np.ndarray) -> str:
    """The first of the labels for which ``chosen`` (C,) is true."""
    return first_few([vocabulary[label] for label in np.flatnonzero(chosen).tolist()])


def _can_not_validate(run: RunPlan, validation: SplitData, *, of_split: bool) -> InputError:
    """The error about images that can't validate a training: their mAP says nothing."""
    problem = "no label has both a positive and a negative image, so that their mAP says nothing."
    if of_split:
        return InputError(
            f"{counted(len(validation), 'image')} of the split `val` in "
            f"{manifest_file(run.dataset)}: {problem}",
            "Check their labels, or leave that split out of the data set.",
        )
    block = f"train.{run.dataset}"
    return InputError(
        f"{block}.validation is {run.settings.validation}, which keeps "
        f"{counted(len(validation), 'image')} for validation: {problem}",
        f"Raise `{block}.validation`, or take another seed.",
    )


def _parts(
    run: RunPlan, cache: RegionCache, manifest: Manifest
) -> tuple[SplitData, SplitData | None]:
    """The images to train on and those to validate on, if any.

    Raises:
        InputError: the settings contradict the splits.
    """
    settings, block = run.settings, f"train.{run.dataset}"
    whole = open_split(cache, manifest, "train", run.views, settings.regions)
    if "val" in manifest.splits:
        if settings.validation:
            raise InputError(
                f"{block}.validation is {settings.validation}, but {run.dataset} has a split `val` "
                f"of {counted(manifest.counts['val']['images'], 'image')}, "
                "which validates each training.",
                f"Set `{block}.validation: 0`, or write `train` instead of `val` where the data "
                "set lists its images.",
            )
        return whole, open_split(cache, manifest, "val", regions=settings.regions)
    if settings.validation:
        return split_validation(whole, settings.validation, run.seed)
    asking = {"selection": ("best", "last")} if settings.selection == "best" else {}
    if settings.patience is not None:
        asking["patience"] = (str(settings.patience), "null")
    for name, usual in (("thresholds", "fixed"), ("calibration", "none")):
        if (kind := getattr(settings.decisions, name)) != usual:
            asking[f"decisions.{name}"] = (kind, usual)
    if asking:
        asked = " and ".join(f"{block}.{name} is `{value}`" for name, (value, _) in asking.items())
        without = " and ".join(f"`{block}.{name}: {value}`" for name, (_, value) in asking.items())
        raise InputError(
            f"{asked}, but nothing validates the training: {block}.validation is 0, and "
            f"{run.dataset} has no split `val`.",
            f"Set `{block}.validation: 0.2`, or {without}.",
        )
    return whole, None


def _learn(
    run: RunPlan,
    inputs: _Inputs,
    processes: Processes,
    shown: TrainingDisplay | None = None,
) -> Training:
    callbacks: dict[str, Any] = {}
    if shown is not None:
        callbacks = {"on_step": shown.step, "on_epoch": shown.epoch}
    return train_network(
        inputs.split,
        inputs.vectors,
        run.seed,
        inputs.settings,
        state_file=inputs.state,
        name=f"{run.variant}, seed {run.seed},",
        processes=processes,
        validation=inputs.validation,
        **callbacks,
    )


def _note_few_steps(run: RunPlan, per_epoch: int) -> None:
    """Note that a training has too few steps to learn much."""
    epochs = run.settings.epochs
    if epochs * per_epoch >= FEW_STEPS:
        return
    wanted = -(-ENOUGH_STEPS // per_epoch)
    note(  # without the name of the run, so that it is said once of many runs
        f"train.{run.dataset}: {counted(epochs, 'epoch')} of {counted(per_epoch, 'step')} "
        f"{'is' if epochs == 1 else 'are'} {counted(epochs * per_epoch, 'step')}, but a network "
        f"usually needs about {ENOUGH_STEPS} to learn. With so few, it often predicts no label. "
        f"Set `epochs: {wanted}` in `train.{run.dataset}` of params.yaml, or in its block "
        "`variants.VARIANT` for a variant that sets `epochs` itself, as most do. "
        f"`--set train.{run.dataset}.epochs={wanted}`, or "
        f"`--set train.{run.dataset}.variants.VARIANT.epochs={wanted}`, tries it."
    )


def _note_precision(run: RunPlan, precision: str, device: torch.device) -> None:
    """Note which precision the machine chose, or that it is slow in the one that was chosen."""
    setting = f"train.{run.dataset}.precision"
    if run.settings.precision == "auto":
        note(f"{setting} is auto, which means {precision} here.")
    elif precision == "bfloat16" and not has_bfloat16_units(device):
        note(
            f"{setting} is bfloat16, for which this machine's {device.type.upper()} has no units, "
            "so that float32 would be faster. Set `precision: auto` to use bfloat16 only where it "
            "is fast."
        )


def _write(run: RunPlan, inputs: _Inputs, training: Training) -> None:
    """Write the results of a finished training.

    The checkpoint comes first. It holds the history too, and metrics name their checkpoint, so that
    nobody takes what an earlier training left for this one's, wherever this is killed.
    """
    decisions = _fitted(run, inputs, training)
    weights = training.network.cpu().state_dict()
    checkpoint = replace(
        _checkpoint(run, inputs, weights, training.epoch, training.history), decisions=decisions
    )
    save_checkpoint(run.folder / CHECKPOINT_FILE, checkpoint)
    _write_history(run.folder / HISTORY_FILE, training.history)
    for name in (*EVALUATION_FILES, LAST_GOOD_FILE):  # of an earlier training
        (run.folder / name).unlink(missing_ok=True)
    write_run_settings(run, checkpoint.chosen_precision)
    inputs.state.unlink(missing_ok=True)


def _fitted(run: RunPlan, inputs: _Inputs, training: Training) -> Decisions | None:
    """Fit calibration and thresholds on the validation part, if the settings ask for them."""
    settings, validation = run.settings.decisions, inputs.validation
    if not settings.fitted or validation is None:  # `_parts` refuses to fit without such a part
        return None
    scorer = Scorer(
        training.network,
        known_labels(inputs.split, inputs.vectors, run.settings),
        inputs.vectors.names,
        name=str(run.folder),
        batch_size=run.settings.batch_size,
    )
    decisions = fit_decisions(scorer.predict(validation).logits, validation.truth, settings)
    for what, kind, own in (
        ("threshold", settings.thresholds, decisions.own_threshold),
        ("calibration", settings.calibration, decisions.own_calibration),
    ):
        if kind in ("f1", "precision", "platt") and not own.all():
            shared = f"They share the {what} of all labels."
            if kind == "precision" and not decisions.thresholds[~own].any():  # logits
                shared = (
                    "Their threshold is 0.5, since no threshold gives all labels together a "
                    f"precision of {settings.precision}."
                )
            note(
                f"labels without a {what} of their own: "
                f"{_names(inputs.manifest.vocabulary, ~own)}. {shared} Among the "
                f"{counted(len(validation), 'image')} that validate, these labels have fewer than "
                f"{ENOUGH} positives or negatives, or scores that allow no {what} of their own."
            )
    return decisions


def _reported(error: Diverged, run: RunPlan, inputs: _Inputs) -> InputError:
    """Keep what a diverged training has learned; return the error that says where it is."""
    inputs.state.unlink(missing_ok=True)  # a training that resumed from it would diverge again
    kept = "It had not finished an epoch."
    if error.weights is not None:
        epoch, path = len(error.history), run.folder / LAST_GOOD_FILE
        save_checkpoint(path, _checkpoint(run, inputs, error.weights, epoch, error.history))
        _write_history(run.folder / HISTORY_FILE, error.history)
        kept = f"{path} holds the weights after epoch {epoch}."
    return InputError(f"{error.problem} {kept}", error.remedy)


def _checkpoint(
    run: RunPlan, inputs: _Inputs, weights: Weights, epoch: int, history: History
) -> Checkpoint:
    labels = known_labels(inputs.split, inputs.vectors, run.settings)
    return Checkpoint(
        dataset=run.dataset,
        variant=run.variant,
        seed=run.seed,
        settings=run.settings,
        views=run.views,
        epoch=epoch,
        history=history,
        vocabulary=inputs.manifest.vocabulary,
        train_sha256=inputs.manifest.train_sha256,
        trained_images=len(inputs.split),
        label_vectors=labels.vectors,
        ratio=labels.ratio,
        conditional=labels.conditional,
        label_vectors_sha256=inputs.vectors.sha256,
        recipe=dict(inputs.cache.recipe),
        feature_size=inputs.cache.feature_size,
        state=weights,
        chosen_precision=inputs.settings.precision if run.settings.precision == "auto" else "",
    )


def _summary(training: Training, settings: TrainSettings) -> str:
    made, loss = len(training.history), training.history[-1]["train_loss"]
    text = f"{counted(made, 'epoch')}, loss {loss:.3f}"
    if made < settings.epochs:
        text = (
            f"stopped early after epoch {made} of {settings.epochs}, since the validation mAP had "
            f"not risen for {counted(settings.patience or 0, 'epoch')}; loss {loss:.3f}"
        )
    if training.epoch != len(training.history):
        text += f", weights of epoch {training.epoch}"
    validation = training.history[training.epoch - 1].get("validation_mAP")
    if validation is not None:
        text += f", validation mAP {validation:.2f}"
    if not math.isnan(training.waited):
        text += f", waiting for data {100 * training.waited:.1f} %"
    return text


def _write_history(path: Path, history: History) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
