"""Stage `train`: cached regions -> runs/<dataset>/<variant>-s<seed>/{checkpoint.pt,history.csv}."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from pipeline.errors import GmpipeError
from pipeline.files import folder_lock, replacing
from pipeline.learning.checkpoint import Checkpoint, save_checkpoint
from pipeline.learning.distributed import processes
from pipeline.learning.splits import open_split
from pipeline.learning.training import (
    Diverged,
    History,
    Row,
    Training,
    Weights,
    split_validation,
    train_network,
)
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    EVALUATION_FILES,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    TENSORBOARD_FOLDER,
    state_file,
)
from stages.checkout.plans import RunPlan, open_inputs
from stages.checkout.times import record_time
from stages.console.progress import progress_bar


def train(run: RunPlan, *, tensorboard: bool = False) -> str | None:
    """Train a run and write its checkpoint and history.

    Where `torchrun` started several processes, each calls this, and the first one writes.

    Args:
        tensorboard: also write each epoch's row of the history for TensorBoard.

    Returns:
        a line that says where they are; None in all processes but the first.

    Raises:
        GmpipeError: what it reads is missing or damaged, or training diverged; then the weights
            of the last whole epoch are in `checkpoint-last-good.pt`.
    """
    began = time.monotonic()
    manifest, cache, vectors = open_inputs(run.dataset, run.settings)
    with advising_on_cache(run.dataset):
        split = open_split(cache, manifest, "train", run.views, run.settings.regions)
    left_out = ""
    if split.left_out:
        left_out = f"; {split.left_out} images without regions left out"
    validation = None
    if run.settings.validation:
        split, validation = split_validation(split, run.settings.validation, run.seed)
    key = {
        "seed": run.seed,
        "settings": run.settings.model_dump(mode="json"),
        "views": run.views,
        "cache": cache.fingerprint,
        "vectors": vectors.sha256,
        "labels": manifest.labels_sha256,
    }
    state = state_file("train", key)

    def checkpoint(weights: Weights, epoch: int) -> Checkpoint:
        return Checkpoint(
            dataset=run.dataset,
            variant=run.variant,
            seed=run.seed,
            settings=run.settings,
            epoch=epoch,
            vocabulary=manifest.vocabulary,
            labels_sha256=manifest.labels_sha256,
            label_vectors=torch.from_numpy(vectors.vectors),
            label_vectors_sha256=vectors.sha256,
            recipe=dict(cache.recipe),
            feature_size=cache.feature_size,
            state=weights,
        )

    with processes() as together:
        learn = partial(
            train_network,
            split,
            vectors,
            run.seed,
            run.settings,
            state_file=state,
            name=f"{run.variant}, seed {run.seed},",
            processes=together,
            validation=validation,
        )
        if together.rank:
            try:
                learn()
            except Diverged:  # in the first process too, which says so
                sys.exit(1)
            return None
        with folder_lock(run.folder):
            last_good = run.folder / LAST_GOOD_FILE
            last_good.unlink(missing_ok=True)  # of an earlier attempt
            try:
                with _watched(run, tensorboard=tensorboard) as on_epoch:
                    training = learn(on_epoch=on_epoch)
            except Diverged as error:
                state.unlink(missing_ok=True)  # it would come to the same end
                kept = "No epoch was whole by then."
                if error.weights is not None:
                    save_checkpoint(last_good, checkpoint(error.weights, len(error.history)))
                    _write_history(run.folder / HISTORY_FILE, error.history)
                    kept = f"{last_good} has the weights after epoch {len(error.history)}."
                raise GmpipeError(f"{error.finding} {kept} {error.remedy}") from error
            _write_history(run.folder / HISTORY_FILE, training.history)
            weights = training.network.cpu().state_dict()
            save_checkpoint(run.folder / CHECKPOINT_FILE, checkpoint(weights, training.epoch))
            # Or the former checkpoint's numbers would pass for this one's.
            for name in EVALUATION_FILES:
                (run.folder / name).unlink(missing_ok=True)
            state.unlink(missing_ok=True)
    record_time(run.dataset, "train", began, run=run.folder.name)
    return f"{run.folder}: {_summary(training)}{left_out}"


def _summary(training: Training) -> str:
    loss = training.history[-1]["train_loss"]
    text = f"{len(training.history)} epochs, loss {loss:.3f}"
    if training.epoch != len(training.history):
        text += f", weights of epoch {training.epoch}"
    if not math.isnan(training.waited):
        text += f", waiting for data {100 * training.waited:.1f} %"
    return text


def _write_history(path: Path, history: History) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


@contextmanager
def _watched(run: RunPlan, *, tensorboard: bool) -> Iterator[Callable[[Row], None]]:
    """What is to be told of each epoch: a progress bar, and TensorBoard if asked for."""
    with ExitStack() as stack:
        board = _board(run.folder / TENSORBOARD_FOLDER, stack) if tensorboard else None
        bar = stack.enter_context(
            progress_bar(total=run.settings.epochs, desc=run.folder.name, unit="epoch")
        )

        def on_epoch(row: Row) -> None:
            bar.update(int(row["epoch"]) - bar.n)
            bar.set_postfix(loss=f"{row['train_loss']:.3f}", refresh=False)
            if board is not None:
                board(row)

        yield on_epoch


def _board(folder: Path, stack: ExitStack) -> Callable[[Row], None]:
    """What writes rows of the history to ``folder``, until the stack is closed.

    Raises:
        GmpipeError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise GmpipeError(
            f"--tensorboard needs the package `tensorboard` ({error}). Run `pip install "
            "--editable '.[tensorboard]'` in the checkout, or leave the option out."
        ) from error
    writer: SummaryWriter | None = None

    def add(row: Row) -> None:
        nonlocal writer
        epoch = int(row["epoch"])
        if writer is None:
            # A resumed training repeats epochs; what an earlier attempt wrote of them goes.
            writer = stack.enter_context(SummaryWriter(str(folder), purge_step=epoch))
        for column in row.keys() - {"epoch"}:
            writer.add_scalar(column, row[column], epoch)

    return add
