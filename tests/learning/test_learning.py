"""From the cache to a trained network: batches, statistics, the loop, its resume, checkpoints.

`toys` describes the toy problem and its letters. Several processes: `test_distributed`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import LABELS, N_TRAIN, RECIPE, VECTORS, VIEWS, C, D, M, Toy, make_toy

from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import evaluate
from pipeline.learning import batches as batches_module
from pipeline.learning.batches import Feed
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.learning.splits import SplitData, open_split
from pipeline.learning.training import (
    Diverged,
    Network,
    Training,
    predict_split,
    split_validation,
    train_network,
)
from pipeline.matching.graphs import InstanceBatch
from pipeline.matching.loss import matching_loss
from pipeline.matching.network import build_network, image_logits
from pipeline.settings import VARIANTS, NetworkSettings, TrainSettings
from pipeline.shards.schema import RegionRows

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    network=NetworkSettings(latent_size=8, neighbors=2, dropout=0.2, input_dropout=0.1),
    epochs=4,
    batch_size=16,
    learning_rate=0.02,
    step_epochs=2,
    beta=0.4,
)


def settings(**changes: Any) -> TrainSettings:
    return SETTINGS.model_copy(update=changes)


BEST = settings(
    validation=0.25, selection="best", schedule="cosine", learning_rate=0.2, averaging=0.5
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("cache") / "toy")


def same(one: Training, other: Training) -> bool:
    """Bit for bit."""
    states = [training.network.state_dict() for training in (one, other)]
    assert states[0].keys() == states[1].keys()
    return (
        one.history == other.history
        and one.epoch == other.epoch
        and all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    )


def train(
    toy: Toy,
    state_file: Path,
    *,
    seed: int = 0,
    chosen: TrainSettings = SETTINGS,
    split: SplitData | None = None,
    **options: Any,
) -> Training:
    return train_network(
        toy.train if split is None else split,
        VECTORS,
        seed,
        chosen,
        state_file=state_file,
        **options,
    )


def float_batch(split: SplitData, images: np.ndarray, views: Any = 0) -> InstanceBatch:
    return split.instances(images, views).to(CPU, torch.float32)


# The loop ---------------------------------------------------------------------------------------


def test_statistics_and_training_see_no_region_beyond(toy: Toy, tmp_path: Path) -> None:
    """Of the second and third region, whatever they are, nothing is left."""

    class Other:
        """The cache, its further regions changed."""

        def __getattr__(self, name: str) -> Any:
            return getattr(toy.cache, name)

        def gather(self, rows: np.ndarray) -> RegionRows:
            found = toy.cache.gather(rows)
            features = found.features.copy()
            features[:, 1:] = 7.0
            return replace(found, features=features)

    split = open_split(toy.cache, toy.manifest, "train", VIEWS, regions=1)
    other = replace(split, cache=Other())  # type: ignore[arg-type]
    trained = [train(toy, tmp_path / f"{n}.pt", split=s) for n, s in enumerate([split, other])]
    assert same(*trained)
    assert not same(trained[0], train(toy, tmp_path / "all.pt"))


@pytest.mark.parametrize("variant", ["full", "max-pool"])
def test_how_batches_are_read_changes_nothing(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    own: Any = VARIANTS[variant].get("network", {})
    chosen = settings(network=SETTINGS.network.model_copy(update=own))
    held = train(toy, tmp_path / "a.pt", chosen=chosen)
    monkeypatch.setattr(batches_module, "available_memory", lambda: 0)
    assert same(train(toy, tmp_path / "b.pt", chosen=chosen), held)


def batch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_the_thread_ends_with_a_loop_that_fails(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "available_memory", lambda: 0)
    with pytest.raises(Diverged) as caught:
        train(toy, tmp_path / "a.pt", chosen=settings(learning_rate=1e20, clip_norm=1e30))
    # The frames of the loop are alive, in the error.
    assert caught.tb is not None
    assert batch_threads() == []


def test_a_damaged_row_stops_the_training_with_its_name(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "available_memory", lambda: 0)
    copy = make_toy(tmp_path / "toy")
    path = tmp_path / "toy/regions-00001.h5"  # view 1
    content = bytearray(path.read_bytes())
    feature = copy.cache.gather(copy.cache.lookup(["image-5"], 1)).features[0, 0].tobytes()
    content[content.index(feature)] ^= 1
    path.write_bytes(content)
    damaged = replace(copy, cache=type(copy.cache).open(tmp_path / "toy"))
    with pytest.raises(GmpipeError, match=r"regions-00001\.h5: row 5 \(image 'image-5', view 1\)"):
        train(damaged, tmp_path / "a.pt")
    assert batch_threads() == []


def test_validation_is_disjoint_and_seeded(toy: Toy) -> None:
    split = toy.train
    kept, held = split_validation(split, 0.25, seed=1)
    assert len(held) == round(0.25 * N_TRAIN)
    assert sorted([*kept.image_ids, *held.image_ids]) == sorted(split.image_ids)
    for part in (kept, held):
        places = [split.image_ids.index(name) for name in part.image_ids]
        assert places == sorted(places)
        np.testing.assert_array_equal(part.truth, split.truth[places])
        np.testing.assert_array_equal(part.rows, split.rows[places])
    assert split_validation(split, 0.25, seed=1)[1].image_ids == held.image_ids
    assert split_validation(split, 0.25, seed=2)[1].image_ids != held.image_ids
    for share in (0.0001, 0.9999):
        assert min(map(len, split_validation(split, share, seed=0))) == 1


class Killed(Exception):
    """Stands for the end of a process."""


def killed_after(step: int) -> Callable[..., torch.Tensor]:
    """In the place of the loss: the process ends in the step after that many."""
    done = 0

    def loss(*inputs: Any) -> torch.Tensor:
        nonlocal done
        if done == step:
            raise Killed
        done += 1
        return matching_loss(*inputs)

    return loss


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_killed_between_epochs_ends_as_an_undisturbed_one(
    toy: Toy, tmp_path: Path, optimizer: str
) -> None:
    chosen = settings(optimizer=optimizer)
    whole = train(toy, tmp_path / "a.pt", chosen=chosen)
    assert [row["epoch"] for row in whole.history] == [1, 2, 3, 4]
    assert whole.epoch == 4
    assert not whole.network.training
    # How often it is saved is nothing to the result.
    assert same(train(toy, tmp_path / "c.pt", chosen=chosen, save_every=math.inf), whole)
    assert not (tmp_path / "c.pt").exists()

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill, save_every=0)
    torch.manual_seed(99)
    seen: list[float] = []

    def note(row: dict[str, float]) -> None:
        seen.append(row["epoch"])

    resumed = train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=note, save_every=0)
    assert seen == [2, 3, 4]
    assert same(resumed, whole)
    # Killed after the last epoch, before the checkpoint: nothing is left to do.
    again = train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill)
    assert same(again, whole)
    assert math.isnan(again.waited)


@pytest.fixture(scope="module")
def undisturbed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Training:
    kept, held = split_validation(toy.train, 0.25, seed=0)
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(toy, folder / "a.pt", chosen=BEST, split=kept, validation=held)


@pytest.mark.parametrize("kills", [(0, 3), (1, 1, 1), (2, 5), (3, 0, 4), (7,)])
def test_a_training_killed_at_any_step_ends_as_an_undisturbed_one(
    toy: Toy, undisturbed: Training, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    """With dropout, views, a schedule, averaged weights, and the best epoch wanted; 8 steps are 4
    epochs."""
    kept, held = split_validation(toy.train, 0.25, seed=0)
    options: dict[str, Any] = {"chosen": BEST, "split": kept, "validation": held, "save_every": 0}
    for step in kills:
        loss = mock.patch("pipeline.learning.training.matching_loss", killed_after(step))
        with loss, pytest.raises(Killed):
            train(toy, tmp_path / "state.pt", **options)
        torch.manual_seed(99)
    position = torch.load(tmp_path / "state.pt", weights_only=True)["position"]
    assert 2 * len(position["history"]) + position["steps"] == sum(kills)
    assert same(train(toy, tmp_path / "state.pt", **options), undisturbed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"text"), "torch can't load it"),
        (lambda path: torch.save([1], path), "expected a dict, not a list"),
        (lambda path: rewritten(path, model={}), "was left by another version of the code"),
        (lambda path: rewritten(path, position={"odd": 1}), "another version of the code"),
    ],
    ids=["text", "list", "model", "position"],
)
def test_what_can_not_be_resumed_is_named(
    toy: Toy, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    state_file = tmp_path / "state.pt"
    train(toy, state_file, save_every=0)
    damage(state_file)
    with pytest.raises(GmpipeError, match=rf"state\.pt .*{message}.*Delete") as caught:
        train(toy, state_file)
    assert str(state_file) in str(caught.value)


def test_a_state_of_more_processes_is_refused(toy: Toy, tmp_path: Path) -> None:
    state_file = tmp_path / "state.pt"
    train(toy, state_file, save_every=0)
    [randoms] = torch.load(state_file, weights_only=True)["random"]
    rewritten(state_file, random=[randoms, randoms])
    with pytest.raises(
        GmpipeError, match=r"state\.pt .* in 2 processes, this one has 1.* or delete that file"
    ):
        train(toy, state_file)


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


def test_validation_decides_nothing(toy: Toy, tmp_path: Path) -> None:
    kept, held = split_validation(toy.train, 0.4, seed=0)
    without = train(toy, tmp_path / "a.pt", split=kept)
    measured = train(toy, tmp_path / "b.pt", split=kept, validation=held)
    last = measured.history[-1].pop("validation_mAP")
    for row in measured.history[:-1]:
        assert 0 <= row.pop("validation_mAP") <= 100
    assert same(measured, without)
    scores = predict_split(measured.network, held, torch.from_numpy(VECTORS.vectors)).scores
    assert last == evaluate(scores, held.truth, LABELS).mAP


@pytest.mark.parametrize("seed", range(4))
def test_the_best_epoch_on_the_validation_part_is_the_result(
    toy: Toy, tmp_path: Path, seed: int
) -> None:
    kept, held = split_validation(toy.train, 0.25, seed=0)
    chosen = BEST.model_copy(update={"epochs": 6})
    best = train(toy, tmp_path / "a.pt", seed=seed, chosen=chosen, split=kept, validation=held)
    measured = [row["validation_mAP"] for row in best.history]
    assert best.epoch == measured.index(max(measured)) + 1
    scores = predict_split(best.network, held, torch.from_numpy(VECTORS.vectors)).scores
    assert evaluate(scores, held.truth, LABELS).mAP == max(measured)
    # The weights are those that a training of so many epochs, at the same rates, ends with.
    last = chosen.model_copy(update={"selection": "last"})
    until = train_until(best.epoch, toy, tmp_path / "b.pt", seed, last, kept, held)
    for key, value in best.network.state_dict().items():
        assert torch.equal(value, until[key])


def train_until(
    epoch: int,
    toy: Toy,
    state_file: Path,
    seed: int,
    chosen: TrainSettings,
    kept: SplitData,
    held: SplitData,
) -> dict[str, torch.Tensor]:
    """The weights after an epoch of a training of more."""

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] > epoch:
            raise Killed

    options: dict[str, Any] = {"seed": seed, "chosen": chosen, "split": kept, "validation": held}
    try:
        return train(toy, state_file, on_epoch=kill, save_every=0, **options).network.state_dict()
    except Killed:
        weights: dict[str, torch.Tensor] = torch.load(state_file)["position"]["weights"]
        return weights


def test_the_best_epoch_can_only_be_chosen_on_a_validation_part() -> None:
    with pytest.raises(ValidationError, match="selection `best` needs `validation` above 0"):
        TrainSettings(selection="best")


@pytest.mark.parametrize("variant", ["full", "max-pool"])
def test_bfloat16_learns_the_toy_problem(toy: Toy, tmp_path: Path, variant: str) -> None:
    own: Any = VARIANTS[variant].get("network", {})
    seen = set()
    for precision in ("float32", "bfloat16"):
        chosen = settings(
            network=NetworkSettings(**{"latent_size": 32, "neighbors": 2, **own}),
            epochs=8,
            batch_size=8,
            optimizer="adamw",
            learning_rate=0.003,
            step_epochs=30,
            precision=precision,
        )
        trained = train(toy, tmp_path / f"{precision}.pt", chosen=chosen)
        assert {p.dtype for p in trained.network.parameters()} == {torch.float32}
        found = predict_split(trained.network, toy.train, torch.from_numpy(VECTORS.vectors))
        assert evaluate(found.scores, toy.train.truth, LABELS).mAP > 75
        seen.add(trained.history[0]["train_loss"])
    assert len(seen) == 2
    assert max(seen) - min(seen) < 0.05 * max(seen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_the_toy_problem(toy: Toy, tmp_path: Path, variant: str) -> None:
    own: Any = VARIANTS[variant].get("network", {})
    easy = settings(
        network=NetworkSettings(**{"latent_size": 32, "neighbors": 2, **own}),
        epochs=15,
        batch_size=8,
        optimizer="adamw",
        learning_rate=0.003,
        step_epochs=30,
    )
    trained = train(toy, tmp_path / "a.pt", chosen=easy)
    losses = [row["train_loss"] for row in trained.history]
    assert losses[-1] < 0.75 * losses[0]
    found = predict_split(trained.network, toy.train, torch.from_numpy(VECTORS.vectors))
    prior = 100 * (toy.train.truth == 1).mean()
    assert prior < 60
    assert evaluate(found.scores, toy.train.truth, LABELS).mAP > 85


def test_the_loss_of_an_epoch_is_the_mean_over_its_images(toy: Toy, tmp_path: Path) -> None:
    """Of a network that hardly moves: batches of 16, 16 and 10 must count as such."""
    still = settings(
        network=NetworkSettings(latent_size=8, neighbors=2), epochs=1, learning_rate=1e-12
    )
    split = open_split(toy.cache, toy.manifest, "train")
    trained = train(toy, tmp_path / "a.pt", split=split, chosen=still)
    batch, truth = float_batch(split, np.arange(len(split))), torch.from_numpy(split.truth)
    ratio = torch.from_numpy((split.truth == 1).sum(0) / len(split)).float()
    with torch.no_grad():
        logits = image_logits(trained.network(batch, torch.from_numpy(VECTORS.vectors)))[0]
        expected = matching_loss(logits, truth, ratio, still.beta).item()
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
    found = [row["learning_rate"] for row in trained.history]
    assert found == pytest.approx([0.02 * rate for rate in rates])


def test_averaged_weights_are_those_of_the_steps(toy: Toy, tmp_path: Path) -> None:
    """The mean of every step's weights, each step before counting 0.7 times as much."""
    steps: list[list[np.ndarray]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        group = optimizer.param_groups[0]["params"]
        steps.append([p.detach().double().numpy().copy() for p in group])

    hook = register_optimizer_step_post_hook(look)
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
    assert averaged.history == plain.history  # what is learnt does not depend on it
    assert not same(averaged, plain)


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


def test_gradients_are_clipped_and_reported_before_it(toy: Toy, tmp_path: Path) -> None:
    """With a norm of 1e-12 at most, momentum and decay off, no weight moves further than that."""
    tight = settings(clip_norm=1e-12, momentum=0.0, weight_decay=0.0, epochs=1, learning_rate=1.0)
    trained = train(toy, tmp_path / "a.pt", chosen=tight)
    assert trained.history[0]["gradient_norm"] > 1e-3
    torch.manual_seed(0)
    initial = build_network(D, C, VECTORS.vectors.shape[1], tight.network).state_dict()
    for key, value in trained.network.state_dict().items():
        if not key.startswith("inputs."):
            torch.testing.assert_close(value, initial[key], atol=1e-6, rtol=0)


def wild(**changes: Any) -> TrainSettings:
    """Settings that diverge, with nothing to hold the gradient back."""
    return settings(**{"learning_rate": 1e20, "clip_norm": 1e30, **changes})


def test_a_training_that_diverges_says_where(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(
        Diverged,
        match=r"^training of mine diverged in step 2 \(epoch 1\): loss \S+, gradient norm \S+, "
        r"the largest that of [\w.]+ \((nan|inf)\); .*Lower train\.toy\.learning_rate or "
        r"train\.toy\.clip_norm\.$",
    ) as caught:
        train(toy, tmp_path / "a.pt", chosen=wild(), name="mine")
    assert caught.value.weights is None
    assert caught.value.history == []


def test_the_parameter_with_the_largest_gradient_is_named(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient is made infinite in step 5, the second of the second epoch."""
    steps = 0

    def loss(*inputs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return matching_loss(*inputs)

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([1]), torch.inf) if steps == 5 else gradient

    def hooked(*sizes: Any) -> Network:
        network = build_network(*sizes)
        dict(network.named_parameters())["mlp.first.bias"].register_hook(hook)
        return network

    monkeypatch.setattr("pipeline.learning.training.matching_loss", loss)
    monkeypatch.setattr("pipeline.learning.training.build_network", hooked)
    maxed = settings(network=NetworkSettings(architecture="max-pool", latent_size=8))
    whole = train(toy, tmp_path / "whole.pt", chosen=maxed.model_copy(update={"epochs": 1}))
    steps = 0
    with pytest.raises(
        Diverged,
        match=r"in step 5 \(epoch 2\): loss \d\S+, gradient norm inf, the largest that of "
        r"mlp\.first\.bias \(inf\)",
    ) as caught:
        train(toy, tmp_path / "a.pt", chosen=maxed)
    assert caught.value.history == whole.history
    assert caught.value.weights is not None
    for key, value in whole.network.state_dict().items():
        assert torch.equal(caught.value.weights[key], value)


# Predictions and checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train(toy, tmp_path_factory.mktemp("state") / "a.pt")


@pytest.mark.parametrize("batch_size", [4, 64])
def test_predictions_name_the_region_that_won(toy: Toy, trained: Training, batch_size: int) -> None:
    split, vectors = toy.train, torch.from_numpy(VECTORS.vectors)
    found = predict_split(trained.network, split, vectors, batch_size)
    assert (found.scores.shape, found.scores.dtype) == ((N_TRAIN, C), np.float32)
    assert (found.regions.shape, found.regions.dtype) == ((N_TRAIN, C), np.int16)
    count = toy.cache.gather(split.rows[:, 0]).count
    assert (found.regions >= 0).all()
    assert (found.regions < count[:, None]).all()
    assert len(np.unique(found.regions)) == M
    batch = float_batch(split, np.arange(len(split)))
    with torch.no_grad():
        probabilities = trained.network(batch, vectors).sigmoid().numpy()  # (N, M, C)
    np.testing.assert_allclose(found.scores, probabilities.max(axis=1), atol=1e-6)
    won = np.take_along_axis(probabilities, found.regions[:, None].astype(int), axis=1)[:, 0]
    np.testing.assert_allclose(found.scores, won, atol=1e-6)


def checkpoint_of(trained: Training, variant: str = "full") -> Checkpoint:
    return Checkpoint(
        dataset="toy",
        variant=variant,
        seed=0,
        settings=SETTINGS,
        epoch=4,
        vocabulary=LABELS,
        labels_sha256="0" * 64,
        label_vectors=torch.from_numpy(VECTORS.vectors),
        label_vectors_sha256=VECTORS.sha256,
        recipe=RECIPE,
        feature_size=D,
        state=trained.network.state_dict(),
    )


@pytest.mark.parametrize("variant", ["full", "max-pool"])
def test_a_checkpoint_gives_the_same_predictions(toy: Toy, tmp_path: Path, variant: str) -> None:
    own: Any = VARIANTS[variant].get("network", {})
    chosen = settings(epochs=1, network=SETTINGS.network.model_copy(update=own))
    trained = train(toy, tmp_path / "state.pt", chosen=chosen)
    saved = replace(checkpoint_of(trained, variant), settings=chosen)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", saved)
    loaded = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    for name in ("dataset", "variant", "seed", "settings", "epoch", "vocabulary", "recipe"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.label_vectors_sha256 == VECTORS.sha256
    network = loaded.network()
    assert not network.training
    expected = predict_split(trained.network, toy.train, saved.label_vectors)
    found = predict_split(network, toy.train, loaded.label_vectors)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.regions, expected.regions)


def test_a_checkpoint_is_the_same_bytes_and_runs_no_code(tmp_path: Path, trained: Training) -> None:
    for name in ("a.pt", "b.pt"):
        save_checkpoint(tmp_path / name, checkpoint_of(trained))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["vocabulary"] == list(LABELS)
    assert content["settings"] == SETTINGS.model_dump(mode="json")


def rewritten(path: Path, **changes: object) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "there is no checkpoint at"),
        (lambda path: path.write_bytes(b"text"), "is not a checkpoint: torch can't load it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-99]), "is not a checkpoint"),
        (lambda path: torch.save(torch.nn.Linear(1, 1), path), "is not a checkpoint"),
        (lambda path: torch.save([1], path), "holds no gmpipe checkpoint"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "holds no gmpipe checkpoint"),
        (
            lambda path: rewritten(
                path, gmpipe_checkpoint=2, settings={"network": {"direct_size": 4}}
            ),
            "version 2.*version 3",
        ),
        (lambda path: rewritten(path, odd=1), "is damaged"),
        (lambda path: rewritten(path, settings={"epochs": 0}), "is damaged"),
    ],
    ids=["missing", "text", "cut off", "code", "list", "state dict", "version", "odd", "settings"],
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, trained: Training, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint_of(trained))
    damage(path)
    with pytest.raises(GmpipeError, match=rf"(?s){message}.*Run `gmpipe train`") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
