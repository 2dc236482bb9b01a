"""What differs from the paper: the values that the sentences must hold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from results import make_evaluation, make_metrics

from pipeline.evaluation.differences import describe_detector, paper_differences
from pipeline.evaluation.paper import PAPER
from pipeline.evaluation.runs import Run
from pipeline.settings import DetectorSettings, TrainSettings

PAPERS = TrainSettings.model_validate({"network": {"node_norm": False}, "epochs": 7})
COUNTS = {"train": {"images": 4_000}, "test": {"images": 500}}
FILE = Path("unread")
RUN = Run(
    name="full-s0",
    settings=PAPERS,
    views=1,
    recipe={"regions": 10, "size": 448},
    evaluation=make_evaluation(make_metrics(50), counts=COUNTS, images=490),
    checkpoint=FILE,
    history=FILE,
    predictions=FILE,
)


def lines(run: Run) -> dict[str, str]:
    """The subject of each line, and the rest of it."""
    return dict(
        line.split(": ", 1) for line in paper_differences(run, PAPER["voc2007"], "the detector")
    )


def test_the_detector_is_named_by_what_made_the_regions() -> None:
    torchvision = DetectorSettings(source="torchvision")
    fitted = DetectorSettings.model_validate({"source": "fit", "fit": {}})
    assert "torchvision" in describe_detector(torchvision, {})
    assert "fitted" in describe_detector(fitted, {})
    file = DetectorSettings.model_validate({"source": "file", "weights": "mine.pt"})
    assert "mine.pt" in describe_detector(file, {})
    assert "(npz)" in describe_detector(torchvision, {"imported_from": "npz"})


def test_what_every_run_says() -> None:
    said = lines(RUN)
    assert said["Detector"].startswith("our regions come from the detector, kept as it is")
    assert re.search("4,000.*490.*5,011.*4,952", said["Images"])
    assert "wordllama" in said["Label vectors"]
    assert re.search("7 epochs .* 32", said["Length of training"])
    assert len(said) == 5  # its settings are the paper's


def test_augmentation_says_how_many_views_of_which_size() -> None:
    plain = lines(RUN)["Augmentation"]
    assert plain.startswith("ours is none; images are resized to 448 x 448.")
    views = lines(replace(RUN, views=5))["Augmentation"]
    assert re.search(r"5 cached views.*448 x 448", views)
    imported = replace(RUN, recipe={"regions": 10, "imported_from": "npz"}, views=5)
    assert lines(imported)["Augmentation"].startswith("ours is none.")
    assert "kept as it is" not in lines(imported)["Detector"]


def test_other_settings_are_listed_with_the_papers() -> None:
    settings = PAPERS.model_copy(update={"learning_rate": 0.02, "regions": 7})
    said = lines(replace(RUN, settings=settings))
    [own] = [text for subject, text in said.items() if subject.startswith("Settings of full")]
    assert own == "regions 7 (paper: 10); learning_rate 0.02 (paper: 0.01)."


def test_the_devkits_map_is_named_where_it_was_computed() -> None:
    metrics = replace(make_metrics(50), mAP11=47.25)
    run = replace(RUN, evaluation=make_evaluation(metrics, counts=COUNTS))
    assert "full-s0 is 47.2" in lines(run)["mAP"]
