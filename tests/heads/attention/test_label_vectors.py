"""Heads whose queries come from the vectors of the labels."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same, make_batch, make_head, make_label_set

from pipeline.heads.contract import LabelSet


@pytest.mark.parametrize("variant", ["ml-decoder", "query2label"])
def test_with_vectors_a_label_is_nothing_but_its_vector(variant: str) -> None:
    head, batch, labels = make_head(variant, queries="vectors"), make_batch(), make_label_set()
    order = torch.tensor([2, 0, 1, 1])
    others = LabelSet(labels.vectors[order], labels.ratio[order])
    assert_same(head(batch, others).image, head(batch, labels).image[:, order])
