"""What differs from the paper: the values that the sentences must hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from results import make_evaluation, make_metrics

from pipeline.evaluation.bootstrap import Intervals
from pipeline.evaluation.differences import (
    BY_DATA_SET,
    IN_WORDS,
    OF_OTHER_LOSSES,
    OURS,
    STATED,
    UNMENTIONED,
    WITHOUT_EFFECT,
    describe_detector,
    paper_differences,
    seen_by_detector,
)
from pipeline.evaluation.paper import PAPER
from pipeline.evaluation.runs import Run
from pipeline.evaluation.tables import results_markdown
from pipeline.regions.detector import DetectorDescription
from pipeline.regions.extraction import extraction_recipe
from pipeline.settings import (
    ArchitectureSettings,
    DecisionSettings,
    ExtractSettings,
    GmMlicSettings,
    Loss,
    TrainSettings,
    settings_class,
)

PAPERS = TrainSettings.model_validate({"network": {"node_norm": False}, "epochs": 7})
COUNTED: dict[str, Any] = {"trained_images": 4_000, "images": 490}
FILE = Path("unread")
FIT = DetectorDescription("fit", ArchitectureSettings(), (), "0" * 64)
FILE_OF = replace(FIT, source="file")
TORCHVISIONS = replace(FIT, source="torchvision")
"""As an older release described it: without the hash of torchvision's file."""
SAME_FILE = replace(FILE_OF, origin_sha256=f"258fb6c6{'0' * 56}")
"""torchvision's file, put there by hand."""
MASK_RCNN = replace(
    FILE_OF, origin_sha256="1234" * 16, classes=tuple(f"class {number}" for number in range(91))
)
"""Another file with COCO's 91 classes, such as torchvision's Mask R-CNN."""
HISTORY = [
    {"epoch": number, "train_loss": 1.0, "gradient_norm": norm}
    for number, norm in ((1, 9.0), (2, 5.25), (3, 5.0), (4, 0.5))
]
RUN = Run(
    name="full-s0",
    settings=PAPERS,
    views=1,
    recipe={"regions": 10, "size": 448},
    evaluation=make_evaluation(make_metrics(50), **COUNTED),
    checkpoint=FILE,
    history=HISTORY,
    parameters=1,
    predictions=FILE,
)


def lines(run: Run, detector: DetectorDescription | None = FIT) -> dict[str, str]:
    """The subject of each line, and the rest of it."""
    runs = {run.evaluation.variant: [run]}
    return dict(line.split(": ", 1) for line in paper_differences(runs, PAPER["voc2007"], detector))


def test_the_detector_is_named_by_what_made_the_regions() -> None:
    assert "torchvision" in describe_detector(TORCHVISIONS, {})
    assert describe_detector(SAME_FILE, {}) == describe_detector(TORCHVISIONS, {})
    mine = replace(FILE_OF, origin_sha256="1234" * 16)
    assert "1234" * 16 in describe_detector(mine, {})
    assert "file" in describe_detector(FILE_OF, {})  # an older release did not record the hash
    fitted = describe_detector(FIT, {})
    assert re.search(r"fitted on boxes of this data set$", fitted)
    assert re.search(
        rf"{fitted}.*{'1234' * 16}", describe_detector(replace(mine, source="fit"), {})
    )
    of_coco = describe_detector(replace(SAME_FILE, source="fit"), {})
    assert re.search(rf"{fitted}.*train2017", of_coco)
    assert "5678" in describe_detector(None, {"weights_sha256": "5678"})
    assert "(npz)" in describe_detector(None, {"imported_from": "npz"})


@pytest.mark.parametrize(
    ("split", "detector", "seen"),
    [
        ("train2014/val2014/test", TORCHVISIONS, r"train2017.*35,504.*40,504.*`coco2017`"),
        ("train2014/val2014/test", SAME_FILE, r"train2017.*35,504.*40,504.*`coco2017`"),
        ("train2014/val2014/test", replace(SAME_FILE, source="fit"), r"train2017"),
        ("val2014/train2014/test", TORCHVISIONS, r"82,783"),
        ("val2017/train2017/test", TORCHVISIONS, r"train2017"),
        ("train2014/val2014/test", MASK_RCNN, r"may have seen.* 91\b.*train2017.*35,504"),
        (
            "train2014/val2014/test",
            replace(MASK_RCNN, source="fit", classes=("background", "cat")),
            r"may have seen.*fit started.*train2017.*35,504",
        ),
        ("train2014/val2014/test", replace(MASK_RCNN, classes=("class 0", "class 1")), None),
        ("train2017/val2017/test", MASK_RCNN, None),
        ("train2017/val2017/test", TORCHVISIONS, None),
        ("official/test", TORCHVISIONS, None),
        ("train2014/val2014/test", FIT, None),
        ("train2014/val2014/test", FILE_OF, None),
        ("train2014/val2014/test", None, None),
    ],
)
def test_test_images_that_the_detector_was_trained_on(
    split: str, detector: DetectorDescription | None, seen: str | None
) -> None:
    run = replace(
        RUN,
        recipe={**RUN.recipe, "weights_sha256": "0" * 64},
        evaluation=make_evaluation(make_metrics(50), **COUNTED, split=split),
    )
    said = seen_by_detector(run, detector)
    assert (said is None) == (seen is None)
    assert ("Test images" in lines(run, detector)) == (seen is not None)
    if seen and said:
        assert re.search(seen, said)
        assert re.search(seen, lines(run, detector)["Test images"])
        none, positives = Intervals({}, "", weak=False), [50] * len(run.evaluation.metrics.AP)
        runs = {"full": [run]}
        table = results_markdown("coco", "coco", detector, runs, none, "full", positives)
        assert said in table.partition("Comparison")[0]  # also where the paper has no rows


def test_another_architecture_than_torchvisions_is_named() -> None:
    usual = extraction_recipe(FIT, ExtractSettings())
    assert "architecture" not in lines(replace(RUN, recipe=usual))["Detector"]
    narrow = ArchitectureSettings(width_per_group=16, anchor_sizes=(8, 16, 32, 64, 128))
    recipe = extraction_recipe(replace(FIT, architecture=narrow), ExtractSettings())
    said = lines(replace(RUN, recipe=recipe))["Detector"]
    assert re.search(r"architecture\.width_per_group 16\b.*anchor_sizes \[8,16,32,64,128\]\.", said)
    assert "fpn_channels" not in said


def test_what_every_run_says() -> None:
    said = lines(RUN)
    assert said["Detector"].startswith("our regions come from a Faster R-CNN fitted")
    assert "kept as it is" in said["Detector"]
    assert re.search("4,000.*490.*5,011.*4,952", said["Images"])
    assert "wordllama" in said["Label vectors"]
    assert re.search("7 epochs .* 32", said["Length of training"])
    assert "difficult" in said["Labels"]
    assert "ignored" not in said["Labels"]
    for treatments in ({"train": "ignored"}, {"train": "negative", "test": "negative"}):
        evaluation = replace(RUN.evaluation, difficult=treatments)
        line = lines(replace(RUN, evaluation=evaluation))["Labels"]
        assert f"{treatments['train']} in training" in line
        assert ("carries no loss" in line) == ("ignored" in treatments.values())
    assert not [subject for subject in said if subject.startswith("Settings of")]  # the paper's
    own = said["Settings for which the paper gives no value"]
    for part in ("network.neighbors 5", "label_neighbors all", "deviation 0.1", "clip_norm 5.0"):
        assert part in own
    assert {"Inputs", "Initial weights", "Equations"} <= said.keys()


@pytest.mark.parametrize(
    ("clip_norm", "clipped"), [(100.0, 0), (9.0, 0), (5.0, 2), (0.75, 3), (0.1, 4)]
)
def test_in_how_many_epochs_gradients_were_clipped(clip_norm: float, clipped: int) -> None:
    settings = PAPERS.model_copy(update={"clip_norm": clip_norm})
    own = lines(replace(RUN, settings=settings))["Settings for which the paper gives no value"]
    assert re.search(rf"clip_norm {clip_norm} [^;]*\b{clipped} of 4 epochs", own)


FIELDS = {
    **{f"network.{name}": field for name, field in GmMlicSettings.model_fields.items()},
    **{
        f"loss.{name}": field
        for loss in get_args(Loss)
        for name, field in loss.model_fields.items()
    },
    **{
        name: field
        for name, field in TrainSettings.model_fields.items()
        if name not in ("network", "loss")
    },
    **{f"extract.{name}": field for name, field in ExtractSettings.model_fields.items()},
}
"""Every setting of stage one, and of training GM-MLIC, as the tables name them."""

TABLES: dict[str, Iterable[str]] = {
    "stated": STATED,
    "by data set": BY_DATA_SET,
    "unmentioned": UNMENTIONED,
    "of other losses": OF_OTHER_LOSSES,
    "ours": OURS,
    "in words": IN_WORDS,
    "without effect": WITHOUT_EFFECT,
}


def test_every_setting_is_in_one_table() -> None:
    """A new setting must be compared with the paper, or be listed as one without effect."""
    listed = [name for table in TABLES.values() for name in table]
    assert sorted(listed) == sorted(FIELDS)


def other_value(name: str) -> Any:
    """A value that differs from that of `RUN`."""
    value = value_of(name)
    if isinstance(value, str):
        choices = get_args(FIELDS[name].annotation) or ("mine.npz",)
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, DecisionSettings):
        return DecisionSettings(thresholds="f1")
    if isinstance(value, float):
        return value + 0.25
    return {"own": {}} if isinstance(value, dict) else (value or 0) + 1


def value_of(name: str) -> Any:
    room, _, field = name.rpartition(".")
    if room == "extract":
        return EXTRACTED[field]
    return getattr({"network": PAPERS.network, "loss": PAPERS.loss}.get(room, PAPERS), field)


MAX_POOL = PAPERS.model_copy(update={"network": settings_class("max-pool")(head="max-pool")})


def with_loss(name: str) -> TrainSettings:
    """The settings of `RUN` with another value of a loss's setting, or another loss."""
    [*losses] = get_args(Loss)
    if name == "name":
        loss = losses[1](name="asymmetric")
    else:
        [kind] = [loss for loss in losses if name in loss.model_fields]
        tag = get_args(kind.model_fields["name"].annotation)[0]
        loss = kind(name=tag, **{name: 1.5 if name == "largest_positive_weight" else 0.5})
    return PAPERS.model_copy(update={"loss": loss})


EXTRACTED = {**ExtractSettings().model_dump(), "feature_dtype": "float32", "views.flip": True}
"""A recipe of the paper's regions; it spells some settings in another way than params.yaml."""


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_setting_changes_what_is_said_unless_it_has_no_effect(name: str) -> None:
    base = replace(RUN, recipe={**EXTRACTED, "views": 2}, views=2)
    room, _, field = name.rpartition(".")
    changed = base
    if room == "extract":
        key = {"flip": "views.flip", "seed": "views.seed"}.get(field, field)
        changed = replace(base, recipe={**base.recipe, key: other_value(name)})
        if field == "views":
            changed = replace(changed, views=3)
    elif name == "network.head":
        changed = replace(base, settings=MAX_POOL)
    elif room == "loss":
        changed = replace(base, settings=with_loss(field))
    elif room == "network":
        network = PAPERS.network.model_copy(update={field: other_value(name)})
        # `full` is the paper's network; its ablations are the paper's, too.
        evaluation = make_evaluation(make_metrics(50), **COUNTED, variant="mine")
        base = replace(base, evaluation=evaluation)
        changed = replace(base, settings=PAPERS.model_copy(update={"network": network}))
    else:
        settings = PAPERS.model_copy(update={field: other_value(name)})
        changed = replace(base, settings=settings)
    before, after = lines(base), lines(changed)
    if name in WITHOUT_EFFECT:
        assert before == after
    elif name == "network.head":
        assert "max-pool" in after["Method of full"]
    else:
        [subject] = {one for one in before | after if before.get(one) != after.get(one)}
        if name not in IN_WORDS:
            assert f"{name} " in after[subject]


def test_other_heads_are_named_with_their_method_and_their_settings_are_not_compared() -> None:
    def other(variant: str) -> Run:
        evaluation = make_evaluation(make_metrics(50), **COUNTED, variant=variant)
        return replace(RUN, settings=MAX_POOL, evaluation=evaluation)

    alone = lines(other("max-pool"))
    assert re.search(r"head max-pool\b.* no method\b.*docs/heads\.md", alone["Method of max-pool"])
    assert {"Detector", "Images", "Length of training"} <= alone.keys()
    subjects = ("Settings", "Equations", "Initial")
    assert not [subject for subject in alone if subject.startswith(subjects)]
    # GM-MLIC is compared wherever it stands, and each other head has its line.
    runs = {name: [other(name)] for name in ("hcp", "ml-gcn-published")} | {"full": [RUN]}
    said = paper_differences(runs, PAPER["voc2007"], FIT)
    own = lines(RUN)
    assert [line for line in said if line.split(": ")[0] in own] == [
        f"{subject}: {text}" for subject, text in own.items()
    ]
    methods = [line for line in said if line.startswith("Method of ")]
    assert re.search(r"^Method of hcp: .*\bHCP\b.*docs/heads\.md", methods[0])
    assert re.search(r"^Method of ml-gcn-published: .*\bML-GCN\b", methods[1])
    assert len(methods) == 2


def test_the_papers_ablations_are_no_difference() -> None:
    evaluation = make_evaluation(make_metrics(50), **COUNTED, variant="without-label-graph")
    network = PAPERS.network.model_copy(update={"label_graph": False})
    settings = PAPERS.model_copy(update={"network": network})
    said = lines(replace(RUN, settings=settings, evaluation=evaluation))
    assert not [subject for subject in said if subject.startswith("Settings of")]


def test_the_values_are_the_papers(shared: Path) -> None:
    text = (shared / "paper/gm-mlic.md").read_text()
    for printed in (
        "$k$ is 2 and the output dimension of the corresponding convolution module is 512 and 256",
        "randomly cropped and resized into $448 \\times 448$ with random horizontal flips",
        "optimizer is SGD with momentum 0.9. Weight decay is $10^{-4}$",
        "initial learning rate is 0.01, which decays by a factor of 10 for every 30 epochs",
        "set to 0 in VOC 2007 dataset and 0.4 in both MS-COCO and NUS-WIDE",
        "$m$ is set to 10 in VOC 2007 dataset, and 35 in both MS-COCO and NUS-WIDE",
    ):
        assert " ".join(printed.split()) in re.sub(r"\s+", " ", text), printed
    for word in (
        "dropout",
        "LayerNorm",
        "clipping",
        "standardi",
        "moving average",
        "initiali[sz]e",
    ):
        assert not re.search(word, text, re.IGNORECASE), word


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
    run = replace(RUN, evaluation=make_evaluation(metrics, **COUNTED))
    assert "full-s0 is 47.2" in lines(run)["mAP"]
