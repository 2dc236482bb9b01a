"""Fitting a detector on drawn scenes, and measuring one.

The detector is the real architecture made very narrow.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from builders import CLASSES, TINY, S, Scenes, draw_scenes, tiny_model
from refusals import GONE, change_state, mostly_slow, refused
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.resnet import Bottleneck

from pipeline.datasets.manifest import ImageBoxes
from pipeline.errors import DamagedError, InputError
from pipeline.interrupts import Interrupted
from pipeline.regions import fitting
from pipeline.regions.detection import Detections
from pipeline.regions.fitting import (
    fit_detector,
    match_detections,
    measure_detector,
    split_holdout,
)
from pipeline.regions.transforms import load_image, to_tensor
from pipeline.settings import FitSettings

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


FIT = FitSettings(size=S, steps=4, batch_size=2, sampled_proposals=16, holdout=0.25, seed=3)


class Killed(Exception):
    """Stands for the death of a process."""


def fit(
    scenes: Scenes, state_file: Path, settings: FitSettings = FIT, killed_after: int = 0
) -> tuple[FasterRCNN, list[int]]:
    """Return the fitted model, and the steps that this attempt did; checks where it started."""
    steps: list[int] = []
    starts: list[int] = []

    def on_step(done: int, loss: float) -> None:
        assert np.isfinite(loss)
        steps.append(done)
        if done == killed_after:
            raise Killed

    model = fit_detector(
        scenes.annotated,
        CLASSES,
        TINY,
        settings,
        state_file=state_file,
        on_start=starts.append,
        on_step=on_step,
    )
    assert starts == [steps[0] - 1]
    return model, steps


def test_a_killed_fit_ends_with_the_weights_of_an_undisturbed_one(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_SAVE_EVERY", 2)
    whole, steps = fit(scenes, tmp_path / "a.pt")
    assert steps == [1, 2, 3, 4]
    assert not whole.training
    with pytest.raises(Killed):
        fit(scenes, tmp_path / "b.pt", killed_after=3)
    torch.manual_seed(99)
    resumed, steps = fit(scenes, tmp_path / "b.pt")
    assert steps == [3, 4]
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    start = tiny_model().state_dict()
    assert not torch.equal(start[CLASSIFIER], whole.state_dict()[CLASSIFIER])


def test_ctrl_c_saves_the_step_that_is_being_done(scenes: Scenes, tmp_path: Path) -> None:
    learn = fitting._Learner.learn

    def pressed(*inputs: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return learn(*inputs)

    with mock.patch.object(fitting._Learner, "learn", pressed), pytest.raises(Interrupted) as end:
        fit(scenes, tmp_path / "state.pt")
    assert end.value.steps == 1
    _, steps = fit(scenes, tmp_path / "state.pt")
    assert steps == [2, 3, 4]


@pytest.fixture(scope="module")
def saved_state(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a fit that was killed in its third of 4 steps left."""
    path = tmp_path_factory.mktemp("saved") / "state.pt"
    with mock.patch.object(fitting, "_SAVE_EVERY", 2), pytest.raises(Killed):
        fit(scenes, path, killed_after=3)
    return path.read_bytes()


ODD = [
    ("optimizer/state/0/step", lambda old: old + 1),
    *((name, GONE) for name in ("model", "optimizer", "schedule", "random", "done")),
    *((name, None) for name in ("model", "optimizer", "schedule", "random", "done")),
    ("done", 3),
    ("done", 0),
    ("done", 4),
    ("done", -2),
    ("done", True),
    ("done", 2.0),
    ("done", "2"),
    ("model/FIRST", GONE),
    ("model/FIRST", lambda old: old[:1]),
    ("model/FIRST", lambda old: old * np.nan),
    ("optimizer/state", {}),
    ("optimizer/state/0/exp_avg", lambda old: old[:1]),
    ("optimizer/state/0/step", GONE),
    ("optimizer/param_groups", []),
    ("optimizer/param_groups/0/lr", 1.0),
    ("optimizer/param_groups/0/betas", (0.5, 0.5)),
    ("schedule/total_steps", 100),
    ("schedule/last_epoch", 1),
    ("schedule/_schedule_phases", []),
    ("random", []),
    ("random/0", "text"),
    ("random/0", lambda old: old[:5]),
]


@pytest.mark.parametrize(("keys", "value"), mostly_slow(ODD))
def test_a_state_with_an_odd_field_is_named(
    scenes: Scenes, saved_state: bytes, tmp_path: Path, keys: str, value: Any
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(saved_state)
    change_state(path, keys, value)
    with refused(DamagedError, str(path), "Delete it"):
        fit(scenes, path)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_fit_from_scratch_starts_with_identity_blocks(
    scenes: Scenes, tmp_path: Path, norm: str
) -> None:
    """Unless the norm is frozen, and could never leave the zero."""
    still = FIT.model_copy(update={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0})
    architecture = TINY.model_copy(update={"norm": norm})
    model = fit_detector(
        scenes.annotated, CLASSES, architecture, still, state_file=tmp_path / "state.pt"
    )
    blocks = [block for block in model.backbone.body.modules() if isinstance(block, Bottleneck)]
    assert len(blocks) == 16  # ResNet50's
    for block in blocks:
        expected = torch.full_like(block.bn3.weight, 0.0 if norm == "batch" else 1.0)
        torch.testing.assert_close(block.bn3.weight.detach(), expected)


def test_fitting_from_given_weights_starts_there(scenes: Scenes, tmp_path: Path) -> None:
    initial = tiny_model().state_dict()
    still = FIT.model_copy(update={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0})
    model = fit_detector(
        scenes.annotated,
        CLASSES,
        TINY,
        still,
        state_file=tmp_path / "state.pt",
        initial=(initial, Path("w.pt")),
    )
    torch.testing.assert_close(model.state_dict()[CLASSIFIER], initial[CLASSIFIER])


def test_weights_of_another_vocabulary_give_all_but_the_class_predictor(
    scenes: Scenes, tmp_path: Path
) -> None:
    initial = tiny_model().state_dict()
    still = FIT.model_copy(update={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0})
    model = fit_detector(
        scenes.annotated,
        CLASSES + 1,
        TINY,
        still,
        state_file=tmp_path / "other.pt",
        initial=(initial, Path("w.pt")),
    )
    fitted = model.state_dict()
    assert len(fitted[CLASSIFIER]) == CLASSES + 1
    for key, value in fitted.items():
        same = "box_predictor" not in key and "running" not in key and "tracked" not in key
        if same:
            torch.testing.assert_close(value, initial[key])
    assert not torch.equal(fitted[CLASSIFIER][:CLASSES], initial[CLASSIFIER])


def test_mirrored_objects_move_with_their_images(scenes: Scenes) -> None:
    images, device = scenes.annotated[:8], torch.device("cpu")
    mirrored = 0
    for image in images:
        plain = to_tensor(np.asarray(load_image(image.path)))
        for step in range(4):
            [view], [target] = fitting._batch([image], step, FIT, device)
            boxes = torch.from_numpy(image.objects.boxes) * S
            if not torch.equal(view, plain):
                mirrored += 1
                assert torch.equal(view, plain.flip(-1))
                boxes = torch.stack([S - boxes[:, 2], boxes[:, 1], S - boxes[:, 0], boxes[:, 3]], 1)
            torch.testing.assert_close(target["boxes"], boxes)
            assert target["labels"].tolist() == image.objects.classes.tolist()
    assert 4 < mirrored < 28


def test_every_epoch_takes_every_image_once() -> None:
    taken = [n for step in range(5) for n in fitting._batch_indices(step, 4, 10, seed=1)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert taken[:4] != fitting._batch_indices(0, 4, 10, seed=2)


def test_batches_are_decoded_while_steps_are_computed(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    seen: list[bool] = []
    third, make = threading.Event(), fitting._batch

    def noted(images: Any, step: int, *rest: Any) -> Any:
        decoded.append(step)
        if step == 2:
            third.set()
        return make(images, step, *rest)

    monkeypatch.setattr(fitting, "_batch", noted)
    fit_detector(
        scenes.annotated,
        CLASSES,
        TINY,
        FIT,
        state_file=tmp_path / "state.pt",
        on_step=lambda done, _: seen.append(third.wait(20)) if done == 1 else None,
    )
    assert seen == [True]
    assert decoded == [0, 1, 2, 3]


def test_holdout_is_disjoint_and_seeded(scenes: Scenes) -> None:
    images = scenes.annotated
    kept, held = split_holdout(images, FIT)
    assert len(held) == 3
    names = [image.image_id for image in images]
    for part in (kept, held):
        positions = [names.index(image.image_id) for image in part]
        assert positions == sorted(positions)
    assert sorted(image.image_id for image in kept + held) == names
    assert [i.image_id for i in split_holdout(images, FIT)[1]] == [i.image_id for i in held]
    others = {
        tuple(i.image_id for i in split_holdout(images, FIT.model_copy(update={"seed": n}))[1])
        for n in range(5)
    }
    assert len(others) > 1
    for share in (0.001, 0.999):
        parts = split_holdout(images, FIT.model_copy(update={"holdout": share}))
        assert min(map(len, parts)) == 1


def detections(*rows: tuple[float, int, Sequence[float]]) -> Detections:
    """Detections, given by score, class and box."""
    return Detections(
        boxes=torch.tensor([box for _, _, box in rows], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([score for score, _, _ in rows]),
        classes=torch.tensor([number for _, number, _ in rows], dtype=torch.int64),
        features=torch.zeros(len(rows), 1),
    )


def objects(*rows: tuple[int, Sequence[float]]) -> ImageBoxes:
    """Objects, given by class and box."""
    return ImageBoxes(
        np.array([number for number, _ in rows], dtype=np.int64),
        np.array([box for _, box in rows], dtype=np.float32).reshape(-1, 4),
    )


def test_which_detections_find_an_object() -> None:
    first, second = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)
    given = detections(
        (0.9, 1, first),
        (0.8, 1, first),  # the object is taken
        (0.7, 1, second),  # another class
        (0.6, 2, (0.5, 0.5, 0.9, 0.5 + 0.4 * 0.49)),  # IoU 0.49
        (0.5, 2, (0.5, 0.5, 0.9, 0.5 + 0.4 * 0.51)),  # IoU 0.51
        (0.4, 2, second),  # better, but later
    )
    annotated = objects((1, first), (2, second))
    expected = [True, False, False, False, True, False]
    assert match_detections(given, annotated).tolist() == expected
    assert match_detections(given, annotated, iou=0.52).tolist() == [True, *[False] * 4, True]
    assert match_detections(given, objects()).tolist() == [False] * 6
    assert match_detections(detections(), annotated).tolist() == []


def test_a_second_detection_takes_the_neighbour_that_is_free() -> None:
    box, beside = (0.0, 0.0, 0.4, 0.4), (0.0, 0.0, 0.4, 0.3)
    given = detections((0.9, 1, box), (0.8, 1, box), (0.7, 1, box))
    assert match_detections(given, objects((1, beside), (1, box))).tolist() == [True, True, False]


def test_measures_of_a_detector(scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub finds one object and makes one mistake, both confidently, then finds the rest with a
    low score."""
    images = scenes.annotated
    given = iter(images)

    def stub(model: nn.Module, views: Tensor) -> list[Detections]:
        answers = []
        for _ in views:
            annotated = next(given).objects
            rows = list(zip(annotated.classes.tolist(), annotated.boxes.tolist(), strict=True))
            rest = [(0.4, number, box) for number, box in rows[1:]]
            mistake = (0.6, 99, (0, 0, 1, 1))  # no object has this class
            answers.append(detections((0.9, *rows[0]), mistake, *rest))
        return answers

    monkeypatch.setattr(fitting, "detect", stub)
    measured = measure_detector(nn.Linear(1, 1), images, FIT)  # type: ignore[arg-type]
    sizes = [len(image.objects.classes) for image in images]
    assert max(sizes) > 4  # or recall at 5 would be 100
    assert measured["images"] == len(images)
    assert measured["objects"] == sum(sizes)
    for m in (5, 10, 20, 35):
        hits = sum(min(size, m - 1) for size in sizes)
        assert measured["recall_at"][str(m)] == round(100 * hits / sum(sizes), 2)
    assert measured["precision"] == 50.0


@pytest.mark.parametrize("steps", [1, 4])
def test_a_fit_that_diverges_is_refused(scenes: Scenes, tmp_path: Path, steps: int) -> None:
    """After one step the weights are not finite; in the next one the loss is not either."""
    wild = FIT.model_copy(update={"learning_rate": 1e48, "steps": steps})
    with pytest.raises(InputError, match="learning_rate"):
        fit_detector(scenes.annotated, CLASSES, TINY, wild, state_file=tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
