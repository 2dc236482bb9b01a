"""benchmarks.context: what is hidden, what stands in where nothing is left, and what it prints.

`toys` describes the toy problem and its letters. A third of its test images have one region.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import Flow
from stand_in_heads import PlainSettings, RankingSettings, registered
from tiny import make_statistics
from toys import LABELS, N_TEST, C, D, Toy, make_checkout
from trainings import known, tiny

from benchmarks.context import (
    KINDS,
    Trained,
    first_scores,
    main,
    measure,
    scores_without_each,
    without,
)
from pipeline.errors import InputError
from pipeline.evaluation.metrics import evaluate
from pipeline.heads.building import build_head
from pipeline.heads.contract import HeadOutput, HeadSizes, RegionBatch
from pipeline.learning.prediction import Scorer
from pipeline.learning.splits import SplitData, open_split
from pipeline.settings import HeadSettings, TrainSettings

HEADS = {"ranking": RankingSettings(), "plain": PlainSettings(), "full": tiny("full")}
"""One whose score of a label is that of a single region, and two that read all regions."""


@pytest.fixture
def images(toy: Toy) -> SplitData:
    return open_split(toy.cache, toy.manifest, "test")


def make_scorer(toy: Toy, settings: HeadSettings) -> Scorer:
    """An untrained head, with statistics that it can't do without; 9 images are three batches."""
    torch.manual_seed(0)
    statistics, labels = make_statistics(), known(toy.train)
    with registered():
        head = build_head(HeadSizes(D, C, 4, statistics.classes), settings)
    head.start(statistics, labels)
    return Scorer(head, labels, LABELS, name="head", batch_size=4)


def overlap_of(box: list[float], other: list[float]) -> float:
    """The IoU of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (box, other)]
    return common / (sum(areas) - common)


def said(scorer: Scorer, regions: list[dict[str, Any]]) -> HeadOutput:
    """What a head says about one image that has these regions and no others."""
    batch = {name: torch.tensor([[one[name] for one in regions]]) for name in regions[0]}
    with torch.no_grad():
        output: HeadOutput = scorer.network(
            RegionBatch(**batch, mask=torch.ones(1, len(regions), dtype=torch.bool)), scorer.labels
        )
    return output


def regions_of(images: SplitData, image: int) -> list[dict[str, Any]]:
    """The real regions of an image: name of a field -> value."""
    batch = images.instances(np.array([image]))
    named = {"features": batch.features.float(), "boxes": batch.boxes, "scores": batch.scores}
    return [
        {name: values[0, region].tolist() for name, values in named.items()}
        | {"classes": int(batch.classes[0, region])}
        for region in range(int(batch.mask.sum()))
    ]


@pytest.mark.parametrize("overlap", [0.02, 0.5])
@pytest.mark.parametrize("name", HEADS)
def test_a_score_is_that_of_an_image_without_the_hidden_regions(
    toy: Toy, images: SplitData, name: str, overlap: float
) -> None:
    """The regions to hide are those that one head finds best, and another head loses them."""
    scorer, choosing = make_scorer(toy, HEADS[name]), make_scorer(toy, HEADS["ranking"])
    _, best = first_scores(choosing, images)
    assert best is not None
    [*_, row] = measure(Trained(TrainSettings(), scorer, images), best, overlap)
    logits, _ = scores_without_each(scorer, images, overlap)
    second = np.zeros((N_TEST, C), dtype=np.float32)
    empty, more = [], 0
    for image in range(N_TEST):
        regions = regions_of(images, image)
        attribution = said(choosing, regions).regions
        assert attribution is not None
        for label in range(C):
            hidden = int(attribution[0, :, label].argmax())
            left = [
                region
                for number, region in enumerate(regions)
                if number != hidden
                and overlap_of(region["boxes"], regions[hidden]["boxes"]) <= overlap
            ]
            more += len(regions) - len(left) - 1
            empty.append(not left)
            if not left:
                feature = make_statistics().feature_mean.tolist()
                whole_view = {"boxes": [0.0, 0.0, 1.0, 1.0], "scores": 0.0, "classes": 0}
                left = [{"features": feature, **whole_view}]
            second[image, label] = said(scorer, left).image[0, label].item()
            found = logits[image, hidden, label]
            assert found == pytest.approx(second[image, label], abs=1e-5), (image, label)
    assert row["kind"] == "same hidden"
    assert row["nothing left"] == pytest.approx(100 * np.mean(empty))
    assert 0 < np.mean(empty) < 1
    assert row["mAP"] == pytest.approx(evaluate(second, images.truth, LABELS).mAP)
    assert (more > 0) == (overlap == 0.02)


def test_the_best_region_is_never_padding(toy: Toy, images: SplitData) -> None:
    scorer = make_scorer(toy, HEADS["ranking"])
    logits, best = first_scores(scorer, images)
    predictions = scorer.predict(images)
    np.testing.assert_array_equal(logits, predictions.logits)
    assert best is not None
    np.testing.assert_array_equal(best, predictions.regions)
    assert first_scores(make_scorer(toy, HEADS["plain"]), images)[1] is None


def test_a_region_without_an_area_is_hidden_like_others() -> None:
    batch = RegionBatch(
        features=torch.zeros(1, 2, D),
        boxes=torch.tensor([[[0.5, 0.5, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]]]),
        scores=torch.zeros(1, 2),
        classes=torch.zeros(1, 2, dtype=torch.int16),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    left, empty = without(batch, 0, 0.5, torch.zeros(D))
    assert left.mask.tolist() == [[False, True]]
    assert empty.tolist() == [False]
    assert batch.mask.all()


VARIANTS = ("full", "max-pool", "linear-mean")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    flow = make_checkout(tmp_path_factory.mktemp("checkout"), epochs=1)
    for variant in VARIANTS:
        for seed in "01":
            flow.ok("train", "--variant", variant, "--seed", seed)
    return flow


def test_trained_runs_are_measured(checkout: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.ok("evaluate", "--variant", "full")
    monkeypatch.chdir(checkout.folder)
    said: list[str] = []
    main(["--variants", ",".join(VARIANTS), "--seeds", "0,1"], said.append)
    of_variants, of_labels, line = said
    rows = {(row["variant"], row["seed"], row["kind"]): row for row in json.loads(line)["rows"]}
    kinds = dict.fromkeys(VARIANTS, KINDS) | {"linear-mean": (KINDS[0], KINDS[2])}
    assert set(rows) == {(v, seed, kind) for v in VARIANTS for seed in (0, 1) for kind in kinds[v]}
    metrics = json.loads(Path("runs/toy/full-s0/metrics.json").read_text())
    assert rows["full", 0, "all regions"]["mAP"] == pytest.approx(metrics["mAP"])
    assert rows["full", 0, "all regions"]["AP"] == pytest.approx(metrics["AP"])
    for seed in (0, 1):
        own, same = (rows["max-pool", seed, kind] for kind in KINDS[1:])
        assert {**own, "kind": ""} == {**same, "kind": ""}  # it is the reference
        left = {rows[variant, seed, "same hidden"]["nothing left"] for variant in VARIANTS}
        assert len(left) == 1
    maps = [rows["full", seed, "own hidden"]["mAP"] for seed in (0, 1)]
    shown = f"{np.mean(maps):.1f} ± {np.std(maps, ddof=1):.1f}"
    [of_full] = [text for text in of_variants.splitlines() if "full" in text and "own" in text]
    assert shown in of_full
    assert len(of_variants.splitlines()) == 2 + 8
    assert len(of_labels.splitlines()) == 2 + C


def test_a_reference_without_best_regions_is_refused(
    checkout: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.folder)
    with pytest.raises(InputError, match=r"linear-mean .*--reference"):
        main(["--variants", "full", "--reference", "linear-mean"])
