"""`gmpipe sweep`: one run per value and seed, the table, the CSV file and the figure."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from flows import Flow
from PIL import Image
from small import no_run_is_made, run_names, write_params

from pipeline.learning.checkpoint import load_checkpoint
from pipeline.report.figures import sweep_figure
from pipeline.report.sweeps import read_sweep

SEEDS = ("--seed", "0", "--seed", "1")
ALONE = ("--jobs", "1")
FILES = ["figure.png", "figure.svg", "results.csv", "sweep.json"]


def sweep(flow: Flow, *arguments: str) -> str:
    return flow.ok("sweep", *arguments, *ALONE)


def rows(flow: Flow, folder: str) -> list[dict[str, str]]:
    with (flow / "runs/voc2007/sweeps" / folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_each_value_and_seed_has_a_run_and_a_row(small: Flow) -> None:
    said = sweep(small, "network.modules=3,1,2", *SEEDS)
    written = rows(small, "network.modules")
    assert [(row["value"], row["seed"]) for row in written] == [
        (value, seed) for value in "123" for seed in "01"
    ]
    # params.yaml has two modules, so those runs are in folders without a hash.
    names = run_names(small)
    assert {"full-s0", "full-s1"} < names
    assert len(names) == 6
    of_value: dict[str, list[float]] = {}
    for name in names:
        folder = small / "runs/voc2007" / name
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        modules = str(checkpoint.settings.network.modules)
        [row] = [
            row for row in written if (row["value"], row["seed"]) == (modules, str(checkpoint.seed))
        ]
        assert row["variant"] == "full"
        assert row["setting"] == "network.modules"
        metrics = json.loads((folder / "metrics.json").read_text())
        for number in ("mAP", "CF1", "OF1"):
            assert float(row[number]) == metrics[number]
        of_value.setdefault(modules, []).append(metrics["mAP"])
    for value, maps in of_value.items():
        mean, spread = np.mean(maps), np.std(maps, ddof=1)
        assert re.search(rf"^\| {value} +\| {mean:.1f} ± {spread:.1f} +\|", said, re.MULTILINE)
    sweep_json = small / "runs/voc2007/sweeps/network.modules/sweep.json"
    for hashed in ("fingerprint", "train_sha256", "test_sha256"):
        assert getattr(read_sweep(sweep_json), hashed) == metrics[hashed]
    assert "18 images" in said
    assert "seeds 0, 1" in said


def test_runs_are_used_again_and_bytes_are_the_same_again(
    small: Flow, small_made: Flow, tmp_path: Path
) -> None:
    said = sweep(small, "loss.beta=0.0,0.4")
    before = small.bytes("runs")
    with no_run_is_made():
        assert said.endswith(sweep(small, "loss.beta=0.0,0.4"))
    assert small.bytes("runs") == before
    other = Flow(Path(shutil.copytree(small_made.folder, tmp_path / "other")))
    sweep(other, "loss.beta=0.0,0.4")
    assert other.bytes("runs") == before
    assert sorted(p.name for p in (small / "runs/voc2007/sweeps/loss.beta").iterdir()) == FILES
    # One more value trains one more run.
    assert sweep(small, "loss.beta=0.0,0.2,0.4").count(" epochs, loss ") == 1


def test_the_number_of_regions_is_swept_from_one_cache(small: Flow) -> None:
    cache = small.bytes("cache")
    sweep(small, "regions=1,2,3")
    maps = [row["mAP"] for row in rows(small, "regions")]
    assert len(set(maps)) == 3
    assert small.bytes("cache") == cache
    text = "".join(ET.parse(small / "runs/voc2007/sweeps/regions/figure.svg").getroot().itertext())
    assert "regions m" in text
    assert "voc2007, full, split imported/test" in text


def test_a_variant_and_further_settings(small: Flow) -> None:
    other = ("--set", "train.voc2007.variants.max-pool.epochs=1", "--variant", "max-pool")
    sweep(small, "variants.max-pool.optimizer=sgd,adamw", *other)
    written = rows(small, "max-pool-variants.max-pool.optimizer")
    assert [(row["variant"], row["value"]) for row in written] == [
        ("max-pool", "sgd"),
        ("max-pool", "adamw"),
    ]
    folders = [small / "runs/voc2007" / name / "checkpoint.pt" for name in run_names(small)]
    settings = [load_checkpoint(path).settings for path in folders]
    assert {(own.epochs, own.optimizer) for own in settings} == {(1, "sgd"), (1, "adamw")}
    write_params(small.folder, {"variants": {"max-pool": {"epochs": 3}}})
    sweep(small, "variants.max-pool.epochs=1,2", "--variant", "max-pool")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs", r"epochs: .*KEY=VALUE,VALUE.*network\.modules=1,2,3,4"),
        ("epochs=1", "epochs=1: .*KEY=VALUE,VALUE"),
        ("=1,2", "=1,2: .*KEY=VALUE,VALUE"),
        ("epochs=1,[", "KEY=VALUE,VALUE"),
        ("epochs=1,1", "epochs=1,1: .*value"),
        ("epocs=1,2", r"`train\.voc2007\.epocs`.*`epochs`"),
        (
            "modules=1,2",
            r"unknown setting `train\.voc2007\.modules`\. Did you mean `network\.modules`",
        ),
        ("network.epochs=1,2", r"`train\.voc2007\.network\.epochs`.*`train\.voc2007\.epochs`"),
        ("epochs=1,0", r"`train\.voc2007\.epochs` is 0"),
        ("train.voc2007.epochs=1,2", r"train\.voc2007\.train"),
        ("regions=2,50", r"train\.voc2007\.regions is 50\b.*\b3\b"),
        ("decisions.calibration=none,platt", r"decisions\.calibration.*`python -m benchmarks\.dec"),
    ],
)
def test_a_setting_that_cannot_be_swept_is_named_before_anything_is_made(
    small: Flow, setting: str, message: str
) -> None:
    assert small.gmpipe("sweep", setting).refused(message)
    assert not (small / "runs").exists()


def test_a_setting_that_the_variant_sets_itself_is_named(small: Flow) -> None:
    write_params(small.folder, {"variants": {"max-pool": {"epochs": 3}}})
    assert small.gmpipe("sweep", "epochs=1,2", "--variant", "max-pool").refused(
        r"epochs=1 .*max-pool.*`epochs`.*`variants\.max-pool\.epochs`"
    )
    for setting, why in (
        ("network.modules=1,2", "head `max-pool`.*no setting `network.modules`"),
        ("network.head=gm-mlic,max-pool", "head `max-pool`"),
    ):
        refused = small.gmpipe("sweep", setting, "--variant", "max-pool")
        assert refused.refused(f"max-pool.*{why}")
    assert small.gmpipe("sweep", "variants.max-pool.epochs=1,2").refused("same run of full")
    assert small.gmpipe("sweep", "epochs=1,2", "--variant", "maxpool").refused("max-pool")


# Which value is chosen ---------------------------------------------------------------------------


VALIDATED = ("--set", "train.voc2007.validation=0.3")


def test_the_validation_part_decides_and_never_the_test_split(small: Flow) -> None:
    best_epoch = ("--set", "train.voc2007.selection=best", "--set", "train.voc2007.epochs=3")
    outcome = small.gmpipe(
        "sweep", "learning_rate=0.0001,0.1", *SEEDS, *VALIDATED, *best_epoch, *ALONE
    )
    assert outcome.code == 0
    written = rows(small, "learning_rate")
    measured: dict[str, list[float]] = {}
    for name in run_names(small):
        checkpoint = load_checkpoint(small / "runs/voc2007" / name / "checkpoint.pt")
        # With `selection: best`, the result is the best of the epochs.
        value = max(row["validation_mAP"] for row in checkpoint.history)
        rate = str(checkpoint.settings.learning_rate)
        measured.setdefault(rate, []).append(value)
        [row] = [
            row for row in written if (row["value"], row["seed"]) == (rate, str(checkpoint.seed))
        ]
        assert float(row["validation_mAP"]) == value
    means = {value: float(np.mean(maps)) for value, maps in measured.items()}
    best, other = sorted(means, key=means.__getitem__, reverse=True)
    assert means[best] > means[other]
    assert re.search(rf"^\| {best} +\| {means[best]:.1f} ± \S+ \(best\) +\|", outcome.out, re.M)
    assert re.search(rf"^\| {other} +\| {means[other]:.1f} ± \S+ +\|", outcome.out, re.M)
    assert f"learning_rate={best}." in outcome.out
    assert "validation=0.2" not in outcome.err
    results = read_sweep(small / "runs/voc2007/sweeps/learning_rate/sweep.json")
    assert results.best() == [best]
    # Other numbers on the test split change nothing.
    flipped = [run.model_copy(update={"mAP": 100 - run.mAP}) for run in results.runs]
    assert results.model_copy(update={"runs": flipped}).best() == [best]
    swapped = {best: 1.0, other: 2.0}
    turned = [run.model_copy(update={"validation_mAP": swapped[run.value]}) for run in results.runs]
    assert results.model_copy(update={"runs": turned}).best() == [other]
    text = "".join(
        ET.parse(small / "runs/voc2007/sweeps/learning_rate/figure.svg").getroot().itertext()
    )
    for words in ("validation", "test", "best by validation"):
        assert words in text


def test_values_that_tie_are_all_marked(small: Flow) -> None:
    """With learning rates this small, the runs rank the images alike."""
    values = ("1e-9", "2e-9")
    outcome = small.gmpipe("sweep", f"learning_rate={','.join(values)}", *VALIDATED, *ALONE)
    maps = {row["validation_mAP"] for row in rows(small, "learning_rate")}
    assert len(maps) == 1
    assert outcome.out.count("(best)") == 2
    assert re.search(r"1e-09 and 2e-09 of learning_rate tie\b", outcome.out)
    assert "The best value" not in outcome.out


def test_without_a_validation_part_no_value_is_marked(small: Flow) -> None:
    outcome = small.gmpipe("sweep", "loss.beta=0.0,0.8", *ALONE)
    assert "best" not in outcome.out
    assert "--set train.voc2007.validation=0.2" in outcome.err
    assert "validation_mAP" not in rows(small, "loss.beta")[0]


@pytest.mark.parametrize("values", ["0.2,0.4", "0.0,0.3"])
def test_runs_that_are_validated_on_other_images_are_not_compared(small: Flow, values: str) -> None:
    outcome = small.gmpipe("sweep", f"validation={values}", *ALONE)
    assert outcome.code == 0
    assert "(best)" not in outcome.out
    assert "no value" in outcome.err


# The figure --------------------------------------------------------------------------------------


SVG = "{http://www.w3.org/2000/svg}"


def circles(path: Path) -> list[tuple[float, float]]:
    """Positions of the blue round markers: the means, then the one in the legend."""
    root = ET.parse(path).getroot()
    round_ones = {f"#{p.get('id')}" for p in root.iter(f"{SVG}path") if "C " in p.get("d", "")}
    return [
        (float(use.get("x", "")), float(use.get("y", "")))
        for use in root.iter(f"{SVG}use")
        if "fill: #0072b2" in use.get("style", "")
        and use.get("{http://www.w3.org/1999/xlink}href") in round_ones
    ]


def test_means_are_drawn_at_their_numbers(tmp_path: Path) -> None:
    maps = {"1": [50.0, 52.0], "2": [55.0, 57.0], "5": [53.0, 53.0]}
    sweep_figure(tmp_path / "figure", "network.modules", maps, title="here", numeric=True)
    (x1, y1), (x2, y2), (x5, y5), _in_legend = circles(tmp_path / "figure.svg")
    assert (x5 - x2) / (x2 - x1) == pytest.approx(3, rel=1e-3)
    assert (y5 - y1) / (y2 - y1) == pytest.approx(2 / 5, rel=1e-3)
    assert y2 < y1  # up is better
    text = "".join(ET.parse(tmp_path / "figure.svg").getroot().itertext())
    for words in ("convolution modules k", "mAP (%)", "here", "each seed"):
        assert words in text
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (825, 570)
        assert "Software" not in image.info
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.png", "figure.svg"]


def test_the_validation_map_is_the_first_line_and_its_best_has_a_ring(tmp_path: Path) -> None:
    maps = {"1": [50.0], "2": [55.0], "5": [53.0]}
    validation = {"1": [60.0], "2": [62.0], "5": [61.0]}
    sweep_figure(tmp_path / "figure", "epochs", maps, validation, title="here", numeric=True)
    (_, y1), (x2, y2), (_, y5), *_ = circles(tmp_path / "figure.svg")
    assert y2 < y5 < y1  # of the validation part: 62, 61, 60
    text = "".join(ET.parse(tmp_path / "figure.svg").getroot().itertext())
    for words in ("validation", "test", "best by validation"):
        assert words in text
    root = ET.parse(tmp_path / "figure.svg").getroot()
    [ring, _in_legend] = [
        use for use in root.iter(f"{SVG}use") if "stroke: #d55e00" in use.get("style", "")
    ]
    assert float(ring.get("x", "")) == pytest.approx(x2)
    assert float(ring.get("y", "")) == pytest.approx(y2)


def test_each_of_several_best_values_has_a_ring(tmp_path: Path) -> None:
    maps = {"1": [50.0], "2": [55.0], "5": [53.0]}
    validation = {"1": [62.0], "2": [60.0], "5": [62.0]}
    sweep_figure(tmp_path / "figure", "epochs", maps, validation, title="here", numeric=True)
    root = ET.parse(tmp_path / "figure.svg").getroot()
    rings = [u for u in root.iter(f"{SVG}use") if "stroke: #d55e00" in u.get("style", "")]
    assert len(rings) == 3  # one of them in the legend


def test_words_are_evenly_spaced_and_one_seed_has_no_bars(tmp_path: Path) -> None:
    maps = {"sgd": [50.0], "adamw": [60.0], "other": [70.0]}
    sweep_figure(tmp_path / "figure", "optimizer", maps, title="here", numeric=False)
    means = circles(tmp_path / "figure.svg")
    steps = np.diff([x for x, _ in means])
    assert len(means) == 3
    assert steps == pytest.approx([steps[0]] * 2)
    text = "".join(ET.parse(tmp_path / "figure.svg").getroot().itertext())
    assert "adamw" in text
    assert "each seed" not in text
