"""Labels that a run was not trained with: which heads score them, and `predict --labels`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import Flow
from tiny import C, D, W, assert_same, head_settings, make_batch, make_head, make_label_set

from pipeline.errors import InputError, MismatchError, MissingError
from pipeline.heads.building import build_head
from pipeline.heads.contract import HeadSizes, LabelSet
from pipeline.inference.new_labels import with_labels
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.settings import variant_names

OF_VECTORS = ("ml-decoder", "query2label")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in variant_names()),
    *((name, {"queries": "vectors"}) for name in OF_VECTORS),
]


@pytest.mark.parametrize(("variant", "changes"), CASES)
def test_heads_that_score_new_labels_have_nothing_for_each_label(
    variant: str, changes: dict[str, Any]
) -> None:
    settings = head_settings(variant, **changes)
    with torch.device("meta"):
        few, many = (
            {name: value.shape for name, value in build_head(sizes, settings).state_dict().items()}
            for sizes in (HeadSizes(D, labels, W, 7) for labels in (C, C + 4))
        )
    assert settings.scores_new_labels == (few == many and not settings.reads_conditional)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        (name, changes)
        for name, changes in CASES
        if head_settings(name, **changes).scores_new_labels
    ],
)
def test_scores_read_nothing_of_labels_but_their_vectors(
    variant: str, changes: dict[str, Any]
) -> None:
    """A head of three labels scores seven like one that is built for seven, and reads no ratio."""
    head, batch, labels = make_head(variant, **changes), make_batch(), make_label_set(C + 4)
    wide = make_head(variant, labels=C + 4, **changes)
    wide.load_state_dict(head.state_dict())
    unknown = LabelSet(labels.vectors, torch.zeros_like(labels.ratio))
    assert_same(head(batch, unknown).image, wide(batch, labels).image)


# A trained run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(made: Flow) -> Checkpoint:
    return load_checkpoint(made / "runs/tiny/full-s0/checkpoint.pt")


def test_new_labels_come_after_the_runs_own(checkpoint: Checkpoint) -> None:
    own = checkpoint.vocabulary
    added = with_labels(checkpoint, ["zebra", own[1], "traffic light", "zebra"])
    assert added.vocabulary == (*own, "zebra", "traffic light")
    assert torch.equal(added.label_vectors[: len(own)], checkpoint.label_vectors)
    assert added.label_vectors.shape[0] == added.ratio.shape[0] == len(own) + 2
    assert with_labels(checkpoint, own[:2]) is checkpoint
    states = [one.network().state_dict() for one in (checkpoint, added)]
    assert all(map(torch.equal, *(state.values() for state in states)))


def test_a_vector_source_that_changed_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "vectors.npz"

    def of_file() -> Checkpoint:
        settings = checkpoint.settings.model_copy(update={"label_vectors": str(path)})
        return with_labels(replace(checkpoint, settings=settings), ["zebra"])

    with pytest.raises(MissingError, match=r"vectors\.npz"):
        of_file()
    names, vectors = np.array([*checkpoint.vocabulary, "zebra"]), checkpoint.label_vectors.numpy()
    new = np.ones((1, vectors.shape[1]), np.float32)
    np.savez(path, labels=names[:-1], vectors=vectors)
    with pytest.raises(InputError, match=r"zebra.*vectors\.npz") as error:
        of_file()
    assert "wordllama" not in str(error.value)  # which the run was not trained with
    np.savez(path, labels=names, vectors=np.concatenate([vectors, new]))
    assert of_file().vocabulary[-1] == "zebra"
    assert torch.equal(of_file().label_vectors[-1], torch.from_numpy(new[0]))
    np.savez(path, labels=names, vectors=np.concatenate([2 * vectors, new]))
    with pytest.raises(MismatchError, match=checkpoint.label_vectors_sha256):
        of_file()


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("zebra", "Traffic_light", "traffic light"), "'Traffic_light'.*'traffic light'"),
        (("--",), "'--'"),
    ],
)
def test_a_name_that_gets_no_vector_of_its_own_is_refused(
    checkpoint: Checkpoint, names: tuple[str, ...], named: str
) -> None:
    settings = checkpoint.settings.model_copy(update={"label_vectors": "wordllama"})
    with pytest.raises(InputError, match=named) as error:
        with_labels(replace(checkpoint, settings=settings), names)
    for advice in ("data set", "label_vectors:", "train with"):
        assert advice not in str(error.value)


def test_predict_lists_the_labels_that_are_asked_for(made: Flow, tmp_path: Path) -> None:
    image, run = "data/tiny/prepared/images/test-00000.png", ("--run", "runs/tiny/full-s0")
    own = load_checkpoint(made / "runs/tiny/full-s0/checkpoint.pt").vocabulary[0]
    outcome = made.gmpipe(
        "predict", image, *run, "--json", "--labels", f"zebra, {own},traffic light"
    )
    [predicted] = json.loads(outcome.out)
    assert {row["label"] for row in predicted["labels"]} == {"zebra", own, "traffic light"}
    assert all(0 < row["score"] < 1 for row in predicted["labels"])
    assert "zebra" in outcome.err
    assert "new-labels.md" in outcome.err
    known = made.gmpipe("predict", image, *run, "--json", "--labels", own)
    assert [row["label"] for row in json.loads(known.out)[0]["labels"]] == [own]
    assert "new-labels.md" not in known.err
    best = made.ok(
        "predict", image, *run, "--labels", "zebra,lamp", "--threshold", "0", "--top", "1"
    )
    assert ("zebra" in best) != ("lamp" in best)


def test_predict_refuses_a_head_with_weights_for_each_label(made: Flow) -> None:
    image = "data/tiny/prepared/images/test-00000.png"
    outcome = made.gmpipe("predict", image, "--run", "runs/tiny/max-pool-s0", "--labels", "zebra")
    assert outcome.refused("zebra.*max-pool.*gm-mlic.*ml-decoder.*query2label.*queries: vectors")
    own = load_checkpoint(made / "runs/tiny/max-pool-s0/checkpoint.pt").vocabulary[0]
    words = ("--run", "runs/tiny/max-pool-s0", "--labels", own.upper())
    assert made.gmpipe("predict", image, *words).refused(f"Is {own!r}")
    assert made.gmpipe("predict", image, "--run", "x", "--labels", "a,,b").code == 2
