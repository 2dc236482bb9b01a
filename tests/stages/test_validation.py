"""What is trained on, and what validates it: the split `val`, shares, and labels that can't be
learned."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flows import Flow
from small import TEST, TRAIN, make_small
from toys import Killed

from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import SplitData

HELD_OUT = 10
"""The last images of the training split, which become the split `val`."""


def imported(flow: Flow, folder: Path, **arrays: np.ndarray) -> Flow:
    """Import the small data set's regions with other arrays, in another folder."""
    folder.mkdir()
    with np.load(flow / "regions.npz") as stored:
        np.savez(folder / "regions.npz", **{**stored, **arrays})
    for name in ("vectors.npz", "params.yaml"):
        (folder / name).write_bytes((flow / name).read_bytes())
    other = Flow(folder)
    other.ok("import-regions", "regions.npz")
    return other


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    return make_small(tmp_path_factory.mktemp("small"))


SPLITS = np.array(["train"] * (TRAIN - HELD_OUT) + ["val"] * HELD_OUT + ["test"] * TEST)


@pytest.fixture(scope="module")
def validated(small: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    flow = imported(small, tmp_path_factory.mktemp("validated") / "flow", split=SPLITS)
    flow.ok("train")
    flow.ok("evaluate")
    return flow


def metrics(flow: Flow) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((flow / "runs/voc2007/full-s0/metrics.json").read_text())
    return found


def history(flow: Flow) -> list[dict[str, str]]:
    with (flow / "runs/voc2007/full-s0/history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_validation_map_is_that_of_the_split(
    small: Flow, validated: Flow, tmp_path: Path
) -> None:
    """The same images as the test split of a training on the same images give the same mAP."""
    with np.load(small / "regions.npz") as stored:
        images = {
            name: array[:TRAIN] for name, array in stored.items() if len(array) == TRAIN + TEST
        }
    images["split"] = np.where(SPLITS == "val", "test", SPLITS)[:TRAIN]
    tested = imported(small, tmp_path / "flow", **images)
    tested.ok("train")
    tested.ok("evaluate")
    expected = metrics(tested)["mAP"]
    assert float(history(validated)[-1]["validation_mAP"]) == pytest.approx(expected, abs=1e-6)


def test_nobody_trains_or_tests_on_the_split(validated: Flow) -> None:
    found = metrics(validated)
    assert (found["trained_images"], found["images"]) == (TRAIN - HELD_OUT, TEST)
    assert set(found["counts"]) == {"train", "val", "test"}
    assert "20 train, 10 val, 18 test" in validated.ok("prepare")


def test_the_result_says_how_the_split_was_scored(validated: Flow) -> None:
    shutil.rmtree(validated / "runs/voc2007/full-s0")
    said = validated.ok("train")
    score = float(history(validated)[-1]["validation_mAP"])
    assert f", validation mAP {score:.2f}" in said
    validated.ok("evaluate")
    shown = validated.ok("runs", "show", "full-s0")
    assert re.search(r"^validation images +10 of the split `val`; the setting", shown, re.MULTILINE)
    assert re.search(rf"^validation mAP +{score:.2f}$", shown, re.MULTILINE)


def test_the_best_epoch_is_chosen_on_the_split(validated: Flow) -> None:
    validated.ok("train", "--set", "train.voc2007.selection=best")
    [folder] = (validated / "runs/voc2007").glob("full-s0-*")
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    scores = [row["validation_mAP"] for row in checkpoint.history]
    assert checkpoint.epoch == 1 + scores.index(max(scores))


def test_settings_that_contradict_the_splits_are_refused(small: Flow, validated: Flow) -> None:
    done = validated.gmpipe("train", "--set", "train.voc2007.validation=0.2")
    assert done.refused(r"train.voc2007.validation is 0.2.*`val` of 10 images.*validation: 0`")
    done = small.gmpipe("train", "--set", "train.voc2007.selection=best")
    assert done.refused(r"selection is `best`.*no split `val`.*`train.voc2007.validation: 0.2`")


def test_the_validation_part_does_not_change_with_the_share(small: Flow) -> None:
    """It is cut off first. What is trained on is drawn from the rest."""
    seen: list[tuple[set[str], set[str]]] = []

    def noting(split: SplitData, *_: Any, validation: SplitData, **__: Any) -> None:
        seen.append((set(split.image_ids), set(validation.image_ids)))
        raise Killed

    for share in (0.25, 0.5, 1.0):
        sets = [f"train.voc2007.{name}" for name in ("validation=0.2", f"training_share={share}")]
        with mock.patch("stages.train.train_network", noting), pytest.raises(Killed):
            small.gmpipe("train", *(word for one in sets for word in ("--set", one)))
    (few, validation), (half, of_half), (rest, of_rest) = seen
    assert validation == of_half == of_rest
    assert (len(few), len(half), len(rest), len(validation)) == (6, 12, 24, 6)
    assert few < half < rest
    assert not rest & validation


def test_a_share_from_which_little_can_be_learned(small: Flow) -> None:
    share = ("--set", "train.voc2007.training_share")
    done = small.gmpipe("train", share[0], f"{share[1]}=0.01")
    assert done.refused(
        r"train\.voc2007\.training_share is 0\.01, .*\b1 image of 30\b.*no label has both.*"
        r"Raise `train\.voc2007\.training_share`"
    )
    done = small.gmpipe("train", share[0], f"{share[1]}=0.1")
    assert done.code == 0
    [folder] = (
        path.parent
        for path in (small / "runs/voc2007").glob("full-s0-*/checkpoint.pt")
        if load_checkpoint(path).settings.training_share == 0.1
    )
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    assert checkpoint.trained_images == 3
    lost = [
        name
        for name, ratio in zip(checkpoint.vocabulary, checkpoint.ratio, strict=True)
        if ratio == 0
    ]
    assert 4 < len(lost) < 20
    assert re.search(
        rf"training_share 0\.1 draws 3 images of 30.*: {', '.join(lost[:4])}, and "
        rf"{len(lost) - 4} more\.",
        done.err,
    )


def test_a_run_is_out_of_date_when_an_image_leaves_the_split(
    small: Flow, validated: Flow, tmp_path: Path
) -> None:
    moved = np.where(np.arange(TRAIN + TEST) == TRAIN - 1, "test", SPLITS)
    flow = imported(small, tmp_path / "flow", split=moved)
    for path in (validated / "runs").rglob("full-s0/*"):
        target = flow / path.relative_to(validated.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert flow.gmpipe("evaluate").refused("trained on another training split.*gmpipe train")


def test_a_training_without_any_negative_is_refused(small: Flow, tmp_path: Path) -> None:
    """What labels coded 1/0 become where 1, -1 and 0 mean positive, negative and ignored."""
    with np.load(small / "regions.npz") as stored:
        labels = np.maximum(stored["labels"], 0)
    labels[0, 0], labels[1, 0] = 1, -1  # one label can be learned
    flow = imported(small, tmp_path / "some", labels=labels)
    said = flow.ok("prepare")
    assert "Labels that every train image has or ignores, which can't be learned: bicycle" in said
    assert "Labels that every test image has or ignores, whose AP is 100" in said
    trained = flow.gmpipe("train")
    assert trained.code == 0
    assert "labels that can't be learned, since each of the 30 training images" in trained.err
    scored = flow.gmpipe("evaluate")
    assert scored.code == 0
    assert "19 of 20 labels have an AP of 100" in scored.err
    labels[1, 0], labels[-1, 0] = 0, -1  # without any -1, the file would be multi-hot
    flow = imported(small, tmp_path / "none", labels=labels)
    assert flow.gmpipe("train").refused(
        "nothing to learn.*30 training images.*every image: 20 .*-1"
    )


def test_images_without_labels_can_not_validate(small: Flow, tmp_path: Path) -> None:
    with np.load(small / "regions.npz") as stored:
        labels = np.where((SPLITS == "val")[:, None], -1, stored["labels"])
    flow = imported(small, tmp_path / "flow", labels=labels, split=SPLITS)
    assert "Labels without a validation image" in flow.ok("prepare")
    assert flow.gmpipe("train").refused(
        "10 images of the split `val` in data/voc2007/prep.*no label has both"
    )
    every = np.where((SPLITS == "val")[:, None], 1, labels)
    flow = imported(small, tmp_path / "every", labels=every, split=SPLITS)
    assert flow.gmpipe("train").refused("10 images of the split `val`.*no label has both")
    labels[:] = -1
    labels[np.random.default_rng([0, 2]).permutation(TRAIN)[-1], 0] = 1  # of those trained on
    flow = imported(small, tmp_path / "part", labels=labels)
    done = flow.gmpipe("train", "--set", "train.voc2007.validation=0.2")
    assert done.refused("train.voc2007.validation is 0.2, which keeps 6 images.*no label.*seed")


def test_a_training_without_any_label_is_refused(small: Flow, tmp_path: Path) -> None:
    labels = np.full((TRAIN + TEST, 20), -1, dtype=np.int8)
    labels[TRAIN:, 0] = 1
    flow = imported(small, tmp_path / "flow", labels=labels)
    assert flow.gmpipe("train").refused("nothing to learn.*no image has a label")
