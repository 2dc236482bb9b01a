"""What a training computes: batches, statistics, losses, rates, averages, and the chosen epoch.

`toys` describes the toy problem and its letters. Killed trainings: `test_resume`; those that
diverge: `test_divergence`; several processes: `test_distributed`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import LABELS, N_TRAIN, VECTORS, VIEWS, C, D, Killed, Toy
from trainings import (
    float_batch,
    known,
    predict,
    same,
    settings,
    tiny,
    train,
)

from pipeline.evaluation.metrics import evaluate
from pipeline.heads.building import build_head
from pipeline.heads.contract import HeadSizes
from pipeline.heads.matching.network import GmMlic
from pipeline.learning import batches as batches_module
from pipeline.learning.batches import Feed
from pipeline.learning.losses import matching_loss
from pipeline.learning.splits import SplitData, open_split, split_validation
from pipeline.settings import GmMlicSettings, TrainSettings
from pipeline.shards.schema import RegionRows

BEST = settings(
    validation=0.25, selection="best", schedule="cosine", learning_rate=0.2, averaging=0.5
)


# What is read ------------------------------------------------------------------------------------


def test_regions_beyond_the_best_m_are_never_read(toy: Toy, tmp_path: Path) -> None:
    """The second and third region change neither the statistics nor the training."""

    class Other:
        """The cache, with its further regions changed."""

        def __getattr__(self, name: str) -> Any:
            return getattr(toy.cache, name)

        def gather(self, rows: np.ndarray) -> RegionRows:
            stored = toy.cache.gather(rows)
            features = stored.features.copy()
            features[:, 1:] = 7.0
            return replace(stored, features=features)

    split = open_split(toy.cache, toy.manifest, "train", VIEWS, regions=1)
    other = replace(split, cache=Other())  # type: ignore[arg-type]
    trained = [train(toy, tmp_path / f"{n}.pt", split=s) for n, s in enumerate([split, other])]
    assert same(*trained)
    assert not same(trained[0], train(toy, tmp_path / "all.pt"))


@pytest.mark.parametrize("variant", ["full", "max-pool"])
def test_how_batches_are_read_changes_nothing(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    chosen = settings(network=tiny(variant, dropout=0.2, input_dropout=0.1), epochs=2)
    in_memory = train(toy, tmp_path / "a.pt", chosen=chosen)
    monkeypatch.setattr(batches_module, "available_memory", lambda: 0)
    assert same(train(toy, tmp_path / "b.pt", chosen=chosen), in_memory)


def test_an_epoch_takes_every_image_once_in_a_view_drawn_for_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    original = Feed.batches

    def noting(feed: Feed, chosen: Any) -> Any:
        return original(feed, (asked.append(one) or one for one in chosen))  # type: ignore[func-returns-value]

    monkeypatch.setattr(Feed, "batches", noting)
    train(toy, tmp_path / "a.pt")
    (statistics, view), *steps = asked
    assert (statistics.tolist(), view) == (list(range(N_TRAIN)), 0)
    assert [len(images) for images, _ in steps] == [16, 16, 10] * 4
    epochs = np.concatenate([images for images, _ in steps]).reshape(4, N_TRAIN)
    views = np.concatenate([views for _, views in steps]).reshape(4, N_TRAIN)
    for epoch in epochs.tolist():
        assert sorted(epoch) == list(range(N_TRAIN))
    assert ((views.mean(1) > 0.2) & (views.mean(1) < 0.8)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert len({tuple(epoch) for epoch in views.tolist()}) == 4


def test_a_head_gets_the_truth_and_the_statistics_of_the_images_it_trains_on(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never those of the validation part, which is scored without its truth."""
    kept, held_out = split_validation(toy.train, 0.4, seed=0)
    trained_on, seen = known(kept), []

    def noting(head: GmMlic, batch: Any, labels: Any, truth: Any = None, of: Any = GmMlic.score):
        seen.append((head.training, labels, truth))
        return of(head, batch, labels, truth)

    for reads in (True, False):
        seen.clear()
        monkeypatch.setattr(GmMlicSettings, "reads_conditional", reads)
        with mock.patch.object(GmMlic, "score", noting):
            train(
                toy,
                tmp_path / f"{reads}.pt",
                split=kept,
                validation=held_out,
                chosen=settings(epochs=1),
            )
        for training, labels, truth in seen:
            assert torch.equal(labels.vectors, trained_on.vectors)
            assert torch.equal(labels.ratio, trained_on.ratio)
            assert (labels.conditional is not None) == reads
            if reads:
                assert torch.equal(labels.conditional, trained_on.conditional)
            assert (truth is not None) == training
        truths = [truth for training, _, truth in seen if training]
        rows = sorted(torch.cat(truths).tolist())
        assert rows == sorted(kept.truth.tolist())
        assert {training for training, *_ in seen} == {True, False}
    assert not torch.equal(known(toy.train).ratio, trained_on.ratio)


SHIPPED = (
    "full",
    "without-label-graph",
    "without-instance-graph",
    "without-matching-edges",
    "max-pool",
)


# What is learned ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SHIPPED)
def test_every_variant_learns_the_toy_problem(toy: Toy, tmp_path: Path, variant: str) -> None:
    easy = settings(
        network=tiny(variant, 32),
        epochs=15,
        batch_size=8,
        optimizer="adamw",
        learning_rate=0.003,
        step_epochs=30,
    )
    trained = train(toy, tmp_path / "a.pt", chosen=easy)
    losses = [row["train_loss"] for row in trained.history]
    assert losses[-1] < 0.75 * losses[0]
    predictions = predict(trained.network, toy.train)
    prior = 100 * (toy.train.truth == 1).mean()
    assert prior < 60
    assert evaluate(predictions.logits, toy.train.truth, LABELS).mAP > 85


@pytest.mark.parametrize(("variant", "epochs"), [("full", 8), ("max-pool", 12)])
def test_bfloat16_learns_the_toy_problem(
    toy: Toy, tmp_path: Path, variant: str, epochs: int
) -> None:
    losses = set()
    for precision in ("float32", "bfloat16"):
        chosen = settings(
            network=tiny(variant, 32),
            epochs=epochs,
            batch_size=8,
            optimizer="adamw",
            learning_rate=0.003,
            step_epochs=30,
            precision=precision,
        )
        trained = train(toy, tmp_path / f"{precision}.pt", chosen=chosen)
        assert {p.dtype for p in trained.network.parameters()} == {torch.float32}
        predictions = predict(trained.network, toy.train)
        assert evaluate(predictions.logits, toy.train.truth, LABELS).mAP > 75
        losses.add(trained.history[0]["train_loss"])
    assert len(losses) == 2
    assert max(losses) - min(losses) < 0.05 * max(losses)


def test_the_seed_decides_the_result(toy: Toy, tmp_path: Path) -> None:
    first = train(toy, tmp_path / "a.pt", seed=1)
    torch.manual_seed(99)
    assert same(train(toy, tmp_path / "b.pt", seed=1), first)
    other = train(toy, tmp_path / "c.pt", seed=2)
    assert not same(other, first)
    assert any(
        not torch.equal(value, other.network.state_dict()[key])
        for key, value in first.network.state_dict().items()
        if key.endswith("weight")
    )


def test_the_loss_of_an_epoch_is_the_mean_over_its_images(toy: Toy, tmp_path: Path) -> None:
    """Batches of 16, 16 and 10 images count by their sizes; the network hardly moves."""
    still = settings(
        network=GmMlicSettings(latent_size=8, neighbors=2), epochs=1, learning_rate=1e-12
    )
    split = open_split(toy.cache, toy.manifest, "train")
    trained = train(toy, tmp_path / "a.pt", split=split, chosen=still)
    batch, truth = float_batch(split, np.arange(len(split))), torch.from_numpy(split.truth)
    ratio = torch.from_numpy((split.truth == 1).sum(0) / len(split)).float()
    with torch.no_grad():
        logits = trained.network(batch, known(split)).image
        expected = matching_loss(logits, truth, ratio, beta=0.4).item()
    [row] = trained.history
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert row["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("step", [1, 1, 0.1, 0.1]),
        ("cosine", [(1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]),
        ("constant", [1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    toy: Toy, tmp_path: Path, schedule: str, rates: list[float]
) -> None:
    trained = train(toy, tmp_path / "a.pt", chosen=settings(schedule=schedule))
    history = [row["learning_rate"] for row in trained.history]
    assert history == pytest.approx([0.02 * rate for rate in rates])


def test_averaged_weights_are_those_of_the_steps(toy: Toy, tmp_path: Path) -> None:
    """They are the mean of every step's weights, each step counting 0.7 times the next one."""
    steps: list[list[np.ndarray]] = []

    def note_weights(optimizer: torch.optim.Optimizer, *_: object) -> None:
        group = optimizer.param_groups[0]["params"]
        steps.append([p.detach().double().numpy().copy() for p in group])

    hook = register_optimizer_step_post_hook(note_weights)
    try:
        averaged = train(toy, tmp_path / "a.pt", chosen=settings(averaging=0.7))
    finally:
        hook.remove()
    assert len(steps) == 4 * math.ceil(N_TRAIN / 16)
    shares = np.array(
        [0.7 ** (len(steps) - 1)] + [0.3 * 0.7**k for k in range(len(steps) - 2, -1, -1)]
    )
    assert shares.sum() == pytest.approx(1)
    for parameter, *history in zip(averaged.network.parameters(), *steps, strict=True):
        expected = np.tensordot(shares, np.stack(history), axes=1)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    plain = train(toy, tmp_path / "b.pt")
    assert averaged.history == plain.history  # the average does not change what is learned
    assert not same(averaged, plain)


def test_gradients_are_clipped_and_reported_before_it(toy: Toy, tmp_path: Path) -> None:
    """With a norm of at most 1e-12 and neither momentum nor decay, no weight moves further."""
    tight = settings(clip_norm=1e-12, momentum=0.0, weight_decay=0.0, epochs=1, learning_rate=1.0)
    trained = train(toy, tmp_path / "a.pt", chosen=tight)
    assert trained.history[0]["gradient_norm"] > 1e-3
    torch.manual_seed(0)
    initial = build_head(HeadSizes(D, C, VECTORS.vectors.shape[1], 9), tight.network).state_dict()
    for key, value in trained.network.state_dict().items():
        if not key.startswith("inputs."):
            torch.testing.assert_close(value, initial[key], atol=1e-6, rtol=0)


# Validation --------------------------------------------------------------------------------------


def test_validation_decides_nothing(toy: Toy, tmp_path: Path) -> None:
    kept, held_out = split_validation(toy.train, 0.4, seed=0)
    without = train(toy, tmp_path / "a.pt", split=kept)
    measured = train(toy, tmp_path / "b.pt", split=kept, validation=held_out)
    last = measured.history[-1].pop("validation_mAP")
    for row in measured.history[:-1]:
        assert 0 <= row.pop("validation_mAP") <= 100
    assert same(measured, without)
    scores = predict(measured.network, held_out, trained_on=kept).logits
    assert last == evaluate(scores, held_out.truth, LABELS).mAP


@pytest.mark.parametrize("seed", range(4))
def test_the_best_epoch_on_the_validation_part_is_the_result(
    toy: Toy, tmp_path: Path, seed: int
) -> None:
    kept, held_out = split_validation(toy.train, 0.25, seed=0)
    chosen = BEST.model_copy(update={"epochs": 6})
    best = train(toy, tmp_path / "a.pt", seed=seed, chosen=chosen, split=kept, validation=held_out)
    measured = [row["validation_mAP"] for row in best.history]
    assert best.epoch == measured.index(max(measured)) + 1
    scores = predict(best.network, held_out, trained_on=kept).logits
    assert evaluate(scores, held_out.truth, LABELS).mAP == max(measured)
    # The weights are those that a training of so many epochs, at the same rates, ends with.
    last = chosen.model_copy(update={"selection": "last"})
    until = train_until(best.epoch, toy, tmp_path / "b.pt", seed, last, kept, held_out)
    for key, value in best.network.state_dict().items():
        assert torch.equal(value, until[key])


def train_until(
    epoch: int,
    toy: Toy,
    state_file: Path,
    seed: int,
    chosen: TrainSettings,
    kept: SplitData,
    held_out: SplitData,
) -> dict[str, torch.Tensor]:
    """The weights after an epoch of a training of more."""

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] > epoch:
            raise Killed

    options: dict[str, Any] = {"seed": seed, "chosen": chosen, "split": kept}
    try:
        return train(
            toy, state_file, validation=held_out, on_epoch=kill, save_every=0, **options
        ).network.state_dict()
    except Killed:
        weights: dict[str, torch.Tensor] = torch.load(state_file)["position"]["weights"]
        return weights
