"""Stage `detector` with weights of a file: those that gmpipe fitted bring their description."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from flows import PARAMS, Flow
from ruamel.yaml import YAML

from pipeline.datasets.scenes import KINDS
from pipeline.formats.sealed import read_sealed_json, write_sealed_json

RIGHT: dict[str, Any] = PARAMS["detector"]["tiny"]["architecture"]
OTHER = {**RIGHT, "anchor_sizes": [4, 8, 16, 32, 64], "norm": "frozen"}
BLOCK = (
    "{width_per_group: 1, fpn_channels: 4, feature_size: 8, anchor_sizes: [8, 16, 32, 64, 128], "
    "proposals: 20, norm: batch}"
)


@pytest.fixture
def folder(made: Flow, tmp_path: Path) -> Flow:
    """A prepared data set, and beside it a detector that gmpipe fitted, in `own`."""
    shutil.copytree(made / "data/tiny/prepared", tmp_path / "data/tiny/prepared")
    shutil.copytree(made / "data/tiny/detector", tmp_path / "own")
    return Flow(tmp_path)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in RIGHT.items() if key not in keys}


def use(flow: Flow, architecture: dict[str, Any] | None, source: str = "file") -> None:
    block: dict[str, Any] = {"source": source, "weights": "own/weights.pt"}
    if architecture is not None:
        block["architecture"] = architecture
    if source == "fit":
        block["fit"] = PARAMS["detector"]["tiny"]["fit"]
    flow.params(detector__tiny=block)


def test_classes_and_origin_of_a_fitted_detector_are_taken_along(folder: Flow) -> None:
    coco = "258fb6c6" + 56 * "0"  # a fit that started from torchvision's weights
    described = read_sealed_json(folder / "own/detector.json")
    write_sealed_json(folder / "own/detector.json", {**described, "origin_sha256": coco})
    use(folder, RIGHT)
    folder.ok("detector")
    written = read_sealed_json(folder / "data/tiny/detector/detector.json")
    assert written["classes"] == ["background", *KINDS]
    assert written["architecture"] == RIGHT
    assert written["origin_sha256"] == coco


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        (None, ["`width_per_group` is 1, not 64", "`norm` is batch, not frozen"]),
        (without("anchor_sizes"), ["`anchor_sizes` is [8, 16, 32, 64, 128], not [32,"]),
        (without("proposals"), ["`proposals` is 20, not 1000"]),
        (OTHER, ["`anchor_sizes`", "`norm`"]),
    ],
)
def test_an_architecture_that_is_not_that_of_the_weights_is_refused(
    folder: Flow, architecture: dict[str, Any] | None, named: list[str]
) -> None:
    use(folder, architecture)
    outcome = folder.gmpipe("detector")
    assert outcome.refused("own/weights.pt")
    said = " ".join(outcome.err.split())
    for part in (*named, "detector.json", "`detector.tiny.architecture`", BLOCK):
        assert part in said
    assert "<dataset>" not in said
    use(folder, YAML(typ="safe").load(BLOCK))
    folder.ok("detector")


def test_proposals_can_be_chosen(folder: Flow) -> None:
    use(folder, {**RIGHT, "proposals": 30})
    folder.ok("detector")
    written = json.loads((folder / "data/tiny/detector/detector.json").read_text())
    assert written["architecture"]["proposals"] == 30


def test_a_fit_from_weights_may_choose_anchors_but_not_forget_them(folder: Flow) -> None:
    use(folder, without("anchor_sizes"), source="fit")
    assert folder.gmpipe("detector").refused("`anchor_sizes`.*detector.tiny.architecture")
    use(folder, {**RIGHT, "anchor_sizes": OTHER["anchor_sizes"]}, source="fit")
    assert re.search(
        r"precision [\d.]+ of those with a score of 0\.5 or more", folder.ok("detector")
    )


def test_a_description_of_other_weights_is_not_used_and_said(folder: Flow) -> None:
    use(folder, without("proposals"))
    state = torch.load(folder / "own/weights.pt", weights_only=True)
    torch.save(state, folder / "own/weights.pt")
    outcome = folder.gmpipe("detector")
    assert outcome.code == 0, outcome.err
    assert "own/detector.json" in outcome.err
    written = read_sealed_json(folder / "data/tiny/detector/detector.json")
    assert written["classes"][:2] == ["class 0", "class 1"]


def test_a_damaged_description_is_named(folder: Flow) -> None:
    use(folder, RIGHT)
    (folder / "own/detector.json").write_text("{}")
    assert folder.gmpipe("detector").refused("own/detector.json.*copy the weights")


def test_messages_name_the_data_set(folder: Flow) -> None:
    use(folder, without("norm", "fpn_channels"))
    (folder / "own/detector.json").unlink()
    outcome = folder.gmpipe("detector")
    assert outcome.refused("`fpn_channels` is 4, not 256.*`detector.tiny.architecture`")
    (folder / "own/weights.pt").unlink()
    assert folder.gmpipe("detector").refused(r"own/weights.pt.*`detector.tiny.weights`")
    folder.params(detector__tiny={"source": "torchvision"})
    with (
        mock.patch.dict("os.environ", TORCH_HOME=str(folder.folder)),
        mock.patch.object(torch.hub, "download_url_to_file", side_effect=URLError("no route")),
    ):
        assert folder.gmpipe("detector").refused(r"no route.*`detector.tiny.source: file`")
