"""What heads read and return: batches of regions, attributions, and the whole view as a region.

Letters: B images, M regions, C labels, D feature size.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tiny import C, D, M, W, assert_same, make_batch, make_label_set, perturb, select
from torch import Tensor

from pipeline.heads.building import build_head, head_class
from pipeline.heads.contract import Head, HeadOutput, HeadSizes, RegionBatch
from pipeline.settings import settings_class

LABELS = make_label_set()
CPU = torch.device("cpu")

SMALL: dict[str, dict[str, Any]] = {
    "gm-mlic": {"latent_size": 16, "neighbors": 2},
    "max-pool": {"hidden_size": 16},
}
"""Heads that can read the whole view as one more region, and settings that make them small."""


def small_head(name: str, **changes: Any) -> Head:
    """Make a tiny head in float64, with the same weights whatever ``changes`` say."""
    settings = settings_class(name).model_validate({**SMALL[name], **changes})
    head = build_head(HeadSizes(D, C, W, 1), settings).double()
    perturb(head)
    return head


# Batches -----------------------------------------------------------------------------------------


def appended_by_hand(batch: RegionBatch) -> RegionBatch:
    """The batch with the whole view as the last region of each image, built from lists."""
    assert batch.whole is not None
    rows: dict[str, list[Any]] = {field.name: [] for field in fields(batch)}
    for image, whole in enumerate(batch.whole.tolist()):
        rows["features"].append([*batch.features[image].tolist(), whole])
        rows["boxes"].append([*batch.boxes[image].tolist(), [0, 0, 1, 1]])
        rows["scores"].append([*batch.scores[image].tolist(), 0])
        rows["classes"].append([*batch.classes[image].tolist(), 0])
        rows["mask"].append([*batch.mask[image].tolist(), True])
    floats = {
        name: torch.tensor(rows[name], dtype=torch.float64)
        for name in ("features", "boxes", "scores")
    }
    classes, mask = torch.tensor(rows["classes"]), torch.tensor(rows["mask"])
    return RegionBatch(**floats, classes=classes, mask=mask)


def tensors(batch: RegionBatch) -> dict[str, Tensor | None]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def test_the_whole_view_becomes_the_last_region() -> None:
    batch = make_batch(counts=[4, 1, 2], dtype=torch.float32)
    longer, expected = batch.with_whole_region(), appended_by_hand(batch)
    assert longer.mask.sum(dim=1).tolist() == [5, 2, 3]
    for name, value in tensors(longer).items():
        before = getattr(batch, name)
        assert value is not None
        assert value.dtype == before.dtype
        if name == "whole":
            assert torch.equal(value, before)
        else:
            wanted = getattr(expected, name).to(before.dtype)
            assert torch.equal(value, wanted), name


@pytest.mark.parametrize("whole", [True, False])
def test_each_changes_every_tensor_that_is_there(whole: bool) -> None:
    batch = make_batch(whole=whole)
    changed = batch.each(lambda x: x[1:])
    for name, value in tensors(changed).items():
        before = getattr(batch, name)
        if name == "whole" and not whole:
            assert value is before is None
        else:
            assert value is not None
            assert torch.equal(value, before[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_floats_are_converted(dtype: torch.dtype) -> None:
    batch = make_batch()
    stored = replace(batch, features=batch.features.half(), classes=batch.classes.short())
    assert stored.whole is not None
    moved = replace(stored, whole=stored.whole.half()).to(CPU, dtype)
    assert {name: value.dtype for name, value in vars(moved).items()} == {
        "features": dtype,
        "boxes": dtype,
        "scores": dtype,
        "classes": torch.int16,
        "mask": torch.bool,
        "whole": dtype,
    }
    assert replace(batch, whole=None).to(CPU, dtype).whole is None


# Winners -----------------------------------------------------------------------------------------


def test_a_head_without_attribution_has_no_winning_region() -> None:
    winners = HeadOutput(torch.zeros(2, 3)).winners()
    assert winners.tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert winners.dtype == torch.int64


def test_the_winner_has_the_largest_attribution() -> None:
    """Not the largest logit of the image, and never padding. Of equal ones the first wins."""
    regions = torch.tensor(
        [
            [[0.0, -5.0, 2.0], [3.0, -7.0, 2.0], [1.0, -9.0, 2.0]],
            [[-4.0, 0.1, 0.0], [-1.0, 0.2, 0.0], [-torch.inf, -torch.inf, -torch.inf]],
        ]
    )
    output = HeadOutput(torch.tensor([[9.0, 9.0, 9.0], [0.0, 0.0, 0.0]]), regions)
    assert output.winners().tolist() == [[1, 0, 0], [1, 1, 0]]
    assert output.winners().dtype == torch.int64


def test_no_region_wins_a_label_for_which_none_was_read() -> None:
    """PLA gives regions no weight for a label that it does not emit."""
    regions = torch.tensor([[[0.0, 0.25, -0.0], [0.0, 0.0, 0.0], [0.0, 0.75, 0.0]]])
    assert HeadOutput(torch.zeros(1, 3), regions).winners().tolist() == [[-1, 2, -1]]


def test_the_whole_view_wins_only_if_it_says_more_than_every_region() -> None:
    regions = torch.tensor([[[0.25, 0.5, -3.0], [0.5, 0.125, -2.0]]])
    whole = torch.tensor([[0.75, 0.5, -2.5]])  # more, a tie, less than one of them
    output = HeadOutput(torch.zeros(1, 3), regions, whole)
    assert output.winners().tolist() == [[-1, 0, 1]]


def test_a_label_that_read_no_region_has_no_winner() -> None:
    """Of weights, all are 0; of logits, padding is -inf."""
    weights = torch.tensor([[[0.0, 0.25], [0.0, 0.75], [0.0, 0.0]]])
    assert HeadOutput(torch.zeros(1, 2), weights).winners().tolist() == [[-1, 1]]
    logits = torch.tensor([[[0.0, -0.5], [-torch.inf, -torch.inf]]])
    assert HeadOutput(torch.zeros(1, 2), logits).winners().tolist() == [[0, 0]]


# The whole view as a region of heads -------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_head_reads_the_whole_view_like_a_region_that_is_appended_by_hand(name: str) -> None:
    batch = make_batch()
    output = small_head(name, whole_region=True)(batch, LABELS)
    expected = small_head(name)(appended_by_hand(batch), LABELS)
    assert output.regions.shape == (3, M, C)
    assert output.whole.shape == (3, C)
    assert_same(output.image, expected.image, 1e-12)
    assert_same(output.regions, expected.regions[:, :-1], 1e-12)
    assert_same(output.whole, expected.regions[:, -1], 1e-12)
    best = torch.maximum(output.regions.amax(dim=1), output.whole)
    assert torch.equal(output.image, best)
    winners = expected.winners()
    assert torch.equal(output.winners(), winners.masked_fill(winners == M, -1))
    assert {winner == -1 for winner in output.winners().flatten().tolist()} == {True, False}
    without = small_head(name)(batch, LABELS)
    assert without.whole is None
    assert (without.image - output.image).abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_the_whole_view_is_read_only_if_the_settings_say_so(name: str) -> None:
    batch = make_batch()
    assert batch.whole is not None
    other = replace(batch, whole=batch.whole + 1)
    for whole_region in (True, False):
        head = small_head(name, whole_region=whole_region)
        same = torch.equal(head(other, LABELS).image, head(batch, LABELS).image)
        assert same != whole_region
    assert torch.equal(head(replace(batch, whole=None), LABELS).image, head(batch, LABELS).image)


@pytest.mark.parametrize("name", SMALL)
def test_order_of_regions_and_padding_do_not_matter_beside_the_whole_view(name: str) -> None:
    head, batch = small_head(name, whole_region=True), make_batch()
    expected = head(batch, LABELS)
    wide = select(batch, slice(None), [*range(M), 0, 0])
    wide.mask[:, M:] = False
    wide.features[~wide.mask] = 1e6
    order = [5, 3, 1, 0, 4, 2]
    actual = head(select(wide, slice(None), order), LABELS)
    assert_same(actual.image, expected.image, 1e-9)
    assert_same(actual.whole, expected.whole, 1e-9)
    restored = torch.empty_like(actual.regions)
    restored[:, order] = actual.regions
    assert_same(restored[:, :M], expected.regions, 1e-9)


def test_label_nodes_of_gm_mlic_read_the_whole_view() -> None:
    batch = make_batch()
    nodes: Any = small_head("gm-mlic", whole_region=True)
    by_hand: Any = small_head("gm-mlic")
    actual = nodes.label_nodes(batch, LABELS.vectors)
    assert_same(actual, by_hand.label_nodes(appended_by_hand(batch), LABELS.vectors), 1e-12)
    without = by_hand.label_nodes(batch, LABELS.vectors)
    assert (actual - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_a_head_is_built_by_its_name_with_the_sizes_of_the_data(name: str) -> None:
    head = small_head(name)
    assert type(head) is head_class(name)
    assert head.attribution == "logits"
    for field, size in (("feature", D), ("whole", D), ("box", 4)):
        assert getattr(head.inputs, f"{field}_mean").shape == (size,)
    many = build_head(HeadSizes(D, C, W, classes=7), settings_class(name)(**SMALL[name]))
    assert many.state_dict()["inputs.classes"].item() == 7
