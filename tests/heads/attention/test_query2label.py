"""Query2Label against plain loops, and what it can learn."""

from __future__ import annotations

import pytest
import torch
from placed_objects import learn_places
from plain_loops import attend, check_against, feedforward, linear, norm, position, real_regions
from tiny import HIDDEN, C, make_batch, make_head, make_label_set
from torch import Tensor
from toy_fits import fit, kinds_problem, right_regions

from pipeline.heads.attention.query2label import Query2Label, Query2LabelSettings
from pipeline.heads.contract import Head, LabelSet, RegionBatch


def by_hand(
    head: Head, batch: RegionBatch, image: int, labels: LabelSet
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(head, Query2Label)
    z = [linear(head.project, x) for x in real_regions(head, batch, image)]
    real = range(len(z))
    p = [position(head.positions, batch.boxes[image, m], head.inputs) for m in real]
    for layer in head.encoder:
        placed = [z[m] + p[m] for m in real]
        found = [attend(layer.attention, placed[m], placed, z)[0] for m in real]
        z = [feedforward(layer.feedforward, norm(layer.norm, z[m] + found[m])) for m in real]
    logits, said = [], []
    for label in range(C):
        q, w, u = of_label(head, label, labels)
        t = torch.zeros(HIDDEN, dtype=torch.float64)
        for layer in head.decoder:
            found, weights = attend(layer.attention, t + q, [z[m] + p[m] for m in real], z)
            t = feedforward(layer.feedforward, norm(layer.norm, t + found))
        logits.append((w @ norm(head.norm, t) + u).reshape(()))
        said.append(torch.stack(weights))
    return torch.stack(logits), torch.stack(said, dim=1)


def of_label(head: Query2Label, label: int, labels: LabelSet) -> list[Tensor]:
    """Query, weights and bias of a label."""
    parts = [getattr(head.of_labels, name) for name in ("queries", "weights", "bias")]
    if isinstance(parts[0], torch.nn.Linear):
        vector = labels.vectors[label] * head.inputs.vector_scale
        return [linear(part, vector) for part in parts]
    return [part[label] for part in parts]


@pytest.mark.parametrize(
    ("queries", "boxes", "encoder", "decoder"),
    [("learned", "mlp", 1, 2), ("vectors", "sine", 2, 1), ("learned", "none", 0, 1)],
)
def test_it_equals_plain_loops(queries: str, boxes: str, encoder: int, decoder: int) -> None:
    layers = {"encoder_layers": encoder, "decoder_layers": decoder}
    head = make_head("query2label", queries=queries, boxes=boxes, **layers)
    check_against(head, make_batch(4), make_label_set(), by_hand)


def test_the_lengths_of_sine_waves() -> None:
    head = make_head("query2label", boxes="sine", hidden_size=32, dtype=torch.float32)
    assert isinstance(head, Query2Label)
    expected = [2 * torch.pi / 10000 ** (2 * i / 8) for i in range(4)]
    assert head.positions.scales.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_region_that_shows_a_label_wins_it() -> None:
    # With an encoder, which spreads what a region shows over the others, or with several attention
    # heads, which may share the work, it need not.
    batch, truth, kinds = kinds_problem()
    labels = make_label_set(dtype=torch.float32)
    one = {"encoder_layers": 0, "attention_heads": 1}
    # Some starts among few labels end in a local optimum.
    head = make_head("query2label", **one, dtype=torch.float32, seed=1)
    fit(head, batch, labels, truth, steps=150, rate=0.005)
    assert right_regions(head, batch, labels, kinds) > 0.95


def test_places_of_boxes_decide() -> None:
    assert learn_places("query2label", boxes="mlp") > 0.95
    assert learn_places("query2label", boxes="none") == 0.5


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size 130 .* multiple of 4"):
        Query2LabelSettings(hidden_size=130)
    with pytest.raises(ValueError, match=r"hidden_size 12 .* multiple of 8"):
        Query2LabelSettings(hidden_size=12, boxes="sine")
    Query2LabelSettings(hidden_size=12)
