"""Predictions of a trained network, and checkpoints that give the same ones.

`toys` describes the toy problem and its letters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from toys import LABELS, N_TRAIN, RECIPE, VECTORS, C, D, M, Toy
from trainings import (
    LABEL_VECTORS,
    SETTINGS,
    float_batch,
    known,
    predict,
    rewritten,
    settings,
    tiny,
    train,
)

from pipeline.errors import DamagedError, MissingError
from pipeline.heads.building import build_head
from pipeline.heads.contract import HeadSizes
from pipeline.learning import checkpoint as checkpoint_module
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.learning.loop import Training
from pipeline.settings import GmMlicSettings


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train(toy, tmp_path_factory.mktemp("state") / "a.pt")


@pytest.mark.parametrize("batch_size", [4, 64])
def test_predictions_name_the_region_that_won(toy: Toy, trained: Training, batch_size: int) -> None:
    split = toy.train
    predictions = predict(trained.network, split, batch_size)
    logits, regions = predictions.logits, predictions.regions
    assert (logits.shape, logits.dtype) == ((N_TRAIN, C), np.float32)
    assert (regions.shape, regions.dtype) == ((N_TRAIN, C), np.int16)
    count = toy.cache.gather(split.rows[:, 0]).count
    assert (regions >= 0).all()
    assert (regions < count[:, None]).all()
    assert len(np.unique(regions)) == M
    batch = float_batch(split, np.arange(len(split)))
    with torch.no_grad():
        output = trained.network(batch, known(split))
    np.testing.assert_allclose(logits, output.image.numpy(), atol=1e-5)
    of_regions = output.regions.numpy()  # (N, M, C)
    np.testing.assert_allclose(logits, of_regions.max(axis=1), atol=1e-5)
    won = np.take_along_axis(of_regions, regions[:, None].astype(int), axis=1)[:, 0]
    np.testing.assert_allclose(logits, won, atol=1e-5)


RATIO = torch.tensor([0.25, 0.5, 1.0])


def checkpoint_of(trained: Training, variant: str = "full") -> Checkpoint:
    return Checkpoint(
        dataset="toy",
        variant=variant,
        seed=0,
        settings=SETTINGS,
        views=1,
        epoch=1,
        history=trained.history,
        vocabulary=LABELS,
        train_sha256="0" * 64,
        trained_images=N_TRAIN,
        label_vectors=LABEL_VECTORS,
        ratio=RATIO,
        conditional=None,
        label_vectors_sha256=VECTORS.sha256,
        recipe=RECIPE,
        feature_size=D,
        state=trained.network.state_dict(),
    )


@pytest.mark.parametrize("variant", ["full", "max-pool"])
def test_a_checkpoint_gives_the_same_predictions(toy: Toy, tmp_path: Path, variant: str) -> None:
    chosen = settings(epochs=1, network=tiny(variant))
    trained = train(toy, tmp_path / "state.pt", chosen=chosen)
    saved = replace(checkpoint_of(trained, variant), settings=chosen)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", saved)
    loaded = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    for field in fields(Checkpoint):
        if field.name not in ("sha256", "state", "label_vectors", "ratio"):
            assert getattr(loaded, field.name) == getattr(saved, field.name)
    assert torch.equal(loaded.labels.vectors, LABEL_VECTORS)
    assert torch.equal(loaded.labels.ratio, RATIO)
    assert loaded.labels.conditional is None
    assert loaded.label_vectors_sha256 == VECTORS.sha256
    stored = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert loaded.sha256 == hashlib.sha256(stored).hexdigest()
    network = loaded.network()
    assert not network.training
    expected = predict(trained.network, toy.train)
    predictions = predict(network, toy.train)
    np.testing.assert_array_equal(predictions.logits, expected.logits)
    np.testing.assert_array_equal(predictions.regions, expected.regions)


def test_a_checkpoint_is_the_same_bytes_and_runs_no_code(tmp_path: Path, trained: Training) -> None:
    for name in ("a.pt", "b.pt"):
        save_checkpoint(tmp_path / name, checkpoint_of(trained))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["vocabulary"] == list(LABELS)
    assert content["settings"] == SETTINGS.model_dump(mode="json")


CONDITIONAL = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0, 0.0], [0.0, 0.125, 0.0]])


@pytest.fixture
def reads_conditional(monkeypatch: pytest.MonkeyPatch) -> None:
    """GM-MLIC as if it read the co-occurrence of the labels."""
    monkeypatch.setattr(GmMlicSettings, "reads_conditional", True)


@pytest.mark.usefixtures("reads_conditional")
def test_a_checkpoint_keeps_what_was_known_of_the_labels(tmp_path: Path, trained: Training) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, replace(checkpoint_of(trained), conditional=CONDITIONAL))
    labels = load_checkpoint(path).labels
    assert torch.equal(labels.vectors, LABEL_VECTORS)
    assert torch.equal(labels.ratio, RATIO)
    assert labels.conditional is not None
    assert torch.equal(labels.conditional, CONDITIONAL)


@pytest.mark.usefixtures("reads_conditional")
@pytest.mark.parametrize(
    ("conditional", "message"),
    [
        (None, "conditional"),
        ("text", "conditional"),
        (CONDITIONAL[:2], "conditional"),
        (CONDITIONAL.double(), "conditional"),
        (CONDITIONAL * 2, "between 0 and 1"),
        (CONDITIONAL - 0.5, "between 0 and 1"),
        (CONDITIONAL * torch.nan, "conditional"),
    ],
    ids=["none", "text", "shape", "type", "above 1", "below 0", "nan"],
)
def test_damaged_co_occurrence_is_refused(
    tmp_path: Path, trained: Training, conditional: Any, message: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, replace(checkpoint_of(trained), conditional=conditional))
    with pytest.raises(DamagedError, match=rf"(?s){message}.*Train") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_the_network_is_built_for_the_classes_of_its_training(
    toy: Toy, tmp_path: Path, trained: Training
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint_of(trained))
    classes = 1 + toy.cache.gather(toy.train.rows[:, 0]).classes.max()
    assert trained.network.inputs.classes.item() == classes > 2
    with mock.patch.object(checkpoint_module, "build_head", wraps=build_head) as built:
        network = load_checkpoint(path).network()
    width = LABEL_VECTORS.shape[1]
    assert built.call_args.args[0] == HeadSizes(D, C, width, classes)
    assert network.inputs.classes.item() == classes


def state_with(path: Path, **changes: Any) -> None:
    """Change tensors of a checkpoint's state; keys have `__` for the dot, and None removes one."""
    state = torch.load(path, weights_only=True)["state"]
    for key, value in changes.items():
        name = key.replace("__", ".")
        state.pop(name)
        if value is not None:
            state[name] = value
    rewritten(path, state=state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"text"), "can't be loaded"),
        (lambda path: path.write_bytes(path.read_bytes()[:-99]), "can't be loaded"),
        (lambda path: torch.save(torch.nn.Linear(1, 1), path), "can't be loaded"),
        (lambda path: torch.save([1], path), "version 5"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "version 5"),
        (
            lambda path: rewritten(
                path, gmpipe_checkpoint=2, settings={"network": {"direct_size": 4}}
            ),
            "version 2, .*older release.*; .* version 5",
        ),
        (lambda path: rewritten(path, odd=1), "odd"),
        (lambda path: rewritten(path, settings={"epochs": 0}), "TrainSettings"),
        (lambda path: rewritten(path, settings=None), "TrainSettings"),
        (lambda path: rewritten(path, vocabulary=None), "vocabulary"),
        (lambda path: rewritten(path, vocabulary=[*LABELS[1:], 1]), "vocabulary"),
        (lambda path: rewritten(path, vocabulary=list(LABELS[1:])), "label vectors"),
        (lambda path: rewritten(path, vocabulary=[*LABELS[:-1], "other"]), "sha256"),
        (lambda path: rewritten(path, label_vectors=LABEL_VECTORS + 1), "sha256"),
        (lambda path: rewritten(path, label_vectors=LABEL_VECTORS[0]), "shape"),
        (lambda path: rewritten(path, label_vectors=[1.0]), "label_vectors"),
        (lambda path: rewritten(path, ratio=None), "ratio"),
        (lambda path: rewritten(path, ratio=[0.5] * C), "ratio"),
        (lambda path: rewritten(path, ratio=RATIO[:2]), "ratio"),
        (lambda path: rewritten(path, ratio=RATIO.double()), "ratio"),
        (lambda path: rewritten(path, ratio=RATIO * 2), "between 0 and 1"),
        (lambda path: rewritten(path, ratio=RATIO - 1), "between 0 and 1"),
        (lambda path: rewritten(path, ratio=RATIO * torch.nan), "ratio"),
        (lambda path: rewritten(path, conditional=CONDITIONAL), "conditional"),
        (lambda path: state_with(path, inputs__classes=None), r"inputs\.classes"),
        (lambda path: state_with(path, inputs__classes=torch.tensor([1, 2])), "damaged"),
        (lambda path: rewritten(path, recipe=[]), "recipe"),
        (lambda path: rewritten(path, seed="0"), "seed"),
        (lambda path: rewritten(path, seed=-1), "seed"),
        (lambda path: rewritten(path, epoch=99), "epoch"),
        (lambda path: rewritten(path, history="[[1]]"), "history"),
        (lambda path: rewritten(path, history='[{"epoch": 1, "train_loss": "low"}]'), "low"),
        (lambda path: rewritten(path, feature_size=D + 1), "size mismatch"),
        (lambda path: rewritten(path, feature_size=-1), "feature_size"),
        (lambda path: rewritten(path, state={}), r"inputs\.classes"),
        (lambda path: rewritten(path, state={"a": torch.tensor(torch.nan)}), "`a`.*finite"),
        (lambda path: rewritten(path, state={"a": "b"}), "`a`"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, trained: Training, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint_of(trained))
    damage(path)
    with pytest.raises(DamagedError, match=rf"(?s){message}.*Train") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(MissingError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
