"""ML-Decoder against plain loops, and what it can learn."""

from __future__ import annotations

import pytest
import torch
from placed_objects import learn_places
from plain_loops import attend, check_against, feedforward, linear, norm, position, real_regions
from tiny import C, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.attention.ml_decoder import MlDecoder
from pipeline.heads.contract import Head, LabelSet, RegionBatch


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, MlDecoder)
    z = [linear(head.project, x).clamp(min=0) for x in real_regions(head, batch, image)]
    boxes = batch.boxes[image]
    keys = [z[m] + position(head.positions, boxes[m], head.inputs) for m in range(len(z))]
    logits, said = [], []
    for label in range(C):
        if head.of_vectors:
            vector = labels.vectors[label] * head.inputs.vector_scale
            query = linear(head.project_vectors, vector).clamp(min=0)
            classifier, bias = head.classifiers[0, :, 0], head.bias[0]
        else:
            group, place = divmod(label, 2 if len(head.queries) == 2 else 1)
            query, bias = head.queries[group], head.bias[label]
            classifier = head.classifiers[group, :, place]
        t = norm(head.norm_query, 2 * query)
        found, weights = attend(head.layer.attention, t, keys, z)
        t = feedforward(head.layer.feedforward, norm(head.layer.norm, t + found))
        logits.append(classifier @ t + bias)
        said.append(torch.stack(weights))
    return torch.stack(logits), torch.stack(said, dim=1)


@pytest.mark.parametrize(
    ("queries", "groups", "boxes"),
    [("fixed", 100, "mlp"), ("fixed", 2, "none"), ("vectors", 2, "sine")],
)
def test_it_equals_plain_loops(queries: str, groups: int, boxes: str) -> None:
    head = make_head("ml-decoder", queries=queries, groups=groups, boxes=boxes)
    check_against(head, make_batch(4), make_label_set(), by_hand)


@pytest.mark.parametrize(
    ("labels", "groups", "queries", "in_group"), [(3, 100, 3, 1), (5, 2, 2, 3), (5, 4, 3, 2)]
)
def test_labels_share_queries(labels: int, groups: int, queries: int, in_group: int) -> None:
    head = make_head("ml-decoder", labels=labels, groups=groups)
    assert isinstance(head, MlDecoder)
    assert len(head.queries) == queries
    output = head(make_batch(2), make_label_set(labels))
    assert output.image.shape == (2, labels)
    assert output.regions is not None
    for label in range(labels):
        first = label // in_group * in_group
        assert torch.equal(output.regions[..., label], output.regions[..., first])


def test_fixed_queries_are_saved_and_not_trained() -> None:
    head = make_head("ml-decoder")
    assert "queries" in head.state_dict()
    assert "queries" not in dict(head.named_parameters())


def test_the_region_that_shows_a_label_wins_it() -> None:
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    head = make_head("ml-decoder", dtype=torch.float32)
    fit(head, batch, labels, truth, steps=60)
    assert right_regions(head, batch, labels, kinds) > 0.95


def test_places_of_boxes_decide() -> None:
    assert learn_places("ml-decoder", boxes="mlp") > 0.95
    assert learn_places("ml-decoder", boxes="sine") > 0.95
    assert learn_places("ml-decoder", boxes="none") == 0.5
