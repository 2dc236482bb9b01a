"""Write the network of a run as ONNX, for programs without torch.

All that the network reads of the labels is part of the model. Its inputs and outputs, for B images
with up to M regions (any numbers of either), C labels and feature size D:

    features  (B, M, D) float32    boxes    (B, M, 4) float32, xyxy in [0, 1]
    scores    (B, M) float32       classes  (B, M) int64, both the detector's
    count     (B,) int64, real regions of each image, which come first: from 1 to M; less counts as
              1, and more as M
    whole     (B, D) float32, vectors of the whole views; only if the head reads them

    image_scores   (B, C) float32, probability of each label
    winners        (B, C) int64, index of the region that says most for each label; -1 where that is
                   the image as a whole
    region_scores  (B, M, C) float32, what each region says for each label: its probability, or the
                   weight by which the head reads it; 0 for padding

    probabilities  (B, C) float32, the calibrated probability of each label
    predicted      (B, C) bool, whether it exceeds the label's threshold

A head that does not tell regions apart (`Head.attribution`) has no `winners` and `region_scores`.
`probabilities` and `predicted` are there if the run fitted decisions.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.decisions.decisions import Decisions
from pipeline.errors import GmpipeError, InputError, MissingError, briefly
from pipeline.files import replacing
from pipeline.heads.contract import Head, HeadOutput, LabelSet, RegionBatch
from pipeline.heads.matching.network import GmMlic
from pipeline.learning.checkpoint import Checkpoint
from pipeline.learning.prediction import shown_attribution
from pipeline.shards.schema import fingerprint

INPUTS = ("features", "boxes", "scores", "classes", "count")
"""The inputs that every model has."""

Phase = Callable[[str], AbstractContextManager[object]]
"""Shows a part of the work, given its name."""


class CacheToScores(nn.Module):
    """The network on the arrays of a cache. Its arguments and results are the model's."""

    conditional: Tensor | None
    scale: Tensor
    shift: Tensor
    thresholds: Tensor

    def __init__(self, network: Head, labels: LabelSet, decisions: Decisions | None = None) -> None:
        super().__init__()
        self.network = network
        self.label_vectors = nn.Buffer(labels.vectors)
        self.ratio = nn.Buffer(labels.ratio)
        self.register_buffer("conditional", labels.conditional)
        # With K instances of padding there are always K others, so the number of neighbours that
        # the network looks for is the same for any M.
        self.padding = network.settings.neighbors if isinstance(network, GmMlic) else 0
        self.decides = decisions is not None
        if decisions is not None:
            for name in ("scale", "shift", "thresholds"):
                self.register_buffer(name, torch.from_numpy(getattr(decisions, name)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        of_regions = () if self.network.attribution is None else ("winners", "region_scores")
        of_decisions = ("probabilities", "predicted") if self.decides else ()
        return ("image_scores", *of_regions, *of_decisions)

    def forward(
        self,
        features: Tensor,
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        count: Tensor,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the outputs from the inputs; see the module's docstring."""
        instances, added = features.shape[1], self.padding
        real = count.clamp(min=1).minimum(torch.full_like(count, instances))
        mask = torch.arange(instances + added, device=count.device) < real[:, None]
        batch = RegionBatch(
            # Whatever padding holds: nan times 0 would be nan.
            pad(features, (0, 0, 0, added)).masked_fill(~mask[..., None], 0),
            pad(boxes, (0, 0, 0, added)).masked_fill(~mask[..., None], 0),
            pad(scores, (0, added)).masked_fill(~mask, 0),
            pad(classes, (0, added)),
            mask,
            whole,
        )
        labels = LabelSet(self.label_vectors, self.ratio, self.conditional)
        output: HeadOutput = self.network(batch, labels)
        results = [output.image.sigmoid()]
        if output.regions is not None:
            output = output._replace(regions=output.regions[:, :instances])
            said = shown_attribution(self.network, output)
            assert said is not None
            results += [output.winners(), said]
        if self.decides:
            calibrated = self.scale * output.image.double() + self.shift
            results += [calibrated.sigmoid().float(), calibrated > self.thresholds]
        return tuple(results)


def export_onnx(checkpoint: Checkpoint, path: Path, phase: Phase = nullcontext) -> None:
    """Write a run's network as ONNX, whole or not at all.

    The model's metadata says what it is: data set, variant, seed, head, vocabulary (JSON), what
    `region_scores` are (`logits` as probabilities, `weights`, or `none`), and of the regions it was
    trained on the recipe (JSON), its fingerprint and how many of an image are used. If decisions
    were fitted, `thresholds` are the probabilities that a predicted label exceeds, and `scale` and
    `shift` calibrate logits (JSON, in the vocabulary's order).

    Raises:
        MissingError: the packages that write ONNX are not installed.
        InputError: the head computes something that can't be translated to ONNX.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingError(
            f"Writing ONNX needs the packages `onnx` and `onnxscript`: {error}.",
            "Run `pip install --editable '.[onnx]'` in the checkout.",
        ) from error
    network = CacheToScores(checkpoint.network(), checkpoint.labels, checkpoint.decisions).eval()
    settings = checkpoint.settings.network
    try:
        with quiet():
            program = _translate(network, checkpoint.feature_size, settings.needs_whole, phase)
    except GmpipeError:
        raise
    except Exception as error:  # of many types, which torch documents nowhere
        raise InputError(
            f"The head `{settings.head}` of {checkpoint.variant}-s{checkpoint.seed} can't be "
            f"written as ONNX: {briefly(error)}.",
            "Use the run with `gmpipe predict` or from Python (docs/python.md), or export a run "
            "with another head.",
        ) from error
    recipe = dict(checkpoint.recipe)
    program.model.producer_name = "gmpipe"
    program.model.metadata_props.update(
        {
            "dataset": checkpoint.dataset,
            "variant": checkpoint.variant,
            "seed": str(checkpoint.seed),
            "head": settings.head,
            "region_scores": network.network.attribution or "none",
            "vocabulary": json.dumps(checkpoint.vocabulary),
            "label_vectors_sha256": checkpoint.label_vectors_sha256,
            "fingerprint": fingerprint(recipe),
            "recipe": json.dumps(recipe),
            "regions": str(checkpoint.settings.regions or recipe.get("regions")),
            **_about(checkpoint.decisions),
        }
    )
    with phase("writing the file"), replacing(path) as temporary:
        temporary.write_bytes(program.model_proto.SerializeToString(deterministic=True))


def _about(decisions: Decisions | None) -> dict[str, str]:
    """The metadata of decisions."""
    if decisions is None:
        return {}
    numbers = {
        "thresholds": decisions.probabilities,
        "scale": decisions.scale,
        "shift": decisions.shift,
    }
    return {name: json.dumps(values.tolist()) for name, values in numbers.items()}


def _translate(
    network: CacheToScores, feature_size: int, needs_whole: bool, phase: Phase
) -> torch.onnx.ONNXProgram:
    """Translate the network to ONNX for any number of images and regions."""
    images, instances = 2, 3  # any but 1, which torch would take for a constant
    example: tuple[Tensor, ...] = (
        torch.zeros(images, instances, feature_size),
        torch.zeros(images, instances, 4),
        torch.zeros(images, instances),
        torch.zeros(images, instances, dtype=torch.int64),
        torch.full((images,), instances),
    )
    dynamic = {0: torch.export.Dim("images"), 1: torch.export.Dim("regions")}
    shapes: tuple[dict[int, Any], ...] = (*(dynamic for _ in INPUTS[:-1]), {0: dynamic[0]})
    inputs: tuple[str, ...] = INPUTS
    if needs_whole:
        inputs += ("whole",)
        example += (torch.zeros(images, feature_size),)
        shapes += ({0: dynamic[0]},)
    # Called separately, because torch.onnx.export falls back to fixed sizes where this fails.
    with phase("tracing the network"):
        graph = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
    with phase("translating it"):
        program = torch.onnx.export(
            graph,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=network.outputs,
            custom_translation_table=TRANSLATIONS,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program


def _stable_sort(
    values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    """Translate a stable sort, which torch's exporter lacks.

    Ties of ONNX's TopK go to the lower index, so it is a stable sort.
    """
    from onnxscript import opset18

    axis: Any = opset18.Constant(value_ints=[dim])
    size = opset18.Gather(opset18.Shape(values), axis)
    return opset18.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Any, Any] = {torch.ops.aten.sort.stable: _stable_sort}
"""What torch's exporter can't translate."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of torch's exporter about its own parts."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
