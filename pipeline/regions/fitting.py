"""Fitting a detector on the boxes of a data set's training split."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.resnet import Bottleneck
from torchvision.ops import box_iou

from pipeline.ahead import ahead
from pipeline.datasets.manifest import ImageBoxes
from pipeline.errors import InputError, MismatchError
from pipeline.files import exists
from pipeline.interrupts import Interrupted, deferred_interrupt
from pipeline.learning.seeds import seeded
from pipeline.regions.detection import Detections, detect, trained_faster
from pipeline.regions.detector import build_model, class_count, fit_state
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings, FitSettings
from pipeline.tensors import (
    ODD_STATE,
    best_device,
    foreign_state,
    learning_state,
    load_state,
    non_finite,
    random_state,
    restore_learning,
    restore_random,
    save_tensors,
)

RECALL_AT = (5, 10, 20, 35)
"""The numbers of regions m at which recall is measured."""

# torchvision's defaults for detections; extraction has its own settings.
_SCORE_THRESHOLD = 0.05
_NMS_THRESHOLD = 0.5
CONFIDENT = 0.5  # precision is measured on detections with at least this score
# torchvision's quarter leaves few objects among a small number of sampled proposals.
_POSITIVE_SHARE = 0.5
_LARGEST_GRADIENT = 10.0
_SAVE_EVERY = 50

_Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""Views (3, S, S) and, for each, the objects in it, as torchvision's detectors learn from them."""


@dataclass(frozen=True)
class FitImage:
    """One annotated training image.

    Attributes:
        image_id: as in the manifest.
        path: of the file.
        objects: its boxes, xyxy in [0,1] of the upright picture, and their classes.
        size: width and height of the picture that the boxes were placed in; None if unknown.
    """

    image_id: str
    path: Path
    objects: ImageBoxes
    size: tuple[int, int] | None = None


def split_holdout(
    images: Sequence[FitImage], settings: FitSettings
) -> tuple[list[FitImage], list[FitImage]]:
    """Split images into those to fit on and those held out to measure on.

    The split is seeded, and both parts keep the given order.
    """
    size = min(max(1, round(settings.holdout * len(images))), len(images) - 1)
    order = np.random.default_rng(settings.seed).permutation(len(images))
    held_out = set(order[:size].tolist())
    fitted = [image for index, image in enumerate(images) if index not in held_out]
    return fitted, [images[index] for index in sorted(held_out)]


def fit_detector(
    images: Sequence[FitImage],
    classes: int,
    architecture: ArchitectureSettings,
    settings: FitSettings,
    *,
    state_file: Path,
    initial: tuple[dict[str, Tensor], Path] | None = None,
    on_start: Callable[[int], None] = lambda done: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> FasterRCNN:
    """Fit a Faster R-CNN with AdamW and a one-cycle schedule.

    The same images and settings give the same weights on the same CPU; on a GPU, two fits differ
    by rounding, which grows with the steps. The state is saved to ``state_file`` every 50 steps,
    and on Ctrl-C. A fit that was stopped resumes from there, and on a CPU ends with the same
    weights as one that ran through.

    Args:
        images: annotated images; every batch is drawn from a seeded shuffle of them.
        classes: number of classes, including the background.
        architecture: of the network.
        settings: steps, rates, seed, view size.
        state_file: where the state is kept between two attempts.
        initial: weights to start from and the file that they came from; None: from scratch. If
            they were made for another number of classes, the class predictor starts from scratch.
        on_start: called before the first step, with the number of steps done by an earlier attempt.
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        the fitted model in eval mode.

    Raises:
        InputError: the loss of a step or a weight at the end is nan or infinite.
        Interrupted: Ctrl-C was pressed, and the state is saved.
        MismatchError: a file has another size than the boxes were placed in.
        GmpipeError: ``state_file`` can't be used, see `_Learner.resume`.
    """
    device = best_device()
    with seeded(settings.seed, deterministic=_is_repeatable(device)):
        model = _new_model(classes, architecture, settings)
        _start(model, initial, classes)
        model.to(device).train()
        with trained_faster(model), deferred_interrupt() as interrupted:
            learner = _Learner(model, settings)
            done = learner.resume(state_file)
            on_start(done)
            with closing(_batches(images, done, settings, device)) as batches:
                for step, (views, targets) in enumerate(batches, done + 1):
                    loss = learner.learn(views, targets)
                    if not math.isfinite(loss):
                        raise _diverged(f"the loss of step {step} is {loss}")
                    on_step(step, loss)
                    if step < settings.steps:
                        learner.save_if_due(state_file, step, interrupted=interrupted())
        if broken := non_finite(model.state_dict()):
            raise _diverged(f"after the last step {broken[0]} is not finite")
        return model.eval()


def _is_repeatable(device: torch.device) -> bool:
    """Whether a fit on a device asks for deterministic kernels."""
    # On a GPU, torchvision would replace RoIAlign by a version in Python, which torch compiles anew
    # for many numbers of boxes. A step of the demo's fit then took 88 s on an H200 (torch 2.11,
    # torchvision 0.26).
    return device.type == "cpu"


def _start(model: FasterRCNN, initial: tuple[dict[str, Tensor], Path] | None, classes: int) -> None:
    """Give a model its first weights, as `fit_detector` describes them."""
    if initial is None:
        _start_from_scratch(model)
    else:
        _start_from(model, *initial, classes)


def _diverged(problem: str) -> InputError:
    return InputError(
        f"The fit of the detector diverged: {problem}.", "Lower `learning_rate` of its `fit`."
    )


def _new_model(
    classes: int, architecture: ArchitectureSettings, settings: FitSettings
) -> FasterRCNN:
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
    return model


class _Learner:
    """A model in training mode with its optimizer and schedule, and the file they resume from."""

    def __init__(self, model: FasterRCNN, settings: FitSettings) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=settings.learning_rate, total_steps=settings.steps
        )

    def learn(self, views: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
        """Take one step and return its loss, the sum of Faster R-CNN's four."""
        losses: dict[str, Tensor] = self.model(views, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, _LARGEST_GRADIENT)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def save(self, path: Path, done: int) -> None:
        """Write what `resume` reads, after ``done`` steps."""
        state = learning_state(self.model, self.optimizer, self.schedule)
        save_tensors(path, {**state, "random": random_state(), "done": done})

    def save_if_due(self, path: Path, done: int, *, interrupted: bool) -> None:
        """Save the state every 50 steps, and if Ctrl-C was pressed.

        Raises:
            Interrupted: it was, and the state is saved.
        """
        if interrupted or done % _SAVE_EVERY == 0:
            self.save(path, done)
        if interrupted:
            raise Interrupted(done)

    def resume(self, path: Path) -> int:
        """Continue from a saved state if there is one, and return the number of steps done.

        Raises:
            GmpipeError: the file can't be read, or was left by another learner.
        """
        if not exists(path):
            return 0
        state = load_state(path)
        try:
            done: int = state["done"]
            random_states: list[Tensor] = state["random"]
            if type(done) is not int or not 0 < done < self.schedule.total_steps:
                raise ValueError(f"`done` is {done!r} of {self.schedule.total_steps} steps")
        except ODD_STATE as error:
            raise foreign_state(path, error) from error
        restore_learning(state, path, self.model, self.optimizer, self.schedule, steps=done)
        restore_random(random_states, path)
        return done


def _start_from_scratch(model: FasterRCNN) -> None:
    """Let every residual block begin as the identity (Goyal et al. 2017, section 5.1).

    Without it, the demo's detector does not learn at a rate of 0.002, and at 0.001 it needs many
    more steps for the same recall. A frozen norm would keep its block the identity forever,
    so it is left as it is.
    """
    for block in model.backbone.body.modules():
        if isinstance(block, Bottleneck) and isinstance(block.bn3, nn.BatchNorm2d):
            nn.init.zeros_(block.bn3.weight)


def _start_from(model: FasterRCNN, state: dict[str, Tensor], origin: Path, classes: int) -> None:
    if class_count(state, origin) != classes:
        # Only the layers that distinguish the classes of another vocabulary are left out.
        predictor = "roi_heads.box_predictor."
        own = model.state_dict()
        state = state | {key: own[key] for key in own if key.startswith(predictor)}
    fit_state(model, state, origin)


def _batch_indices(step: int, batch_size: int, images: int, seed: int) -> list[int]:
    """Return the indices of a step's images; every epoch is a seeded shuffle of all images."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, images)
        indices.append(int(np.random.default_rng([seed, epoch]).permutation(images)[offset]))
    return indices


def _batches(
    images: Sequence[FitImage], done: int, settings: FitSettings, device: torch.device
) -> Generator[_Batch]:
    """Yield the batch of each step after ``done``, decoded while the steps before are computed."""

    def batch(step: int) -> _Batch:
        chosen = _batch_indices(step, settings.batch_size, len(images), settings.seed)
        return _batch([images[index] for index in chosen], step, settings, device)

    return ahead(batch, range(done, settings.steps))


def _batch(
    images: Sequence[FitImage], step: int, settings: FitSettings, device: torch.device
) -> _Batch:
    """Return views, each mirrored with probability 0.5, and their objects in pixels of the view."""
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
    if image.size and picture.size != image.size:
        found, expected = ("{} x {}".format(*size) for size in (picture.size, image.size))
        raise MismatchError(
            f"{image.path} has {found} pixels, expected {expected}: the file has changed since the "
            "data set was prepared, and its boxes may be of another picture."
        )
    return to_tensor(view_of(picture, 0, size=size, image_id=image.image_id, seed=0, flip=False))


def measure_detector(
    model: FasterRCNN,
    images: Sequence[FitImage],
    settings: FitSettings,
    on_images: Callable[[int], object] = lambda images: None,
) -> dict[str, Any]:
    """Measure recall and precision at IoU 0.5, class-aware, in percent.

    A detection finds an object of its class if their IoU is at least 0.5 and no detection with a
    better score has found that object. ``recall_at`` m counts the m best detections of an image
    (with a score of at least 0.05) over all objects; ``precision`` counts detections with a score
    of at least 0.5.

    ``on_images`` is called with the number of images of each batch that is measured.
    """
    device = next(model.parameters()).device
    hits: dict[int, int] = dict.fromkeys(RECALL_AT, 0)
    objects = confident = correct = 0
    for start in range(0, len(images), settings.batch_size):
        batch = images[start : start + settings.batch_size]
        views = torch.stack([_whole_view(image, settings.size) for image in batch]).to(device)
        for image, detections in zip(batch, detect(model, views), strict=True):
            right = match_detections(detections, image.objects)
            objects += len(image.objects.classes)
            for m in RECALL_AT:
                hits[m] += int(right[:m].sum())
            sure = detections.scores.cpu().numpy() >= CONFIDENT
            confident += int(sure.sum())
            correct += int((right & sure).sum())
        on_images(len(batch))
    return {
        "images": len(images),
        "objects": objects,
        "recall_at": {str(m): round(100 * hits[m] / max(objects, 1), 2) for m in RECALL_AT},
        "precision": round(100 * correct / max(confident, 1), 2),
    }


def match_detections(detections: Detections, objects: ImageBoxes, iou: float = 0.5) -> np.ndarray:
    """Say which detections find an object, greedily from the best score on.

    Returns:
        (n,) bool, in the detections' order.
    """
    right = np.zeros(len(detections.boxes), dtype=bool)
    if not len(objects.classes):
        return right
    overlaps = box_iou(detections.boxes.cpu(), torch.from_numpy(objects.boxes)).numpy()
    same = detections.classes.cpu().numpy()[:, None] == objects.classes[None, :]
    overlaps = np.where(same, overlaps, 0.0)
    free = np.ones(len(objects.classes), dtype=bool)
    for detection, of_objects in enumerate(overlaps):
        best = int(np.argmax(np.where(free, of_objects, -1.0)))
        if free[best] and of_objects[best] >= iou:
            free[best] = False
            right[detection] = True
    return right
