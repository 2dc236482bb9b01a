"""From the cache to a trained network: batches, statistics, the loop, its resume, checkpoints.

The toy problem: a region is of one of three kinds, or of none, and its feature says which; a label
is there where a region of its kind is. Every image has two views: the same kinds, other noise.

Letters: N images, M instances, C labels, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import make_rows

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts
from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import evaluate
from pipeline.labels.vectors import LabelVectors
from pipeline.learning import data
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.learning.data import SplitData, instance_batch, open_split, region_statistics
from pipeline.learning.training import (
    Network,
    predict_split,
    split_validation,
    train_network,
)
from pipeline.matching.loss import matching_loss
from pipeline.matching.network import build_network, image_logits
from pipeline.settings import VARIANTS, NetworkSettings, TrainSettings
from pipeline.shards.reader import RegionCache, whole_shards
from pipeline.shards.schema import Recipe, RegionRows
from pipeline.shards.writer import shard_name, write_index, write_shard

N_TRAIN, N_TEST, M, C, D, VIEWS = 42, 9, 3, 3, 6, 2
RECIPE: Recipe = {"regions": M, "views": VIEWS}
LABELS = ("cat", "dog", "owl")
VECTORS = LabelVectors(
    LABELS, np.random.default_rng(5).normal(size=(C, 4)).astype(np.float32), "somewhere", LABELS
)
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


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    """Training asks for deterministic kernels, for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def toy_rows(kinds: np.ndarray, view: int) -> RegionRows:
    """Rows whose real regions are of ``kinds`` (N, M), C for none."""
    rows = make_rows(len(kinds), regions=M, feature_size=D, view=view)
    noise = np.random.default_rng([11, view]).normal(scale=0.3, size=rows.features.shape)
    features = noise + 2.0 * (kinds[..., None] == np.arange(D)) * (kinds < C)[..., None]
    real = np.arange(M) < rows.count[:, None]
    return replace(rows, features=(features * real[..., None]).astype(np.float16))


@dataclass(frozen=True)
class Toy:
    """A cache of regions, and the manifest of its images."""

    cache: RegionCache
    manifest: Manifest

    @property
    def train(self) -> SplitData:
        return open_split(self.cache, self.manifest, "train", VIEWS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("cache") / "toy"
    images = N_TRAIN + N_TEST
    kinds = np.random.default_rng(3).integers(0, C + 1, size=(images, M))
    for view in range(VIEWS):
        write_shard(folder / shard_name(view), toy_rows(kinds, view), dataset="toy", recipe=RECIPE)
    write_index(folder, "toy", RECIPE, whole_shards(folder))
    counts = np.arange(images) % M + 1
    rows = []
    for image in range(images):
        present = set(kinds[image, : counts[image]].tolist()) - {C}
        rows.append(
            {
                "image_id": f"image-{image}",
                "path": f"{image}.png",
                "split": "train" if image < N_TRAIN else "test",
                "labels": sorted(present),
                "ignored": [],
                "width": None,
                "height": None,
            }
        )
    # Neither positive nor negative, whatever is there.
    rows[4]["labels"], rows[4]["ignored"] = [], [1]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("toy", "made", LABELS, {}, full_counts(table), table)
    return Toy(RegionCache.open(folder), manifest)


@dataclass(frozen=True)
class Trained:
    network: Network
    history: list[dict[str, float]]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.network.state_dict())

    def same(self, other: Trained) -> bool:
        """Bit for bit."""
        assert self.state.keys() == other.state.keys()
        return self.history == other.history and all(
            torch.equal(value, other.state[key]) for key, value in self.state.items()
        )


def train(
    toy: Toy,
    state_file: Path,
    *,
    seed: int = 0,
    chosen: TrainSettings = SETTINGS,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    split: SplitData | None = None,
    validation: SplitData | None = None,
) -> Trained:
    found = train_network(
        toy.train if split is None else split,
        VECTORS,
        seed,
        chosen,
        state_file=state_file,
        validation=validation,
        on_epoch=on_epoch,
    )
    return Trained(*found)


# Batches and statistics --------------------------------------------------------------------------


def test_an_opened_split_has_every_view_in_the_manifests_order(toy: Toy) -> None:
    split = toy.train
    assert len(split) == N_TRAIN
    assert split.image_ids == [f"image-{n}" for n in range(N_TRAIN)]
    for view in range(VIEWS):
        rows = toy.cache.gather(split.rows[:, view])
        assert [name.decode() for name in rows.image_id] == split.image_ids
        assert set(rows.view.tolist()) == {view}
    assert split.truth[4].tolist() == [0, -1, 0]
    np.testing.assert_array_equal(split.truth, toy.manifest.truth("train"))
    with pytest.raises(GmpipeError, match="no view 2 of image 'image-0'"):
        open_split(toy.cache, toy.manifest, "train", VIEWS + 1)


def test_a_batch_has_the_views_and_labels_that_were_asked_for(toy: Toy) -> None:
    split = toy.train
    images, views = np.array([7, 2, 30]), np.array([1, 0, 1])
    batch, truth = split.batch(images, views)
    for place, (image, view) in enumerate(zip(images, views, strict=True)):
        stored = toy.cache.gather([split.rows[image, view]])
        np.testing.assert_array_equal(batch.features[place], stored.features[0].astype(np.float32))
        assert truth[place].tolist() == split.truth[image].tolist()
    taken = split.take(images)
    assert taken.image_ids == ["image-7", "image-2", "image-30"]
    assert torch.equal(taken.batch(np.arange(3), views)[0].features, batch.features)


def test_an_instance_batch_masks_padding() -> None:
    rows = make_rows(5, regions=3)
    batch = instance_batch(rows)
    assert batch.mask.tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
        [True, False, False],
        [True, True, False],
    ]
    assert batch.features.dtype == torch.float32
    for name in ("features", "boxes", "scores", "classes"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(rows, name))


@pytest.mark.parametrize("chunk", [1024, 5])
def test_statistics_are_of_the_real_regions_of_view_0(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(data, "_CHUNK", chunk)
    found = region_statistics(toy.train)
    rows = toy.cache.gather(toy.train.rows[:, 0])
    real = np.arange(M) < rows.count[:, None]
    features, boxes = rows.features[real].astype(np.float64), rows.boxes[real].astype(np.float64)
    assert real.sum() < real.size
    for ours, expected in (
        (found.feature_mean, features.mean(0)),
        (found.feature_std, features.std(0)),
        (found.box_mean, boxes.mean(0)),
        (found.box_std, boxes.std(0)),
    ):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


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


# The loop ----------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_training_ends_as_an_undisturbed_one(
    toy: Toy, tmp_path: Path, optimizer: str
) -> None:
    chosen = settings(optimizer=optimizer)
    whole = train(toy, tmp_path / "a.pt", chosen=chosen)
    assert [row["epoch"] for row in whole.history] == [1, 2, 3, 4]
    assert not whole.network.training

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill)
    torch.manual_seed(99)
    seen: list[float] = []
    resumed = train(
        toy, tmp_path / "b.pt", chosen=chosen, on_epoch=lambda row: seen.append(row["epoch"])
    )
    assert seen == [2, 3, 4]
    assert resumed.same(whole)
    # Killed after the last epoch, before the checkpoint: nothing is left to do.
    assert train(toy, tmp_path / "b.pt", chosen=chosen, on_epoch=kill).same(whole)


def test_the_seed_decides_the_result(toy: Toy, tmp_path: Path) -> None:
    first = train(toy, tmp_path / "a.pt", seed=1)
    torch.manual_seed(99)
    assert train(toy, tmp_path / "b.pt", seed=1).same(first)
    other = train(toy, tmp_path / "c.pt", seed=2)
    assert not other.same(first)
    assert any(
        not torch.equal(value, other.state[key])
        for key, value in first.state.items()
        if key.endswith("weight")
    )


def test_validation_decides_nothing(toy: Toy, tmp_path: Path) -> None:
    kept, held = split_validation(toy.train, 0.4, seed=0)
    without = train(toy, tmp_path / "a.pt", split=kept)
    measured = train(toy, tmp_path / "b.pt", split=kept, validation=held)
    last = measured.history[-1].pop("validation_mAP")
    for row in measured.history[:-1]:
        assert 0 <= row.pop("validation_mAP") <= 100
    assert measured.same(without)
    scores = predict_split(measured.network, held, torch.from_numpy(VECTORS.vectors)).scores
    assert last == evaluate(scores, held.truth, LABELS)["mAP"]


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
    assert evaluate(found.scores, toy.train.truth, LABELS)["mAP"] > 85


def test_the_loss_of_an_epoch_is_the_mean_over_its_images(toy: Toy, tmp_path: Path) -> None:
    """Of a network that hardly moves: batches of 16, 16 and 10 must count as such."""
    still = settings(
        network=NetworkSettings(latent_size=8, neighbors=2), epochs=1, learning_rate=1e-12
    )
    split = open_split(toy.cache, toy.manifest, "train")
    trained = train(toy, tmp_path / "a.pt", split=split, chosen=still)
    batch, truth = split.batch(np.arange(len(split)))
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
    ],
)
def test_the_learning_rate_follows_its_schedule(
    toy: Toy, tmp_path: Path, schedule: str, rates: list[float]
) -> None:
    trained = train(toy, tmp_path / "a.pt", chosen=settings(schedule=schedule))
    found = [row["learning_rate"] for row in trained.history]
    assert found == pytest.approx([0.02 * rate for rate in rates])


class Recorder:
    """A cache that notes which rows were asked for."""

    def __init__(self, cache: RegionCache) -> None:
        self.cache, self.asked = cache, list[np.ndarray]()
        self.feature_size = cache.feature_size

    def gather(self, rows: np.ndarray) -> RegionRows:
        self.asked.append(np.asarray(rows))
        return self.cache.gather(rows)


def test_an_epoch_takes_every_image_once_in_a_view_drawn_for_it(toy: Toy, tmp_path: Path) -> None:
    recorder = Recorder(toy.cache)
    split = replace(toy.train, cache=recorder)  # type: ignore[arg-type]
    train(toy, tmp_path / "a.pt", split=split)
    statistics, *batches = recorder.asked
    np.testing.assert_array_equal(statistics, toy.train.rows[:, 0])
    assert [len(batch) for batch in batches] == [16, 16, 10] * 4
    epochs = np.concatenate(batches).reshape(4, N_TRAIN)
    image_of = {row: image for image, rows in enumerate(split.rows.tolist()) for row in rows}
    drawn = []
    for epoch in epochs.tolist():
        assert sorted(image_of[row] for row in epoch) == list(range(N_TRAIN))
        drawn.append(sum(row in split.rows[:, 1] for row in epoch))
    assert all(0.2 * N_TRAIN < number < 0.8 * N_TRAIN for number in drawn)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_training_that_diverges_says_so(toy: Toy, tmp_path: Path) -> None:
    wild = settings(learning_rate=1e20, clip_norm=1e30)
    with pytest.raises(
        GmpipeError,
        match=r"^training diverged in step \d+ \(epoch \d+\): loss .*Lower "
        r"train\.<dataset>\.learning_rate or clip_norm",
    ):
        train(toy, tmp_path / "a.pt", chosen=wild)


def test_gradients_are_clipped_and_reported_before_it(toy: Toy, tmp_path: Path) -> None:
    """With a norm of 1e-12 at most, momentum and decay off, no weight moves further than that."""
    tight = settings(clip_norm=1e-12, momentum=0.0, weight_decay=0.0, epochs=1, learning_rate=1.0)
    trained = train(toy, tmp_path / "a.pt", chosen=tight)
    assert trained.history[0]["gradient_norm"] > 1e-3
    torch.manual_seed(0)
    initial = build_network(D, C, VECTORS.vectors.shape[1], tight.network).state_dict()
    for key, value in trained.state.items():
        if not key.startswith("inputs."):
            torch.testing.assert_close(value, initial[key], atol=1e-6, rtol=0)


# Predictions and checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(toy, tmp_path_factory.mktemp("state") / "a.pt")


@pytest.mark.parametrize("batch_size", [4, 64])
def test_predictions_name_the_region_that_won(toy: Toy, trained: Trained, batch_size: int) -> None:
    split, vectors = toy.train, torch.from_numpy(VECTORS.vectors)
    found = predict_split(trained.network, split, vectors, batch_size)
    assert (found.scores.shape, found.scores.dtype) == ((N_TRAIN, C), np.float32)
    assert (found.regions.shape, found.regions.dtype) == ((N_TRAIN, C), np.int16)
    count = toy.cache.gather(split.rows[:, 0]).count
    assert (found.regions >= 0).all()
    assert (found.regions < count[:, None]).all()
    assert len(np.unique(found.regions)) == M
    batch, _ = split.batch(np.arange(len(split)))
    with torch.no_grad():
        probabilities = trained.network(batch, vectors).sigmoid().numpy()  # (N, M, C)
    np.testing.assert_allclose(found.scores, probabilities.max(axis=1), atol=1e-6)
    won = np.take_along_axis(probabilities, found.regions[:, None].astype(int), axis=1)[:, 0]
    np.testing.assert_allclose(found.scores, won, atol=1e-6)


def checkpoint_of(trained: Trained, variant: str = "full") -> Checkpoint:
    return Checkpoint(
        dataset="toy",
        variant=variant,
        seed=0,
        settings=SETTINGS,
        vocabulary=LABELS,
        labels_sha256="0" * 64,
        label_vectors=torch.from_numpy(VECTORS.vectors),
        label_vectors_sha256=VECTORS.sha256,
        recipe=RECIPE,
        feature_size=D,
        state=trained.state,
    )


@pytest.mark.parametrize("variant", ["full", "max-pool"])
def test_a_checkpoint_gives_the_same_predictions(toy: Toy, tmp_path: Path, variant: str) -> None:
    own: Any = VARIANTS[variant].get("network", {})
    chosen = settings(epochs=1, network=SETTINGS.network.model_copy(update=own))
    trained = train(toy, tmp_path / "state.pt", chosen=chosen)
    saved = replace(checkpoint_of(trained, variant), settings=chosen)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", saved)
    loaded = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    for name in ("dataset", "variant", "seed", "settings", "vocabulary", "recipe", "feature_size"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.label_vectors_sha256 == VECTORS.sha256
    network = loaded.network()
    assert not network.training
    expected = predict_split(trained.network, toy.train, saved.label_vectors)
    found = predict_split(network, toy.train, loaded.label_vectors)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.regions, expected.regions)


def test_a_checkpoint_is_the_same_bytes_and_runs_no_code(tmp_path: Path, trained: Trained) -> None:
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
        (lambda path: rewritten(path, gmpipe_checkpoint=2), "holds version 2; .* version 1"),
        (lambda path: rewritten(path, odd=1), "is damaged"),
        (lambda path: rewritten(path, settings={"epochs": 0}), "is damaged"),
    ],
    ids=["missing", "text", "cut off", "code", "list", "state dict", "version", "odd", "settings"],
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, trained: Trained, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint_of(trained))
    damage(path)
    with pytest.raises(GmpipeError, match=rf"(?s){message}.*Run `gmpipe train`") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
