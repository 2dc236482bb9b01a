"""What differs between our runs and the paper's, in sentences for a reader who compares them.

Every setting is in one of the tables below, which say what the paper gives for it, so that none can
be forgotten (tests/evaluation/test_differences.py). Settings of stage one have the prefix
``extract.``, all others are those of `TrainSettings` with GM-MLIC. Only GM-MLIC's are compared:
the paper quotes its other methods from their own papers. Sections are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.datasets.difficult import describe_treatments
from pipeline.evaluation.paper import ABLATIONS, PaperResults, method_of
from pipeline.evaluation.runs import Run, Runs
from pipeline.files import canonical_json
from pipeline.formats.text import counted
from pipeline.regions.detector import DetectorDescription
from pipeline.settings import ArchitectureSettings, GmMlicSettings, TrainSettings
from pipeline.shards.schema import Recipe

STATED: Mapping[str, tuple[object, str]] = {
    "network.instance_graph": (True, "3.2"),
    "network.label_graph": (True, "3.2"),
    "network.matching_edges": (True, "3.2"),
    "network.latent_size": (512, "4.2"),
    "network.modules": (2, "4.2"),
    "optimizer": ("sgd", "4.2"),
    "learning_rate": (0.01, "4.2"),
    "momentum": (0.9, "4.2"),
    "weight_decay": (0.0001, "4.2"),
    "schedule": ("step", "4.2"),
    "step_epochs": (30, "4.2"),
    "loss.name": ("weighted", "3.4"),
}
"""Setting -> the value that the paper gives, and where. Each that differs is named."""

BY_DATA_SET: Mapping[str, tuple[str, str]] = {
    "regions": ("regions", "4.4"),
    "loss.beta": ("beta", "4.2"),
}
"""Setting -> the field of `PaperResults` that has the paper's value, and where that is given."""

UNMENTIONED: Mapping[str, object] = {
    "network.node_norm": False,
    "network.residual": False,
    "network.input_dropout": 0.0,
    "network.dropout": 0.0,
    "network.decoder_dropout": 0.0,
    "network.whole_region": False,
    "averaging": 0.0,
    "warm_up": 0.0,
    "patience": None,
    "precision": "float32",
    "validation": 0.0,
    "training_share": 1.0,
    "repeat_threshold": 0.0,
    "loss.largest_positive_weight": 1.0,
    "extract.precision": "float32",
    "extract.feature_dtype": "float32",
}
"""Setting of something that the paper does not mention -> its value where we do without it, too.
Each with another value is named."""

OF_OTHER_LOSSES = (
    "loss.negative_gamma",
    "loss.positive_gamma",
    "loss.clip",
    "loss.gamma",
    "loss.alpha",
)
"""Settings of losses that the paper does not use. Each is named with its loss."""

OURS = (
    "network.neighbors",
    "network.label_neighbors",
    "network.least_deviation",
    "clip_norm",
    "selection",
    "extract.score_threshold",
    "extract.nms_threshold",
)
"""Settings that need a value, while the paper gives none. Each is always named."""

IN_WORDS = (
    "network.head",
    "label_vectors",
    "epochs",
    "batch_size",
    "extract.size",
    "extract.views",
    "extract.flip",
    "extract.regions",
    "extract.boxes",
)
"""Settings that a line of their own describes."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "variants": "defines other variants",
    "decisions": "fitted after the training, for numbers that stand beside those at 0.5",
    "extract.seed": "a seed",
    "extract.boxes_file": "where given boxes are read",
    "extract.whole": "what only heads read whose own setting asks for it",
    "extract.hash_images": "how a cache is recognised",
    "extract.rows_per_shard": "how regions are stored",
    "extract.batch_size": "how many images the detector takes at once",
    "extract.max_failures": "images without regions are counted beside the results",
}
"""Setting that changes nothing which could be compared with the paper -> what it is."""

_IN_TRAINING = {
    "train2014": "all of train2014's 82,783 images",
    "val2014": "35,504 of val2014's 40,504 images",
    "train2017": "all of these images",
}
"""Split of COCO -> which of its images are in train2017. It is the union of train2014 and val2014
without the 5,000 images of val2017, which are from val2014: 82,783 + 40,504 - 5,000 = 118,287."""


_GIVEN = {
    "annotations": "the data set's own boxes and their classes, which makes all results an upper "
    "bound",
    "file": "the boxes of a file",
}
"""`extract.boxes` -> what a reader must know of such regions."""


def describe_detector(detector: DetectorDescription | None, recipe: Recipe) -> str:
    """Say in words what made the regions, e.g. to end the sentence "The regions come from ...".

    Args:
        detector: that made the regions; None if it is not known any more, or they are imported.
        recipe: of the regions; imported ones name their source there.
    """
    if "imported_from" in recipe:
        return f"another program, imported ({recipe['imported_from']})"
    if boxes := _GIVEN.get(str(recipe.get("boxes"))):
        found = {field: value for field, value in recipe.items() if field != "boxes"}
        return f"{boxes}, with features of {describe_detector(detector, found)}"
    if detector is None:
        weights = recipe.get("weights_sha256", "unknown")
        return f"a Faster R-CNN whose weights had the sha256 {weights}"
    origin = f"weights with the sha256 {detector.origin_sha256}"
    if detector.has_seen_coco:
        origin = "torchvision's ResNet50-FPN Faster R-CNN, trained on train2017 of MS-COCO"
    if detector.source == "fit":
        known = detector.has_seen_coco or detector.origin_sha256
        start = f", starting from {origin}" if known else ""
        return f"a Faster R-CNN fitted on boxes of this data set{start}"
    if detector.has_seen_coco:
        return origin
    return f"a Faster R-CNN with {origin if detector.origin_sha256 else 'weights of a file'}"


def seen_by_detector(run: Run, detector: DetectorDescription | None) -> str | None:
    """Say how many of a run's test images the detector was trained on, or may have been.

    torchvision's weights were trained on train2017 of COCO, according to its documentation ("models
    trained on the instances set of COCO train2017 and evaluated on COCO val2017",
    pytorch.org/vision/0.12/models.html) and to the recipe that the weights name.

    Args:
        run: a run.
        detector: as in `describe_detector`.

    Returns:
        sentences, the last without its full stop; None if nothing tells that it was.
    """
    _, _, tested = run.evaluation.split.removesuffix("/test").rpartition("/")
    if detector is None or tested not in _IN_TRAINING:
        return None
    if detector.may_have_seen_coco:
        why = (
            "its fit started from the weights of a file"
            if detector.source == "fit"
            else f"its weights are a file's with as many classes as COCO, {len(detector.classes)}"
        )
        return (
            f"The detector may have seen test images with their boxes: {why}. What these weights "
            f"were trained on is not known. If it was train2017, which holds "
            f"{_IN_TRAINING[tested]}, these numbers are probably higher than on new images"
        )
    if not detector.has_seen_coco:
        return None
    return (
        f"The detector has seen test images with their boxes: it was trained on train2017, which "
        f"holds {_IN_TRAINING[tested]}. So these numbers are probably higher than on new "
        "images; val2017 (`coco2017` in params.yaml) has images that it has not seen"
    )


def paper_differences(
    runs: Runs, paper: PaperResults, detector: DetectorDescription | None
) -> list[str]:
    """List what a reader must know who compares runs with the paper; one or two sentences each.

    They are about the first run of GM-MLIC, or else about the first run. Of every other head they
    say which method it is.

    Args:
        detector: as in `describe_detector`.
    """
    firsts = [seeds[0] for seeds in runs.values()]
    run = next(filter(_is_gm_mlic, firsts), firsts[0])
    evaluation, settings = run.evaluation, run.settings
    train, test = paper.images
    origin = describe_detector(detector, run.recipe)
    origin += _architecture(run.recipe)
    lines = [
        f"Detector: our regions come from {origin}. The paper's come from a pre-trained "
        "ResNet50-FPN Faster R-CNN; it does not say what that was trained on, nor whether it was "
        "trained further.",
    ]
    seen = seen_by_detector(run, detector)
    if seen:
        lines.append(
            f"Test images: {seen[0].lower()}{seen[1:]}. The paper does not say what its "
            "detector had seen."
        )
    lines += [
        f"Images: ours are {evaluation.trained_images:,} for training and "
        f"{evaluation.images:,} for testing, the paper's {train:,} and {test:,}.",
        f"Labels: {paper.truth}{_difficult(run)}. The paper does not say how it reads them.",
        _augmentation(run),
        f"Label vectors: ours come from {settings.label_vectors}. The paper's are 300-dimensional "
        "GloVe vectors, trained on Wikipedia.",
        f"Length of training: {counted(settings.epochs, 'epoch')} in batches of "
        f"{settings.batch_size}. The paper states neither, nor how it chose its epoch.",
    ]
    if _is_gm_mlic(run):
        lines += _of_gm_mlic(run, paper)
    lines += [_method(seeds[0]) for seeds in runs.values() if not _is_gm_mlic(seeds[0])]
    if evaluation.metrics.mAP11 is not None:
        lines.append(
            "mAP: ours is the mean area under the precision-recall curve; the devkit's 11-point "
            f"mAP of {run.name} is {evaluation.metrics.mAP11:.1f}. The paper does not say which "
            "one it reports, and its printed AP have a mean of 95.2, not 94.7."
        )
    return lines


def _difficult(run: Run) -> str:
    """What the difficult labels counted as, after a semicolon; empty if there are none."""
    treatments = run.evaluation.difficult
    if not treatments:
        return ""
    ignored = "; an ignored label carries no loss and is left out of the metrics"
    said = f"; difficult labels are {describe_treatments(treatments)}"
    return said + (ignored if "ignored" in treatments.values() else "")


def _is_gm_mlic(run: Run) -> bool:
    return isinstance(run.settings.network, GmMlicSettings)


def _method(run: Run) -> str:
    """Say which method a run of another head than GM-MLIC's is, and where it is described."""
    variant, head = run.evaluation.variant, run.settings.network.head
    method = method_of(variant)
    stands = "stands for no method of the paper's tables"
    if method is not None:
        stands = (
            f"is {method} on cached regions. The paper quotes {method} from its own publication, "
            "whose backbone, images and training are others"
        )
    return (
        f"Method of {variant}: the head {head}, which {stands}. docs/heads.md has its equation, "
        "its settings, and what the adaptation to regions loses."
    )


def _of_gm_mlic(run: Run, paper: PaperResults) -> list[str]:
    """What differs between GM-MLIC as we have it and as the paper has it."""
    lines = []
    variant = run.evaluation.variant
    ours = _values(run.settings, run.recipe)
    other = _other_settings(ours, paper, variant)
    if other:
        lines.append(f"Settings of {variant} that differ from the paper's: {'; '.join(other)}.")
    more = {"clip_norm": _clipped(run)}
    own = [f"{name} {_shown(ours[name])}{more.get(name, '')}" for name in OURS if name in ours]
    lines += [
        f"Settings for which the paper gives no value: {'; '.join(own)}.",
        "Inputs: ours are standardised with the mean and deviation of the training images. The "
        "paper does not mention it.",
        "Initial weights: ours keep the size of a signal from layer to layer, with biases of 0. "
        "The paper does not say how it initialises.",
        "Equations: ours takes the mean over neighbours in (5) and (7), whose sums are not "
        "printed, and reads matching edges where the print has e^o and e^l. The loss (15) has the "
        "minus sign that its print lacks, and is averaged over the images of a batch, not summed.",
    ]
    return lines


def _clipped(run: Run) -> str:
    """In how many epochs the clipping of gradients acted."""
    norms = [row["gradient_norm"] for row in run.history if "gradient_norm" in row]
    clipped = sum(norm > run.settings.clip_norm for norm in norms)
    return f" (it acted in {clipped} of {len(norms)} epochs)"


def _architecture(recipe: Recipe) -> str:
    """That the detector is not trained further, and what differs from torchvision's; imported
    regions don't say."""
    if "imported_from" in recipe:
        return ""
    usual = ArchitectureSettings().model_dump(mode="json")
    others = [
        f"architecture.{name} {recipe[f'architecture.{name}']}"
        for name, value in usual.items()
        if recipe.get(f"architecture.{name}", value) not in (value, canonical_json(value))
    ]
    return f", kept as it is, with {', '.join(others)}" if others else ", kept as it is"


def _augmentation(run: Run) -> str:
    ours = "ours is none"
    if "size" in run.recipe:  # imported regions have one view, of unknown size
        if run.views > 1:
            flips = "with flips" if run.recipe.get("views.flip", True) else "without flips"
            ours = f"ours draws one of {run.views} cached views of an image, one of them plain and "
            ours += f"the others random crops {flips}"
        ours += f"; images are resized to {run.recipe['size']} x {run.recipe['size']}"
    return (
        f"Augmentation: {ours}. The paper crops each image at random, resizes it to 448 x 448 and "
        "flips it, again in each epoch."
    )


def _values(settings: TrainSettings, recipe: Recipe) -> dict[str, object]:
    """Setting, as the tables name it -> its value; an imported cache has few of stage one."""
    train = settings.model_dump(exclude={"variants"})
    blocks = {block: train.pop(block) for block in ("network", "loss")}
    train["regions"] = settings.regions or recipe["regions"]
    return {
        **train,
        **{
            f"{block}.{name}": value
            for block, content in blocks.items()
            for name, value in content.items()
        },
        **{f"extract.{name}": value for name, value in recipe.items()},
        **({"extract.precision": recipe["compute_dtype"]} if "compute_dtype" in recipe else {}),
    }


def _other_settings(ours: Mapping[str, object], paper: PaperResults, variant: str) -> list[str]:
    """Name the settings that have another value than the paper's, or that it does not mention."""
    ablated = ("network.instance_graph", "network.label_graph", "network.matching_edges")
    stated = {
        **{name: getattr(paper, field) for name, (field, _) in BY_DATA_SET.items()},
        **{name: value for name, (value, _) in STATED.items()},
    }
    lines = [
        f"{name} {_shown(ours[name])} (paper: {value})"
        for name, value in stated.items()
        # The paper has these ablations too.
        if name in ours and ours[name] != value and not (name in ablated and variant in ABLATIONS)
    ]
    lines += [f"{name} {_shown(ours[name])}" for name in OF_OTHER_LOSSES if name in ours]
    lines += [
        f"{name} {_shown(ours[name])} (the paper mentions none)"
        for name, without in UNMENTIONED.items()
        if name in ours and ours[name] != without
    ]
    return lines


def _shown(value: object) -> str:
    return "all" if value is None else str(value)
