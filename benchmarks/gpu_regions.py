"""Extraction on a GPU, for `benchmarks.gpu`: how fast it is, and whether it finds the same regions.

Speed, in images per second, at score thresholds of 0.05 (torchvision's default) and 0.0 (ours):

- bare_loop: what a script with torchvision does: decode with PIL, resize, `model(batch)`.
- gmpipe: files to shards, as a worker of `gmpipe extract` does it. `ratio` is over the bare loop of
  the same precision; in bfloat16 and float16, over that in TF32.
- bare_detector, detector: torchvision's model and ours on views that lie on the device.
- decoding: our decoding alone, with all cores. `decoding_share` is gmpipe's rate at a threshold of
  0.0 divided by it: near 1, the decoder is what limits.

Both use the same photographs, weights, batches and number of regions. Photographs are JPEGs of
500 x 375 pixels that are drawn, views are 448 x 448, and the detector is a ResNet50-FPN with random
weights that were made to detect something (`benchmarks.extraction.enliven`).

The regions of a few views are compared with those that the CPU finds in float32: the share that
has a counterpart of the same class (IoU above 0.9), and among those the largest difference of boxes
(of the view's side), of scores, and of features (relative to the largest feature).

Letters: S side of a view in pixels, m regions of an image.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.extraction import (
    THRESHOLDS,
    bare_loop,
    draw_photographs,
    end_to_end,
    enliven,
    view,
)
from benchmarks.networks.costs import seconds
from pipeline.machine import cores
from pipeline.regions.detection import (
    Detections,
    detect,
    prepare_for_extraction,
)
from pipeline.regions.extraction import ShardExtractor
from pipeline.regions.plan import ViewJob
from pipeline.settings import ExtractSettings, Precision
from pipeline.tensors import computing_in

PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16", "float16")

Figures = dict[str, Any]


def show(name: str, figures: Figures) -> None:
    """Print figures on a line."""
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items())}")


def extract_settings(quick: bool) -> ExtractSettings:
    """As for COCO, with batches that fill a GPU."""
    batch = 2 if quick else 32
    return ExtractSettings(
        size=64 if quick else 448, regions=35, batch_size=batch, rows_per_shard=2 * batch
    )


def make_detector(settings: ExtractSettings, views: Tensor, *, quick: bool) -> FasterRCNN:
    """torchvision's model on the CPU, with random weights that detect something in ``views``."""
    torch.manual_seed(0)
    proposals = {"rpn_post_nms_top_n_test": 20, "rpn_pre_nms_top_n_test": 20} if quick else {}
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=settings.size,
        max_size=settings.size,
        box_nms_thresh=settings.nms_threshold,
        box_detections_per_img=settings.regions,
        **proposals,
    ).eval()
    enliven(model, views)
    return model


def photographs(folder: Path, drawn: int, copies: int) -> list[Path]:
    """Draw photographs, and copy them under other names, which is quicker."""
    folder.mkdir()
    draw_photographs(folder, drawn)
    for path in sorted(folder.iterdir()):
        for number in range(1, copies):
            shutil.copyfile(path, path.with_stem(f"{path.stem}-{number}"))
    return sorted(folder.iterdir())


def loop_with_decoding(
    model: FasterRCNN, paths: Sequence[Path], settings: ExtractSettings, device: torch.device
) -> int:
    """Decode with PIL and run torchvision's model, batch by batch; return the detections."""
    side, detections = (settings.size, settings.size), 0
    for start in range(0, len(paths), settings.batch_size):
        views = []
        for path in paths[start : start + settings.batch_size]:
            with Image.open(path) as picture:
                views.append(pil_to_tensor(picture.convert("RGB").resize(side)))
        batch = [of_image.to(device).float() / 255 for of_image in views]
        with torch.inference_mode():
            detections += sum(len(image["scores"].cpu()) for image in model(batch))
    return detections


def detector_loop(model: FasterRCNN, views: Tensor, settings: ExtractSettings) -> None:
    """Run our detector on views that lie on the device."""
    for batch in views.split(settings.batch_size):
        detect(model, batch, whole=settings.whole)


def measure_extraction(device: torch.device, folder: Path, *, quick: bool) -> Figures:
    """Measure the rates of extraction in each precision, and print them."""
    settings = extract_settings(quick)
    paths = photographs(folder / "photographs", *((2, 2) if quick else (32, 8)))
    views = torch.stack([view(path, settings) for path in paths[: settings.batch_size]])
    theirs = make_detector(settings, views[:2], quick=quick).to(device)
    many = views.to(device).repeat(1 if quick else 4, 1, 1, 1)
    figures: Figures = {"decoding": _decoding(theirs, paths, settings)}
    print(f"images/s, {len(paths)} images, S = {settings.size}, m = {settings.regions},", end=" ")
    print(f"batches of {settings.batch_size}; {cores()} cores decode {figures['decoding']}")
    bare: dict[float, dict[str, float]] = {}
    for precision in PRECISIONS:
        figures[precision] = {}
        for threshold in THRESHOLDS:
            changes = {"score_threshold": threshold, "precision": precision}
            used = settings.model_copy(update=changes)
            theirs.roi_heads.score_thresh = threshold
            part = _extraction_rates(theirs, paths, many, used)
            if "bare_loop" in part:
                bare[threshold] = part
            part["ratio"] = round(part["gmpipe"] / bare[threshold]["bare_loop"], 3)
            of_detector = part["detector"] / bare[threshold]["bare_detector"]
            part["detector_ratio"] = round(of_detector, 3)
            figures[precision][str(threshold)] = part
            show(f"{precision}, threshold {threshold}", part)
    figures["decoding_share"] = {
        precision: round(figures[precision]["0.0"]["gmpipe"] / figures["decoding"], 3)
        for precision in PRECISIONS
    }
    return figures


def _extraction_rates(
    theirs: FasterRCNN, paths: Sequence[Path], views: Tensor, settings: ExtractSettings
) -> dict[str, float]:
    """Images per second with settings; of torchvision's own only in float32 and TF32."""
    ours = prepare_for_extraction(theirs, settings.precision)
    works: dict[str, tuple[Callable[[], object], int]] = {
        "gmpipe": (lambda: end_to_end(ours, paths, settings), len(paths)),
        "detector": (lambda: detector_loop(ours, views, settings), len(views)),
    }
    if settings.precision in ("float32", "tf32"):
        works["bare_loop"] = (
            lambda: loop_with_decoding(theirs, paths, settings, views.device),
            len(paths),
        )
        works["bare_detector"] = (lambda: bare_loop(theirs, views, settings), len(views))
    with computing_in(settings.precision):
        return _rates(works, views.device)


def _rates(
    works: Mapping[str, tuple[Callable[[], object], int]], device: torch.device
) -> dict[str, float]:
    """Images per second of the second turn; the first one warms up."""
    rates: dict[str, float] = {}
    for _ in range(2):
        for name, (work, images) in works.items():
            rates[name] = round(images / seconds(work, device), 2)
    return rates


def _decoding(model: FasterRCNN, paths: Sequence[Path], settings: ExtractSettings) -> float:
    """Images per second that are decoded to views with all cores."""
    extractor = ShardExtractor(model, settings, threads=cores())
    jobs = [ViewJob(path.name, path.name, 0) for path in paths]
    taken = [seconds(lambda: extractor.decode(jobs, paths[0].parent)) for _ in range(3)]
    return round(len(jobs) / statistics.median(taken), 1)


def compare_regions(device: torch.device, *, quick: bool) -> Figures:
    """Compare the regions of a few views with those on the CPU, and print the differences."""
    settings = extract_settings(quick)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 12, 12, generator=generator)
    views = torch.nn.functional.interpolate(coarse, size=settings.size, mode="bicubic").clamp(0, 1)
    theirs = make_detector(settings, views[:2], quick=quick)
    expected = detect(prepare_for_extraction(theirs), views)
    theirs.to(device)
    figures: Figures = {}
    for precision in PRECISIONS:
        on_device = prepare_for_extraction(theirs, precision)
        with computing_in(precision):
            found = detect(on_device, views.to(device))
        figures[precision] = differences(found, expected)
        show(precision, figures[precision])
    return figures


def differences(found: Sequence[Detections], expected: Sequence[Detections]) -> Figures:
    """Compare regions of the same views, as the module's docstring says."""
    matched, regions = 0, 0
    largest = dict.fromkeys(("boxes", "scores", "features"), 0.0)
    for one, other in zip(found, expected, strict=True):
        boxes, classes = one.boxes.cpu(), one.classes.cpu()
        overlap = box_iou(other.boxes.cpu(), boxes) * (other.classes.cpu()[:, None] == classes)
        best, at = overlap.max(dim=1)
        alike = best > 0.9
        regions += len(alike)
        matched += int(alike.sum())
        for name in largest:
            mine = getattr(one, name).cpu()[at[alike]]
            theirs = getattr(other, name).cpu()[alike]
            difference = (mine - theirs).abs().max().item() if len(theirs) else 0.0
            scale = other.features.abs().max().item() if name == "features" else 1.0
            largest[name] = max(largest[name], difference / scale)
    return {
        "matched": round(matched / regions, 4),
        **{name: float(f"{value:.2e}") for name, value in largest.items()},
    }
