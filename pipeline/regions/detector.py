"""The detector: a ResNet50-FPN Faster R-CNN, built, resolved, stored and loaded."""

from __future__ import annotations

import json
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

from pipeline.errors import GmpipeError
from pipeline.files import sha256_file, write_json
from pipeline.settings import ArchitectureSettings
from pipeline.tensors import save_tensors

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
    """A Faster R-CNN with random weights; with the default architecture, parameter for parameter
    torchvision's ``fasterrcnn_resnet50_fpn``.

    Args:
        architecture: widths, anchors, proposals and normalisation.
        classes: number of classes, the background (0) included.
        size: side of the square views. Without it torchvision rescales them to 800 pixels.
        regions: most detections of an image.
        score_threshold: least score of a detection.
        nms_threshold: IoU of the per-class NMS.
    """
    frozen = architecture.norm == "frozen"
    # torchvision builds its COCO network with eps 0; a file of such weights does not say so.
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

    Raises:
        GmpipeError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise GmpipeError(
            f"there are no detector weights at {path}. Put the file there, or name another in "
            "`detector.<dataset>.weights` of params.yaml."
        )
    expected = f"{path} is not a state dict of tensors saved by torch.save"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no narrower set for a foreign file
        raise GmpipeError(f"{expected} ({type(error).__name__}). Give another file.") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise GmpipeError(f"{expected}. Save the model's `state_dict()` alone.")
    return state


def class_count(state: dict[str, Tensor], origin: Path) -> int:
    """Number of classes, background included, that the weights were made for."""
    key = "roi_heads.box_predictor.cls_score.weight"
    if key not in state:
        raise GmpipeError(
            f"{origin} has no `{key}`: these are not a Faster R-CNN's weights. Give another file."
        )
    return len(state[key])


def fit_state(model: FasterRCNN, state: dict[str, Tensor], origin: Path) -> None:
    """Load weights into a model, or say how they don't fit.

    Raises:
        GmpipeError: these are no Faster R-CNN's weights, one is missing, unknown or of another
            shape, or they were made with the other kind of batch norm (which torch would load
            without a word).
    """
    class_count(state, origin)
    remedy = "Make `detector.<dataset>.architecture` in params.yaml that of the weights."
    counted = any(key.endswith("num_batches_tracked") for key in state)
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if counted != batch_norm:
        found, wanted = ("batch", "frozen") if counted else ("frozen", "batch")
        raise GmpipeError(
            f"{origin} holds weights with norm `{found}`, the architecture has `{wanted}`. {remedy}"
        )
    own = model.state_dict()
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise GmpipeError(
                f"{origin}: `{key}` has shape {tuple(value.shape)}, the architecture expects "
                f"{tuple(own[key].shape)}. {remedy}"
            )
    try:
        # Not compared by name here: torchvision still loads the names of its older releases.
        outcome: Any = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise GmpipeError(f"{origin} does not fit the architecture: {detail} {remedy}") from error
    for keys, problem in (
        (outcome.missing_keys, "lacks weights that the architecture has"),
        (outcome.unexpected_keys, "has weights that the architecture lacks"),
    ):
        if keys:
            raise GmpipeError(
                f"{origin} {problem}: {len(keys)}, the first is `{keys[0]}`. {remedy}"
            )


@dataclass(frozen=True)
class DetectorDescription:
    """What a detector's folder says of its weights.

    Attributes:
        source: ``torchvision``, ``file`` or ``fit``.
        architecture: of the network.
        classes: name of every class number; the first is the background.
        weights_sha256: of the file of weights.
    """

    source: str
    architecture: ArchitectureSettings
    classes: tuple[str, ...]
    weights_sha256: str


def write_detector(
    folder: Path,
    state: dict[str, Tensor],
    *,
    source: str,
    architecture: ArchitectureSettings,
    classes: tuple[str, ...],
) -> DetectorDescription:
    """Write weights and their description into ``folder``."""
    weights = folder / WEIGHTS_FILE
    save_tensors(weights, state)
    description = DetectorDescription(source, architecture, classes, sha256_file(weights))
    write_json(
        folder / DESCRIPTION_FILE,
        {
            "version": DETECTOR_VERSION,
            "source": source,
            "architecture": architecture.model_dump(mode="json"),
            "classes": classes,
            "weights_sha256": description.weights_sha256,
        },
    )
    return description


def read_description(folder: Path, dataset: str) -> DetectorDescription:
    """What the detector in ``folder`` is.

    Raises:
        GmpipeError: there is none, of another version, or its weights are not those described.
    """
    remedy = f"Run `gmpipe detector --dataset {dataset}`."
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise GmpipeError(f"there is no detector in {folder}. {remedy}")
    try:
        content = json.loads(path.read_text())
        if content["source"] == "imported":
            raise GmpipeError(
                f"{path}: the regions of {dataset} are imported, there is no detector. Set "
                f"`detector.{dataset}.source` in params.yaml and run `gmpipe detector --dataset "
                f"{dataset}`."
            )
        version = content["version"]
        if version == DETECTOR_VERSION:
            description = DetectorDescription(
                source=content["source"],
                architecture=ArchitectureSettings.model_validate(content["architecture"]),
                classes=tuple(content["classes"]),
                weights_sha256=content["weights_sha256"],
            )
    except (KeyError, TypeError, ValueError) as error:
        raise GmpipeError(f"{path} is damaged ({error!r}). {remedy}") from error
    if version != DETECTOR_VERSION:
        raise GmpipeError(
            f"{path} has version {version}, this gmpipe reads {DETECTOR_VERSION}. {remedy}"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise GmpipeError(f"{folder} lacks {WEIGHTS_FILE}. {remedy}")
    found = sha256_file(folder / WEIGHTS_FILE)
    if found != description.weights_sha256:
        raise GmpipeError(
            f"{folder / WEIGHTS_FILE} has sha256 {found}, {DESCRIPTION_FILE} expects "
            f"{description.weights_sha256}: the file was changed or damaged. {remedy}"
        )
    return description


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The names of the detector's class numbers, for people to read; None where none are told.

    Nothing depends on them, so unlike `read_description` it looks at no weights.
    """
    try:
        return tuple(json.loads((folder / DESCRIPTION_FILE).read_text())["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def torchvision_weights_path() -> Path:
    """Where torchvision's COCO weights lie in its cache, or would."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(TORCHVISION_WEIGHTS.url).name


def torchvision_weights_file(announce: Any = print, *, progress: bool = True) -> Path:
    """torchvision's COCO weights: from its cache, or downloaded into it.

    Args:
        announce: called with a line before a download starts.
        progress: whether a download draws a bar on stderr.

    Raises:
        GmpipeError: they are neither there nor to be had; says where to put the file.
    """
    path = torchvision_weights_path()
    if not path.is_file():
        megabytes = TORCHVISION_WEIGHTS.meta["_file_size"]
        announce(f"downloading {path.name} ({megabytes:.0f} MB) to {path.parent}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                TORCHVISION_WEIGHTS.url,
                str(path),
                hash_prefix=path.stem.rsplit("-", 1)[1],
                progress=progress,
            )
        except (OSError, RuntimeError) as error:
            raise GmpipeError(
                f"torchvision's weights {path.name} are not at {path} and can't be downloaded "
                f"({error}). Put the file there by hand, from {TORCHVISION_WEIGHTS.url}, or name "
                "another with `detector.<dataset>.source: file` in params.yaml."
            ) from error
    return path
