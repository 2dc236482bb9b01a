"""Use a trained run on new photographs: the detector finds regions, the network labels them.

How a photograph becomes regions is read from the recipe of the regions that the run was trained
on, never from params.yaml, and every step is the pipeline's own. So the same photograph gets the
same scores as through the pipeline, up to rounding: a detector computes in another order when other
images are in its batch.

Letters: B images of a batch, S side of a view in pixels, M instances, C labels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.special import expit
from torchvision.models.detection import FasterRCNN

from pipeline.ahead import ahead
from pipeline.decisions.decisions import Decisions
from pipeline.errors import (
    AccessError,
    DamagedError,
    GmpipeError,
    InputError,
    MissingError,
    briefly,
)
from pipeline.evaluation.metrics import THRESHOLD
from pipeline.files import access_error, exists
from pipeline.heads.contract import Head, HeadOutput, LabelSet, RegionBatch
from pipeline.images import upright
from pipeline.learning import CHECKPOINT_FILE
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.prediction import (
    NotFinite,
    check_finite,
    finite_output,
    shown_attribution,
)
from pipeline.learning.splits import instance_batch
from pipeline.machine import cores
from pipeline.regions.detector import DESCRIPTION_FILE, read_description
from pipeline.regions.extraction import (
    blank_rows,
    extraction_recipe,
    extraction_settings,
    fill_rows,
    load_detector,
)
from pipeline.regions.transforms import load_image, view_of
from pipeline.settings import ExtractSettings
from pipeline.shards.schema import check_same_recipe, without_images
from pipeline.tensors import best_device, computing_in

Picture = Image.Image | npt.NDArray[np.uint8]
"""A Pillow image of any mode, or an upright (H, W, 3) array of RGB.

Pillow images are turned upright by their EXIF orientation, which an array does not have."""

_BATCH_SIZE = 8
_REPLACE = "Replace the file, or leave it out."


@dataclass(frozen=True, eq=False)
class Prediction:
    """The labels of one image. Its n regions are in the order of the detector's scores.

    Attributes:
        logits: (C,) float32. Labels are ranked by them: probabilities near 1 may be equal.
        scores: (C,) float32, probability of each label, the sigmoid of its logit.
        regions: (C,) int64, index of the region that says most for each label; -1 where that is
            the image as a whole.
        region_scores: (n, C) float32, what each region says for each label: its probability, or
            the weight by which the head reads it (`Head.attribution`); None for a head that looks
            at the image as a whole.
        boxes: (n, 4) float32, xyxy in [0, 1] of the image.
        detector_scores: (n,) float32, descending.
        detector_classes: (n,) int64, numbers in `TrainedRun.detector_classes`; 0 if the detector
            found nothing, and the only region is the whole image.
        size: width and height in pixels, after the image was turned by its EXIF orientation.
        decisions: that the run fitted; None if it fitted none.
    """

    logits: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    regions: npt.NDArray[np.int64]
    region_scores: npt.NDArray[np.float32] | None
    boxes: npt.NDArray[np.float32]
    detector_scores: npt.NDArray[np.float32]
    detector_classes: npt.NDArray[np.int64]
    size: tuple[int, int]
    decisions: Decisions | None = None

    @property
    def probabilities(self) -> npt.NDArray[np.floating[Any]]:
        """(C,), calibrated as the run fitted it; `scores` if it fitted nothing."""
        if self.decisions is None:
            return self.scores
        calibrated: npt.NDArray[np.float64] = expit(self.decisions.calibrated(self.logits))
        return calibrated

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """(C,), the probability that each predicted label exceeds: fitted by the run, or 0.5."""
        if self.decisions is None:
            return np.full(len(self.logits), THRESHOLD)
        return self.decisions.probabilities

    @property
    def predicted(self) -> npt.NDArray[np.bool_]:
        """(C,), whether each label is predicted."""
        if self.decisions is None:
            return self.scores > THRESHOLD
        return self.decisions.predicted(self.logits)

    @property
    def order(self) -> list[int]:
        """The numbers of the labels, the most probable first."""
        logits = self.logits if self.decisions is None else self.decisions.calibrated(self.logits)
        order: list[int] = np.argsort(-logits, kind="stable").tolist()
        return order

    def region_of(self, label: int) -> int | None:
        """The region that says most for a label; None where that is the image as a whole."""
        region = int(self.regions[label])
        return None if region < 0 else region

    def said(self, region: int | None, label: int) -> float | None:
        """What a region says for a label, as in `region_scores`; None without such a region."""
        if region is None or self.region_scores is None:
            return None
        return float(self.region_scores[region, label])

    def pixel_box(self, region: int) -> tuple[float, float, float, float]:
        """Convert a region's box to pixels of the image, xyxy; -1 gives the whole image's."""
        if region < 0:
            return 0.0, 0.0, float(self.size[0]), float(self.size[1])
        left, top, right, bottom = (self.boxes[region] * np.tile(self.size, 2)).tolist()
        return left, top, right, bottom


class TrainedRun:
    """A run's network, and the detector whose regions it was trained on; see `load_run`.

    Example:
        >>> run = load_run("runs/demo/full-s0")
        >>> [prediction] = run.predict([Image.open("photo.jpg")])
        >>> run.vocabulary[prediction.logits.argmax()]
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        detector: FasterRCNN,
        detector_classes: Sequence[str],
        extract: ExtractSettings,
        name: str = "the run",
    ) -> None:
        """
        Args:
            checkpoint: the run's.
            detector: as `load_detector` makes it for ``extract``.
            detector_classes: name of every class number; the first is the background.
            extract: the settings with which the run's regions were extracted.
            name: of the run, for errors.
        """
        self.checkpoint = checkpoint
        self.detector = detector
        self.detector_classes = tuple(detector_classes)
        self.device = best_device()
        self.network: Head = checkpoint.network().to(self.device)
        self.labels: LabelSet = checkpoint.labels.to(self.device)
        self.name = name
        self._extract = extract

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The C label names, in the order of the scores."""
        return self.checkpoint.vocabulary

    @property
    def regions(self) -> int:
        """M: how many regions of an image the network reads, best first."""
        return self.checkpoint.settings.regions or self._extract.regions

    def class_name(self, number: int) -> str | None:
        """Name a class of the detector; None for 0, which stands for no detection."""
        return self.detector_classes[number] if number else None

    def predict(
        self, images: Iterable[Picture], *, batch_size: int = _BATCH_SIZE
    ) -> list[Prediction]:
        """Predict the labels of images in memory.

        Args:
            images: Pillow images, which are turned upright by their EXIF orientation; or upright
                (H, W, 3) uint8 arrays of RGB.
            batch_size: images that the detector processes at once.

        Raises:
            TypeError, ValueError: one of them is something else, or ``batch_size`` is below 1.
            NotFinite: what the detector or the network computes for an image is nan or infinite.
                The error gives the image's position, from 0.
        """
        _check_batch_size(batch_size)
        predictions: list[Prediction] = []
        waiting: list[_View] = []
        for number, image in enumerate(images):
            waiting.append(self._view(as_picture(image), str(number)))
            if len(waiting) == batch_size:
                predictions += self._predict(waiting)
                waiting = []
        return predictions + self._predict(waiting)

    def predict_files(
        self, paths: Iterable[str | Path], *, batch_size: int = _BATCH_SIZE
    ) -> Generator[tuple[Path, Prediction | GmpipeError]]:
        """Predict the labels of photographs on disk, in order.

        Photographs are decoded ahead in threads. Only a photograph's view is kept, so that memory
        does not grow with their number or size.

        Args:
            paths: of the photographs.
            batch_size: images that the detector processes at once.

        Yields:
            each path with its prediction, or with the error that says why it has none.

        Raises:
            TypeError: ``paths`` is a single path.
            ValueError: ``batch_size`` is below 1.
            NotFinite: as `predict`; the error gives the path.
        """
        if isinstance(paths, str | Path):
            raise TypeError(f"expected a list of paths, not the single path {str(paths)!r}")
        _check_batch_size(batch_size)

        def view(path: Path) -> tuple[Path, _View | GmpipeError]:
            try:
                if not exists(path):
                    raise InputError(f"There is no file {path}.", "Correct the name.")
                return path, self._view(load_image(path, _REPLACE), str(path))
            except (MissingError, InputError, AccessError) as error:
                return path, error
            except OSError as error:
                return path, access_error(error, path)

        with closing(
            ahead(view, map(Path, paths), threads=cores(), most=2 * batch_size)
        ) as outcomes:
            waiting: list[tuple[Path, _View | GmpipeError]] = []
            for one in outcomes:
                waiting.append(one)
                if sum(isinstance(outcome, _View) for _, outcome in waiting) == batch_size:
                    yield from self._predict_outcomes(waiting)
                    waiting = []
            yield from self._predict_outcomes(waiting)

    def instances(
        self, images: Sequence[Image.Image], names: Sequence[str] | None = None
    ) -> RegionBatch:
        """Find the regions of B images in RGB, as the network reads them.

        Args:
            images: upright.
            names: of the images, for errors; None for their positions.

        Raises:
            NotFinite: a number of the detector is nan or infinite.
        """
        names = names or [str(number) for number in range(len(images))]
        return self._instances([self._view(*named) for named in zip(images, names, strict=True)])

    @torch.inference_mode()
    def outputs(
        self, batch: RegionBatch, names: Sequence[str] | None = None, **parts: bool
    ) -> HeadOutput:
        """Compute what the head says about a batch.

        Args:
            batch: the regions of B images.
            names: of the images, for errors; None for their positions.
            parts: keywords of the head's own `score`.

        Raises:
            NotFinite: a logit of an image, or what is said of a real region, is nan or infinite.
        """
        with computing_in("float32"):
            output: HeadOutput = self.network(batch, self.labels, **parts)
        names = names or [str(number) for number in range(len(output.image))]
        finite = finite_output(output, batch.mask)
        check_finite(finite, self.name, names, self.vocabulary, self.network)
        return output

    def read(
        self,
        batch: RegionBatch,
        sizes: Sequence[tuple[int, int]],
        names: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """Predict the labels of B images from their regions.

        Args:
            batch, names: as `outputs` takes them.
            sizes: width and height of each image.
        """
        output = self.outputs(batch, names)
        best = output.image
        scores, regions = best.sigmoid().cpu().numpy(), output.winners().cpu().numpy()
        said = shown_attribution(self.network, output)
        of_regions = {
            "boxes": batch.boxes,
            "detector_scores": batch.scores,
            "detector_classes": batch.classes.long(),
        }
        arrays = {name: tensor.cpu().numpy() for name, tensor in of_regions.items()}
        counts = batch.mask.sum(dim=1).tolist()
        return [
            Prediction(
                logits=best[image].cpu().numpy(),
                scores=scores[image],
                regions=regions[image],
                region_scores=None if said is None else said[image, :count].cpu().numpy(),
                size=size,
                decisions=self.checkpoint.decisions,
                **{name: array[image, :count] for name, array in arrays.items()},
            )
            for image, (count, size) in enumerate(zip(counts, sizes, strict=True))
        ]

    def _predict_outcomes(
        self, waiting: list[tuple[Path, _View | GmpipeError]]
    ) -> Generator[tuple[Path, Prediction | GmpipeError]]:
        views = [outcome for _, outcome in waiting if isinstance(outcome, _View)]
        predictions = iter(self._predict(views))
        for path, outcome in waiting:
            yield path, next(predictions) if isinstance(outcome, _View) else outcome

    def _view(self, image: Image.Image, name: str) -> _View:
        pixels = view_of(image, 0, size=self._extract.size, image_id="", seed=0, flip=False)
        return _View(pixels, image.size, name)

    def _predict(self, views: Sequence[_View]) -> list[Prediction]:
        if not views:
            return []
        sizes, names = [view.size for view in views], [view.name for view in views]
        return self.read(self._instances(views), sizes, names)

    def _instances(self, views: Sequence[_View]) -> RegionBatch:
        rows = blank_rows(len(views), self.detector, self._extract)
        pixels = torch.from_numpy(np.stack([view.pixels for view in views]))
        with computing_in(self._extract.precision):
            fill_rows(rows, self.detector, pixels)
        numbers = {"features": rows.features, "boxes": rows.boxes, "scores": rows.scores}
        if rows.whole is not None:
            numbers["features of the whole view"] = rows.whole
        for name, values in numbers.items():
            for image, region, *_ in np.argwhere(~np.isfinite(values))[:1]:
                where = "" if values is rows.whole else f", region {region},"
                raise NotFinite(
                    f"{self.name}: the detector's {name} of image {views[image].name!r}{where} "
                    "are not finite in the type of the run's regions.",
                    "Restore the detector's weights.",
                )
        return instance_batch(rows, self.regions).to(self.device, torch.float32)


@dataclass(frozen=True, eq=False)
class _View:
    """View 0 of an image: pixels (S, S, 3), and the image's width and height, and its name."""

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    name: str


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected 1 or more")


def as_picture(image: Picture) -> Image.Image:
    """Convert an image in memory to what decoding a file would give: RGB, upright.

    Raises:
        TypeError, ValueError: it is neither a Pillow image nor an (H, W, 3) uint8 array, or it has
            no pixels.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"expected an image with pixels, not one of size {image.size}")
        return upright(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"expected a Pillow image or an (H, W, 3) uint8 array, not a {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"expected an array of uint8 with shape (H, W, 3), RGB, not of {image.dtype} with "
            f"shape {image.shape}"
        )
    return Image.fromarray(image)


def load_run(folder: str | Path, detector: str | Path | None = None) -> TrainedRun:
    """Load a trained run for new images.

    Args:
        folder: of the run, e.g. ``runs/demo/full-s0``.
        detector: folder of the detector whose regions the run was trained on; None for
            ``data/<dataset>/detector`` of the same checkout.

    Raises:
        MissingError, DamagedError: there is no such run, or its checkpoint can't be read.
        GmpipeError: as `attach_detector`.
    """
    return attach_detector(load_checkpoint(Path(folder) / CHECKPOINT_FILE), folder, detector)


def detector_of(folder: Path, dataset: str, detector: str | Path | None = None) -> Path:
    """The folder of a run's detector: ``detector``, or the one in the run's checkout.

    Args:
        folder: of the run, as an absolute path; not resolved, as `runs` may be a link.
        dataset: of the run.
        detector: as `load_run` takes it.
    """
    return Path(detector or folder.parent.parent.parent / "data" / dataset / "detector")


def attach_detector(
    checkpoint: Checkpoint, folder: str | Path, detector: str | Path | None = None
) -> TrainedRun:
    """Load the detector of a run whose checkpoint is read.

    Args:
        checkpoint: the run's.
        folder, detector: as `load_run` takes them.

    Raises:
        InputError: the run was trained on imported regions, which no known detector makes, or on
            regions at given boxes, which a new photograph lacks.
        MissingError, DamagedError: there is no detector, or it can't be read.
        MismatchError: it is not the one whose regions the run was trained on.
    """
    folder = Path(folder).absolute()
    recipe, dataset = checkpoint.recipe, checkpoint.dataset
    if "imported_from" in recipe:
        raise InputError(
            f"{folder} was trained on imported regions ({recipe['imported_from']}), and no "
            "detector is known that makes the same kind of regions from new photographs.",
            "Use a run with a detector; this one can only be evaluated, reported and exported.",
        )
    if "boxes" in recipe:
        raise InputError(
            f"{folder} was trained on regions at given boxes (`boxes` was `{recipe['boxes']}`), "
            "and a new photograph has none.",
            f"Set `extract.{dataset}.boxes` to `detector`, extract, and train a run to predict "
            "with; this one can only be evaluated, reported and exported.",
        )
    source = detector_of(folder, dataset, detector)
    if not exists(source / DESCRIPTION_FILE):
        raise MissingError(
            f"{folder} needs the detector of its regions, but there is no detector in {source}.",
            "Make the detector there, or pass the folder of the right one as `detector`.",
        )
    description = read_description(source)
    try:
        extract = extraction_settings(recipe)
    except ValueError as error:  # a recipe that anybody may have written
        raise DamagedError(
            f"The checkpoint of {folder} has an invalid recipe of its regions: {briefly(error)}.",
            "Restore the checkpoint, or train the run again.",
        ) from error
    check_same_recipe(
        extraction_recipe(description, extract),
        without_images(recipe),
        f"The detector in {source}",
        f"Restore the detector that {folder} was trained with, pass its folder as `detector`, or "
        "train the run again.",
    )
    return TrainedRun(
        checkpoint,
        load_detector(source, description, extract),
        description.classes,
        extract,
        str(folder),
    )
