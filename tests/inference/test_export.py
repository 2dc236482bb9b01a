"""`gmpipe export`: the ONNX file in onnxruntime against torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from builders import make_instances
from flows import Flow

from pipeline.inference.export import INPUTS, OUTPUTS, export_onnx
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.matching.network import build_network, image_logits
from pipeline.settings import VARIANTS, NetworkSettings, TrainSettings
from pipeline.shards.schema import fingerprint

C, D, W = 6, 5, 4
RECIPE = {"regions": 4, "size": 64}
TOLERANCE = 1e-5


def checkpoint(variant: str = "full", **changes: Any) -> Checkpoint:
    """Of an untrained network in which no parameter is 0."""
    own: Any = VARIANTS[variant].get("network", {})
    settings = NetworkSettings(**{"latent_size": 32, "neighbors": 2, **own, **changes})
    torch.manual_seed(0)
    vectors = torch.randn(C, W)
    network = build_network(D, C, W, settings)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return Checkpoint(
        dataset="toy",
        variant=variant,
        seed=3,
        settings=TrainSettings(network=settings),
        epoch=1,
        vocabulary=tuple("abcdef"),
        labels_sha256="",
        label_vectors=vectors,
        label_vectors_sha256="of vectors",
        recipe=RECIPE,
        feature_size=D,
        state=network.state_dict(),
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full, one module": ("full", {"modules": 1, "label_neighbors": 2}),
    "max-pool": ("max-pool", {}),
    "full": ("full", {}),
    "full, sparse": ("full", {"label_neighbors": 2}),
    "without-label-graph": ("without-label-graph", {"modules": 1}),
    "without-instance-graph": ("without-instance-graph", {"modules": 1}),
    "without-matching-edges": ("without-matching-edges", {"modules": 1, "node_norm": False}),
}
QUICK = ("full, one module", "max-pool")
"""An export takes ten seconds or more, all of them minutes."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
@torch.no_grad()
def test_onnxruntime_says_what_torch_says(case: str, tmp_path: Path) -> None:
    variant, changes = CASES[case]
    trained = checkpoint(variant, **changes)
    path = tmp_path / "model.onnx"
    export_onnx(trained, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert tuple(value.name for value in session.get_inputs()) == INPUTS
    assert tuple(value.name for value in session.get_outputs()) == OUTPUTS
    network = trained.network()
    # K is 2: an image with one region, one with two (a single neighbour), and padding.
    for counts, instances in (
        ([1], 1),
        ([2], 2),
        ([3, 1, 2], 3),
        ([1, 4, 2, 3, 4], 4),
        ([2, 1], 7),
        ([20, 9], 20),
    ):
        batch = make_instances(len(counts), instances=instances, feature_size=D, counts=counts)
        logits = network(batch, trained.label_vectors)
        best, _ = image_logits(logits)
        scores, winners, region_scores = session.run(
            None,
            {
                "features": batch.features.numpy(),
                "boxes": batch.boxes.numpy(),
                "scores": batch.scores.numpy(),
                "classes": batch.classes.numpy(),
                "count": np.array(counts),
            },
        )
        assert np.abs(scores - best.sigmoid().numpy()).max() <= TOLERANCE
        assert np.abs(region_scores - logits.sigmoid().numpy()).max() <= TOLERANCE
        # Regions that tie may each be named the winner.
        won = np.take_along_axis(region_scores, winners[:, None], axis=1)[:, 0]
        assert np.abs(won - scores).max() <= TOLERANCE
        assert (winners < np.array(counts)[:, None]).all()
        assert np.ptp(scores) > 0.02
    said = session.get_modelmeta()
    assert said.producer_name == "gmpipe"
    about = said.custom_metadata_map
    assert json.loads(about["vocabulary"]) == list("abcdef")
    assert json.loads(about["recipe"]) == RECIPE
    assert about["fingerprint"] == fingerprint(RECIPE)
    found = [about[name] for name in ("dataset", "variant", "seed", "regions")]
    assert found == ["toy", variant, "3", "4"]


def test_command(small: Flow) -> None:
    """A run on imported regions, which has no detector, can be exported."""
    small.ok("train", "--variant", "max-pool")
    line = small.ok("export", "--run", "runs/voc2007/max-pool-s0")
    assert line.startswith("voc2007-max-pool-s0.onnx: ")
    about = onnxruntime.InferenceSession(small / "voc2007-max-pool-s0.onnx").get_modelmeta()
    trained = load_checkpoint(small / "runs/voc2007/max-pool-s0/checkpoint.pt")
    assert about.custom_metadata_map["fingerprint"] == fingerprint(trained.recipe)
    assert "voc2007/max-pool-s0" in small.ok("runs", "list")  # still taken for a run
    assert small.gmpipe("export", "--run", "runs/none").refused(
        "there is no checkpoint at runs/none"
    )
    outcome = small.gmpipe("export", "--run", "runs/none", "-o", "model.pt")
    assert outcome.code == 2
    assert "model.pt: expected a name that ends in .onnx" in outcome.err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(Exception, match=r"pip install --editable '\.\[onnx\]'"):
        export_onnx(checkpoint("max-pool"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
