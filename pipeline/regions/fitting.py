"""Fitting a detector on the boxes of a data set's training split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_iou

from pipeline.datasets.manifest import ImageBoxes
from pipeline.regions.detection import Detections, detect
from pipeline.regions.detector import build_model, class_count, fit_state
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings, FitSettings
from pipeline.tensors import (
    best_device,
    learning_state,
    load_state,
    random_state,
    restore_learning,
    restore_random,
    save_tensors,
)

RECALL_AT = (5, 10, 20, 35)
"""The numbers m of regions for which recall is measured."""

# torchvision's defaults for detections; extraction has settings of its own.
_SCORE_THRESHOLD = 0.05
_NMS_THRESHOLD = 0.5
_CONFIDENT = 0.5  # precision is that of detections with at least this score
# torchvision's quarter would leave few objects among few sampled proposals.
_POSITIVE_SHARE = 0.5
_LARGEST_GRADIENT = 10.0
_SAVE_EVERY = 50


@dataclass(frozen=True)
class FitImage:
    """One annotated training image."""

    image_id: str
    path: Path
    objects: ImageBoxes


def split_holdout(
    images: Sequence[FitImage], settings: FitSettings
) -> tuple[list[FitImage], list[FitImage]]:
    """Images to fit on, and images held out to measure on; seeded, both in the given order."""
    held = min(max(1, round(settings.holdout * len(images))), len(images) - 1)
    order = np.random.default_rng(settings.seed).permutation(len(images))
    out = set(order[:held].tolist())
    fit = [image for place, image in enumerate(images) if place not in out]
    return fit, [images[place] for place in sorted(out)]


def fit_detector(
    images: Sequence[FitImage],
    classes: int,
    architecture: ArchitectureSettings,
    settings: FitSettings,
    *,
    state_file: Path,
    initial: tuple[dict[str, Tensor], Path] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> FasterRCNN:
    """Fit a Faster R-CNN with AdamW and a one-cycle schedule.

    What is needed to resume is written to ``state_file`` every 50 steps; a fit that was killed
    continues from there and ends with the same weights as one that was not.

    Args:
        images: annotated images; every batch is drawn from a seeded shuffle of them.
        classes: number of classes, the background included.
        architecture: of the network.
        settings: steps, rates, seed, view size.
        state_file: where the state lies between two attempts.
        initial: weights to start from and the file they came from; None: from scratch. Where
            they were made for another number of classes, the class predictor starts from scratch.
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        the fitted model in eval mode.
    """
    device = best_device()
    torch.manual_seed(settings.seed)
    model = build_model(
        architecture,
        classes,
        size=settings.size,
        regions=max(RECALL_AT),
        score_threshold=_SCORE_THRESHOLD,
        nms_threshold=_NMS_THRESHOLD,
    )
    model.roi_heads.fg_bg_sampler.batch_size_per_image = settings.sampled_proposals
    model.roi_heads.fg_bg_sampler.positive_fraction = _POSITIVE_SHARE
    if initial is not None:
        _start_from(model, *initial, classes)
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps
    )
    done = 0
    if state_file.is_file():
        state = load_state(state_file)
        restore_learning(state, state_file, model, optimizer, schedule)
        restore_random(state["random"])
        done = state["done"]
    for step in range(done, settings.steps):
        chosen = _batch_numbers(step, settings.batch_size, len(images), settings.seed)
        views, targets = _batch([images[n] for n in chosen], step, settings, device)
        losses: dict[str, Tensor] = model(views, targets)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < settings.steps:
            learner = learning_state(model, optimizer, schedule)
            save_tensors(state_file, {**learner, "random": random_state(), "done": step + 1})
    return model.eval()


def _start_from(model: FasterRCNN, state: dict[str, Tensor], origin: Path, classes: int) -> None:
    if class_count(state, origin) != classes:
        # Weights of another vocabulary: all is taken over but the layers that tell its classes.
        predictor = "roi_heads.box_predictor."
        own = model.state_dict()
        state = state | {key: own[key] for key in own if key.startswith(predictor)}
    fit_state(model, state, origin)


def _batch_numbers(step: int, batch_size: int, images: int, seed: int) -> list[int]:
    """Which images a step takes: its piece of one seeded shuffle after another."""
    numbers = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(place, images)
        numbers.append(int(np.random.default_rng([seed, epoch]).permutation(images)[offset]))
    return numbers


def _batch(
    images: Sequence[FitImage], step: int, settings: FitSettings, device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Views mirrored half of the time, and their objects in pixels of the view."""
    mirrored = np.random.default_rng([settings.seed, 1, step]).random(len(images)) < 0.5
    views, targets = [], []
    for image, mirror in zip(images, mirrored, strict=True):
        view = _whole_view(image, settings.size)
        boxes = torch.from_numpy(image.objects.boxes) * settings.size
        if mirror:
            view = view.flip(-1)
            boxes = torch.stack(
                [
                    settings.size - boxes[:, 2],
                    boxes[:, 1],
                    settings.size - boxes[:, 0],
                    boxes[:, 3],
                ],
                dim=1,
            )
        views.append(view.to(device))
        targets.append(
            {
                "boxes": boxes.to(device),
                "labels": torch.from_numpy(image.objects.classes).to(device),
            }
        )
    return views, targets


def _whole_view(image: FitImage, size: int) -> Tensor:
    picture = load_image(image.path)
    return to_tensor(view_of(picture, 0, size=size, image_id=image.image_id, seed=0, flip=False))


def measure_detector(
    model: FasterRCNN, images: Sequence[FitImage], settings: FitSettings
) -> dict[str, Any]:
    """Recall and precision at IoU 0.5, class-aware, in percent.

    A detection finds an object of its class with an IoU of at least 0.5 that no better-scored
    detection has found. ``recall_at`` m counts the m best detections of an image (with a score of
    at least 0.05), over all objects; ``precision`` counts detections with a score of at least 0.5.
    """
    device = next(model.parameters()).device
    hits: dict[int, int] = dict.fromkeys(RECALL_AT, 0)
    objects = confident = correct = 0
    for start in range(0, len(images), settings.batch_size):
        batch = images[start : start + settings.batch_size]
        views = torch.stack([_whole_view(image, settings.size) for image in batch]).to(device)
        for image, found in zip(batch, detect(model, views), strict=True):
            right = match_detections(found, image.objects)
            objects += len(image.objects.classes)
            for m in RECALL_AT:
                hits[m] += int(right[:m].sum())
            sure = found.scores.cpu().numpy() >= _CONFIDENT
            confident += int(sure.sum())
            correct += int((right & sure).sum())
    return {
        "images": len(images),
        "objects": objects,
        "recall_at": {str(m): round(100 * hits[m] / max(objects, 1), 2) for m in RECALL_AT},
        "precision": round(100 * correct / max(confident, 1), 2),
    }


def match_detections(found: Detections, objects: ImageBoxes, iou: float = 0.5) -> np.ndarray:
    """Which detections find an object, greedily from the best score on.

    Returns:
        (n,) bool, in the detections' order.
    """
    right = np.zeros(len(found.boxes), dtype=bool)
    if not len(objects.classes):
        return right
    overlaps = box_iou(found.boxes.cpu(), torch.from_numpy(objects.boxes)).numpy()
    same = found.classes.cpu().numpy()[:, None] == objects.classes[None, :]
    overlaps = np.where(same, overlaps, 0.0)
    free = np.ones(len(objects.classes), dtype=bool)
    for place, row in enumerate(overlaps):
        best = int(np.argmax(np.where(free, row, -1.0)))
        if free[best] and row[best] >= iou:
            free[best] = False
            right[place] = True
    return right
