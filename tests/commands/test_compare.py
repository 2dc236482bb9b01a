"""`gmpipe compare` and `gmpipe report`: which runs are made, how, and which tables are printed."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from flows import BIN, Flow, started_commands, unrendered
from small import no_run_is_made, run_names, write_params

from pipeline.datasets.manifest import read_manifest
from pipeline.evaluation import bootstrap
from pipeline.evaluation.metrics import evaluate
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.settings import head_variants
from pipeline.settings.heads import HEADS

SEEDS = ("--seed", "0", "--seed", "1")
ALONE = ("--jobs", "1")


@pytest.fixture(scope="module")
def compared(small_made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """Two variants with two seeds each, and what was printed; to be read only."""
    folder = tmp_path_factory.mktemp("compared") / "flow"
    flow = Flow(Path(shutil.copytree(small_made.folder, folder)))
    (flow / "said.txt").write_text(flow.ok("compare", *SEEDS, *ALONE))
    return flow


@pytest.fixture
def runs(compared: Flow, tmp_path: Path) -> Flow:
    """The same, to be changed."""
    return Flow(Path(shutil.copytree(compared.folder, tmp_path / "runs")))


def metrics(flow: Flow, run: str) -> Any:
    return json.loads((flow / f"runs/voc2007/{run}/metrics.json").read_text())


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


# Which runs are made -----------------------------------------------------------------------------


def test_runs_that_exist_are_used_again(compared: Flow) -> None:
    said = (compared / "said.txt").read_text()
    assert run_names(compared) == {"full-s0", "full-s1", "max-pool-s0", "max-pool-s1"}
    assert said.count(" epochs, loss ") == 4
    before = compared.bytes("runs")
    with no_run_is_made():
        again = compared.ok("compare", *SEEDS)
    assert said.endswith(again)
    assert compared.bytes("runs") == before


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_run_that_is_trained_is_only_evaluated(small: Flow, jobs: str) -> None:
    small.ok("train")
    small.ok("compare", "--variant", "max-pool", "--seed", "0", *ALONE)
    (small / "runs/voc2007/max-pool-s0/metrics.json").write_text("{}")
    names = ("full-s0", "max-pool-s0")
    trained = {name: small.bytes(f"runs/voc2007/{name}/checkpoint.pt") for name in names}
    times = small / ".state/times/voc2007.csv"
    before = times.read_text()
    said = small.ok("compare", "--seed", "0", "--jobs", jobs)
    assert " epochs, loss " not in said
    assert "finished already" not in said  # neither is evaluated
    assert sorted(re.findall(r"(\S+): mAP \d", said)) == [
        "runs/voc2007/full-s0",
        "runs/voc2007/max-pool-s0",
    ]
    later = times.read_text().removeprefix(before)
    assert sorted(line.split(",")[:2] for line in later.splitlines()) == [
        ["evaluate", "full-s0"],
        ["evaluate", "max-pool-s0"],
    ]
    for name, content in trained.items():
        assert small.bytes(f"runs/voc2007/{name}/checkpoint.pt") == content


def test_a_run_of_other_settings_labels_or_regions_is_made_again(small: Flow) -> None:
    chosen = ("compare", "--variant", "max-pool", "--seed", "0", *ALONE)
    small.ok(*chosen)
    made = "max-pool-s0: "
    assert made not in small.ok(*chosen)
    write_params(small.folder, {"clip_norm": 4.0})
    assert made in small.ok(*chosen)
    with np.load(small / "regions.npz") as arrays:
        changed = {**arrays, "labels": np.roll(arrays["labels"], 1, axis=1)}
    np.savez(small / "regions.npz", **changed)
    small.ok("import-regions", "regions.npz", "--replace")
    assert made in small.ok(*chosen)
    (small / "runs/voc2007/max-pool-s0/metrics.json").write_text("{}")
    assert made in small.ok(*chosen)
    (small / "runs/voc2007/max-pool-s0/checkpoint.pt").unlink()
    assert made in small.ok(*chosen)
    assert made not in small.ok(*chosen)


@pytest.mark.slow
def test_processes_make_the_same_runs(small: Flow, small_made: Flow, tmp_path: Path) -> None:
    """Both have one thread each, so that the bytes are the same."""
    other = Flow(Path(shutil.copytree(small_made.folder, tmp_path / "other")))
    chosen = ("compare", *SEEDS, "--variant", "max-pool")
    done = other.installed(*chosen, "--jobs", "2")
    assert done.code == 0, done.err
    with mock.patch("stages.commands.compare.run_jobs", side_effect=AssertionError):
        small.ok(*chosen, *ALONE)
    assert other.bytes("runs") == small.bytes("runs")
    times = (other / ".state/times/voc2007.csv").read_text()
    for run in ("max-pool-s0", "max-pool-s1"):
        for stage in ("train", "evaluate"):
            assert times.count(f"\n{stage},{run},") == 1
    assert "2/2" in done.err
    assert "step/s" not in done.err  # the processes draw no bars of their own
    assert "gmpipe progress" not in done.err


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_run_that_fails_is_named_and_the_others_stay(small: Flow, jobs: str) -> None:
    small.ok("train")
    mine = {"learning_rate": 1e30, "clip_norm": 1e30}
    write_params(small.folder, {"variants": {"mine": mine}}, variants=["mine", "full"])
    failed = small.gmpipe("compare", "--seed", "0", "--jobs", jobs)
    assert failed.refused(
        r"\b1 of 2\b.*\nruns/voc2007/mine-s0: .*\bmine, seed 0\b.* step 2\b.*"
        r"train\.voc2007\.learning_rate"
    )
    assert failed.err.count("mine, seed 0") == 1
    assert re.search(r"^runs: 100% 2/2 ", failed.err, re.MULTILINE)
    assert "gmpipe progress" not in failed.err
    assert re.search(r"^runs/voc2007/full-s0: mAP \d", failed.out, re.MULTILINE)
    assert run_names(small) == {"full-s0"}
    with no_run_is_made():
        small.ok("compare", "--variant", "full", "--seed", "0")


def test_variants_are_checked_before_anything_is_made(small: Flow) -> None:
    assert small.gmpipe("compare", "--variant", "fulll").refused("fulll.*`full`")
    assert not (small / "runs").exists()


def test_heads_are_compared_by_name_beside_variants(compared: Flow, small: Flow) -> None:
    def variants(*options: str) -> list[str]:
        with mock.patch("stages.commands.compare.compare", return_value="") as compare:
            compared.ok("compare", *options)
        return list(compare.call_args.args[1])

    assert variants() == ["full", "max-pool"]
    assert variants("--heads", "max-pool") == ["max-pool"]
    assert variants("--heads", "gm-mlic, max-pool") == ["full", "max-pool"]
    assert variants("--heads", "max-pool,full,max-pool") == ["max-pool", "full"]
    assert variants("--heads", "all") == head_variants()
    both = variants("--variant", "without-label-graph", "--heads", "max-pool")
    assert both == ["without-label-graph", "max-pool"]
    assert small.gmpipe("compare", "--heads", "full,max-pol").refused("'max-pol'.*`max-pool`")
    assert small.gmpipe("compare", "--heads", "full,").refused(r"--heads: unknown head ''")
    assert not (small / "runs").exists()
    mine = ("--set", "train.voc2007.variants.mine.epochs=1")  # of one's own
    assert variants("--heads", "mine,max-pool", *mine) == ["mine", "max-pool"]
    assert small.gmpipe("compare", "--heads", "min", *mine).refused("'min'.*`mine`")


def test_published_settings_are_compared_beside_our_own(compared: Flow) -> None:
    entry = replace(HEADS["max-pool"], further=("max-pool-published",))
    published = {"max-pool-published": {"epochs": 1, "network": {"head": "max-pool"}}}
    with (
        mock.patch.dict(HEADS, {"max-pool": entry}),
        mock.patch.dict("pipeline.settings.max_pool.VARIANTS", published),
        mock.patch("stages.commands.compare.compare", return_value="") as compare,
    ):
        compared.ok("compare", "--published")
        assert compare.call_args.args[1] == ["full", "max-pool", "max-pool-published"]
        compared.ok("compare", "--heads", "max-pool", "--published")
        assert compare.call_args.args[1] == ["max-pool", "max-pool-published"]
        none = compared.gmpipe("compare", "--variant", "full", "--published")
        assert compare.call_args.args[1] == ["full"]
    assert re.search("Note: .*--published", none.err)


# Processes ---------------------------------------------------------------------------------------


def endless(folder: Path, *variants: str) -> None:
    """Variants whose training won't end while a test runs."""
    write_params(folder, {"variants": {name: {"epochs": 1_000_000} for name in variants}})


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(flow: Flow) -> int:
    """Trainings that have begun: each holds the lock of its folder."""
    return len(list((flow / "runs/voc2007").glob(".*.lock")))


@contextlib.contextmanager
def started(flow: Flow, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [BIN / "gmpipe", *arguments],
        cwd=flow.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever started the tests in the background may have made all of them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        try:
            yield command
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(small: Flow, number: signal.Signals) -> None:
    """Ctrl-C goes to the command's process group, as a terminal sends it; a kill to it alone.

    `tests/workers/test_jobs.py` has the same with quicker commands.
    """
    endless(small.folder, "full", "max-pool")
    with started(small, "compare", "--seed", "0", "--jobs", "2") as command:
        wait_for(lambda: begun(small) == 2)
        children = started_commands(command.pid)
        assert len(children) == 2
        if number == signal.SIGINT:
            os.killpg(command.pid, number)
        else:
            command.send_signal(number)
        _, said = command.communicate(timeout=30)
        assert command.returncode == (130 if number == signal.SIGINT else -number)
        assert "Traceback" not in said
        _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_named(small: Flow) -> None:
    endless(small.folder, "full")
    with started(small, "compare", "--seed", "0", "--jobs", "2") as command:
        wait_for(lambda: run_names(small) == {"max-pool-s0"} and begun(small) == 2)
        wait_for(lambda: len(started_commands(command.pid)) == 1)
        started_commands(command.pid)[0].kill()
        _, said = command.communicate(timeout=30)
    assert command.returncode == 1
    assert re.search(r"\b1 of 2\b.*\nruns/voc2007/full-s0: .*SIGKILL.*--jobs", said)


# Tables ------------------------------------------------------------------------------------------


def scores(flow: Flow, run: str) -> np.ndarray:
    table = pq.read_table(flow / f"runs/voc2007/{run}/predictions.parquet")
    return np.array(table.column("logits").to_pylist())


def test_the_difference_from_full_is_that_of_the_predictions(compared: Flow) -> None:
    said = (compared / "said.txt").read_text()
    manifest = read_manifest(compared / "data/voc2007/prepared/manifest.parquet")
    truth = manifest.truth("test")
    runs = {run: scores(compared, run) for run in run_names(compared)}
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(bootstrap.RESAMPLES):
        drawn = rng.integers(len(truth), size=len(truth))
        maps = {
            run: evaluate(of_run[drawn], truth[drawn], manifest.vocabulary).mAP
            for run, of_run in runs.items()
        }
        differences.append(
            np.mean([maps[f"max-pool-s{seed}"] - maps[f"full-s{seed}"] for seed in (0, 1)])
        )
    values = {run: metrics(compared, run)["mAP"] for run in run_names(compared)}
    mean = np.mean([values[f"max-pool-s{seed}"] - values[f"full-s{seed}"] for seed in (0, 1)])
    bias = np.mean(differences) - mean
    low, high = np.quantile(differences, [0.025, 0.975]) - 2 * bias
    rows = section(said, "Difference from full").strip().splitlines()
    assert re.search(rf"\b{bootstrap.RESAMPLES}\b.*\b18\b", rows[0])
    assert [cell.strip() for cell in rows[-1].split("|")[1:-1]] == [
        "max-pool",
        f"{mean:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
    ]


def test_another_base_turns_the_difference_round(compared: Flow) -> None:
    def difference(*options: str) -> list[str]:
        said = compared.ok("compare", *SEEDS, *options)
        [row] = re.findall(r"^\| [\w-]+ +\| [+-]\d.*$", said, re.MULTILINE)
        return [cell.strip() for cell in row.split("|")[1:-1]]

    usual = difference()
    assert difference("--base", "full") == usual
    name, mean, interval = difference("--base", "max-pool")
    assert name == "full"
    assert float(mean) == -float(usual[1])
    low, high = map(float, usual[2].split(" to "))
    assert interval == f"{-high:+.2f} to {-low:+.2f}"
    said = compared.ok("compare", *SEEDS, "--base", "max-pool")
    assert "| mAP - max-pool " in section(said, "Difference from max-pool")
    refused = compared.gmpipe("compare", *SEEDS, "--variant", "full", "--base", "max-pool")
    assert refused.refused(r"--base.*'max-pool'.*full.*--variant max-pool")


def test_no_difference_is_printed_of_a_variant_alone(compared: Flow) -> None:
    for variant in ("full", "max-pool"):
        said = compared.ok("compare", "--variant", variant, "--seed", "0", *ALONE)
        assert "Difference" not in said
        assert "seed 0" in said


def test_predictions_of_other_images_are_named(runs: Flow) -> None:
    path = runs / "runs/voc2007/max-pool-s0/predictions.parquet"
    named = r"max-pool-s0/predictions\.parquet\b.*`gmpipe evaluate .*--variant max-pool"
    table = pq.read_table(path)
    for damage in (
        lambda: pq.write_table(table.take(list(range(17, -1, -1))), path),
        lambda: path.write_bytes(b"damaged"),
        path.unlink,
    ):
        damage()
        assert runs.gmpipe("compare", "--seed", "0").refused(named)


def test_the_results_say_what_a_network_costs(compared: Flow, tmp_path: Path) -> None:
    results = section((compared / "said.txt").read_text(), "Results")
    assert re.search(r"\| parameters +\| training, s +\|\n", results)
    costs = re.findall(
        r"^\| (full|max-pool) .*\| ([\d,]+) +\| ([\d.]+) +\|$", results, re.MULTILINE
    )
    assert [variant for variant, *_ in costs] == ["full", "max-pool"]
    with (compared / ".state/times/voc2007.csv").open(newline="") as stream:
        lines = [line for line in csv.DictReader(stream) if line["stage"] == "train"]
    taken = {line["run"]: float(line["seconds"]) for line in lines}
    for variant, parameters, seconds in costs:
        mean = np.mean([taken[f"{variant}-s{seed}"] for seed in (0, 1)])
        assert float(seconds) == pytest.approx(mean, abs=0.06)
        checkpoint = load_checkpoint(compared / f"runs/voc2007/{variant}-s0/checkpoint.pt")
        learned = [name for name in checkpoint.state if name.endswith((".weight", ".bias"))]
        assert int(parameters.replace(",", "")) == sum(
            checkpoint.state[name].numel() for name in learned
        )
        assert [name for name in checkpoint.state if name not in learned]  # buffers are there
    # Nothing depends on the file of times.
    flow = Flow(Path(shutil.copytree(compared.folder, tmp_path / "flow")))
    shutil.rmtree(flow / ".state")
    assert re.search(r"\| full .*\| -  +\|\n", flow.ok("compare", *SEEDS))


def test_the_caption_says_over_how_many_labels_the_map_is(compared: Flow) -> None:
    said = (compared / "said.txt").read_text()
    assert re.search(
        r"\bvoc2007\b.* imported/test\b.* 18 images\b.* mAP\b.* 19 of 20 labels\b.* seeds 0, 1\n",
        said,
    )


def test_the_papers_rows_and_what_differs_stand_beside_ours(compared: Flow) -> None:
    said = compared.ok("compare", "--seed", "0", *ALONE)
    beside = section(said, "Comparison with the paper")
    ours = metrics(compared, "full-s0")["mAP"]
    assert re.search(
        rf"\| GM-MLIC +\| ours: full +\| {ours:.1f} +\|\n\| GM-MLIC +\| paper +\| 94.7", beside
    )
    assert re.search(r"\| TSGCN +\| not reproduced +\| - +\|\n\| TSGCN +\| paper +\| 94.3", beside)
    assert re.search(r"^- TSGCN: .*\.$", beside, re.MULTILINE)
    assert "MLIC-KD-WSD" not in beside  # which has no results on VOC 2007
    for words in (
        r"- Detector: .*\bnpz\b",
        r"- Images: .*\b30\b.*\b18\b.*\b5,011\b.*\b4,952\b",
        "- Augmentation: ",
        r"- Label vectors: .*vectors\.npz",
        r"- Length of training: 2 epochs.*\b16\b",
        r"\bregions 3 .*\b10\b.*network\.latent_size 4 .*\b512\b.*network\.node_norm True",
        r"\bfull-s0\b",
        r"- Method of max-pool: .*docs/heads\.md",
    ):
        assert re.search(words, beside), words
    assert "learning_rate" not in beside
    labels = section(said, "Average precision by label")
    assert re.search(r"\| tvmonitor +\| - +\| - +\| 94.9 +\|", labels)


# The report --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(compared: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """The runs with their report; to be read only."""
    flow = Flow(tmp_path_factory.mktemp("reported"))
    shutil.copytree(compared.folder, flow.folder, dirs_exist_ok=True)
    with unrendered():
        (flow / "said.txt").write_text(flow.ok("report"))
    return flow


def test_the_report_has_tables_and_their_numbers(reported: Flow) -> None:
    said = (reported / "said.txt").read_text()
    written = (reported / "reports/voc2007/tables/results.md").read_text()
    assert said == f"{written}\nreports/voc2007/index.html\n"
    with (reported / "reports/voc2007/tables/results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["variant"], row["seed"]) for row in rows] == [("full", "0"), ("max-pool", "0")]
    for row in rows:
        of_run = metrics(reported, f"{row['variant']}-s0")
        for name in ("mAP", "mAP11", "CP", "CR", "CF1", "OP", "OR", "OF1"):
            assert float(row[name]) == of_run[name]
        for group in ("top3", "top3_forced"):
            for name in ("CP", "CR", "CF1", "OP", "OR", "OF1"):
                assert float(row[f"{group}_{name}"]) == of_run[group][name]
    with (reported / "reports/voc2007/tables/labels.csv").open(newline="") as stream:
        labels = list(csv.DictReader(stream))
    assert len(labels) == 2 * 20
    printed = {row["label"]: row["AP"] for row in labels if row["variant"] == "full"}
    expected = metrics(reported, "full-s0")["AP"]
    assert printed == {name: "" if ap is None else str(ap) for name, ap in expected.items()}


def test_removed_variants_leave_the_report(reported: Flow, tmp_path: Path) -> None:
    flow = Flow(Path(shutil.copytree(reported.folder, tmp_path / "flow")))
    assert "max-pool" in (flow / "said.txt").read_text()
    write_params(flow.folder, variants=["full"], seeds=[1])
    said = flow.ok("--quiet", "report")
    assert said == (flow / "reports/voc2007/tables/results.md").read_text() + "\n"
    assert "max-pool" not in said
    assert "seed 1" in said
    for name, content in flow.bytes("reports").items():
        assert b"max-pool" not in content, name
        if name.endswith(("/results.csv", "/labels.csv")):
            assert b"full,0," not in content, name


def test_a_report_without_all_runs_says_how_to_make_them(small: Flow) -> None:
    write_params(small.folder, seeds=[4, 7])
    small.ok("compare", "--seed", "4", *ALONE)
    failed = small.gmpipe("report")
    assert failed.refused(
        r"runs/voc2007/full-s7/metrics\.json.*`gmpipe compare --dataset voc2007 "
        r"--seed 4 --seed 7`.*`gmpipe train .*--seed 7`"
    )
    # What is there can be shown; a list that was given takes the other one's place.
    failed = small.gmpipe("report", "--set", "seeds=[4,7]", "--set", "train.voc2007.epochs=2")
    [shown] = re.findall("`(gmpipe report [^`]*)`", failed.err)
    assert "seeds=[4,7]" not in shown
    assert "--set train.voc2007.epochs=2 --set 'seeds=[4]'" in shown
    # So can runs of other variants, such as those of `compare --heads`.
    assert re.search(r"variants=\[.*`gmpipe runs list --dataset voc2007`", failed.err, re.S)
    failed = small.gmpipe("report")
    [remedy] = re.findall("`gmpipe (compare [^`]*)`", failed.err)
    small.ok(*remedy.split(), *ALONE)
    assert run_names(small) == {f"{name}-s{seed}" for name in ("full", "max-pool") for seed in "47"}


def test_a_run_of_older_settings_is_not_reported(runs: Flow) -> None:
    write_params(runs.folder, {"learning_rate": 0.02})
    named = r"full-s0 .*`learning_rate` .*0\.01\b.*0\.02\b.*gmpipe train .*--variant full --seed 0"
    assert runs.gmpipe("report").refused(named)


def test_runs_of_two_caches_don_t_share_a_table(runs: Flow) -> None:
    path = runs / "runs/voc2007/max-pool-s0/metrics.json"
    write_sealed_json(path, {**read_sealed_json(path), "fingerprint": "other"})
    assert runs.gmpipe("report").refused(
        r"max-pool-s0 .*full-s0 .*`fingerprint` .* other\b.*"
        r"gmpipe train --dataset voc2007 --variant max-pool"
    )


def test_damaged_metrics_are_named(runs: Flow) -> None:
    path = runs / "runs/voc2007/full-s0/metrics.json"
    for content in ("{", "[1]", "{}"):
        path.write_text(content)
        named = r"full-s0/metrics\.json .*`gmpipe evaluate --dataset voc2007"
        assert runs.gmpipe("report").refused(named)
