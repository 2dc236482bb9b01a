"""`gmpipe export`: the ONNX file in onnxruntime against torch."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from flows import Flow
from stand_in_heads import registered
from tiny import make_batch, make_label_set

from pipeline.errors import InputError, MissingError
from pipeline.heads.building import build_head, head_class
from pipeline.heads.contract import HeadSizes, RegionBatch
from pipeline.inference.export import (
    INPUTS,
    TRANSLATIONS,
    CacheToScores,
    export_onnx,
    quiet,
)
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.prediction import shown_attribution
from pipeline.settings import TrainSettings, head_variants
from pipeline.settings.heads import settings_class, variant_changes
from pipeline.shards.schema import fingerprint

C, D, W = 6, 5, 4
RECIPE = {"regions": 4, "size": 64}
TOLERANCE = 1e-5


def checkpoint(variant: str = "full", **changes: Any) -> Checkpoint:
    """Make a checkpoint of an untrained network in which no parameter is 0."""
    own: Any = variant_changes(variant).get("network", {})
    head = own.get("head", "gm-mlic")
    small = {"latent_size": 32, "neighbors": 2} if head == "gm-mlic" else {}
    settings = settings_class(head)(**{**small, **own, **changes})
    torch.manual_seed(0)
    labels = make_label_set(C, size=W, dtype=torch.float32)
    network = build_head(HeadSizes(D, C, W, classes=3), settings)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return Checkpoint(
        dataset="toy",
        variant=variant,
        seed=3,
        settings=TrainSettings.model_validate(
            {"network": settings, "loss": {"name": "own" if settings.own_loss else "weighted"}}
        ),
        views=1,
        epoch=1,
        history=[{"epoch": 1, "train_loss": 1.0}],
        vocabulary=tuple("abcdef"),
        train_sha256="",
        trained_images=1,
        label_vectors=labels.vectors,
        ratio=labels.ratio,
        conditional=labels.conditional,
        label_vectors_sha256="of vectors",
        recipe=RECIPE,
        feature_size=D,
        state=network.state_dict(),
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "max-pool": ("max-pool", {}),
    "max-pool, whole view": ("max-pool", {"whole_region": True}),
    "plain": ("plain", {}),
    "weighing": ("weighing", {}),
    "only-whole": ("only-whole", {}),
    "full": ("full", {}),
    "full, sparse": ("full", {"label_neighbors": 2, "latent_size": 8}),
    "without-label-graph": ("without-label-graph", {"modules": 1}),
    "without-instance-graph": ("without-instance-graph", {"modules": 1}),
    "without-matching-edges": ("without-matching-edges", {"modules": 1, "node_norm": False}),
    "stateless-matching-edges": ("stateless-matching-edges", {"residual": True}),
    **{name: (name, {}) for name in head_variants() if name not in ("full", "max-pool")},
}
SHAPES = (([1], 1), ([2], 2), ([3, 1, 2], 3), ([1, 4, 2, 3, 4], 4), ([2, 1], 7), ([20, 9], 20))
"""Real regions of each image, and M. K is 2, so some images have fewer than K neighbours."""


def batch_of(trained: Checkpoint, counts: list[int], instances: int) -> RegionBatch:
    """A batch with whole views where the head needs them."""
    whole = trained.settings.network.needs_whole
    return make_batch(
        len(counts), instances, counts=counts, features=D, whole=whole, dtype=torch.float32
    )


def inputs(batch: RegionBatch, counts: list[int]) -> dict[str, np.ndarray]:
    """What the model reads of a batch."""
    fields = {name: getattr(batch, name).numpy() for name in INPUTS[:-1]}
    whole = {} if batch.whole is None else {"whole": batch.whole.numpy()}
    return {**fields, "count": np.array(counts), **whole}


def expected_outputs(trained: Checkpoint, batch: RegionBatch) -> dict[str, np.ndarray]:
    """What the network itself says, by the names of the model's outputs."""
    network = trained.network()
    output = network(batch, trained.labels)
    said = shown_attribution(network, output)
    outputs = {"image_scores": output.image.sigmoid()}
    if said is not None:
        outputs |= {"winners": output.winners(), "region_scores": said}
    return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.fixture(autouse=True)
def _stand_in_heads() -> Iterator[None]:
    with registered():
        yield


FAST = ("max-pool, whole view", "weighing", "only-whole", "linear-scores")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
@torch.no_grad()
def test_onnxruntime_computes_what_torch_does(case: str, tmp_path: Path) -> None:
    """An export of a network with graphs takes ten seconds or more, so those are slow tests."""
    variant, changes = CASES[case]
    trained = checkpoint(variant, **changes)
    path = tmp_path / "model.onnx"
    export_onnx(trained, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    needs_whole = trained.settings.network.needs_whole
    names = (*INPUTS, "whole") if needs_whole else INPUTS
    assert tuple(value.name for value in session.get_inputs()) == names
    for counts, instances in SHAPES:
        batch = batch_of(trained, counts, instances)
        expected = expected_outputs(trained, batch)
        assert [value.name for value in session.get_outputs()] == list(expected)
        actual = dict(zip(expected, session.run(None, inputs(batch, counts)), strict=True))
        assert np.ptp(actual["image_scores"]) > 0.005
        for name in expected.keys() - {"winners"}:
            assert np.abs(actual[name] - expected[name]).max() <= TOLERANCE
        if "winners" in expected:
            # Regions that tie may each be named the winner.
            winners, said = actual["winners"], actual["region_scores"]
            assert (winners < np.array(counts)[:, None]).all()
            assert np.array_equal(winners < 0, expected["winners"] < 0)
            named = np.take_along_axis(said, np.maximum(winners, 0)[:, None], axis=1)[:, 0]
            assert np.abs(named - said.max(axis=1))[winners >= 0].max(initial=0) <= TOLERANCE
        # Padding may hold anything.
        padded = inputs(batch, counts)
        for field in ("features", "boxes", "scores"):
            padded[field] = padded[field].copy()
            for image, count in enumerate(counts):
                padded[field][image, count:] = np.nan
        for one, other in zip(
            session.run(None, padded), session.run(None, inputs(batch, counts)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        # Counts beyond M count as M, and those below 1 as 1: padding gets no score.
        for wrong, right in ((instances + 1, instances), (2**40, instances), (0, 1), (-5, 1)):
            of_wrong, of_right = (
                session.run(None, inputs(batch, [count] * len(counts))) for count in (wrong, right)
            )
            for one, other in zip(of_wrong, of_right, strict=True):
                assert np.array_equal(one, other)
            if "winners" in expected:
                assert (of_wrong[1] < instances).all()
            assert np.isfinite(of_wrong[0]).all()
            assert (of_wrong[0] > 0).all()
    described = session.get_modelmeta()
    assert described.producer_name == "gmpipe"
    metadata = described.custom_metadata_map
    assert json.loads(metadata["vocabulary"]) == list("abcdef")
    assert json.loads(metadata["recipe"]) == RECIPE
    assert metadata["fingerprint"] == fingerprint(RECIPE)
    values = [metadata[name] for name in ("dataset", "variant", "seed", "regions", "head")]
    assert values == ["toy", variant, "3", "4", trained.settings.network.head]
    attribution = head_class(trained.settings.network.head).attribution
    assert metadata["region_scores"] == (attribution or "none")


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_exported_form_equals_the_network(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced, run by torch: counts for masks, padding for K neighbours, plain grids."""
    variant, changes = CASES[case]
    trained = checkpoint(variant, **changes)
    exported = CacheToScores(trained.network(), trained.labels).eval()
    for counts, instances in SHAPES:
        batch = batch_of(trained, counts, instances)
        expected = expected_outputs(trained, batch)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            actual = exported(*map(torch.from_numpy, inputs(batch, counts).values()))
        assert exported.outputs == tuple(expected)
        for output, wanted in zip(actual, expected.values(), strict=True):
            torch.testing.assert_close(output, torch.from_numpy(wanted), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["linear-scores", "cnn-rnn", "rma-style"])
@torch.no_grad()
def test_heads_with_states_are_traced_for_any_number_of_images(
    variant: str, tmp_path: Path
) -> None:
    """They begin with zeros for each image. To translate the traces takes a minute."""
    trained = checkpoint(variant, **({"steps": 2, "beams": 2} if variant == "cnn-rnn" else {}))
    with mock.patch("torch.onnx.export") as export:
        export.return_value.model_proto.SerializeToString.return_value = b""
        export_onnx(trained, tmp_path / "model.onnx")
    traced = export.call_args.args[0].module()
    for counts, instances in SHAPES[1:5]:
        batch = batch_of(trained, counts, instances)
        actual = traced(*map(torch.from_numpy, inputs(batch, counts).values()))
        for output, wanted in zip(actual, expected_outputs(trained, batch).values(), strict=True):
            torch.testing.assert_close(output, torch.from_numpy(wanted), rtol=0, atol=TOLERANCE)


def test_all_that_is_known_of_the_labels_is_in_the_model() -> None:
    trained = checkpoint("max-pool")
    buffers = dict(CacheToScores(trained.network(), trained.labels).named_buffers())
    known = {"label_vectors": "vectors", "ratio": "ratio", "conditional": "conditional"}
    for buffer, name in known.items():
        assert torch.equal(buffers[buffer], getattr(trained.labels, name))
    without = replace(trained, conditional=None)
    assert CacheToScores(without.network(), without.labels).conditional is None


def test_a_head_that_can_not_be_translated_is_named(tmp_path: Path) -> None:
    remedy = r"gmpipe predict.*"
    with pytest.raises(InputError, match=rf"`stubborn` of stubborn-s3 .*ONNX: \w+.*{remedy}"):
        export_onnx(checkpoint("stubborn"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_stable_sort_in_onnx(tmp_path: Path) -> None:
    """Ties keep their order in both directions, in float and integer keys."""

    class Sorts(torch.nn.Module):
        def forward(self, keys: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, ...]:
            up, down = (keys.sort(dim=1, stable=True, descending=d).indices for d in (False, True))
            return up, down, classes.sort(dim=1, stable=True).indices

    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (4, 50), generator=generator)
    inputs = (classes.float() / 2, classes)
    with quiet():
        program = torch.onnx.export(
            Sorts(),
            inputs,
            input_names=("keys", "classes"),
            custom_translation_table=TRANSLATIONS,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(tmp_path / "sorts.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "sorts.onnx")
    actual = session.run(None, {"keys": inputs[0].numpy(), "classes": inputs[1].numpy()})
    for indices, expected in zip(actual, Sorts()(*inputs), strict=True):
        assert np.array_equal(indices, expected.numpy())


def test_command(small: Flow) -> None:
    """A run on imported regions has no detector, but it can be exported."""
    small.ok("train", "--variant", "max-pool")
    with mock.patch("stages.console.progress._PHASE_DELAY", 0):
        done = small.gmpipe("export", "--run", "runs/voc2007/max-pool-s0")
    line = done.out
    phases = re.findall(r"^export, (.*): \d\d:\d\d$", done.err, re.MULTILINE)
    assert list(dict.fromkeys(phases)) == [
        "tracing the network",
        "translating it",
        "writing the file",
    ]
    assert line.startswith("voc2007-max-pool-s0.onnx: ")
    model = onnxruntime.InferenceSession(small / "voc2007-max-pool-s0.onnx").get_modelmeta()
    trained = load_checkpoint(small / "runs/voc2007/max-pool-s0/checkpoint.pt")
    assert model.custom_metadata_map["fingerprint"] == fingerprint(trained.recipe)
    assert "voc2007/max-pool-s0" in small.ok("runs", "list")  # it is still a run
    assert small.gmpipe("export", "--run", "runs/none").refused(r"runs/none/checkpoint\.pt")
    outcome = small.gmpipe("export", "--run", "runs/none", "-o", "model.pt")
    assert outcome.code == 2
    assert re.search(r"model\.pt.*\.onnx", outcome.err, re.DOTALL)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingError, match=r"pip install --editable '\.\[onnx\]'"):
        export_onnx(checkpoint("max-pool"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
