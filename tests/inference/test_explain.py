"""`gmpipe explain`: every change against the edge-by-edge reference, the picture, the tables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flows import Flow, unrendered
from matplotlib.axes import Axes
from PIL import Image
from reference import build_graph, convolve, decode, encode
from refusals import refused
from stand_in_heads import of_head, registered, untrained, with_statistics
from tiny import perturb
from torch import Tensor

from pipeline.api import Explanation, TrainedRun, explain, load_run
from pipeline.errors import InputError
from pipeline.formats.text import legible
from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching.convolution import Convolution
from pipeline.heads.matching.network import GmMlic
from pipeline.inference.picture import draw
from pipeline.learning.checkpoint import Checkpoint
from stages.commands.explain import _tables

TOLERANCE = 2e-5  # of a probability: float32 against float64


@pytest.fixture(scope="module")
def run(made: Flow) -> TrainedRun:
    """A run whose weights give every label another score, as a short training may not."""
    loaded = load_run(made / "runs/tiny/full-s0")
    network = loaded.checkpoint.network()
    perturb(network, seed=1)
    after = replace(loaded.checkpoint, state=with_statistics(network, loaded))
    return TrainedRun(after, loaded.detector, loaded.detector_classes, loaded._extract, loaded.name)


def changed(run: TrainedRun, shift: float = 0.0, **changes: Any) -> TrainedRun:
    """Change settings of the run's network that no weight depends on, and shift all its logits."""
    before: Checkpoint = run.checkpoint
    state = dict(before.state)
    state["decoder.mlp.second.bias"] = state["decoder.mlp.second.bias"] + shift
    regions = changes.pop("regions", before.settings.regions)
    network = before.settings.network.model_copy(update=changes)
    settings = before.settings.model_copy(update={"network": network, "regions": regions})
    after = replace(before, settings=settings, state=state)
    return TrainedRun(after, run.detector, run.detector_classes, run._extract)


def photograph(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 70))


def reference_scores(run: TrainedRun, batch: RegionBatch, kinds: tuple[str, ...]) -> Tensor:
    """Compute scores (C,) of one image, edge by edge in float64, without some kinds of edges."""
    network = run.checkpoint.network().double()
    assert isinstance(network, GmMlic)
    words = run.checkpoint.label_vectors.double()
    graph = build_graph(network, batch, 0, words)
    for kind in kinds:
        assert getattr(graph, kind)
        getattr(graph, kind).clear()
    graph = encode(network, graph)
    for module in network.convolutions:
        assert isinstance(module, Convolution)
        graph = convolve(module, graph)
    logits = decode(network, graph)
    of_label = [max(v for (_, j), v in logits.items() if j == label) for label in range(len(words))]
    return torch.stack(of_label).sigmoid()


@pytest.mark.parametrize("label_neighbors", [None, 3])
@torch.no_grad()
def test_every_change_equals_the_references(run: TrainedRun, label_neighbors: int | None) -> None:
    own = changed(run, shift=0.3, label_neighbors=label_neighbors)
    image = photograph()
    explanation = explain(own, image)
    batch = own.instances([image]).to(torch.device("cpu"), torch.float64)
    regions = int(batch.mask.sum())
    assert regions == 4
    scores = reference_scores(own, batch, ())
    assert explanation.predicted
    best = scores.sort(descending=True)
    names = [own.vocabulary[i] for i in best.indices[best.values > 0.5].tolist()]
    assert [label.label for label in explanation.labels] == names
    assert len(names) > 3
    without_label_graph = reference_scores(own, batch, ("label_edges",)) - scores
    without_instance_graph = reference_scores(own, batch, ("instance_edges",)) - scores
    without_region = []
    for region in range(regions):
        mask = batch.mask.clone()
        mask[0, region] = False
        without_region.append(reference_scores(own, replace(batch, mask=mask), ()) - scores)
    for label in explanation.labels:
        number = own.vocabulary.index(label.label)
        assert label.score == pytest.approx(scores[number].item(), abs=TOLERANCE)
        output = own.outputs(own.instances([image]))
        assert label.region == output.regions[0, :, number].argmax()
        assert label.said == pytest.approx(label.score, abs=1e-6)
        for actual, expected in (
            (label.label_graph, without_label_graph),
            (label.instance_graph, without_instance_graph),
        ):
            assert actual == pytest.approx(expected[number].item(), abs=TOLERANCE)
            assert abs(expected[number].item()) > 2 * TOLERANCE
        assert label.region_changes is not None
        expected_changes = [change[number].item() for change in without_region]
        assert label.region_changes.tolist() == pytest.approx(expected_changes, abs=TOLERANCE)
        order = [region for region, _ in label.most_influential(2, least=0)]
        assert order == np.argsort(-np.abs(label.region_changes))[:2].tolist()
        assert label.most_influential(4, least=2) == []


def test_a_graph_that_the_run_lacks_has_no_change(made: Flow, run: TrainedRun) -> None:
    [label, *_] = explain(load_run(made / "runs/tiny/max-pool-s0"), photograph()).labels
    assert (label.label_graph, label.instance_graph) == (None, None)
    assert label.region_changes is not None
    assert np.flatnonzero(label.region_changes).tolist() == [label.region]
    for lacking, present in (("label_graph", "instance_graph"), ("instance_graph", "label_graph")):
        network = run.checkpoint.settings.network.model_copy(update={lacking: False})
        [label, *_] = explain(untrained(run, network), photograph()).labels
        assert getattr(label, lacking) is None
        assert getattr(label, present) is not None
    [label, *_] = explain(changed(run, regions=1), photograph()).labels
    assert label.region_changes is None  # without its only region, nothing would be left
    assert label.instance_graph == 0  # the run has one, which has no edge here


@pytest.fixture
def _stand_in_heads() -> Iterator[None]:
    with registered():
        yield


def printed_tables(explanation: Explanation, run: TrainedRun) -> tuple[list[dict[str, str]], str]:
    """The rows of the table of labels, and all that is printed."""
    text = _tables(explanation, run)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    labels = len(explanation.labels)
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2 : 2 + labels]], text


def titles(explanation: Explanation, path: Path) -> str:
    """All titles of the picture's charts."""
    with unrendered(), mock.patch.object(Axes, "set_title", autospec=True) as title:
        draw(explanation, photograph(), "a photograph", path)
    return "\n".join(call.args[1] for call in title.call_args_list)


@pytest.mark.usefixtures("_stand_in_heads")
def test_a_head_that_tells_regions_not_apart_names_none(run: TrainedRun, tmp_path: Path) -> None:
    own = of_head(run, "plain")
    image = photograph()
    explanation = explain(own, image, labels=own.vocabulary[:3])
    [prediction] = own.predict([image])
    assert prediction.region_scores is None
    assert (prediction.regions == -1).all()
    assert prediction.pixel_box(-1) == (0, 0, *image.size)
    assert explanation.reads_regions
    assert explanation.attribution is None
    batch, number = own.instances([image]), {name: i for i, name in enumerate(own.vocabulary)}
    regions = int(batch.mask.sum())
    features = own.network.inputs.features(batch.features[0, :regions])
    said = features.double() @ own.network.second.weight.double().T
    for label in explanation.labels:
        assert (label.region, label.said) == (None, None)
        one = said[:, number[label.label]]
        assert label.region_changes is not None
        for region in range(regions):  # the mean of the others
            others = torch.cat([one[:region], one[region + 1 :]])
            change = others.mean().sigmoid() - one.mean().sigmoid()
            assert label.region_changes[region] == pytest.approx(change.item(), abs=TOLERANCE)
    rows, text = printed_tables(explanation, own)
    assert [row["region"] for row in rows] == ["the whole image"] * 3
    assert list(rows[0]) == ["label", "score", "region", "a region"]
    assert all(re.search(r"\d: [+-]0\.\d+", row["a region"]) for row in rows)
    assert "probability" not in text
    assert titles(explanation, tmp_path / "out.png").count("by the whole image") == 3


@pytest.mark.usefixtures("_stand_in_heads")
def test_the_weights_of_a_head_are_called_weights(run: TrainedRun, tmp_path: Path) -> None:
    own = of_head(run, "weighing")
    explanation = explain(own, photograph(), labels=own.vocabulary[:3])
    weights = explanation.prediction.region_scores
    assert weights is not None
    assert np.allclose(weights.sum(axis=0), 1, atol=1e-6)
    rows, text = printed_tables(explanation, own)
    drawn = titles(explanation, tmp_path / "out.png")
    for label, row in zip(explanation.labels, rows, strict=True):
        of_label = weights[:, own.vocabulary.index(label.label)]
        assert label.region == of_label.argmax()
        assert label.said == of_label.max()
        assert (row["region"], row["its weight"]) == (str(label.region), f"{of_label.max():.3f}")
        assert f"by region {label.region}, weight {of_label.max():.2f}" in drawn
    assert "probability" not in text


@pytest.mark.usefixtures("_stand_in_heads")
def test_where_the_whole_view_says_most_no_region_is_named(run: TrainedRun, tmp_path: Path) -> None:
    own = of_head(run, "whole-wins")
    explanation = explain(own, photograph(), labels=own.vocabulary[:4])
    rows, _ = printed_tables(explanation, own)
    drawn = titles(explanation, tmp_path / "out.png")
    for label, row in zip(explanation.labels, rows, strict=True):
        even = own.vocabulary.index(label.label) % 2 == 0
        assert (label.region is None) == even == (row["region"] == "the whole image")
        assert re.search(rf"{label.label}  0\.\d\d  by (.*)", drawn)[1] == (
            "the whole image" if even else f"region {label.region}"
        )


@pytest.mark.usefixtures("_stand_in_heads")
def test_a_head_that_reads_only_the_whole_view_reads_no_regions(
    run: TrainedRun, tmp_path: Path
) -> None:
    own = of_head(run, "only-whole")
    whole = torch.randn(1, own.checkpoint.feature_size, generator=torch.Generator().manual_seed(0))
    with mock.patch.object(
        TrainedRun, "instances", lambda *inputs: replace(of_image(*inputs), whole=whole)
    ):
        explanation = explain(own, photograph())
    assert not explanation.reads_regions
    assert all(label.region_changes is None for label in explanation.labels)
    rows, text = printed_tables(explanation, own)
    assert {row["a region"] for row in rows} == {"reads no regions"}
    assert "only-whole reads no regions" in text
    assert "detector" not in text  # no region is named
    draw(explanation, photograph(), "a photograph", tmp_path / "out.png")


of_image = TrainedRun.instances


def test_without_a_predicted_label_the_best_is_explained(run: TrainedRun) -> None:
    explanation = explain(changed(run, shift=-9), photograph())
    assert not explanation.predicted
    [label] = explanation.labels
    scores = explanation.prediction.scores
    assert label.label == run.vocabulary[scores.argmax()]
    assert label.score == scores.max() < 0.5


def test_labels_that_are_asked_for_are_explained_whatever_their_scores(
    run: TrainedRun, tmp_path: Path
) -> None:
    low, middle = (changed(run, shift=shift) for shift in (-9, 0.3))
    every = {one.label: one for one in explain(changed(run, shift=9), photograph()).labels}
    assert len(every) == len(run.vocabulary)
    worst = explain(low, photograph()).prediction.logits.argmin()
    names = [run.vocabulary[worst], run.vocabulary[0], run.vocabulary[0]]
    explanation = explain(low, photograph(), labels=names)
    assert explanation.asked
    assert not explanation.predicted
    scores = explanation.prediction.scores
    assert {one.label: one.score for one in explanation.labels} == {
        name: scores[run.vocabulary.index(name)] for name in names
    }
    assert [one.score for one in explanation.labels] == sorted(
        (one.score for one in explanation.labels), reverse=True
    )
    by_default = {one.label: one for one in explain(middle, photograph()).labels}
    name = next(iter(by_default))
    [one] = explain(middle, photograph(), labels=[name]).labels
    assert (one.score, one.label_graph) == (by_default[name].score, by_default[name].label_graph)
    with unrendered(), mock.patch.object(Axes, "set_title", autospec=True) as title:
        draw(explanation, photograph(), "title", tmp_path / "out.png")
    assert not any("best" in call.args[1] for call in title.call_args_list)
    for wrong, named in (("pyramide", ("'pyramid'",)), ("q9", run.vocabulary)):
        with refused(InputError, run.name, repr(wrong), *named):
            explain(run, photograph(), labels=["dog", wrong])


# The picture -------------------------------------------------------------------------------------


def drawn(explanation: Explanation, path: Path) -> tuple[int, int]:
    draw(explanation, photograph(), "a photograph: full, seed 0", path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert "Software" not in picture.info
        return picture.size


@pytest.mark.slow
def test_a_picture_of_any_number_of_labels(run: TrainedRun, tmp_path: Path) -> None:
    every = explain(changed(run, shift=9), photograph())
    none = explain(changed(run, shift=-9), photograph())
    assert len(every.labels) == len(run.vocabulary) > 10
    assert len(none.labels) == 1
    some = [none, *(replace(every, labels=every.labels[:number]) for number in (2, 4, 5, 10))]
    sizes = {
        len(one.labels): drawn(one, tmp_path / f"{len(one.labels)}.png") for one in (*some, every)
    }
    assert sizes[10] == sizes[18]  # more than ten are not drawn
    assert sizes[1][1] <= sizes[2][1] < sizes[4][1] < 1000  # in one column
    assert sizes[4][0] < sizes[5][0] < sizes[10][0]  # more columns
    for number in sizes:  # neither side ends far above the other
        with Image.open(tmp_path / f"{number}.png") as picture:
            drawn_on = np.asarray(picture.convert("L")) < 250
        left = round(picture.width * 0.3)
        for side in (drawn_on[:, :left], drawn_on[:, left:]):
            assert np.flatnonzero(side.any(axis=1)).max() > 0.7 * picture.height
    drawn(none, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "1.png").read_bytes()


# The command -------------------------------------------------------------------------------------


def test_command(made: Flow, tmp_path: Path) -> None:
    photo, output = tmp_path / "photo.png", tmp_path / "out/picture.png"
    photograph().save(photo)
    printed = made.ok("explain", str(photo), "--run", "runs/tiny/full-s0", "-o", str(output))
    explanation = explain(load_run(made / "runs/tiny/full-s0"), photograph())
    labels, regions, path = printed.split("\n\n")[-3:]
    assert path.strip() == str(output)
    assert output.read_bytes()[:4] == b"\x89PNG"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in labels.splitlines()[3:]]
    assert [(row[0], row[1], int(row[2])) for row in rows] == [
        (label.label, f"{label.score:.3f}", label.region) for label in explanation.labels
    ]
    assert rows[0][3] == f"{explanation.labels[0].label_graph:+.3f}"
    assert len(regions.splitlines()) > 2
    assert ("0.5" in printed.split("|")[0]) != explanation.predicted
    worst = load_run(made / "runs/tiny/full-s0").vocabulary[explanation.prediction.logits.argmin()]
    asked = ("--label", worst, "--label", rows[0][0])
    named = made.ok("explain", str(photo), "--run", "runs/tiny/full-s0", "-o", str(output), *asked)
    lines = named.split("\n\n")[-3].splitlines()[3:]
    assert [line.split("|")[1].strip() for line in lines] == [rows[0][0], worst]
    assert "0.5" not in named.split("|")[0]
    wrong = ("-o", str(output), "--label", "pyramide")
    outcome = made.gmpipe("explain", str(photo), "--run", "runs/tiny/full-s0", *wrong)
    assert outcome.refused("runs/tiny/full-s0.*'pyramide'.*'pyramid'")
    printed = made.ok("explain", str(photo), "--run", "runs/tiny/max-pool-s0", "-o", str(output))
    assert "graph" not in printed  # this head has none


def test_command_refuses(made: Flow, tmp_path: Path) -> None:
    run = ("--run", "runs/tiny/full-s0", "-o", str(tmp_path / "out.png"))
    assert made.gmpipe("explain", "absent.jpg", *run).refused(r"absent\.jpg")
    (tmp_path / "empty.jpg").touch()
    outcome = made.gmpipe("explain", str(tmp_path / "empty.jpg"), *run)
    assert outcome.refused(r"empty\.jpg.*empty")
    outcome = made.gmpipe("explain", "x.jpg", *run[:2], "-o", "out.gif")
    assert outcome.code == 2
    assert re.search(r"out\.gif.*\.png", outcome.err, re.DOTALL)
    assert not (tmp_path / "out.png").exists()


HARD = ["$5 bill$", "$", "a_b^{c}\\frac%", "_x", "\x1b[31m\0", "line\nbreak", "<i>&amp;", "x" * 300]
HARD += ["كلب", "猫 沙发", "कुत्ता", "👩\u200d🚀", "\udcff\ud800"]


def test_any_label_and_title_can_be_drawn(run: TrainedRun, tmp_path: Path) -> None:
    explanation = explain(changed(run, shift=9), photograph())
    for start in range(0, len(HARD), 7):
        hard = HARD[start : start + 7]
        labels = [
            replace(one, label=name)
            for one, name in zip(explanation.labels, hard, strict=False)  # the rest is not drawn
        ]
        drawn = replace(explanation, labels=tuple(labels))
        draw(drawn, photograph(), f"{legible(hard[0])}: tiny, full", tmp_path / f"{start}.png")
        with Image.open(tmp_path / f"{start}.png") as image:
            assert image.width >= 1000


def test_a_label_from_right_to_left_leaves_the_rest_of_its_line(
    run: TrainedRun, tmp_path: Path
) -> None:
    explanation = explain(changed(run, shift=-9), photograph())
    [label] = explanation.labels
    titles = {}
    for name in ("قطة", "שלום 5", "cat"):
        other = replace(explanation, labels=(replace(label, label=name),))
        with unrendered(), mock.patch.object(Axes, "set_title", autospec=True) as title:
            draw(other, photograph(), "title", tmp_path / "out.png")
        titles[name] = title.call_args.args[1]
    assert titles["cat"].startswith("cat  0.")
    for name in ("قطة", "שלום 5"):  # between marks that read from left to right
        assert titles[name].startswith(f"\u200e{name}\u200e  0.")


def test_a_photograph_of_any_name_is_explained(made: Flow, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"why\xff.png")
    photograph().save(tmp_path / "plain.png")
    for name in (b"\xff$%d$_{x}$ .png", b"a\n\x1b" + b"n" * 248 + b".png"):
        path = (tmp_path / "plain.png").rename(tmp_path / os.fsdecode(name))
        said = made.ok("explain", str(path), "--run", "runs/tiny/full-s0", "-o", str(output))
        assert said.endswith("why\\xff.png\n")
        output.unlink()
        path.rename(tmp_path / "plain.png")
