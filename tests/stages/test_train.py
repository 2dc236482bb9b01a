"""`gmpipe train`, and what `evaluate` makes of its runs, on the toy problem of `toys`."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
from flows import ROOT, Flow
from ruamel.yaml import YAML
from toys import KILLED_AT, RECIPE, Killed, copied, killed_after, make_checkout, make_toy

from pipeline.files import sha256_file, sha256_json
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.losses import compute_loss
from pipeline.learning.training import train_network

TRAINED = {"checkpoint.pt", "history.csv", "settings.yaml"}
EVALUATED = {"predictions.parquet", "metrics.json", "summary.json"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A checkout with a run that was trained undisturbed, and evaluated; to be read only."""
    changes: dict[str, Any] = {"validation": 0.25, "training_share": 0.8, "selection": "best"}
    network = {"latent_size": 8, "neighbors": 2, "dropout": 0.2}
    flow = make_checkout(tmp_path_factory.mktemp("checkout"), network=network, **changes)
    said = flow.ok("train")
    assert re.search(r"full-s0: 4 epochs, loss \d\.\d{3}.* \d+\.\d %\n", said)
    flow.ok("evaluate")
    return flow


def killed(flow: Flow, step: int, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(step), where],
        cwd=flow.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(checkout: Flow, tmp_path: Path) -> None:
    """Each process continues the 8 steps of 4 epochs where the one before it was killed."""
    flow = copied(checkout, tmp_path)
    for step, where, done in (
        (3, "step", (1, 1)),
        (2, "saving", (2, 0)),
        (99, "checkpoint", (4, 0)),
    ):
        killed(flow, step, where)
        [state] = [path for path in (flow / ".state").iterdir() if path.suffix == ".pt"]
        position = torch.load(state, weights_only=True)["position"]
        assert (len(position["history"]), position["steps"]) == done
        assert not (flow / "runs/toy/full-s0/checkpoint.pt").exists()
    flow.ok("train")
    left = {path.name if path.is_dir() else path.suffix for path in (flow / ".state").iterdir()}
    assert left == {"times"}
    flow.ok("evaluate")
    assert changed(checkout.bytes("runs"), flow.bytes("runs")) == []


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Files that differ, of the same names."""
    assert after.keys() == before.keys()
    return [name for name in before if after[name] != before[name]]


def test_a_killed_training_continues_where_it_was(checkout: Flow, tmp_path: Path) -> None:
    """Here the end of the process is an exception, at the moments of the slow test."""
    flow = copied(checkout, tmp_path)
    settings = {"save_every": 0}

    def cut_off(name: str, target: Any) -> Any:
        return mock.patch(f"stages.train.{name}", target)

    eager = cut_off("train_network", partial(train_network, **settings))
    for step, done in ((3, (1, 1)), (2, (2, 1))):
        loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(step))
        with eager, loss, pytest.raises(Killed):
            flow.gmpipe("train")
        [state] = (flow / ".state").glob("*.pt")
        position = torch.load(state, weights_only=True)["position"]
        assert (len(position["history"]), position["steps"]) == done
    with eager, cut_off("save_checkpoint", mock.Mock(side_effect=Killed)), pytest.raises(Killed):
        flow.gmpipe("train")
    assert not (flow / "runs/toy/full-s0/checkpoint.pt").exists()
    assert flow.ok("train").startswith(
        "full-s0: all 8 steps had been done before\nruns/toy/full-s0: "
    )
    assert {path.name for path in (flow / ".state").iterdir()} == {"times"}
    flow.ok("evaluate")
    assert changed(checkout.bytes("runs"), flow.bytes("runs")) == []


def test_ctrl_c_saves_the_step_that_is_being_done(checkout: Flow, tmp_path: Path) -> None:
    """Here in the third of 8 steps, and a second time in the sixth."""
    flow = copied(checkout, tmp_path)
    for step, done in ((3, 3), (3, 6)):
        with mock.patch("pipeline.learning.steps.compute_loss", pressing_ctrl_c_in(step)):
            stopped = flow.gmpipe("train")
        assert stopped.code == 130
        assert f"stopped at step {done} of 8, which is saved" in stopped.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert flow.ok("train").startswith("full-s0: resumed at step 6 of 8\n")
    flow.ok("evaluate")
    assert changed(checkout.bytes("runs"), flow.bytes("runs")) == []


def pressing_ctrl_c_in(step: int, times: int = 1) -> Callable[..., torch.Tensor]:
    """A loss in whose nth step Ctrl-C is pressed."""
    steps = itertools.count(1)

    def loss(*inputs: Any) -> torch.Tensor:
        if next(steps) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return compute_loss(*inputs)

    return loss


def test_a_second_ctrl_c_does_not_wait(checkout: Flow, tmp_path: Path) -> None:
    flow = copied(checkout, tmp_path)
    with mock.patch("pipeline.learning.steps.compute_loss", pressing_ctrl_c_in(3, times=2)):
        stopped = flow.gmpipe("train")
    assert stopped.code == 130
    assert "step" not in stopped.err.splitlines()[-1]
    assert list((flow / ".state").glob("*.pt")) == []


def test_ctrl_c_ends_a_comparison_and_not_only_its_run(checkout: Flow, tmp_path: Path) -> None:
    flow = copied(checkout, tmp_path)
    with mock.patch("pipeline.learning.steps.compute_loss", pressing_ctrl_c_in(3)):
        stopped = flow.gmpipe("compare", "--seed", "1", "--seed", "2", "--jobs", "1")
    assert stopped.code == 130
    assert "stopped at step 3 of 8" in stopped.err
    assert not (flow / "runs/toy/full-s2").exists()


def test_too_few_steps_are_noted_before_the_first_epoch(checkout: Flow, tmp_path: Path) -> None:
    """Of the 42 images, 26 are trained on in batches of 16."""
    flow = copied(checkout, tmp_path)
    said = flow.gmpipe("train").err.splitlines()
    hint = next(line for line in said if re.search(r"\b4 epochs of 2 steps\b.* 8 steps", line))
    assert "`epochs: 250`" in hint
    assert "`--set train.toy.epochs=250`" in hint
    # The one above has no effect on a variant that sets its epochs itself.
    assert "`--set train.toy.variants.VARIANT.epochs=250`" in hint
    assert said.index(hint) < next(n for n, line in enumerate(said) if "100%" in line)
    one = flow.gmpipe("train", "--set", "train.toy.epochs=1", "--set", "train.toy.batch_size=32")
    assert "1 epoch of 1 step is 1 step," in one.err
    with mock.patch("stages.train.FEW_STEPS", 8):
        assert "Note" not in flow.gmpipe("train").err


def test_the_settings_of_a_run_lie_beside_its_checkpoint(checkout: Flow, tmp_path: Path) -> None:
    flow = copied(checkout, tmp_path)
    flow.ok("train", "--seed", "3", "--set", "train.toy.epochs=1", "--set", "extract.toy.views=1")
    for top, folder, epochs, views, seed in (
        (checkout, checkout / "runs/toy/full-s0", 4, 2, 0),
        (flow, next((flow / "runs/toy").glob("full-s3-*")), 1, 1, 3),
    ):
        written = YAML(typ="safe").load(folder / "settings.yaml")
        settings = load_checkpoint(folder / "checkpoint.pt").settings
        assert settings.epochs == epochs
        digest = written.pop("sha256")
        assert digest == sha256_json(written)
        assert written.pop("checkpoint_sha256") == sha256_file(folder / "checkpoint.pt")
        assert written == {
            "dataset": "toy",
            "variant": "full",
            "seed": seed,
            "views": views,
            "settings": settings.model_dump(mode="json", exclude={"variants"}),
        }, top


def test_a_folder_that_cannot_be_written_is_named_before_the_first_epoch(
    checkout: Flow, tmp_path: Path
) -> None:
    flow = copied(checkout, tmp_path)
    (flow / "runs/toy").mkdir(parents=True)
    (flow / "runs/toy/full-s0").write_text("a file in its place")
    with mock.patch("pipeline.learning.steps.compute_loss", side_effect=AssertionError):
        assert flow.gmpipe("train").refused("runs/toy/full-s0")
    assert (flow / "runs/toy/full-s0").read_text() == "a file in its place"


def test_the_chosen_epoch_is_written_down(checkout: Flow) -> None:
    run = checkout / "runs/toy/full-s0"
    with (run / "history.csv").open() as stream:
        measured = [float(row["validation_mAP"]) for row in csv.DictReader(stream)]
    best = measured.index(max(measured)) + 1
    assert load_checkpoint(run / "checkpoint.pt").epoch == best
    assert json.loads((run / "metrics.json").read_text())["epoch"] == best
    assert {path.name for path in run.iterdir()} == TRAINED | EVALUATED


def test_a_new_checkpoint_removes_the_numbers_of_the_old_one(
    checkout: Flow, tmp_path: Path
) -> None:
    flow = Flow(Path(shutil.copytree(checkout.folder, tmp_path / "checkout")))
    flow.ok("train")
    assert {path.name for path in (flow / "runs/toy/full-s0").iterdir()} == TRAINED
    assert flow.gmpipe("report").refused("runs/toy/full-s0/metrics.json")


def test_a_diverged_run_leaves_its_last_good_weights(checkout: Flow, tmp_path: Path) -> None:
    flow = copied(checkout, tmp_path)
    flow.ok("train", "--set", "train.toy.epochs=1")
    [run] = (flow / "runs/toy").glob("full*")
    before = flow.bytes(str(run.relative_to(flow.folder)))
    # In its second epoch, the same training meets a loss that is not finite.
    losses = 0

    def loss(*inputs: Any) -> torch.Tensor:
        nonlocal losses
        losses += 1
        return compute_loss(*inputs) * (math.nan if losses == 4 else 1)

    broken = mock.patch("pipeline.learning.steps.compute_loss", loss)
    with broken:
        assert flow.gmpipe("train").refused(
            r"\bfull, seed 0\b.* step 4 .*epoch 2.*\bnan\b.*"
            r"runs/toy/full-s0/checkpoint-last-good\.pt .*epoch 1\b.*"
            r"train\.toy\.learning_rate.* train\.toy\.clip_norm"
        )
    assert list(flow.folder.glob(".state/*.*")) == []
    left = flow / "runs/toy/full-s0"
    assert {path.name for path in left.iterdir()} == {"checkpoint-last-good.pt", "history.csv"}
    good, plain = (
        load_checkpoint(path) for path in (left / "checkpoint-last-good.pt", run / "checkpoint.pt")
    )
    assert good.epoch == plain.epoch == 1
    for key, value in plain.state.items():
        assert torch.equal(good.state[key], value)
    assert (left / "history.csv").read_bytes() == (run / "history.csv").read_bytes()
    # A later success removes them, and a failure keeps the checkpoint that exists.
    flow.ok("train")
    assert {path.name for path in left.iterdir()} == TRAINED
    kept = (left / "checkpoint.pt").read_bytes()
    losses = 2
    with broken:
        assert flow.gmpipe("train").refused(r"\bstep 2\b.*epoch.*train\.toy\.learning_rate")
    assert (left / "checkpoint.pt").read_bytes() == kept
    assert flow.bytes(str(run.relative_to(flow.folder))) == before


def test_a_run_with_fewer_regions_has_a_folder_of_its_own(checkout: Flow, tmp_path: Path) -> None:
    flow = copied(checkout, tmp_path)
    one = ("--set", "train.toy.regions=1")
    flow.ok("train", *one)
    flow.ok("evaluate", *one)
    [run] = (flow / "runs/toy").glob("full*")
    regions = pq.read_table(run / "predictions.parquet").column("regions").to_pylist()
    assert {number for row in regions for number in row} == {0}
    assert flow.gmpipe("train", "--set", "train.toy.regions=4").refused(
        r"train\.toy\.regions is 4\b.* 3 .*gmpipe extract --dataset toy --replace"
    )


@pytest.mark.parametrize("imported", [False, True])
def test_the_command_to_run_repeats_the_options(
    checkout: Flow, tmp_path: Path, imported: bool
) -> None:
    flow = copied(checkout, tmp_path)
    options = ("--variant", "max-pool", "--seed", "3", "--set", "train.toy.network={dropout: 0.1}")
    again = re.escape(
        "gmpipe train --dataset toy --variant max-pool --seed 3 --set "
        "'train.toy.network={dropout: 0.1}'`"
    )
    assert flow.gmpipe("evaluate", *options).refused(f"checkpoint.*`{again}")
    recipe: dict[str, Any] = {**RECIPE, "imported_from": "npz"} if imported else dict(RECIPE)
    shutil.rmtree(flow / "cache")
    make_toy(flow / "cache/toy", recipe)
    flow.ok("train", *options)
    shutil.rmtree(flow / "cache")
    make_toy(flow / "cache/toy", {**recipe, "odd": 1})
    command = "import-regions FILE" if imported else "extract"
    assert flow.gmpipe("evaluate", *options).refused(
        f"odd .*`{again}.*`gmpipe {command} --dataset toy --replace`"
    )


def test_tensorboard_has_the_columns_of_the_history(checkout: Flow, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    flow = copied(checkout, tmp_path)
    flow.ok("train", "--tensorboard")
    run = flow / "runs/toy/full-s0"
    with (run / "history.csv").open() as stream:
        history = list(csv.DictReader(stream))
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(history[0]) - {"epoch"}
    for column in events.Tags()["scalars"]:
        points = events.Scalars(column)
        assert [event.step for event in points] == [int(row["epoch"]) for row in history]
        expected = [float(row[column]) for row in history]
        assert [event.value for event in points] == pytest.approx(expected)
    for name in ("checkpoint.pt", "history.csv"):
        assert (run / name).read_bytes() == (checkout / f"runs/toy/full-s0/{name}").read_bytes()


def test_a_missing_tensorboard_is_named(
    checkout: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flow = copied(checkout, tmp_path)
    assert flow.gmpipe("train", "--tensorboard").refused(
        r"--tensorboard .*`tensorboard`.*pip install --editable '\.\[tensorboard\]'"
    )
    assert list((flow / "runs/toy/full-s0").iterdir()) == []
