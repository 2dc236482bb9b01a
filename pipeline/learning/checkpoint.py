"""Checkpoints: a trained network in one file, which is loaded without running code from it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.decisions.decisions import Decisions
from pipeline.errors import DamagedError, MissingError, briefly
from pipeline.files import canonical_json
from pipeline.heads.building import build_head
from pipeline.heads.contract import Head, HeadSizes, LabelSet
from pipeline.labels.vectors import LabelVectors
from pipeline.names import check_name
from pipeline.settings import TrainSettings
from pipeline.shards.schema import Recipe, fingerprint
from pipeline.tensors import check_alike, check_equal, load_tensors, save_tensors

_log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 5
"""4 knew two networks and no statistics of the labels."""

CHOSEN_PRECISIONS = ("bfloat16", "float32")
"""What the precision `auto` can mean."""

_TRAIN = "Train this run again."


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, and what must match wherever it is used.

    Letters: C labels, W size of a label vector, D feature size.

    Attributes:
        dataset: name of the data set that it was trained on.
        variant: its name in params.yaml.
        seed: of the training.
        settings: the variant's own train settings.
        views: how many cached views of each training image it drew from.
        epoch: after which the weights were taken, counted from 1.
        history: one row per epoch (`pipeline.learning.loop.Training`).
        vocabulary: the C label names, in the order of the scores.
        train_sha256: `Manifest.train_sha256`. With ``seed`` and the settings `validation` and
            `training_share` it says which images the network was trained on.
        trained_images: how many images that were: the part by `training_share` of the training
            split without the images that have no regions, and without the validation part.
        label_vectors, ratio, conditional: what was known of the labels, as `LabelSet` has it.
        label_vectors_sha256: `LabelVectors.sha256`, over names and vectors.
        recipe: of the regions that it was trained on.
        feature_size: D.
        state: the network's parameters and the statistics of its inputs.
        chosen_precision: what the precision `auto` of the settings meant in the training; empty
            where the settings name the precision.
        decisions: fitted calibration and thresholds; None if none were asked for, or the training
            diverged. The file has no such field then.
        sha256: hex sha256 of the file that it was read from; empty for one that was not read.
    """

    dataset: str
    variant: str
    seed: int
    settings: TrainSettings
    views: int
    epoch: int
    history: Sequence[Mapping[str, float]]
    vocabulary: tuple[str, ...]
    train_sha256: str
    trained_images: int
    label_vectors: Tensor
    ratio: Tensor
    conditional: Tensor | None
    label_vectors_sha256: str
    recipe: Recipe
    feature_size: int
    state: dict[str, Tensor]
    chosen_precision: str = ""
    decisions: Decisions | None = None
    sha256: str = ""

    @property
    def labels(self) -> LabelSet:
        """What was known of the labels."""
        return LabelSet(self.label_vectors, self.ratio, self.conditional)

    def network(self) -> Head:
        """Build the network with these weights, in eval mode."""
        network = self._untrained_network()
        network.load_state_dict(self.state)
        return network.eval()

    def check_weights(self) -> None:
        """Check that the weights have the names and shapes that the settings ask for.

        Raises:
            RuntimeError: they do not.
        """
        self._network_of_shapes().load_state_dict(self.state, assign=True)

    @property
    def parameters(self) -> int:
        """How many numbers of `state` are learned; the others are statistics."""
        return sum(weights.numel() for weights in self._network_of_shapes().parameters())

    def _network_of_shapes(self) -> Head:
        # This takes neither memory nor random numbers.
        with torch.device("meta"), _WithoutNormal():
            return self._untrained_network()

    def _untrained_network(self) -> Head:
        sizes = HeadSizes(
            self.feature_size,
            len(self.vocabulary),
            self.label_vectors.shape[1],
            int(self.state["inputs.classes"]),
        )
        return build_head(sizes, self.settings.network)


class _WithoutNormal(TorchFunctionMode):
    """Let `torch.nn.init.normal_` do nothing.

    On the device `meta`, torch does it in Python. The first call imports TorchDynamo, which takes
    more than a second.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **kwargs)


_STORED = [field.name for field in fields(Checkpoint) if field.name != "sha256"]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; the same content gives the same bytes."""
    content = {name: getattr(checkpoint, name) for name in _STORED}
    content["settings"] = checkpoint.settings.model_dump(mode="json")
    content["vocabulary"] = list(checkpoint.vocabulary)
    if not checkpoint.chosen_precision:  # which earlier releases did not store
        del content["chosen_precision"]
    # As text: torch writes equal strings of a killed and of a resumed training in different ways.
    content["history"] = canonical_json([dict(row) for row in checkpoint.history])
    if checkpoint.decisions is None:
        del content["decisions"]
    else:
        content["decisions"] = {
            name: torch.from_numpy(getattr(checkpoint.decisions, name)) for name in _OF_DECISIONS
        }
    save_tensors(path, {"gmpipe_checkpoint": CHECKPOINT_VERSION, **content})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        MissingError: there is no file at ``path``.
        DamagedError: the file was changed, is no checkpoint, or has another version; or its fields
            do not belong together.
    """
    try:
        content, sha256 = load_tensors(path)
    except FileNotFoundError:
        raise MissingError(f"There is no checkpoint at {path}.", _TRAIN) from None
    except DamagedError as error:
        raise DamagedError(f"{path} is not a checkpoint. {error.problem}", _TRAIN) from error
    version = content.pop("gmpipe_checkpoint", None) if isinstance(content, dict) else None
    if version != CHECKPOINT_VERSION:
        holds = "is not a gmpipe checkpoint" if version is None else f"has version {version}"
        if isinstance(version, int) and version < CHECKPOINT_VERSION:
            holds += ", which an older release of gmpipe wrote"
        raise DamagedError(
            f"{path} {holds}; expected a checkpoint of version {CHECKPOINT_VERSION}.", _TRAIN
        )
    try:
        checkpoint = _checked(content, sha256)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DamagedError(f"{path} is damaged ({briefly(error)}).", _TRAIN) from error
    _log.info("read %s: %s, seed %d", path, checkpoint.variant, checkpoint.seed)
    return checkpoint


_TYPES: dict[str, type] = {
    "dataset": str,
    "variant": str,
    "seed": int,
    "views": int,
    "epoch": int,
    "train_sha256": str,
    "trained_images": int,
    "label_vectors": Tensor,
    "ratio": Tensor,
    "label_vectors_sha256": str,
    "recipe": dict,
    "feature_size": int,
    "state": dict,
}
"""The types of fields as they are stored, but for those that are checked one by one."""


def _checked(content: dict[str, Any], sha256: str) -> Checkpoint:
    """Make a checkpoint of what a file holds.

    Raises:
        ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError,
        ValueError: it is no checkpoint's.
    """
    if unknown := content.keys() - set(_STORED):
        raise ValueError(f"it has the unknown field {min(map(str, unknown))!r}")
    for name, kind in _TYPES.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            found = type(content[name]).__name__
            raise TypeError(f"`{name}` is {found}, expected {kind.__name__}")
    vocabulary = _texts(content["vocabulary"])
    chosen_precision = content.get("chosen_precision", "")
    history = [_numbers(row) for row in json.loads(content["history"])]
    checkpoint = Checkpoint(
        **{name: content[name] for name in _TYPES},
        settings=TrainSettings.model_validate(content["settings"]),
        vocabulary=vocabulary,
        conditional=content["conditional"],
        history=history,
        chosen_precision=chosen_precision,
        decisions=_decisions(content, len(vocabulary)),
        sha256=sha256,
    )
    if checkpoint.decisions is not None and not checkpoint.settings.decisions.fitted:
        raise ValueError("it has decisions, which its settings don't ask for")
    vectors = LabelVectors(vocabulary, checkpoint.label_vectors.numpy(), "the checkpoint")
    if vectors.vectors.shape[:1] != (len(vocabulary),) or vectors.vectors.dtype != np.float32:
        raise ValueError(
            f"label vectors of shape {vectors.vectors.shape} for {len(vocabulary)} labels"
        )
    if vectors.sha256 != checkpoint.label_vectors_sha256:
        raise ValueError(
            f"the label vectors have the sha256 {vectors.sha256}, expected "
            f"{checkpoint.label_vectors_sha256}"
        )
    is_chosen = checkpoint.settings.precision == "auto"
    if chosen_precision not in (CHOSEN_PRECISIONS if is_chosen else ("",)):
        raise ValueError(f"`chosen_precision` is {chosen_precision!r}")
    _check_statistics(checkpoint)
    _check_numbers(checkpoint)
    for name, tensor in checkpoint.state.items():
        if not isinstance(tensor, Tensor) or not tensor.isfinite().all():
            raise ValueError(f"the weights `{name}` are not finite numbers")
    checkpoint.check_weights()
    return checkpoint


_OF_DECISIONS = {
    "scale": torch.float64,
    "shift": torch.float64,
    "thresholds": torch.float64,
    "own_calibration": torch.bool,
    "own_threshold": torch.bool,
    "positives": torch.int64,
    "negatives": torch.int64,
}
"""The fields of `Decisions`, as tensors (C,)."""


def _decisions(content: Mapping[str, Any], labels: int) -> Decisions | None:
    """The decisions that a file holds, if it does; raises as `_checked`."""
    if "decisions" not in content:
        return None
    tensors = content["decisions"]
    like = {name: torch.empty(labels, dtype=kind) for name, kind in _OF_DECISIONS.items()}
    check_alike(tensors, like, "decisions")
    decisions = Decisions(**{name: tensor.numpy() for name, tensor in tensors.items()})
    if not (decisions.scale > 0).all():
        raise ValueError("a scale of `decisions` is not above 0")
    return decisions


def _check_statistics(checkpoint: Checkpoint) -> None:
    """Check the shares of the labels."""
    labels = len(checkpoint.vocabulary)
    like = {"ratio": torch.empty(labels)}
    if checkpoint.settings.network.reads_conditional:
        like["conditional"] = torch.empty(labels, labels)
    else:
        check_equal(checkpoint.conditional, None, "conditional")
    found = {name: getattr(checkpoint, name) for name in like}
    check_alike(found, like, "labels")
    if not all(((share >= 0) & (share <= 1)).all() for share in found.values()):
        raise ValueError("the shares of the labels are not all between 0 and 1")


def _check_numbers(checkpoint: Checkpoint) -> None:
    """Check names, counts and the recipe, which may come from anybody."""
    for name in (checkpoint.dataset, checkpoint.variant):
        check_name(name)
    history = checkpoint.history
    if not 1 <= checkpoint.epoch <= len(history):
        raise ValueError(f"epoch {checkpoint.epoch} of {len(history)}")
    if any(row.keys() != history[0].keys() for row in history):
        raise ValueError("the rows of `history` have different columns")
    for name in ("seed", "views", "trained_images", "feature_size"):
        least = 0 if name == "seed" else 1
        if not least <= getattr(checkpoint, name) < 2**63:
            raise ValueError(f"`{name}` is {getattr(checkpoint, name)}")
    if not all(isinstance(field, str) for field in checkpoint.recipe):
        raise TypeError("the fields of `recipe` are not all texts")
    fingerprint(checkpoint.recipe)  # its values are those of JSON, and finite


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise TypeError("`vocabulary` is not a list of texts")
    return tuple(values)


def _numbers(row: Any) -> dict[str, float]:
    if not isinstance(row, dict) or not {"epoch", "train_loss"} <= row.keys():
        raise TypeError("a row of `history` lacks `epoch` or `train_loss`")
    numbers = {str(name): float(value) for name, value in row.items()}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError(f"a row of `history` is not finite: {numbers}")
    return numbers
