"""A trained run on photographs that no cache holds: detector and network together.

How a photograph becomes regions is read from the recipe of the regions that the run was trained
on, never from params.yaml, and every step is the pipeline's own. So the same photograph gets the
same scores, up to rounding: a detector computes a batch of other images in another order.

Letters: B images of a batch, S side of a view in pixels, M instances, C labels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from pipeline.errors import GmpipeError
from pipeline.learning import CHECKPOINT_FILE
from pipeline.learning.batches import ahead
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.splits import instance_batch
from pipeline.learning.training import Network
from pipeline.machine import cores
from pipeline.matching.graphs import InstanceBatch
from pipeline.matching.network import image_logits
from pipeline.regions.detection import detect
from pipeline.regions.detector import DESCRIPTION_FILE, read_description
from pipeline.regions.extraction import (
    blank_rows,
    extraction_recipe,
    extraction_settings,
    fill_rows,
    load_detector,
    to_floats,
)
from pipeline.regions.transforms import load_image, upright, view_of
from pipeline.settings import ExtractSettings
from pipeline.shards.schema import check_same_recipe, without_images
from pipeline.tensors import best_device

Picture = Image.Image | npt.NDArray[np.uint8]
"""A Pillow image of any mode, or an (H, W, 3) array of RGB."""

_BATCH = 8
_REPLACE = "Replace the file, or leave it out."


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a run says of one image, whose n regions come in the order of the detector's scores.

    Attributes:
        scores: (C,) float32, probability of each label.
        regions: (C,) int64, the region that won the max for each label.
        region_scores: (n, C) float32, probability of each label by each region.
        boxes: (n, 4) float32, xyxy in [0, 1] of the image.
        detector_scores: (n,) float32, descending.
        detector_classes: (n,) int64, numbers in `TrainedRun.detector_classes`; 0 where the
            detector found nothing, and the one region is the whole image.
        size: width and height in pixels, of the image as it is looked at (turned by its EXIF
            orientation).
    """

    scores: npt.NDArray[np.float32]
    regions: npt.NDArray[np.int64]
    region_scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    detector_scores: npt.NDArray[np.float32]
    detector_classes: npt.NDArray[np.int64]
    size: tuple[int, int]

    def pixel_box(self, region: int) -> tuple[float, float, float, float]:
        """A region's box, xyxy in pixels of the image."""
        left, top, right, bottom = (self.boxes[region] * np.tile(self.size, 2)).tolist()
        return left, top, right, bottom


class TrainedRun:
    """A run's network, and the detector whose regions it was trained on. Made by `load_run`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        detector: FasterRCNN,
        detector_classes: Sequence[str],
        extract: ExtractSettings,
    ) -> None:
        """
        Args:
            checkpoint: the run's.
            detector: of `load_detector`, made for ``extract``.
            detector_classes: name of every class number; the first is the background.
            extract: the settings that the run's regions were extracted with.
        """
        self.checkpoint = checkpoint
        self.detector = detector
        self.detector_classes = tuple(detector_classes)
        self.device = best_device()
        self.network: Network = checkpoint.network().to(self.device)
        self.label_vectors: Tensor = checkpoint.label_vectors.to(self.device)
        self._extract = extract

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The C label names, in the order of the scores."""
        return self.checkpoint.vocabulary

    @property
    def regions(self) -> int:
        """M: the best regions of an image that the network reads."""
        return self.checkpoint.settings.regions or self._extract.regions

    def class_name(self, number: int) -> str | None:
        """What the detector takes a region of class ``number`` for; None for 0, nothing."""
        return self.detector_classes[number] if number else None

    def predict(self, images: Iterable[Picture], *, batch_size: int = _BATCH) -> list[Prediction]:
        """The labels of images in memory.

        Args:
            images: Pillow images or (H, W, 3) uint8 arrays of RGB.
            batch_size: images that the detector takes at once.

        Raises:
            TypeError, ValueError: one of them is something else.
        """
        found: list[Prediction] = []
        waiting: list[_Seen] = []
        for image in images:
            waiting.append(self._see(as_picture(image)))
            if len(waiting) == batch_size:
                found += self._predict(waiting)
                waiting = []
        return found + self._predict(waiting)

    def predict_files(
        self, paths: Iterable[Path], *, batch_size: int = _BATCH
    ) -> Generator[tuple[Path, Prediction | GmpipeError]]:
        """The labels of photographs on disk, in order, and why one has none.

        They are decoded ahead in threads. Of a photograph only its view is kept, so that memory
        does not grow with their number or size.

        Args:
            paths: of the photographs.
            batch_size: images that the detector takes at once.
        """

        def see(path: Path) -> tuple[Path, _Seen | GmpipeError]:
            try:
                if not path.exists():
                    raise GmpipeError(f"{path}: there is no such file. Correct the name.")
                return path, self._see(load_image(path, _REPLACE))
            except GmpipeError as error:
                return path, error

        with closing(ahead(see, paths, threads=cores(), most=2 * batch_size)) as seen:
            waiting: list[tuple[Path, _Seen | GmpipeError]] = []
            for one in seen:
                waiting.append(one)
                if sum(isinstance(outcome, _Seen) for _, outcome in waiting) == batch_size:
                    yield from self._outcomes(waiting)
                    waiting = []
            yield from self._outcomes(waiting)

    def instances(self, images: Sequence[Image.Image]) -> InstanceBatch:
        """The regions of B images in RGB, as the network reads them."""
        return self._instances([self._see(image).view for image in images])

    @torch.inference_mode()
    def logits(self, batch: InstanceBatch, **graphs: bool) -> Tensor:
        """(B, M, C) logits; keywords as `MatchingNetwork.forward` has them."""
        logits: Tensor = self.network(batch, self.label_vectors, **graphs)
        return logits

    def read(self, batch: InstanceBatch, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """What the network makes of the regions of B images of some widths and heights."""
        logits = self.logits(batch)
        best, winners = image_logits(logits)
        scores, regions = best.sigmoid().cpu().numpy(), winners.cpu().numpy()
        of_regions = {
            "region_scores": logits.sigmoid(),
            "boxes": batch.boxes,
            "detector_scores": batch.scores,
            "detector_classes": batch.classes.long(),
        }
        arrays = {name: tensor.cpu().numpy() for name, tensor in of_regions.items()}
        counts = batch.mask.sum(dim=1).tolist()
        return [
            Prediction(
                scores=scores[image],
                regions=regions[image],
                size=size,
                **{name: array[image, :count] for name, array in arrays.items()},
            )
            for image, (count, size) in enumerate(zip(counts, sizes, strict=True))
        ]

    def _outcomes(
        self, waiting: list[tuple[Path, _Seen | GmpipeError]]
    ) -> Generator[tuple[Path, Prediction | GmpipeError]]:
        seen = [outcome for _, outcome in waiting if isinstance(outcome, _Seen)]
        predictions = iter(self._predict(seen))
        for path, outcome in waiting:
            yield path, next(predictions) if isinstance(outcome, _Seen) else outcome

    def _see(self, image: Image.Image) -> _Seen:
        view = view_of(image, 0, size=self._extract.size, image_id="", seed=0, flip=False)
        return _Seen(view, image.size)

    def _predict(self, seen: Sequence[_Seen]) -> list[Prediction]:
        if not seen:
            return []
        return self.read(self._instances([one.view for one in seen]), [one.size for one in seen])

    def _instances(self, views: Sequence[npt.NDArray[np.uint8]]) -> InstanceBatch:
        rows = blank_rows(len(views), self.detector, self._extract)
        fill_rows(rows, slice(None), detect(self.detector, to_floats(views, self.device)))
        return instance_batch(rows, self.regions).to(self.device, torch.float32)


@dataclass(frozen=True, eq=False)
class _Seen:
    """View 0 (S, S, 3) of an image, and the width and height that it had."""

    view: npt.NDArray[np.uint8]
    size: tuple[int, int]


def as_picture(image: Picture) -> Image.Image:
    """An image in memory as the pipeline sees it after decoding.

    Raises:
        TypeError, ValueError: it is neither a Pillow image nor an (H, W, 3) uint8 array.
    """
    if isinstance(image, Image.Image):
        return upright(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"found a {type(image).__name__}, expected a Pillow image or an (H, W, 3) uint8 array"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"found an array of {image.dtype} with shape {image.shape}, expected (H, W, 3) uint8, "
            "RGB"
        )
    return Image.fromarray(image)


def load_run(folder: str | Path, detector: str | Path | None = None) -> TrainedRun:
    """A trained run, ready for new images.

    Args:
        folder: of the run, e.g. ``runs/demo/full-s0``.
        detector: folder of the detector whose regions it was trained on; None: that of the same
            checkout, ``data/<dataset>/detector``.

    Raises:
        GmpipeError: there is no such run, it was trained on regions that were imported or that
            another detector or version made, or there is no detector.
    """
    # Not resolved: `runs` may be a link to another disk.
    folder = Path(folder).absolute()
    checkpoint = load_checkpoint(folder / CHECKPOINT_FILE)
    recipe, dataset = checkpoint.recipe, checkpoint.dataset
    if "imported_from" in recipe:
        raise GmpipeError(
            f"{folder} was trained on imported regions ({recipe['imported_from']}), and no "
            "detector is known that makes such regions of new photographs. It can be evaluated, "
            "reported and exported: `gmpipe evaluate`, `gmpipe report`, `gmpipe export`."
        )
    place = Path(detector or folder.parent.parent.parent / "data" / dataset / "detector")
    if not (place / DESCRIPTION_FILE).is_file():
        raise GmpipeError(
            f"there is no detector in {place}, where that of {folder} is looked for. Run `gmpipe "
            f"detector --dataset {dataset}` there, or name its folder with `--detector` (in "
            "Python: `detector=`)."
        )
    description = read_description(place)
    extract = extraction_settings(recipe)
    check_same_recipe(
        extraction_recipe(description, extract),
        without_images(recipe),
        f"what the detector in {place} finds",
        f"That is not the detector that {folder} was trained with: restore it, name another with "
        "`--detector` (in Python: `detector=`), or train again.",
    )
    return TrainedRun(
        checkpoint, load_detector(place, description, extract), description.classes, extract
    )
