"""Training of a network on a split, section 4.2 of the paper.

Letters: C labels, W size of a label vector.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from pipeline.evaluation.metrics import evaluate
from pipeline.heads.building import build_head
from pipeline.heads.contract import Head, HeadSizes, LabelSet
from pipeline.interrupts import deferred_interrupt
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.batches import Feed, input_statistics
from pipeline.learning.distributed import Processes, alone
from pipeline.learning.loop import Row, Training, TrainingLoop, is_finished
from pipeline.learning.prediction import NotFinite, Predictions, Scorer
from pipeline.learning.seeds import seed_process, seeded
from pipeline.learning.splits import SplitData, label_set
from pipeline.settings import TrainSettings
from pipeline.tensors import computing_in, has_bfloat16_units

SAVE_SECONDS = 30.0
"""A killed training loses at most these seconds, and on an accelerator up to 32 steps more. Saving
takes a fraction of a second, fsync included, so that saving after every epoch would cost more than
the epochs where those are short."""


def train_network(
    split: SplitData,
    vectors: LabelVectors,
    seed: int,
    settings: TrainSettings,
    *,
    state_file: Path,
    name: str = "the network",
    processes: Processes | None = None,
    validation: SplitData | None = None,
    on_step: Callable[[int], None] = lambda done: None,
    on_epoch: Callable[[Row], None] = lambda row: None,
    save_every: float = SAVE_SECONDS,
) -> Training:
    """Train a network on a split.

    Every 30 s, within an epoch or after it, the training writes to ``state_file`` what it needs to
    resume. A training that was killed continues from there, and ends with the same weights as one
    that was not. W processes with ``batch_size`` images per step make the steps of one process
    with W times as many. In one process, Ctrl-C saves the state and raises `Interrupted`.

    Args:
        split: the training split.
        vectors: of the C labels.
        seed: of the initial weights, the shuffling, the views and the dropout.
        settings: the variant's own settings.
        state_file: where the state is kept between two attempts, which must have one precision.
        name: of the network, for messages.
        processes: that train it together; None for this one alone.
        validation: images on which mAP is measured in each epoch, from which
            ``settings.selection`` and ``settings.patience`` choose epochs.
        on_step: called before the first step and after each, with the number of steps done so far.
        on_epoch: called in process 0 after each epoch, with the epoch's row of the history.
        save_every: seconds between two writes of the state; on an accelerator, 32 steps at least.

    Raises:
        Diverged: a loss, a gradient, a weight or a validation score is not finite.
        GmpipeError: ``state_file`` can't be used, see `TrainingLoop.resume`.
        DamagedError: as `RegionCache.gather`.
        InputError: the validation part has no positive label.
    """
    processes = processes or alone()
    with seeded(seed), computing_in(settings.precision):
        feed = Feed(split, processes.device, sharers=processes.on_machine)
        labels = known_labels(split, vectors, settings)
        network = _initial_network(feed, labels, settings)
        seed_process(seed, processes.rank)
        loop = TrainingLoop(
            network.to(processes.device),
            labels.to(processes.device),
            feed,
            with_precision(settings, processes),
            seed=seed,
            processes=processes,
            name=name,
            state_file=state_file,
            save_every=save_every,
            validated=validation is not None,
        )
        return _run(loop, validation, vectors.names, on_step, on_epoch)


def with_precision(settings: TrainSettings, processes: Processes) -> TrainSettings:
    """Replace the precision `auto` by the one that it means on the device of the first process."""
    if settings.precision != "auto":
        return settings
    half = processes.of_first(has_bfloat16_units(processes.device))
    return settings.model_copy(update={"precision": "bfloat16" if half else "float32"})


def known_labels(split: SplitData, vectors: LabelVectors, settings: TrainSettings) -> LabelSet:
    """What a training on these images knows of the labels."""
    return label_set(split, vectors, conditional=settings.network.reads_conditional)


def _initial_network(feed: Feed, labels: LabelSet, settings: TrainSettings) -> Head:
    """A network with random weights and the statistics of its inputs, on the CPU."""
    statistics = input_statistics(feed)
    sizes = HeadSizes(
        features=feed.split.cache.feature_size,
        labels=labels.vectors.shape[0],
        vectors=labels.vectors.shape[1],
        classes=statistics.classes,
    )
    network = build_head(sizes, settings.network)
    network.start(statistics, labels)
    return network


def _run(
    loop: TrainingLoop,
    validation: SplitData | None,
    labels: tuple[str, ...],
    on_step: Callable[[int], None],
    on_epoch: Callable[[Row], None],
) -> Training:
    """Run the epochs that are left of a training."""
    feed, processes = None, loop.processes
    if validation is not None:
        feed = Feed(validation, processes.device, sharers=processes.on_machine)
    loop.resume()
    on_step(loop.steps)
    # Several processes would have to agree on the step after which they save and stop.
    deferring = deferred_interrupt() if processes.count == 1 else nullcontext(loop.interrupted)
    with deferring as loop.interrupted:
        while not is_finished(loop.position.history, loop.settings):
            row = loop.run_epoch(on_step)
            if feed is not None:
                predictions = _validate(loop, feed, labels)
                measured = evaluate(predictions.logits, feed.split.truth, labels).mAP
                assert measured is not None  # all scores can be ranked
                # All processes must agree on the epoch after which they stop.
                row["validation_mAP"] = processes.of_first(measured)
            loop.end_epoch(row)
            if processes.rank == 0:
                on_epoch(row)
            loop.save_if_due()
    return loop.result()


def _validate(loop: TrainingLoop, validation: Feed, names: tuple[str, ...]) -> Predictions:
    """Score the validation part.

    Raises:
        Diverged: a score is not finite.
    """
    scorer = Scorer(
        loop.current_network(),
        loop.labels,
        names,
        name=loop.name,
        batch_size=loop.settings.batch_size,
        device=loop.processes.device,
    )
    try:
        return scorer.predict(validation)
    except NotFinite as error:
        epoch = len(loop.position.history) + 1
        raise loop.diverged(
            f"in epoch {epoch}, as its validation shows. {error.problem}"
        ) from error
