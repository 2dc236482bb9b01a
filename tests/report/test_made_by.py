"""What the page says about the detector: what made the regions, whatever params.yaml has now."""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from caches import cut
from flows import PARAMS, Flow

from pipeline.files import sha256_file
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.regions import detector
from pipeline.regions.detector import load_state, read_description, write_detector
from pipeline.report.assemble import _about_data_set
from pipeline.report.facts import what_was_run
from pipeline.report.inputs import PageInputs
from stages.checkout.params import read_request
from stages.report import _read_inputs

OF_TINY = PARAMS["detector"]["tiny"]
FITTED = "a Faster R-CNN fitted on boxes of this data set"


def inputs_of(flow: Flow) -> PageInputs:
    with contextlib.chdir(flow.folder):
        request = read_request(None)
        return _read_inputs(request, request.params.variants, [0], 1)


def said_by(inputs: PageInputs) -> str:
    """What made the regions, as the page's first and last section say it."""
    said: str = _about_data_set(inputs, None)["detector"]
    assert said.startswith(dict(what_was_run(inputs)["facts"])["regions made by"])
    return said


def of_coco(inputs: PageInputs) -> PageInputs:
    """The same inputs, with runs that were tested on COCO's val2014."""
    runs = {
        variant: [
            replace(run, evaluation=replace(run.evaluation, split="train2014/val2014/test"))
            for run in seeds
        ]
        for variant, seeds in inputs.runs.items()
    }
    return replace(inputs, runs=runs)


def published_weights(flow: Flow) -> Path:
    """The weights of the flow's detector, in a file that is named as torchvision names its own."""
    path = flow / "weights.pt"
    torch.save(load_state(flow / "data/tiny/detector/weights.pt"), path)
    return path.rename(flow / f"fasterrcnn_tiny-{sha256_file(path)[:8]}.pth")


def test_the_file_that_the_weights_came_from_is_recorded(flow: Flow) -> None:
    """Published weights are known again, although the detector's folder has a file of its own."""
    before = read_description(flow / "data/tiny/detector")
    path = published_weights(flow)
    digest = sha256_file(path)
    file = {"source": "file", "weights": path.name, "architecture": OF_TINY["architecture"]}
    flow.params(detector__tiny=file)
    flow.ok("detector")
    after = read_description(flow / "data/tiny/detector")
    assert (before.origin_sha256, after.origin_sha256) == (None, digest)
    assert after.weights_sha256 == before.weights_sha256 != digest
    inputs = inputs_of(flow)
    assert said_by(inputs) == f"a Faster R-CNN with weights with the sha256 {digest}"
    assert said_by(of_coco(inputs)) == said_by(inputs)
    published = SimpleNamespace(url=f"https://download.example/{path.name}")
    with mock.patch.object(detector, "TORCHVISION_WEIGHTS", published):
        assert re.search(r"^torchvision.*train2017 of MS-COCO$", said_by(inputs))
        assert re.search(r"^torchvision.*train2017.*35,504.*40,504", said_by(of_coco(inputs)))
        flow.params(detector__tiny={**OF_TINY, "weights": path.name})
        flow.ok("detector")  # fits, starting from these weights
        fitted = read_description(flow / "data/tiny/detector")
        assert (fitted.source, fitted.origin_sha256) == ("fit", digest)
        inputs = replace(of_coco(inputs), detector=fitted)
        assert re.search(rf"^{FITTED}, .*train2017.*35,504.*40,504", said_by(inputs))


def test_a_description_of_an_older_release_is_read(flow: Flow) -> None:
    path = flow / "data/tiny/detector/detector.json"
    content = read_sealed_json(path)
    assert content.pop("origin_sha256", "missing") is None
    write_sealed_json(path, content)
    assert said_by(inputs_of(flow)) == FITTED
    write_sealed_json(path, {**content, "source": "torchvision"})
    assert re.search(r"^torchvision.*35,504", said_by(of_coco(inputs_of(flow))))


def test_params_do_not_decide_what_made_the_regions(flow: Flow) -> None:
    for changed in (
        {"source": "torchvision"},
        {"source": "file", "weights": "other.pt"},
        {"source": "imported"},
        {**OF_TINY, "weights": "other.pt"},
    ):
        flow.params(detector__tiny=changed)
        assert said_by(of_coco(inputs_of(flow))) == FITTED


def test_another_detector_in_the_folder_did_not_make_the_regions(flow: Flow) -> None:
    folder = flow / "data/tiny/detector"
    made_by = read_description(folder)
    state = load_state(folder / "weights.pt")
    assert inputs_of(flow).classes == made_by.classes
    (folder / "weights.pt").unlink()  # the page needs none
    assert inputs_of(flow).detector == made_by
    state["roi_heads.box_predictor.cls_score.bias"] += 1
    write_detector(
        folder,
        state,
        source="torchvision",
        architecture=made_by.architecture,
        classes=made_by.classes[::-1],
    )
    inputs = inputs_of(flow)
    assert inputs.classes is None
    said = said_by(of_coco(inputs))
    assert made_by.weights_sha256 in said
    assert "torchvision" not in said
    shutil.rmtree(folder)
    assert said_by(of_coco(inputs_of(flow))) == said


def test_a_damaged_description_is_named_by_the_page_and_by_tables(flow: Flow) -> None:
    cut(flow / "data/tiny/detector/detector.json", 100)
    for command in (["report"], ["compare", "--seed", "0"]):
        refused = r"detector/detector\.json.*`gmpipe detector --dataset tiny`"
        assert flow.gmpipe(*command).refused(refused)
