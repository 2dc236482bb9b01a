"""Weights that other programs saved: the state dict in a file, or what the file is instead.

A checkpoint may hold more than a state dict, wrappers put a prefix before its names, and many files
are of other networks. Nothing here runs code from a file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pipeline.errors import InputError, briefly
from pipeline.regions.file_formats import foreign_format

_log = logging.getLogger(__name__)

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
"""Name of the weight (classes, feature size) whose first size is the number of classes."""

_NAME_ANOTHER = "Name another file in `detector.<dataset>.weights` of params.yaml."

_UNUSED = ("roi_heads.mask_", "roi_heads.keypoint_")
"""Beginnings of the names of Mask R-CNN and Keypoint R-CNN that their box detector does not use."""

_AVERAGED = "n_averaged"  # a counter of torch's AveragedModel

_OTHER_NETWORKS = {
    "roi_heads.box_head.0.0.": "version 2 of torchvision's networks (`..._resnet50_fpn_v2`)",
    "backbone.body.0.0.": "torchvision's `fasterrcnn_mobilenet_v3_large_fpn` or a relative of it",
    "head.classification_head.": "a detector without proposals (RetinaNet, FCOS or SSD)",
    "backbone.bottom_up.": "a network of Detectron2",
    "proposal_generator.": "a network of Detectron2",
    "roi_head.bbox_head.": "a network of MMDetection",
    "bbox_head.": "a network of MMDetection",
    "layer4.0.conv1.weight": "a ResNet that classifies whole images and has no detector",
    "body.layer4.0.conv1.weight": "a backbone without a detector",
}
"""Beginnings of names that only another network has, after a prefix. The first that occurs tells
which one it is."""


_WRAPPERS = re.compile(r"^((module|model|_orig_mod|detector|net)\.)+")


def state_in(content: object, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what ``torch.save`` wrote, and give its weights torchvision's names.

    It is the content itself, or the only entry that is a state dict. What names have before
    torchvision's, such as `module.`, is dropped. So are the heads for masks and keypoints, and the
    modules beside the detector, such as losses.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        InputError: there is no state dict or detector, or more than one.
    """
    entries = content.items() if isinstance(content, Mapping) else ()
    states = {str(name): value for name, value in entries if _is_state(value) and len(value)}
    if _is_state(content):
        states = {"": content}
    # A dict of other tensors, such as losses, may lie beside it.
    states = {
        name: state
        for name, state in states.items()
        if any(key.endswith(CLASSIFIER) for key in state)
    } or states
    if not states:
        holds = f"the entries {', '.join(map(str, content))}" if isinstance(content, dict) else ""
        raise InputError(
            f"{path} is not a state dict of tensors saved by torch.save: it holds "
            f"{holds or type(content).__name__}.",
            "Save only the model's `state_dict()`: `torch.save(model.state_dict(), 'weights.pt')`.",
        )
    if len(states) > 1:
        raise InputError(
            f"{path} holds {len(states)} state dicts: {', '.join(states)}; expected one.",
            f"Save one of them, for instance with `torch.save(torch.load({str(path)!r}, "
            f"weights_only=True)[{next(iter(states))!r}], 'weights.pt')`, and name that file in "
            "`detector.<dataset>.weights` of params.yaml.",
        )
    ((entry, state),) = states.items()
    state = _without_prefix(state, path, entry)
    kept = {name: weight for name, weight in state.items() if not name.startswith(_UNUSED)}
    if len(kept) < len(state) and "roi_heads.box_head.fc6.weight" in state:
        _log.warning(
            "%s has a head for masks or keypoints; its %d weights are not used, and its box "
            "detector is.",
            path,
            len(state) - len(kept),
        )
    return kept


def _is_state(content: object) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in content.items()
    )


def _without_prefix(state: Mapping[str, Tensor], path: Path, entry: str) -> dict[str, Tensor]:
    """Keep the detector's weights, without what their names have before torchvision's.

    The name of the classifier tells what that is.

    Args:
        state: name -> weight.
        path: of the file, for messages.
        entry: name of the state dict in the file; empty if it is the whole content.

    Raises:
        InputError: there are several detectors.
    """
    named = [name for name in state if f".{name}".endswith(f".{CLASSIFIER}")]
    prefixes = [name.removesuffix(CLASSIFIER) for name in named]
    if len(prefixes) > 1:
        prefix = max(prefixes, key=len)
        index = f"[{entry!r}]" if entry else ""
        raise InputError(
            f"{path} holds {len(prefixes)} detectors, whose names begin with "
            f"{' and '.join(repr(one) for one in prefixes)}; expected one.",
            "Save one of them, for instance with `import torch; torch.save({name: weight for name, "
            f"weight in torch.load({str(path)!r}, weights_only=True){index}.items() if "
            f"name.startswith({prefix!r})}}, 'weights.pt')`, and name that file in "
            "`detector.<dataset>.weights` of params.yaml.",
        )
    if prefixes in ([], [""]):
        return dict(state)
    (prefix,) = prefixes
    others = [name for name in state if not name.startswith(prefix) and name != _AVERAGED]
    if others:
        _log.warning(
            "%s: the detector's names begin with `%s`; %d others are not used, the first is `%s`.",
            path,
            prefix,
            len(others),
            others[0],
        )
    return {
        name.removeprefix(prefix): weight
        for name, weight in state.items()
        if name.startswith(prefix)
    }


def check_network(state: Mapping[str, Tensor], origin: Path) -> None:
    """Check that weights are those of a Faster R-CNN of the kind that `build_model` builds.

    Raises:
        InputError: they are those of another network; says which one, if it is a known one.
    """
    for start, network in _OTHER_NETWORKS.items():
        name = next((name for name in state if _WRAPPERS.sub("", name).startswith(start)), None)
        if name is not None:
            raise InputError(
                f"{origin} holds the weights of {network}, since it has `{name}`; expected those "
                "of torchvision's `fasterrcnn_resnet50_fpn`.",
                USE_OTHERS,
            )
    if CLASSIFIER not in state:
        first = next(iter(state), "no name at all")
        raise InputError(
            f"{origin} does not hold the weights of a Faster R-CNN: it has no `{CLASSIFIER}`; its "
            f"first name is `{first}`.",
            USE_OTHERS,
        )


USE_OTHERS = (
    "Set `detector.<dataset>.source: torchvision` in params.yaml, which needs no file; or name "
    "weights of `fasterrcnn_resnet50_fpn` in `detector.<dataset>.weights`. Regions that another "
    "detector found can be imported (docs/cache-format.md)."
)

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin, which are pickles as well."""


def unreadable(path: Path, stored: bytes, error: Exception) -> InputError:
    """Make the error for a file that torch does not load, by what the file is.

    Args:
        path: of the file.
        stored: its bytes.
        error: of torch.
    """
    problem = f"{path} is not a state dict of tensors saved by torch.save"
    name_it = ", and name weights.pt in `detector.<dataset>.weights` of params.yaml."
    what, advice = foreign_format(path, stored, USE_OTHERS, name_it)
    if what:
        problem += f": {what}"
        remedy = advice
    elif stored[:1] == b"\x80" and not stored.startswith(_LEGACY):
        problem += ": it is a plain pickle, as Detectron2 and Caffe2 models are published"
        remedy = USE_OTHERS
    elif found := re.search(r"GLOBAL (\S+)", str(error)):
        problem += f" alone: it also holds {found[1]}, and loading that could run code of the file"
        remedy = (
            "If you trust the file, save its state dict alone: `import torch; "
            f"content = torch.load({str(path)!r}, weights_only=False)` and "
            "`torch.save(content['model'], 'weights.pt')`, with the name that the state dict has "
            f"there, or `content.state_dict()` if the file is a whole model{name_it}"
        )
    elif "TorchScript" in str(error):
        problem += ": it is a TorchScript program"
        remedy = (
            "If you trust the file, save its state dict: `import torch; "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')`{name_it}"
        )
    else:
        problem += f", or was changed ({briefly(error)})"
        remedy = _NAME_ANOTHER
    return InputError(f"{problem}.", remedy)
