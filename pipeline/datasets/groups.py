"""What the publishers of data sets define about them: groups of labels, and a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.datasets import scenes

LABEL_GROUPS: Mapping[str, Mapping[str, Sequence[str]]] = {
    # The kinds of labels that the rules of the scenes define.
    "scenes": {
        "context": scenes.CONTEXT_LABELS,
        "position": scenes.POSITION_LABELS,
        "undrawn": scenes.UNDRAWN_LABELS,
        "plain": scenes.PLAIN_LABELS,
    },
    # As on the page of the VOC 2007 challenge.
    "voc": {
        "person": ("person",),
        "animal": ("bird", "cat", "cow", "dog", "horse", "sheep"),
        "vehicle": ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"),
        "indoor": ("bottle", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor"),
    },
    # The field `supercategory` of COCO's categories.
    "coco": {
        "person": ("person",),
        "vehicle": (
            "bicycle",
            "car",
            "motorcycle",
            "airplane",
            "bus",
            "train",
            "truck",
            "boat",
        ),
        "outdoor": (
            "traffic light",
            "fire hydrant",
            "stop sign",
            "parking meter",
            "bench",
        ),
        "animal": (
            "bird",
            "cat",
            "dog",
            "horse",
            "sheep",
            "cow",
            "elephant",
            "bear",
            "zebra",
            "giraffe",
        ),
        "accessory": ("backpack", "umbrella", "handbag", "tie", "suitcase"),
        "sports": (
            "frisbee",
            "skis",
            "snowboard",
            "sports ball",
            "kite",
            "baseball bat",
            "baseball glove",
            "skateboard",
            "surfboard",
            "tennis racket",
        ),
        "kitchen": ("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
        "food": (
            "banana",
            "apple",
            "sandwich",
            "orange",
            "broccoli",
            "carrot",
            "hot dog",
            "pizza",
            "donut",
            "cake",
        ),
        "furniture": ("chair", "couch", "potted plant", "bed", "dining table", "toilet"),
        "electronic": ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
        "appliance": ("microwave", "oven", "toaster", "sink", "refrigerator"),
        "indoor": (
            "book",
            "clock",
            "vase",
            "scissors",
            "teddy bear",
            "hair drier",
            "toothbrush",
        ),
    },
}
"""The data set's `source` in params.yaml -> name of a group -> its labels."""


def label_groups(source: str, labels: Sequence[str]) -> Mapping[str, Sequence[str]] | None:
    """The groups of a data set's labels; None if it has no groups.

    Args:
        source: the data set's `source` in params.yaml.
        labels: its vocabulary. A vocabulary that the user chose has no groups.
    """
    groups = LABEL_GROUPS.get(source, {})
    if set(labels) <= {label for group in groups.values() for label in group}:
        return groups
    return None


def has_eleven_points(source: str, labels: Sequence[str]) -> bool:
    """Whether a data set is evaluated with VOC 2007's 11-point average precision as well.

    Args:
        source: the data set's `source` in params.yaml.
        labels: its vocabulary. Imported regions of VOC are known by VOC's 20 classes.
    """
    classes = {label for group in LABEL_GROUPS["voc"].values() for label in group}
    return source == "voc" or set(labels) == classes
