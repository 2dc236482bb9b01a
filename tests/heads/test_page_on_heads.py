"""docs/heads.md names every head, and says of each what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.heads.building import build_head, head_class
from pipeline.heads.contract import HeadSizes
from pipeline.settings import (
    RegionSettings,
    TrainSettings,
    head_of_variant,
    head_variants,
    variant_changes,
)

PAGE = Path(__file__).parents[2] / "docs/heads.md"
SAID = {"logits": "its logit", "weights": "its weight", None: "nothing"}


def rows(columns: int) -> dict[str, list[str]]:
    """The rows of the page's table with so many columns, by the variants that they name."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == columns:
            for name in cells[0].split(", "):
                found[name.strip("`")] = cells[1:]
    return found


def test_all_heads_are_described() -> None:
    assert rows(4).keys() == set(head_variants())
    assert rows(8).keys() == set(head_variants())


@pytest.mark.parametrize("variant", head_variants())
def test_what_a_head_reads_says_and_costs(variant: str) -> None:
    settings = TrainSettings.model_validate(variant_changes(variant))
    head = head_of_variant(variant)
    assert head is not None
    with torch.device("meta"):
        network = build_head(HeadSizes(1024, 80, 300, 91), settings.network)
    whole, _, _, co_occurrence, said, lacks, parameters = rows(8)[variant]
    may = "possible" if isinstance(settings.network, RegionSettings) else "no"
    assert whole == ("needed" if settings.network.needs_whole else may)
    assert co_occurrence == ("yes" if settings.network.reads_conditional else "")
    assert said == SAID[head_class(head).attribution]
    expected = "" if settings.decides else "CF1, OF1, top-3"
    assert lacks == (expected if settings.ranks else "mAP, top-3 forced")
    assert parameters == f"{sum(one.numel() for one in network.parameters()):,}"
