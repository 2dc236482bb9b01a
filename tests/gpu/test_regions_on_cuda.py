"""Regions on CUDA are those on the CPU: of views, of given boxes, in a shard, in `predict`.

Weights are random and scaled so that scores differ (`benchmarks.extraction.enliven`). Two regions
whose scores are equal but for rounding may still change places, so regions are matched first.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CLASSES, TINY, S, Scenes, draw_scenes
from clusters import worker_in_this_process
from fakes import without_cuda
from flows import Flow
from PIL import Image
from tiny import D, head_settings, make_head, make_label_set
from torchvision.models.detection import FasterRCNN

from benchmarks.extraction import enliven
from benchmarks.gpu_regions import differences
from pipeline.datasets.scenes import KINDS
from pipeline.inference.explain import explain
from pipeline.inference.trained import TrainedRun
from pipeline.learning.checkpoint import Checkpoint
from pipeline.regions.detection import (
    Detections,
    convolve,
    describe,
    detect,
    prepare_for_extraction,
)
from pipeline.regions.detector import (
    build_model,
    read_description,
    write_detector,
)
from pipeline.regions.extraction import ShardExtractor, extraction_recipe, load_detector
from pipeline.regions.given_boxes import GivenRegions
from pipeline.regions.plan import ViewJob
from pipeline.settings import ExtractSettings, TrainSettings
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import RegionRows
from pipeline.shards.shard import map_shard

pytestmark = pytest.mark.cuda

ARCHITECTURE = TINY.model_copy(update={"feature_size": D, "proposals": 60})
EXTRACT = ExtractSettings(size=S, regions=6, feature_dtype="float32", batch_size=4)
LABELS = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def model(scenes: Scenes) -> FasterRCNN:
    """A detector on the CPU, not prepared."""
    torch.manual_seed(0)
    made = build_model(
        ARCHITECTURE,
        CLASSES,
        size=S,
        regions=EXTRACT.regions,
        score_threshold=EXTRACT.score_threshold,
        nms_threshold=EXTRACT.nms_threshold,
    ).eval()
    enliven(made, scenes.views)
    return made


def prepared(model: FasterRCNN, device: torch.device) -> FasterRCNN:
    return prepare_for_extraction(copy.deepcopy(model).to(device))


def assert_alike(found: list[Detections], expected: list[Detections]) -> None:
    """Nearly all regions have a counterpart, with box, score and vector equal up to 1e-3."""
    largest = differences(found, expected)
    assert largest.pop("matched") >= 0.95
    assert max(largest.values()) <= 1e-3, largest


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.999])
def test_detections_are_the_cpus(
    scenes: Scenes, model: FasterRCNN, device: torch.device, threshold: float
) -> None:
    """With a threshold of 0.999 nothing is found, and the whole view stands in."""
    cpu, other = prepared(model, torch.device("cpu")), prepared(model, device)
    for one in (cpu, other):
        one.roi_heads.score_thresh = threshold
    views = scenes.views
    expected, found = detect(cpu, views, whole=True), detect(other, views.to(device), whole=True)
    assert {one.features.device.type for one in found} == {device.type}
    assert [len(one.scores) for one in found] == [len(one.scores) for one in expected]
    assert_alike(found, expected)
    for one, of_cpu in zip(found, expected, strict=True):
        torch.testing.assert_close(one.whole.cpu(), of_cpu.whole, rtol=1e-3, atol=1e-3)


def test_an_unprepared_detector_finds_the_same_on_the_device(
    scenes: Scenes, model: FasterRCNN, device: torch.device
) -> None:
    views = scenes.views.to(device)
    theirs = copy.deepcopy(model).to(device)
    assert_alike(detect(prepared(model, device), views), detect(theirs, views))


def test_given_regions_have_the_cpus_vectors(
    scenes: Scenes, model: FasterRCNN, device: torch.device
) -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((14, 3, 2, 2)), axis=2).reshape(14, 3, 4)
    given = [
        GivenRegions(boxes, np.ones(3, np.float32), np.array([1, 2, 1], np.int16))
        for boxes in corners
    ]
    given[5] = GivenRegions(np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int16))

    def described(where: torch.device) -> list[Detections]:
        detector = prepared(model, where)
        convolved = convolve(detector, scenes.views.to(where), rpn=False)
        return describe(detector, convolved, given, whole=True).of_views()

    expected, found = described(torch.device("cpu")), described(device)
    for one, of_cpu in zip(found, expected, strict=True):
        for name in ("boxes", "scores", "features", "whole"):
            torch.testing.assert_close(
                getattr(one, name).cpu(), getattr(of_cpu, name), rtol=1e-3, atol=1e-3
            )


def as_detections(rows: RegionRows) -> list[Detections]:
    return [
        Detections(
            *(
                torch.from_numpy(np.array(getattr(rows, name)[row, :count]))
                for name in ("boxes", "scores", "classes", "features")
            )
        )
        for row, count in enumerate(rows.count)
    ]


def extracted(
    folder: Path, scenes: Scenes, path: Path, *, boxes: GivenRegions | None = None
) -> RegionRows:
    """Load the detector of a folder as a worker does, and write a shard of all views but two.

    Args:
        boxes: of every view; None for what the detector finds.
    """
    description = read_description(folder)
    extractor = ShardExtractor(load_detector(folder, description, EXTRACT), EXTRACT, threads=2)
    paths = scenes.manifest.table["path"].to_pylist()
    jobs = [ViewJob(name, name, view, boxes) for name in paths for view in (0, 1)]
    # The second batch of four loses one of its views, and the third one all of them.
    jobs[5:5] = [ViewJob("missing", "missing.png", 0, boxes)]
    jobs[8:8] = [ViewJob(f"missing-{at}", "missing.png", 0, boxes) for at in range(4)]
    outcome = extractor.extract(
        jobs,
        np.zeros((len(jobs), 32), dtype=np.uint8),
        scenes.root,
        path=path,
        dataset="tiny",
        recipe=extraction_recipe(description, EXTRACT),
    )
    assert (outcome.rows, len(outcome.failures)) == (len(jobs) - 5, 5)
    _, rows, _ = map_shard(path)
    return rows


@pytest.mark.parametrize(
    "boxes",
    [
        None,
        GivenRegions(
            np.array([[0.1, 0.1, 0.6, 0.9], [0.5, 0.0, 1.0, 0.5]]),
            np.array([1.0, 0.5], np.float32),
            np.array([1, 2], np.int16),
        ),
    ],
    ids=["found", "given"],
)
def test_a_shard_is_the_cpus(
    scenes: Scenes,
    model: FasterRCNN,
    device: torch.device,
    tmp_path: Path,
    boxes: GivenRegions | None,
) -> None:
    """Also beside views that can't be decoded."""
    write_detector(
        tmp_path / "detector",
        model.state_dict(),
        source="fit",
        architecture=ARCHITECTURE,
        classes=("background", *KINDS),
    )
    found = extracted(tmp_path / "detector", scenes, tmp_path / "found.h5", boxes=boxes)
    with without_cuda():
        expected = extracted(tmp_path / "detector", scenes, tmp_path / "expected.h5", boxes=boxes)
    np.testing.assert_array_equal(found.image_id, expected.image_id)
    np.testing.assert_array_equal(found.count, expected.count)
    assert_alike(as_detections(found), as_detections(expected))
    assert found.whole is not None
    np.testing.assert_allclose(found.whole, expected.whole, rtol=1e-3, atol=1e-3)


def test_a_cache_that_a_worker_extracts_is_the_cpus(device: torch.device, tmp_path: Path) -> None:
    """`gmpipe extract` with its Dask worker, which is a process, against one in this process."""
    flow = Flow(tmp_path / "device")
    flow.folder.mkdir()
    # All regions that there are, so that no two change places at the end of the list.
    flow.params(extract__tiny__regions=20, extract__tiny__score_threshold=0.0)
    with without_cuda():
        flow.ok("prepare")
        flow.ok("detector")
    other = Flow(Path(shutil.copytree(flow.folder, tmp_path / "cpu")))
    flow.ok("extract")
    with without_cuda(), worker_in_this_process():
        other.ok("extract")
    caches = [RegionCache.open(one / "cache/tiny") for one in (flow, other)]
    assert caches[0].fingerprint == caches[1].fingerprint
    found, expected = (cache.gather(np.arange(len(cache))) for cache in caches)
    np.testing.assert_array_equal(found.image_id, expected.image_id)
    figures = differences(as_detections(found), as_detections(expected))
    assert figures["matched"] >= 0.9, figures


def make_run(model: FasterRCNN, variant: str, device: torch.device) -> TrainedRun:
    """A run with a tiny head that was never trained, and this detector."""
    labels = make_label_set(dtype=torch.float32)
    checkpoint = Checkpoint(
        dataset="tiny",
        variant=variant,
        seed=0,
        settings=TrainSettings(network=head_settings(variant)),
        views=1,
        epoch=1,
        history=[],
        vocabulary=LABELS,
        train_sha256="",
        trained_images=1,
        label_vectors=labels.vectors,
        ratio=labels.ratio,
        conditional=labels.conditional,
        label_vectors_sha256="",
        recipe={},
        feature_size=D,
        state=make_head(variant, dtype=torch.float32).state_dict(),
    )
    run = TrainedRun(checkpoint, prepared(model, device), ("background", *KINDS), EXTRACT)
    assert run.device.type == device.type
    return run


@pytest.mark.parametrize("variant", ["full", "max-pool", "linear-whole"])
def test_predictions_and_explanations_are_the_cpus(
    scenes: Scenes, model: FasterRCNN, device: torch.device, variant: str
) -> None:
    paths = scenes.manifest.table["path"].to_pylist()[:5]
    pictures = [Image.open(scenes.root / path) for path in paths]

    def of_device(where: torch.device) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Scores of each picture, and of the first one's labels the changes by what is removed."""
        run = make_run(model, variant, where)
        explanation = explain(run, pictures[0], labels=LABELS)
        changes = [
            np.array([label.label_graph or 0.0, label.instance_graph or 0.0])
            for label in sorted(explanation.labels, key=lambda label: label.label)
        ]
        return [one.scores for one in run.predict(pictures, batch_size=2)], changes

    found = of_device(device)
    with without_cuda():
        expected = of_device(torch.device("cpu"))
    for parts, of_cpu in zip(found, expected, strict=True):
        np.testing.assert_allclose(parts, of_cpu, atol=1e-3)
