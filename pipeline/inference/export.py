"""The matching network of a run as ONNX, for programs without torch.

The label vectors are part of the model. Its inputs and outputs, of B images with M places for
regions, any numbers of either, C labels and feature size D:

    features  (B, M, D) float32    boxes    (B, M, 4) float32, xyxy in [0, 1]
    scores    (B, M) float32       classes  (B, M) int64, both the detector's
    count     (B,) int64, real regions of each image, at least 1; they come first

    image_scores   (B, C) float32, probability of each label
    winners        (B, C) int64, the region that won the max (14) for each label
    region_scores  (B, M, C) float32, probability of each label by each region; 0 for padding
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.errors import GmpipeError
from pipeline.files import replacing
from pipeline.learning.checkpoint import Checkpoint
from pipeline.matching.graphs import InstanceBatch
from pipeline.matching.network import MatchingNetwork, Network, image_logits
from pipeline.shards.schema import fingerprint

INPUTS = ("features", "boxes", "scores", "classes", "count")
OUTPUTS = ("image_scores", "winners", "region_scores")


class _Whole(nn.Module):
    """From the arrays of a cache to scores."""

    def __init__(self, network: Network, label_vectors: Tensor) -> None:
        super().__init__()
        self.network = network
        self.label_vectors = nn.Buffer(label_vectors)
        # With K places of padding there are always K others, so the number of neighbours that are
        # looked for is the same for any M.
        self.padding = network.settings.neighbors if isinstance(network, MatchingNetwork) else 0

    def forward(
        self, features: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's docstring."""
        instances, added = features.shape[1], int(self.padding)
        mask = torch.arange(instances + added, device=count.device) < count[:, None]
        batch = InstanceBatch(
            pad(features, (0, 0, 0, added)),
            pad(boxes, (0, 0, 0, added)),
            pad(scores, (0, added)),
            pad(classes, (0, added)),
            mask,
        )
        logits = self.network(batch, self.label_vectors)[:, :instances]
        best, winners = image_logits(logits)
        return best.sigmoid(), winners, logits.sigmoid()


def export_onnx(checkpoint: Checkpoint, path: Path) -> None:
    """Write a run's network as ONNX, whole or not at all.

    The model's metadata says what it is: data set, variant, seed, vocabulary (JSON), and of the
    regions it was trained on the recipe (JSON), its fingerprint and how many of an image are used.

    Raises:
        GmpipeError: the packages that write ONNX are not installed.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18
    except ImportError as error:
        raise GmpipeError(
            f"writing ONNX needs the packages `onnx` and `onnxscript` ({error}). Run `pip install "
            "--editable '.[onnx]'` in the checkout."
        ) from error

    def stable_sort(
        values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
    ) -> Any:
        """torch's exporter has none; TopK's ties go to the lower index, which is a stable sort."""
        axis: Any = opset18.Constant(value_ints=[dim])
        size = opset18.Gather(opset18.Shape(values), axis)
        return opset18.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    images, instances = 2, 3  # any that are not 1: of 1, torch would think that it stays 1
    example = (
        torch.zeros(images, instances, checkpoint.feature_size),
        torch.zeros(images, instances, 4),
        torch.zeros(images, instances),
        torch.zeros(images, instances, dtype=torch.int64),
        torch.full((images,), instances),
    )
    of_regions = {0: torch.export.Dim("images"), 1: torch.export.Dim("regions")}
    whole = _Whole(checkpoint.network(), checkpoint.label_vectors).eval()
    quiet = logging.getLogger("onnxscript")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
            shapes = (*(of_regions for _ in INPUTS[:-1]), {0: of_regions[0]})
            # By itself torch.onnx.export falls back to fixed sizes where this fails.
            graph = torch.export.export(whole, example, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                graph,
                dynamic_shapes=shapes,
                input_names=INPUTS,
                output_names=OUTPUTS,
                custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
                dynamo=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    recipe = dict(checkpoint.recipe)
    program.model.producer_name = "gmpipe"
    program.model.metadata_props.update(
        {
            "dataset": checkpoint.dataset,
            "variant": checkpoint.variant,
            "seed": str(checkpoint.seed),
            "vocabulary": json.dumps(checkpoint.vocabulary),
            "label_vectors_sha256": checkpoint.label_vectors_sha256,
            "fingerprint": fingerprint(recipe),
            "recipe": json.dumps(recipe),
            "regions": str(checkpoint.settings.regions or recipe.get("regions")),
        }
    )
    with replacing(path) as temporary:
        temporary.write_bytes(program.model_proto.SerializeToString(deterministic=True))
