"""What differs between our runs and the paper's, in sentences for a reader who compares them."""

from __future__ import annotations

from pipeline.evaluation.paper import PaperResults
from pipeline.evaluation.runs import Run
from pipeline.settings import DetectorSettings, TrainSettings
from pipeline.shards.schema import Recipe


def describe_detector(detector: DetectorSettings, recipe: Recipe) -> str:
    """Say in words what made the regions, e.g. to end the sentence "The regions come from ...".

    Args:
        detector: the data set's settings.
        recipe: of the regions; imported ones name their source there.
    """
    if "imported_from" in recipe:
        return f"another program, imported ({recipe['imported_from']})"
    return {
        "torchvision": "torchvision's ResNet50-FPN Faster R-CNN, trained on MS-COCO",
        "fit": "a Faster R-CNN fitted on boxes of this data set",
    }.get(detector.source, f"a Faster R-CNN with the weights {detector.weights}")


def paper_differences(run: Run, paper: PaperResults, detector: str) -> list[str]:
    """List what a reader must know who compares a run with the paper; one or two sentences each.

    Args:
        detector: as `describe_detector` says it.
    """
    evaluation, settings = run.evaluation, run.settings
    train, test = paper.images
    frozen = "" if "imported_from" in run.recipe else ", kept as it is"
    lines = [
        f"Detector: our regions come from {detector}{frozen}. The paper's come from a pre-trained "
        "ResNet50-FPN Faster R-CNN; it does not say what that was trained on.",
        f"Images: ours are {evaluation.counts['train']['images']:,} for training and "
        f"{evaluation.images:,} for testing, the paper's {train:,} and {test:,}.",
        _augmentation(run),
        f"Label vectors: ours come from {settings.label_vectors}. The paper's are 300-dimensional "
        "GloVe vectors, trained on Wikipedia.",
        f"Length of training: {settings.epochs} epochs in batches of {settings.batch_size}. The "
        "paper states neither, nor how it chose its epoch.",
    ]
    own = _other_settings(settings, run.recipe, paper)
    if own:
        lines.append(
            f"Settings of {evaluation.variant} that differ from the paper's: {'; '.join(own)}."
        )
    if evaluation.metrics.mAP11 is not None:
        lines.append(
            "mAP: ours is the mean area under the precision-recall curve; the devkit's 11-point "
            f"mAP of {run.name} is {evaluation.metrics.mAP11:.1f}. The paper does not say which "
            "one it reports, and its printed AP have a mean of 95.2, not 94.7."
        )
    return lines


def _augmentation(run: Run) -> str:
    ours = "ours is none"
    if "size" in run.recipe:  # imported regions have one view, of unknown size
        if run.views > 1:
            ours = f"ours draws one of {run.views} cached views of an image, one of them plain"
        ours += f"; images are resized to {run.recipe['size']} x {run.recipe['size']}"
    return (
        f"Augmentation: {ours}. The paper crops each image at random, resizes it to 448 x 448 and "
        "flips it, again in each epoch."
    )


def _other_settings(ours: TrainSettings, recipe: Recipe, paper: PaperResults) -> list[str]:
    """Name the settings for which the paper states another value."""
    network = ours.network
    pairs = {
        "regions": (ours.regions or recipe["regions"], paper.regions),
        "network.latent_size": (network.latent_size, 512),
        "network.modules": (network.modules, 2),
        "network.node_norm": (network.node_norm, False),
        "optimizer": (ours.optimizer, "sgd"),
        "learning_rate": (ours.learning_rate, 0.01),
        "momentum": (ours.momentum, 0.9),
        "weight_decay": (ours.weight_decay, 0.0001),
        "schedule": (ours.schedule, "step"),
        "step_epochs": (ours.step_epochs, 30),
        "beta": (ours.beta, paper.beta),
    }
    return [
        f"{name} {value} (paper: {printed})"
        for name, (value, printed) in pairs.items()
        if value != printed
    ]
