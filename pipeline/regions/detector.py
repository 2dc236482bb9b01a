"""The detector, a ResNet50-FPN Faster R-CNN: building, storing and loading it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.errors import DamagedError, InputError, MismatchError, MissingError, advising
from pipeline.files import exists, home_advice, read_bytes, sha256_file
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.regions.weights import CLASSIFIER, USE_OTHERS, check_network, state_in, unreadable
from pipeline.settings import ArchitectureSettings
from pipeline.shards.schema import Recipe
from pipeline.tensors import save_tensors, tensors_in

_log = logging.getLogger(__name__)

DETECTOR_VERSION = 1
WEIGHTS_FILE = "weights.pt"
DESCRIPTION_FILE = "detector.json"

TORCHVISION_WEIGHTS = FasterRCNN_ResNet50_FPN_Weights.COCO_V1


def build_model(
    architecture: ArchitectureSettings,
    classes: int,
    *,
    size: int,
    regions: int,
    score_threshold: float,
    nms_threshold: float,
) -> FasterRCNN:
    """Build a Faster R-CNN with random weights.

    With the default architecture it has the same parameters as torchvision's
    ``fasterrcnn_resnet50_fpn``.

    Args:
        architecture: widths, anchors, proposals and normalisation.
        classes: number of classes, including the background (0).
        size: side of the square views in pixels. Without it torchvision rescales them to 800.
        regions: maximum number of detections per image.
        score_threshold: minimum score of a detection.
        nms_threshold: IoU of the per-class NMS.
    """
    frozen = architecture.norm == "frozen"
    # torchvision builds its COCO network with eps 0, which the file of weights does not record.
    norm = (lambda channels: FrozenBatchNorm2d(channels, eps=0.0)) if frozen else nn.BatchNorm2d
    body = resnet50(
        weights=None, width_per_group=architecture.width_per_group, norm_layer=cast(Any, norm)
    )
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{level}": str(level - 1) for level in (1, 2, 3, 4)},
        in_channels_list=[256, 512, 1024, 2048],
        out_channels=architecture.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
    )
    return FasterRCNN(
        backbone,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((side,) for side in architecture.anchor_sizes),
            aspect_ratios=((0.5, 1.0, 2.0),) * len(architecture.anchor_sizes),
        ),
        # torchvision keeps 1000 before and after the NMS, and twice that in training.
        rpn_pre_nms_top_n_train=2 * architecture.proposals,
        rpn_pre_nms_top_n_test=architecture.proposals,
        rpn_post_nms_top_n_train=2 * architecture.proposals,
        rpn_post_nms_top_n_test=architecture.proposals,
        box_head=TwoMLPHead(architecture.fpn_channels * 7 * 7, architecture.feature_size),
        box_predictor=FastRCNNPredictor(architecture.feature_size, classes),
        box_score_thresh=score_threshold,
        box_nms_thresh=nms_threshold,
        box_detections_per_img=regions,
    )


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict saved by ``torch.save``, without running code from the file.

    It may be in a checkpoint, and its names may have a prefix, see `state_in`.

    Raises:
        MissingError: the file does not exist.
        InputError: it is no regular file, holds something else, or was changed.
        OSError: the system can't read it.
    """
    try:
        stored = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(
            f"There are no detector weights at {path}.",
            f"{home_advice(path)}Put the file there, or name another one in "
            "`detector.<dataset>.weights` of params.yaml.",
        ) from None
    try:
        content = tensors_in(stored)
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        raise unreadable(path, stored, error) from error
    return state_in(content, path)


def class_count(state: dict[str, Tensor], origin: Path) -> int:
    """Return the number of classes, including the background, that the weights distinguish.

    Raises:
        InputError: the weights are not those of a Faster R-CNN.
    """
    check_network(state, origin)
    return len(state[CLASSIFIER])


_MATCH_ARCHITECTURE = (
    "Set `detector.<dataset>.architecture` in params.yaml to the architecture of the weights."
)

_SIZES = {
    "width_per_group": ("backbone.body.layer1.0.conv2.weight", 0),
    "fpn_channels": ("rpn.head.cls_logits.weight", 1),
    "feature_size": ("roi_heads.box_head.fc6.weight", 0),
}
"""Weights whose shape tells a key of the architecture, and the place in the shape."""


def _told_by(state: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Read from the names and shapes of weights what they tell about their architecture."""
    told: dict[str, int | str] = {
        key: state[name].shape[place]
        for key, (name, place) in _SIZES.items()
        if name in state and state[name].dim() > place
    }
    counted = any(key.endswith("num_batches_tracked") for key in state)
    return told | {"norm": "batch" if counted else "frozen"}


def fit_state(model: FasterRCNN, state: dict[str, Tensor], origin: Path) -> None:
    """Load weights into a model, or say why they do not fit.

    Args:
        model: to load the weights into.
        state: of `load_state`.
        origin: the file that ``state`` came from, for messages.

    Raises:
        InputError: the weights are not those of a Faster R-CNN; or one of them is missing,
            unknown or of another shape; or they were made with the other kind of batch norm,
            which torch would load without an error. All keys of the architecture whose values
            the weights contradict are named.
    """
    class_count(state, origin)
    own = model.state_dict()
    told, expected = _told_by(state), _told_by(own)
    wrong = [key for key, value in told.items() if value != expected[key]]
    if wrong:
        found = "; ".join(f"`{key}` is {told[key]}, not {expected[key]}" for key in wrong)
        block = ", ".join(f"{key}: {value}" for key, value in told.items())
        raise InputError(
            f"{origin} holds weights of another architecture than params.yaml describes: {found}.",
            f"Set `detector.<dataset>.architecture` in params.yaml to `{{{block}}}`, and add the "
            "`anchor_sizes` and `proposals` of the training that made the weights, which their "
            "shapes don't tell.",
        )
    anchors = "rpn.head.cls_logits.weight"
    if anchors in state and len(state[anchors]) != len(own[anchors]):
        most = len(own[anchors])
        raise InputError(
            f"{origin} has {len(state[anchors])} anchors at each place of a pyramid level, "
            f"expected {most}: one side of `anchor_sizes` in {most} ratios.",
            USE_OTHERS,
        )
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise InputError(
                f"{origin}: `{key}` has shape {tuple(value.shape)}, but the architecture expects "
                f"{tuple(own[key].shape)}.",
                _MATCH_ARCHITECTURE,
            )
    try:
        # Names are compared by torchvision, which also accepts those of its older releases.
        outcome: Any = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise InputError(
            f"{origin} does not fit the architecture: {detail}", _MATCH_ARCHITECTURE
        ) from error
    for keys, problem in (
        (outcome.missing_keys, "lacks weights that the architecture has"),
        (outcome.unexpected_keys, "has weights that the architecture lacks"),
    ):
        if keys:
            raise InputError(
                f"{origin} {problem}: {len(keys)} of them, the first is `{keys[0]}`.",
                _MATCH_ARCHITECTURE,
            )


@dataclass(frozen=True)
class DetectorDescription:
    """What a detector's folder records about its weights.

    Attributes:
        source: ``torchvision``, ``file`` or ``fit``.
        architecture: of the network.
        classes: name of every class number; the first is the background.
        weights_sha256: of the file of weights.
        origin_sha256: of the file that the weights were copied from, or that a fit started from;
            None for a fit from scratch, and if an older release of gmpipe wrote the description.
    """

    source: str
    architecture: ArchitectureSettings
    classes: tuple[str, ...]
    weights_sha256: str
    origin_sha256: str | None = None

    @property
    def has_seen_coco(self) -> bool:
        """Whether the weights are torchvision's COCO weights, or were fitted from them."""
        origin = self.origin_sha256 or ""
        return self.source == "torchvision" or origin.startswith(_published_digits())

    @property
    def may_have_seen_coco(self) -> bool:
        """Whether a file of unknown origin may hold weights that were trained on COCO's images.

        A file tells no more than how many classes it has; of one that a fit started from, not even
        that is recorded.
        """
        if self.has_seen_coco:
            return False
        if self.source == "fit":
            return self.origin_sha256 is not None
        return len(self.classes) == len(TORCHVISION_WEIGHTS.meta["categories"])


def write_detector(
    folder: Path,
    state: dict[str, Tensor],
    *,
    source: str,
    architecture: ArchitectureSettings,
    classes: tuple[str, ...],
    origin_sha256: str | None = None,
) -> DetectorDescription:
    """Write weights and their description to ``folder``."""
    weights = folder / WEIGHTS_FILE
    save_tensors(weights, state)
    description = DetectorDescription(
        source, architecture, classes, sha256_file(weights), origin_sha256
    )
    write_sealed_json(
        folder / DESCRIPTION_FILE,
        {
            "version": DETECTOR_VERSION,
            "source": source,
            "architecture": architecture.model_dump(mode="json"),
            "classes": classes,
            "weights_sha256": description.weights_sha256,
            "origin_sha256": origin_sha256,
        },
    )
    return description


_MAKE_AGAIN = "Make the data set's detector again."


def recorded_detector(folder: Path) -> DetectorDescription:
    """Read what ``folder`` records about its detector, without a look at the weights.

    Raises:
        MissingError: there is no detector in ``folder``.
        MismatchError: the data set's regions are imported, so that it has no detector.
        DamagedError: the description can't be read or has another version.
    """
    path = folder / DESCRIPTION_FILE
    try:
        with advising(_MAKE_AGAIN, DamagedError):
            content = read_sealed_json(path)
        if content["source"] == "imported":
            raise MismatchError(
                f"{path} says that the data set's regions are imported, so it has no detector.",
                "Set `detector.<dataset>.source` in params.yaml and make the detector.",
            )
        version = content["version"]
        if version == DETECTOR_VERSION:
            description = DetectorDescription(
                source=content["source"],
                architecture=ArchitectureSettings.model_validate(content["architecture"]),
                classes=tuple(content["classes"]),
                weights_sha256=content["weights_sha256"],
                origin_sha256=content.get("origin_sha256"),
            )
    except FileNotFoundError:
        raise MissingError(f"There is no detector in {folder}.", _MAKE_AGAIN) from None
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}).", _MAKE_AGAIN) from error
    if version != DETECTOR_VERSION:
        raise DamagedError(
            f"{path} has version {version}, but this release of gmpipe reads version "
            f"{DETECTOR_VERSION}.",
            _MAKE_AGAIN,
        )
    return description


def described_beside(weights: Path) -> DetectorDescription | None:
    """Read the description of a file of weights that gmpipe wrote, from the same folder.

    Returns:
        None if no description lies there; or it is of other weights, which is noted.

    Raises:
        DamagedError: as `recorded_detector`.
    """
    path = weights.with_name(DESCRIPTION_FILE)
    with (
        suppress(MissingError, MismatchError),
        advising("Restore it, or copy the weights to a folder without it.", DamagedError),
    ):
        description = recorded_detector(weights.parent)
        if description.weights_sha256 == sha256_file(weights):
            return description
        _log.warning(
            "%s describes weights with the sha256 %s, which %s does not have; it is not used.",
            path,
            description.weights_sha256,
            weights,
        )
    return None


def check_described(
    architecture: ArchitectureSettings,
    described: DetectorDescription,
    weights: Path,
    chosen: Set[str] = frozenset(),
) -> None:
    """Check that an architecture is that of weights whose description lies beside them.

    Args:
        architecture: of the settings.
        described: of `described_beside`.
        weights: the file.
        chosen: keys that may differ if the settings give them.

    Raises:
        InputError: they differ; has the whole block to copy.
    """
    given = chosen & architecture.model_fields_set
    own, right = (each.model_dump(mode="json") for each in (architecture, described.architecture))
    wrong = [key for key in right if own[key] != right[key] and key not in given]
    if wrong:
        found = "; ".join(f"`{key}` is {right[key]}, not {own[key]}" for key in wrong)
        block = ", ".join(f"{key}: {value}" for key, value in right.items())
        raise InputError(
            f"{weights} holds weights of another architecture than params.yaml describes. "
            f"{DESCRIPTION_FILE} beside it says: {found}.",
            f"Set `detector.<dataset>.architecture` in params.yaml to `{{{block}}}`.",
        )


def detector_of_regions(folder: Path, recipe: Recipe) -> DetectorDescription | None:
    """Read what is recorded about the detector that made regions; its weights may be gone.

    Args:
        folder: of the data set's detector.
        recipe: of the regions.

    Returns:
        None if the regions are imported, or the detector is missing or another one by now.

    Raises:
        DamagedError: as `recorded_detector`.
    """
    with suppress(MissingError, MismatchError):
        found = recorded_detector(folder)
        if recipe.get("weights_sha256") == found.weights_sha256:
            return found
    return None


def read_description(folder: Path) -> DetectorDescription:
    """Read what ``folder`` records about its detector, and check it against the weights.

    Raises:
        MissingError: as `recorded_detector`, or the file of weights is gone.
        MismatchError: as `recorded_detector`.
        DamagedError: as `recorded_detector`, or the weights are not those that it describes.
    """
    description = recorded_detector(folder)
    weights = folder / WEIGHTS_FILE
    if not exists(weights):
        raise MissingError(f"{folder} lacks {WEIGHTS_FILE}.", _MAKE_AGAIN)
    digest = sha256_file(weights)
    if digest != description.weights_sha256:
        raise DamagedError(
            f"{weights} has sha256 {digest}, but {DESCRIPTION_FILE} expects "
            f"{description.weights_sha256}: the file was changed or damaged.",
            _MAKE_AGAIN,
        )
    return description


def _published_digits() -> str:
    """First digits of the sha256 of torchvision's weights, which its file's name has as well."""
    return Path(TORCHVISION_WEIGHTS.url).stem.rsplit("-", 1)[1]


def torchvision_weights_path() -> Path:
    """Return the path of torchvision's COCO weights in its cache, whether or not they exist."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(TORCHVISION_WEIGHTS.url).name


def torchvision_weights_file(
    announce: Callable[[str], object] = print, *, progress: bool = True
) -> Path:
    """Return torchvision's COCO weights, downloading them into its cache if they are not there.

    The file's name holds the first digits of its sha256.

    Args:
        announce: called with a line of text before a download starts.
        progress: whether a download draws a progress bar on stderr.

    Raises:
        MissingError: they are not in the cache and can't be downloaded; says where to put the
            file.
        DamagedError: the file in the cache is not the published one.
    """
    path = torchvision_weights_path()
    published = _published_digits()
    if not exists(path):
        megabytes = TORCHVISION_WEIGHTS.meta["_file_size"]
        announce(f"downloading {path.name} ({megabytes:.0f} MB) to {path.parent}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                TORCHVISION_WEIGHTS.url,
                str(path),
                hash_prefix=published,
                progress=progress,
            )
        except (OSError, RuntimeError) as error:
            raise MissingError(
                f"torchvision's weights {path.name} are not at {path} and can't be downloaded "
                f"({error}).",
                f"Download {TORCHVISION_WEIGHTS.url} elsewhere and put the file there, or set "
                "`detector.<dataset>.source: file` in params.yaml and name a file of weights.",
            ) from error
    if not (digest := sha256_file(path)).startswith(published):
        raise DamagedError(
            f"{path} is damaged or not complete: it has the sha256 {digest}, expected one that "
            f"begins with {published}.",
            "Delete it and run the same command again, which downloads it, or put the file of "
            f"{TORCHVISION_WEIGHTS.url} there.",
        )
    return path
