"""The training loop of stage two: its steps, its epochs, and what a killed training resumes from.

Letters: N images of a split, B images of a batch, C labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError, MismatchError
from pipeline.files import exists
from pipeline.heads.contract import Head, LabelSet
from pipeline.interrupts import Interrupted
from pipeline.learning.batches import Batch, Feed
from pipeline.learning.distributed import Processes
from pipeline.learning.optimization import make_average, make_optimizer, make_schedule
from pipeline.learning.splits import repeat_factors, repeated
from pipeline.learning.steps import Gradients
from pipeline.settings import TrainSettings
from pipeline.settings.heads import HEADS
from pipeline.tensors import (
    ODD_STATE,
    check_alike,
    check_equal,
    foreign_state,
    learning_state,
    load_state,
    non_finite,
    random_state,
    restore_learning,
    restore_random,
    save_tensors,
)

_LOOK_EVERY = {"cpu": 1, "cuda": 32}
"""Device -> number of steps between two looks at their losses: each look waits for the device."""

Row = dict[str, float]
"""One epoch in the history: column -> value."""

History = list[Row]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        network: with the chosen epoch's weights, in eval mode.
        epoch: the chosen epoch, counted from 1.
        history: one row per epoch: ``epoch``, ``learning_rate``, ``train_loss`` (mean over the
            images), ``gradient_norm`` (largest before clipping) and, with a validation part,
            ``validation_mAP`` (percent). The learning rate is that of the epoch's last step. There
            are fewer rows than ``settings.epochs`` if ``settings.patience`` ended the training.
        waited: share of the time of this attempt's training steps that was spent waiting for the
            step's batch; nan if this attempt made no step.
    """

    network: Head
    epoch: int
    history: History
    waited: float


class Diverged(InputError):
    """A loss, a gradient, a weight or a validation score is not finite.

    Attributes:
        weights: the network's at the end of the last finished epoch; None if none was finished.
        history: of the finished epochs.
    """

    def __init__(
        self, problem: str, remedy: str, weights: Weights | None, history: History
    ) -> None:
        super().__init__(problem, remedy)
        self.weights = weights
        self.history = history


@dataclass
class Position:
    """How far a training has come.

    With the learner's state and the random states, this is all that a training resumes from.

    Attributes:
        history: of the finished epochs.
        steps: done in the epoch after those.
        loss: sum over its steps of the loss times the number of images.
        gradient: its largest gradient norm.
        weights: at the end of the last finished epoch.
        chosen: the weights of the best epoch, if ``selection`` asks for those.
        epoch: the epoch whose weights are the result so far, counted from 1.
    """

    history: History = field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    gradient: float = 0.0
    weights: Weights | None = None
    chosen: Weights | None = None
    epoch: int = 0


class _Step(NamedTuple):
    """A step that was taken, or is being taken: its number, images, loss and gradient norm."""

    number: int
    images: int
    loss: Tensor
    norm: Tensor


class TrainingLoop:
    """A training in progress.

    Args:
        network: with its inputs' statistics, on the device of ``processes``.
        labels: what is known of the labels, on the same device.
        feed: of the training split.
        settings, seed, processes, name, state_file, save_every: as in `train_network`.
        validated: whether each epoch's row of the history has a validation mAP.

    Attributes:
        interrupted: is asked between steps whether the training should save its state and stop.
    """

    def __init__(
        self,
        network: Head,
        labels: LabelSet,
        feed: Feed,
        settings: TrainSettings,
        *,
        seed: int,
        processes: Processes,
        name: str,
        state_file: Path,
        save_every: float,
        validated: bool = False,
    ) -> None:
        self.network = network
        self.labels = labels
        self.feed = feed
        self.settings = settings
        self.seed = seed
        self.processes = processes
        self.name = name
        self.state_file = state_file
        self.save_every = save_every
        self.validated = validated
        self.interrupted: Callable[[], bool] = lambda: False
        self.position = Position()
        self._optimizer = make_optimizer(network, settings)
        self._schedule = make_schedule(self._optimizer, settings, self._steps_per_epoch)
        self._gradients = Gradients(network, labels, settings, processes)
        self._average = make_average(network, settings)
        self._waited = self._spent = 0.0
        self._saved = time.monotonic()
        self._save_due = False
        self._unseen: list[_Step] = []
        self._look_every = _LOOK_EVERY[processes.device.type]

    @property
    def steps(self) -> int:
        """Number of steps that are done, in all epochs."""
        position = self.position
        return len(position.history) * self._steps_per_epoch + position.steps

    @property
    def _steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.feed), self.settings.batch_size, self.processes.count)

    def run_epoch(self, on_step: Callable[[int], None] = lambda done: None) -> Row:
        """Make the steps that are left of the epoch.

        Args:
            on_step: called after each step with `steps`.

        Returns:
            The epoch's row of the history, without the validation mAP.
        """
        position = self.position
        epoch = len(position.history)
        # Seeded by the epoch alone, so that a resumed training sees the same batches.
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.feed))
        views = rng.integers(self.feed.split.rows.shape[1], size=len(order))
        size = self.settings.batch_size * self.processes.count
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        parts = [self.processes.part(places) for places in steps]
        drawn = self._drawn(rng)
        self.network.train()
        began, rate = time.perf_counter(), self._schedule.rate
        chosen = ((drawn[own], views[own]) for own, _ in parts[position.steps :])
        with closing(self.feed.batches(chosen)) as batches:
            for step in range(position.steps, len(steps)):
                asked = time.perf_counter()
                batch = next(batches)
                self._waited += time.perf_counter() - asked
                rate = self._schedule.rate
                self._step(batch, parts[step][1], self.steps + 1, len(steps[step]))
                position.steps += 1
                on_step(self.steps)
                if position.steps < len(steps):
                    self.save_if_due()
        self._look()
        self._spent += time.perf_counter() - began
        return {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": position.loss / len(order),
            "gradient_norm": position.gradient,
        }

    def _drawn(self, rng: np.random.Generator) -> np.ndarray:
        """The (N,) images of an epoch, sorted: each one once, unless rare labels are repeated."""
        threshold = self.settings.repeat_threshold
        if not threshold:
            return np.arange(len(self.feed))
        return repeated(repeat_factors(self.feed.split.truth, threshold), rng.random())

    def _step(self, batch: Batch, share: float, number: int, images: int) -> None:
        """Take a step of the optimiser.

        Args:
            batch: this process's images of the step.
            share: of the step's images that these are.
            number: of the step, counted from 1.
            images: of the step.
        """
        loss, norm = self._gradients.compute(batch, share)
        self._unseen.append(_Step(number, images, loss, norm))
        if len(self._unseen) == self._look_every:
            self._look()
        nn.utils.clip_grads_with_norm_(self.network.parameters(), self.settings.clip_norm, norm)
        self._optimizer.step()
        self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self.network)

    def _look(self) -> None:
        """Look at the steps that nobody has looked at, and agree on whether to save the state.

        Raises:
            Diverged: the loss or the gradient norm of a step is not finite.
        """
        steps, self._unseen = self._unseen, []
        if not steps:
            return
        due = float(time.monotonic() - self._saved >= self.save_every)
        values = torch.stack([*(step.loss for step in steps), steps[0].loss.new_tensor(due)])
        *losses, processes_due = self.processes.total(values)
        self._save_due = processes_due > 0
        norms = torch.stack([step.norm for step in steps]).tolist()
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise self._diverged_in_step(step.number, loss, norm)
            self.position.loss += loss * step.images
            self.position.gradient = max(self.position.gradient, norm)

    def diverged(self, problem: str, remedy: str = "") -> Diverged:
        """Make the error for a training that can't go on.

        Args:
            problem: where, and what is not finite, as the end of a sentence.
            remedy: by default, to take smaller steps.
        """
        position, dataset = self.position, self.feed.split.cache.dataset
        return Diverged(
            f"The training of {self.name} diverged {problem}",
            remedy or f"Lower train.{dataset}.learning_rate or train.{dataset}.clip_norm.",
            position.weights,
            position.history,
        )

    def _diverged_in_step(self, step: int, loss: float, norm: float) -> Diverged:
        problem = (
            f"in step {step} (epoch {len(self.position.history) + 1}): the loss is {loss:.4g} and "
            f"the gradient norm {norm:.4g}"
        )
        if step == self.steps + 1:  # whose gradients are still there
            name, largest = self._largest_gradient()
            problem += f"; {name} has the largest gradient ({largest:.4g})"
        if step == 1:
            return self.diverged(
                f"{problem}.",
                "No step was taken before, so the learning rate is not the cause. Look for an "
                f"operation in {HEADS[self.settings.network.head].file} whose result or gradient "
                "is not finite, such as a log or a square root, or for extreme values in the "
                "regions.",
            )
        return self.diverged(
            f"{problem}. Before this step, the gradient norm of this epoch was at most "
            f"{self.position.gradient:.4g}."
        )

    def _largest_gradient(self) -> tuple[str, float]:
        """Name of the parameter with the largest gradient, and its norm."""
        norms = {
            name: parameter.grad.norm().item()
            for name, parameter in self.network.named_parameters()
            if parameter.grad is not None
        }
        return max(norms.items(), key=lambda one: one[1] if math.isfinite(one[1]) else math.inf)

    def current_network(self) -> Head:
        """The network whose weights would be the result now, in eval mode."""
        network = self.network if self._average is None else self._average.module
        return cast(Head, network.eval())

    def end_epoch(self, row: Row) -> None:
        """Finish an epoch, given its complete row of the history.

        Raises:
            Diverged: its last step made a weight that is not finite, which no later step has met.
        """
        position = self.position
        history = [*position.history, row]
        weights = _copied(self.current_network().state_dict())
        if broken := non_finite(weights):
            raise self.diverged(
                f"in the last step of epoch {len(history)}: {len(broken)} tensors of its weights "
                f"are no longer finite, the first is {broken[0]}."
            )
        chosen, epoch = position.chosen, position.epoch
        if self.settings.selection == "last":
            epoch = len(history)
        elif all(row["validation_mAP"] > other["validation_mAP"] for other in position.history):
            chosen, epoch = weights, len(history)
        self.position = Position(history, weights=weights, chosen=chosen, epoch=epoch)

    def save_if_due(self) -> None:
        """Save what a killed training resumes from, if ``save_every`` seconds have passed.

        Raises:
            Interrupted: `interrupted` asked for it, and the state is saved.
        """
        is_interrupted = self.interrupted()
        if not self._save_due and not is_interrupted:
            return
        self._look()
        random_states = self.processes.gathered(random_state())
        if self.processes.rank == 0:
            state = {
                **learning_state(self.network, self._optimizer, self._schedule),
                "average": None if self._average is None else self._average.state_dict(),
                "random": random_states,
                "position": vars(self.position),
            }
            save_tensors(self.state_file, state)
        self._saved = time.monotonic()
        self._save_due = False
        if is_interrupted:
            raise Interrupted(self.steps)

    def resume(self) -> None:
        """Continue where a killed training stopped, if one left its state.

        Raises:
            DamagedError: the state was changed, or is that of another learner or another time.
            MismatchError: the state was saved by another number of processes.
        """
        is_left = self.processes.rank == 0 and exists(self.state_file)
        state = self.processes.of_first(load_state(self.state_file) if is_left else None)
        if state is None:
            return
        random_states = state.get("random")
        if not isinstance(random_states, list) or not random_states:
            raise foreign_state(self.state_file, TypeError(f"`random` is {random_states!r}"))
        if len(random_states) != self.processes.count:
            raise MismatchError(
                f"{self.state_file} was saved by a training in {len(random_states)} processes, but "
                f"this training has {self.processes.count}, which would make other steps.",
                f"Start {len(random_states)} processes, or delete {self.state_file} to train from "
                "the beginning.",
            )
        self._restore(state)
        restore_random(random_states[self.processes.rank], self.state_file)

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over the learner and the position of a state; raise as `resume`."""
        per_epoch = self._steps_per_epoch
        try:
            position = Position(**state["position"])
            _check_position(position, self.settings, per_epoch, validated=self.validated)
            for name in ("weights", "chosen"):
                if (weights := getattr(position, name)) is not None:
                    check_alike(weights, self.network.state_dict(), name)
            steps = len(position.history) * per_epoch + position.steps
            if self._average is None:
                check_equal(state["average"], None, "average")
            else:
                check_alike(state["average"], self._average.state_dict(), "average")
                check_equal(state["average"]["n_averaged"].item(), steps, "n_averaged")
                self._average.load_state_dict(state["average"])
        except ODD_STATE as error:
            raise foreign_state(self.state_file, error) from error
        restore_learning(
            state,
            self.state_file,
            self.network,
            self._optimizer,
            self._schedule,
            steps=steps,
        )
        self.position = position

    def result(self) -> Training:
        """The training, after its last epoch."""
        position = self.position
        network = self.current_network()
        if position.chosen is not None:
            network.load_state_dict(position.chosen)
        waited = self._waited / self._spent if self._spent else math.nan
        return Training(network, position.epoch, position.history, waited)


def steps_per_epoch(images: int, batch_size: int, processes: int = 1) -> int:
    """Number of steps in which so many processes, each with its batches, see all images once."""
    return -(-images // (batch_size * processes))


def is_finished(history: History, settings: TrainSettings) -> bool:
    """Whether a training with this history ends: after all epochs, or because of its patience."""
    if len(history) >= settings.epochs:
        return True
    if settings.patience is None or not history:
        return False
    maps = [row["validation_mAP"] for row in history]
    return len(maps) - (1 + maps.index(max(maps))) >= settings.patience


def _check_position(
    position: Position, settings: TrainSettings, per_epoch: int, *, validated: bool
) -> None:
    """Check that a training with these settings and ``per_epoch`` steps an epoch can be there.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it can't.
    """
    history, best = position.history, settings.selection == "best"
    check_equal(type(history), list, "history")
    columns = ["epoch", "learning_rate", "train_loss", "gradient_norm"]
    columns += ["validation_mAP"] if validated else []
    for number, row in enumerate(history, 1):
        check_equal(list(row), columns, "columns of the history")
        check_equal(row["epoch"], number, "epoch")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in row.values()):
            raise ValueError(f"the history of epoch {number} is {row}")
    check_equal(position.weights is not None, bool(history), "whether there are weights")
    check_equal(position.chosen is not None, bool(history) and best, "whether weights are chosen")
    maps = [row["validation_mAP"] for row in history] if best else []
    check_equal(position.epoch, 1 + maps.index(max(maps)) if maps else len(history), "epoch")
    steps, sums = position.steps, (position.loss, position.gradient)
    ends = [is_finished(history[:number], settings) for number in range(1, len(history) + 1)]
    left = 1 if ends and ends[-1] else per_epoch
    if type(steps) is not int or any(ends[:-1]) or not 0 <= steps < left:
        raise ValueError(f"{steps!r} of {per_epoch} steps after {len(history)} epochs")
    if not all(type(value) is float and 0 <= value < math.inf for value in sums) or (
        not steps and any(sums)
    ):
        raise ValueError(f"the sums of {steps} steps are {sums}")


def _copied(weights: Weights) -> Weights:
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
