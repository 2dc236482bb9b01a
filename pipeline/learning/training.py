"""The training loop of stage two, section 4.2 of the paper.

Letters: N images of a split, B images of a batch, C labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import evaluate
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.batches import Batch, Feed, region_statistics
from pipeline.learning.distributed import Processes, alone
from pipeline.learning.seeds import seed_everything
from pipeline.learning.splits import SplitData
from pipeline.matching.loss import matching_loss
from pipeline.matching.network import Network, build_network, image_logits
from pipeline.settings import TrainSettings
from pipeline.tensors import (
    foreign_state,
    learning_state,
    load_state,
    random_state,
    restore_learning,
    restore_random,
    save_tensors,
)

Row = dict[str, float]
History = list[Row]
Weights = dict[str, Tensor]

SAVE_SECONDS = 30.0
"""What a killed training loses at most. Saving takes a fraction of a second, fsync included, so
that saving after each epoch would cost more than the epochs where those are short."""


@dataclass(frozen=True)
class Predictions:
    """What a network says of a split of N images.

    Attributes:
        scores: (N, C) float32, probabilities.
        regions: (N, C) int16, place of the region that won each label's max (14).
    """

    scores: np.ndarray
    regions: np.ndarray


@dataclass(frozen=True)
class Training:
    """A training that came to its end.

    Attributes:
        network: with the chosen epoch's weights, in eval mode.
        epoch: the chosen one, from 1.
        history: a row an epoch: ``epoch``, ``learning_rate``, ``train_loss`` (mean over the
            images), ``gradient_norm`` (largest before clipping) and, with a validation part,
            ``validation_mAP`` (percent).
        waited: share of the time of this attempt's training steps that went by until the step had
            its batch; nan where it made none.
    """

    network: Network
    epoch: int
    history: History
    waited: float


class Diverged(GmpipeError):
    """A loss or a gradient is not finite.

    Attributes:
        finding: what was found.
        remedy: what to change.
        weights: the network's at the end of the last whole epoch; None if none was finished.
        history: of the whole epochs.
    """

    def __init__(
        self, finding: str, remedy: str, weights: Weights | None, history: History
    ) -> None:
        super().__init__(f"{finding} {remedy}")
        self.finding = finding
        self.remedy = remedy
        self.weights = weights
        self.history = history


@dataclass
class _Position:
    """How far a training has come; with the learner and the random states, all that it resumes.

    Attributes:
        history: of the finished epochs.
        steps: done in the epoch after those.
        loss: its steps' losses, each times its images, summed.
        gradient: its largest gradient norm.
        weights: at the end of the last finished epoch.
        chosen: the weights of the best epoch, where that is what is wanted.
        epoch: the one whose weights are the result, as far as is known.
    """

    history: History = field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    gradient: float = 0.0
    weights: Weights | None = None
    chosen: Weights | None = None
    epoch: int = 0


def split_validation(split: SplitData, share: float, seed: int) -> tuple[SplitData, SplitData]:
    """Cut a validation part out of the training split: (to train on, to validate on)."""
    order = np.random.default_rng([seed, 2]).permutation(len(split))
    held = min(max(1, round(share * len(split))), len(split) - 1)
    return split.take(np.sort(order[held:])), split.take(np.sort(order[:held]))


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
    on_epoch: Callable[[Row], None] = lambda row: None,
    save_every: float = SAVE_SECONDS,
) -> Training:
    """Train a network on a split.

    What is needed to resume is written to ``state_file`` every 30 s, within an epoch or after it; a
    training that was killed continues from there and ends with the same weights as one that was
    not. W processes that each take ``batch_size`` images a step make the steps of one that takes
    W times as many.

    Args:
        split: the training split.
        vectors: of the C labels.
        seed: of the initial weights, the shuffling, the views and the dropout.
        settings: the variant's own settings.
        state_file: where the state lies between two attempts.
        name: of what is trained, for messages.
        processes: that train it together; None: this one.
        validation: a part on which mAP is measured each epoch; it decides which epoch's weights
            are the result if ``settings.selection`` says so, and nothing else.
        on_epoch: called in process 0 after each epoch with its row of the history.
        save_every: seconds between two writings of the state; 0: after every step.

    Raises:
        Diverged: a loss or a gradient is not finite.
        GmpipeError: ``state_file`` is damaged, or was left by another number of processes; or the
            validation part has no positive label.
    """
    together = processes or alone()
    seed_everything(seed)
    feed = Feed(split, together.device, sharers=together.on_machine)
    held_out = None
    if validation is not None:
        held_out = Feed(validation, together.device, sharers=together.on_machine)
    network = build_network(
        split.cache.feature_size,
        len(vectors.names),
        vectors.vectors.shape[1],
        settings.network,
    )
    label_vectors = torch.from_numpy(vectors.vectors)
    statistics = region_statistics(feed)
    network.inputs.set_statistics(
        statistics.feature_mean,
        statistics.feature_std,
        statistics.box_mean,
        statistics.box_std,
        label_vectors,
    )
    network.to(together.device)
    loop = _Loop(
        network,
        label_vectors.to(together.device),
        feed,
        seed,
        settings,
        together,
        name,
        state_file,
        save_every,
    )
    if together.rank:  # every process has a dropout of its own
        torch.manual_seed(int(np.random.SeedSequence([seed, together.rank]).generate_state(1)[0]))
    loop.resume()
    while len(loop.position.history) < settings.epochs:
        row = loop.epoch()
        if held_out is not None:
            truth = held_out.split.truth
            found = _predict(loop.result_so_far(), held_out, loop.label_vectors)
            row["validation_mAP"] = evaluate(found.scores, truth, vectors.names).mAP
        loop.end_epoch(row)
        if together.rank == 0:
            on_epoch(row)
        loop.save_if_due()
    return loop.result()


class _Loop:
    """A training under way.

    Args:
        network: with its inputs' statistics, on the device of ``together``.
        label_vectors: (C, W) float32, there too.
        feed: of the training split.
        seed, settings, together, name, state_file, save_every: as `train_network`.
    """

    def __init__(
        self,
        network: Network,
        label_vectors: Tensor,
        feed: Feed,
        seed: int,
        settings: TrainSettings,
        together: Processes,
        name: str,
        state_file: Path,
        save_every: float,
    ) -> None:
        self.network = network
        self.label_vectors = label_vectors
        self.feed = feed
        self.seed = seed
        self.settings = settings
        self.together = together
        self.name = name
        self.state_file = state_file
        self.save_every = save_every
        self.position = _Position()
        self._optimizer = _optimizer(network, settings)
        self._schedule = _schedule(self._optimizer, settings)
        self._parallel = together.parallel(network)
        self._average = _average(network, settings)
        ratio = (feed.split.truth == 1).mean(axis=0)
        self._ratio = torch.from_numpy(ratio).float().to(together.device)
        self._waited = self._spent = 0.0
        self._saved = time.monotonic()
        self._due = False

    def epoch(self) -> Row:
        """Make the steps that are left of the epoch.

        Returns:
            its row of the history, all but the validation's mAP.
        """
        position = self.position
        epoch = len(position.history)
        # Seeded by the epoch alone, so a resumed training sees the same batches.
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.feed))
        views = rng.integers(self.feed.split.rows.shape[1], size=len(order))
        size = self.settings.batch_size * self.together.count
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        parts = [self.together.part(images) for images in steps]
        todo = range(position.steps, len(steps))
        self.network.train()
        begun = time.perf_counter()
        chosen = ((own, views[own]) for own, _ in parts[position.steps :])
        with closing(self.feed.batches(chosen)) as batches:
            for step in todo:
                asked = time.perf_counter()
                batch = next(batches)
                self._waited += time.perf_counter() - asked
                loss, norm = self._step(batch, parts[step][1], epoch * len(steps) + step + 1)
                position.steps += 1
                position.loss += loss * len(steps[step])
                position.gradient = max(position.gradient, norm)
                if position.steps < len(steps):
                    self.save_if_due()
        self._spent += time.perf_counter() - begun
        return {
            "epoch": epoch + 1,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "train_loss": position.loss / len(order),
            "gradient_norm": position.gradient,
        }

    def _step(self, batch: Batch, share: float, number: int) -> tuple[float, float]:
        """One step of the optimiser: the loss of all its images, and its gradient's norm."""
        instances, truth = batch
        half = self.settings.precision == "bfloat16"
        with torch.autocast(self.together.device.type, torch.bfloat16, enabled=half):
            logits = self._parallel(instances, self.label_vectors)
        best = image_logits(logits.float())[0]
        # This process's part of the mean over the step's images.
        loss = matching_loss(best, truth, self._ratio, self.settings.beta) * share
        self._optimizer.zero_grad()
        # The processes' gradients are averaged, where their sum is wanted.
        (loss * self.together.count).backward()
        due = time.monotonic() - self._saved >= self.save_every
        value, due_in = self.together.total([loss.item(), float(due)])
        self._due = due_in > 0
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        size = norm.item()
        if not math.isfinite(value) or not math.isfinite(size):
            raise self._diverged(number, value, size)
        nn.utils.clip_grads_with_norm_(self.network.parameters(), self.settings.clip_norm, norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.network)
        return value, size

    def result_so_far(self) -> Network:
        """The network whose weights would be the result now, in eval mode."""
        found = self.network if self._average is None else self._average.module
        return cast(Network, found.eval())

    def _diverged(self, step: int, loss: float, norm: float) -> Diverged:
        sizes = {
            name: parameter.grad.norm().item()
            for name, parameter in self.network.named_parameters()
            if parameter.grad is not None
        }
        name, size = max(
            sizes.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf
        )
        position, dataset = self.position, self.feed.split.cache.dataset
        return Diverged(
            f"training of {self.name} diverged in step {step} (epoch "
            f"{len(position.history) + 1}): loss {loss:.4g}, gradient norm {norm:.4g}, the largest "
            f"that of {name} ({size:.4g}); the norm before was at most {position.gradient:.4g} in "
            "this epoch.",
            f"Lower train.{dataset}.learning_rate or train.{dataset}.clip_norm.",
            position.weights,
            position.history,
        )

    def end_epoch(self, row: Row) -> None:
        """Take stock of an epoch, whose row of the history is whole by now."""
        self._schedule.step()
        position = self.position
        history = [*position.history, row]
        weights = _copied(self.result_so_far().state_dict())
        chosen, epoch = position.chosen, position.epoch
        if self.settings.selection == "last":
            epoch = len(history)
        elif all(row["validation_mAP"] > other["validation_mAP"] for other in position.history):
            chosen, epoch = weights, len(history)
        self.position = _Position(history, weights=weights, chosen=chosen, epoch=epoch)

    def save_if_due(self) -> None:
        """Write what a killed training resumes from, where the last time is long ago."""
        if not self._due:
            return
        randoms = self.together.gathered(random_state())
        if self.together.rank == 0:
            learned = learning_state(self.network, self._optimizer, self._schedule)
            average = None if self._average is None else self._average.state_dict()
            position = vars(self.position)
            state = {**learned, "average": average, "random": randoms, "position": position}
            save_tensors(self.state_file, state)
        self._saved = time.monotonic()
        self._due = False

    def resume(self) -> None:
        """Go on from where a killed training left off, if there is one."""
        there = self.together.rank == 0 and self.state_file.is_file()
        state = self.together.of_first(load_state(self.state_file) if there else None)
        if state is None:
            return
        restore_learning(state, self.state_file, self.network, self._optimizer, self._schedule)
        try:
            randoms, self.position = state["random"], _Position(**state["position"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise foreign_state(self.state_file, error) from error
        if len(randoms) != self.together.count:
            raise GmpipeError(
                f"{self.state_file} was left by a training in {len(randoms)} processes, this one "
                f"has {self.together.count}, which makes other steps. Start as many as before, or "
                "delete that file to begin anew."
            )
        restore_random(randoms[self.together.rank])

    def result(self) -> Training:
        """The training, after its last epoch."""
        position = self.position
        network = self.result_so_far()
        if position.chosen is not None:
            network.load_state_dict(position.chosen)
        return Training(
            network,
            position.epoch,
            position.history,
            self._waited / self._spent if self._spent else math.nan,
        )


def _copied(weights: Weights) -> Weights:
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}


def _average(network: Network, settings: TrainSettings) -> AveragedModel | None:
    """The moving average of the weights, if there is to be one; it starts with the first step's."""
    if not settings.averaging:
        return None
    average = get_ema_multi_avg_fn(settings.averaging)
    return AveragedModel(network, multi_avg_fn=average, use_buffers=False)


def _optimizer(network: Network, settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings
) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    if settings.schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    return torch.optim.lr_scheduler.StepLR(optimizer, settings.step_epochs, gamma=0.1)


def predict_split(
    network: Network, split: SplitData, label_vectors: Tensor, batch_size: int = 64
) -> Predictions:
    """Scores of a split in view 0, by a network in eval mode."""
    feed = Feed(split, label_vectors.device, once=True)
    return _predict(network, feed, label_vectors, batch_size)


@torch.inference_mode()
def _predict(
    network: Network, feed: Feed, label_vectors: Tensor, batch_size: int = 64
) -> Predictions:
    scores, regions = [], []
    with closing(feed.in_order(batch_size)) as batches:
        for instances, _ in batches:
            best, winners = image_logits(network(instances, label_vectors))
            scores.append(best.sigmoid().cpu().numpy())
            regions.append(winners.cpu().numpy().astype(np.int16))
    return Predictions(np.concatenate(scores), np.concatenate(regions))
