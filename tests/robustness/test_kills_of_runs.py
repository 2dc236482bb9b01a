"""Kills of `prepare`, `detector`, `train`, `evaluate` and `report` lose nothing.

Each command replaces outputs of earlier settings. Wherever it is killed, each output is the former
one or the new one, whole; the same command then succeeds, ends with the bytes of a run that was
never killed, and leaves no temporary file.

The commands are killed before each of their operations on files (`kills.moments`), and at 8 seeded
moments each, or 20 with the environment variable GMPIPE_ALL_CASES. Figures are saved empty: to
render them takes longer than all else, and happens between two operations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from flows import ALL_CASES, Flow, unrendered
from kills import content, copied, duration, exchanging, killed, leftovers, moments
from ruamel.yaml import YAML
from toys import RECIPE, make_checkout, make_toy

from pipeline.datasets.manifest import COLUMNS, full_counts, read_manifest, write_manifest
from pipeline.evaluation import bootstrap
from pipeline.learning.losses import compute_loss
from pipeline.learning.training import train_network
from pipeline.regions import fitting

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _as_many_resamples_as_in_other_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "RESAMPLES", 1000)
        yield


@pytest.fixture(scope="module", autouse=True)
def _unrendered() -> Iterator[None]:
    with unrendered():
        yield


KILLS = 20 if ALL_CASES else 8
RUN = "runs/toy/full-s0"
SMALL = {"prepare__tiny__train": 10, "prepare__tiny__test": 2}


class Killing:
    """A command that replaces outputs, and what they are before and after it.

    Attributes:
        arguments: of the command line.
        before: the folder before the command; to be read only.
        after: the folder after it; to be read only.
        outputs: folders that the command replaces as a whole.
    """

    def __init__(
        self, before: Flow, after: Path, *arguments: str, outputs: tuple[str, ...]
    ) -> None:
        self.arguments = arguments
        self.before = before
        self.after = copied(before, after)
        self.after.ok(*arguments)
        assert leftovers(self.after) == []
        self.outputs = outputs
        for output in outputs:
            assert content(before, output) != content(self.after, output)

    def check(self, flow: Flow) -> str:
        """Check what a kill left.

        Returns:
            the state of the outputs that are replaced as a whole, in words.
        """
        former, new, now = (content(one) for one in (self.before, self.after, flow))
        states = []
        for output in self.outputs:
            of_output = [
                {name: stored for name, stored in files.items() if name.startswith(f"{output}/")}
                for files in (former, new, now)
            ]
            if of_output[2]:
                assert of_output[2] in of_output[:2]
                states.append("former" if of_output[2] == of_output[0] else "new")
            else:  # between the two renames
                folder = flow / output
                [aside] = folder.parent.glob(f".{folder.name}.*.old")
                stored = flow.bytes(str(aside.relative_to(flow.folder)))
                assert list(stored.values()) == list(of_output[0].values())
                states.append("aside")
        for name in former.keys() | new.keys():
            if not name.startswith(tuple(f"{output}/" for output in self.outputs)):
                assert now.get(name) in (former.get(name), new.get(name)), name
        return ", ".join(states)

    def check_second_run(self, flow: Flow) -> None:
        flow.ok(*self.arguments)
        now, new = content(flow), content(self.after)
        assert now.keys() == new.keys()
        assert [name for name in new if now[name] != new[name]] == []
        assert leftovers(flow) == []

    def check_random_kills(
        self, folder: Path, check: Callable[[Flow], object] = lambda flow: None
    ) -> None:
        """Kill the command at seeded moments, each time in a copy of the folder."""
        whole = duration(copied(self.before, folder / "timed"), *self.arguments)
        rng = np.random.default_rng(12)
        kills = 0
        for attempt in range(4 * KILLS):
            flow = copied(self.before, folder / str(attempt))
            if killed(flow, rng.uniform(0, whole), *self.arguments):
                kills += 1
                self.check(flow)
                check(flow)
                self.check_second_run(flow)
            if kills == KILLS:
                return
        pytest.fail(f"only {kills} of {4 * KILLS} were killed before their end")


# prepare and detector ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preparing(tmp_path_factory: pytest.TempPathFactory) -> Killing:
    """`prepare` draws other scenes, and other settings of a variant."""
    flow = Flow(tmp_path_factory.mktemp("prepare") / "before")
    flow.folder.mkdir()
    flow.params(**SMALL)
    flow.ok("prepare")
    flow.params(**SMALL, prepare__tiny__seed=1, train__tiny__epochs=3, variants=["full"])
    after = flow.folder.with_name("after")
    return Killing(flow, after, "prepare", outputs=("data/tiny/prepared",))


@pytest.fixture(scope="module")
def fitting_detector(tmp_path_factory: pytest.TempPathFactory) -> Killing:
    """`detector` fits with another seed."""
    flow = Flow(tmp_path_factory.mktemp("detector") / "before")
    flow.folder.mkdir()
    flow.params(**SMALL)
    flow.ok("prepare")
    flow.ok("detector")
    flow.params(**SMALL, detector__tiny__fit__seed=1)
    after = flow.folder.with_name("after")
    return Killing(flow, after, "detector", outputs=("data/tiny/detector",))


@pytest.mark.parametrize("at_once", [True, False])
def test_prepare_is_killed_at_each_operation(
    preparing: Killing, tmp_path: Path, at_once: bool
) -> None:
    flow = copied(preparing.before, tmp_path / "run")
    with exchanging(at_once=at_once):
        copies = moments(flow, tmp_path, "prepare")
    states = [preparing.check(moment) for moment in copies]
    assert set(states) == {"former", "new"} | (set() if at_once else {"aside"})
    for moment in copies:
        preparing.check_second_run(moment)


@pytest.mark.parametrize("at_once", [True, False])
def test_detector_is_killed_at_each_operation(
    fitting_detector: Killing, tmp_path: Path, at_once: bool
) -> None:
    flow = copied(fitting_detector.before, tmp_path / "run")
    with (
        exchanging(at_once=at_once),
        mock.patch.object(fitting, "_SAVE_EVERY", 1),
    ):
        copies = moments(flow, tmp_path, "detector")
    kinds = {}
    for moment in copies:
        done = tuple(torch.load(path)["done"] for path in (moment / ".state").glob("*.pt"))
        kinds[fitting_detector.check(moment), done, len(leftovers(moment))] = moment
    assert {state for state, *_ in kinds} == {"former", "new"} | (set() if at_once else {"aside"})
    assert {done for _, done, _ in kinds} == {(), (1,), (2,)}
    for (_, done, _), moment in kinds.items():  # the last of each kind
        learn = mock.Mock(side_effect=fitting._Learner.learn, autospec=True)
        with mock.patch.object(fitting._Learner, "learn", lambda *inputs, of=learn: of(*inputs)):
            fitting_detector.check_second_run(moment)
        assert learn.call_count == 3 - sum(done)


def test_prepare_is_killed_at_random(preparing: Killing, tmp_path: Path) -> None:
    preparing.check_random_kills(tmp_path)


def test_detector_is_killed_at_random(fitting_detector: Killing, tmp_path: Path) -> None:
    fitting_detector.check_random_kills(tmp_path)


# train, evaluate and report ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A run that was trained and evaluated, and its page; to be read only."""
    flow = make_checkout(tmp_path_factory.mktemp("made") / "before", epochs=2)
    make_toy(flow / "cache/toy", {**RECIPE, "imported_from": "regions.npz"})
    for command in ("detector", "train", "evaluate", "report"):
        flow.ok(command)
    return flow


def change_params(flow: Flow, **train: Any) -> None:
    yaml = YAML()
    raw = yaml.load(flow / "params.yaml")
    raw["train"]["toy"].update(train)
    with (flow / "params.yaml").open("w") as stream:
        yaml.dump(raw, stream)


@pytest.fixture(scope="module")
def training(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Killing:
    """`train` replaces an evaluated run of another learning rate."""
    folder = tmp_path_factory.mktemp("train")
    flow = copied(made, folder / "before")
    change_params(flow, learning_rate=0.01)
    return Killing(flow, folder / "after", "train", outputs=())


@pytest.fixture(scope="module")
def evaluating(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Killing:
    """`evaluate` replaces metrics that are of another network and of other test labels."""
    folder = tmp_path_factory.mktemp("evaluate")
    flow = copied(made, folder / "before")
    former = {path.name: path.read_bytes() for path in (flow / RUN).iterdir()}
    change_params(flow, learning_rate=0.01)
    flow.ok("train")
    for name in ("metrics.json", "predictions.parquet", "summary.json"):
        (flow / RUN / name).write_bytes(former[name])
    correct_a_label(flow)
    return Killing(flow, folder / "after", "evaluate", outputs=())


def correct_a_label(flow: Flow) -> None:
    """Change the labels of the last test image."""
    path = flow / "data/toy/prepared/manifest.parquet"
    manifest = read_manifest(path)
    rows = manifest.table.to_pylist()
    rows[-1]["labels"] = [0] if rows[-1]["labels"] != [0] else [1]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    about = manifest.dataset, manifest.split_name, manifest.vocabulary, manifest.sources
    write_manifest(path, type(manifest)(*about, full_counts(table), table))


@pytest.fixture(scope="module")
def reporting(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Killing:
    """`report` replaces the page of another network."""
    folder = tmp_path_factory.mktemp("report")
    flow = copied(made, folder / "before")
    change_params(flow, learning_rate=0.01)
    flow.ok("train")
    flow.ok("evaluate")
    return Killing(flow, folder / "after", "report", outputs=("reports/toy",))


def check_numbers(flow: Flow) -> bool:
    """Check that nothing takes the numbers of one network for another's.

    Returns:
        whether the run's metrics are those of its checkpoint.
    """
    checkpoint = hashlib.sha256((flow / RUN / "checkpoint.pt").read_bytes()).hexdigest()
    path = flow / RUN / "metrics.json"
    fits = path.exists() and json.loads(path.read_text())["checkpoint_sha256"] == checkpoint
    if not fits:
        for command in ("report", "compare"):
            with mock.patch("stages.commands.compare.make_runs"):  # would make them anew
                assert flow.gmpipe(command).refused("runs/toy/full-s0.*gmpipe evaluate")
    return fits


def test_train_is_killed_at_each_operation(training: Killing, tmp_path: Path) -> None:
    flow = copied(training.before, tmp_path / "run")
    with mock.patch("stages.train.train_network", partial(train_network, save_every=0)):
        copies = moments(flow, tmp_path, "train")
    former = hashlib.sha256((training.before / RUN / "checkpoint.pt").read_bytes()).digest()
    fitting_numbers, resumed = set(), set()
    for moment in copies:
        training.check(moment)
        stored = hashlib.sha256((moment / RUN / "checkpoint.pt").read_bytes()).digest()
        assert check_numbers(moment) == (stored == former)
        fitting_numbers.add(stored == former)
        done = 0
        for path in (moment / ".state").glob("*.pt"):
            position = torch.load(path)["position"]
            done = 3 * len(position["history"]) + position["steps"]
        loss = mock.Mock(side_effect=compute_loss)
        with mock.patch("pipeline.learning.steps.compute_loss", loss):
            training.check_second_run(moment)
        assert loss.call_count == 6 - done
        resumed.add(done)
    assert fitting_numbers == {True, False}
    assert resumed == set(range(7))


def test_evaluate_is_killed_at_each_operation(evaluating: Killing, tmp_path: Path) -> None:
    copies = moments(copied(evaluating.before, tmp_path / "run"), tmp_path, "evaluate")
    fits = set()
    for moment in copies:
        evaluating.check(moment)
        fits.add(check_numbers(moment))
        evaluating.check_second_run(moment)
    assert fits == {True, False}


@pytest.mark.parametrize("at_once", [True, False])
def test_report_is_killed_at_each_operation(
    reporting: Killing, tmp_path: Path, at_once: bool
) -> None:
    flow = copied(reporting.before, tmp_path / "run")
    with exchanging(at_once=at_once):
        copies = moments(flow, tmp_path, "report")
    states = {
        (reporting.check(moment), len(list((moment / "reports").iterdir()))): moment
        for moment in copies
    }
    assert {state for state, _ in states} == {"former", "new"} | (set() if at_once else {"aside"})
    for moment in states.values():  # the last of each kind
        reporting.check_second_run(moment)


def test_train_is_killed_at_random(training: Killing, tmp_path: Path) -> None:
    training.check_random_kills(tmp_path, check_numbers)


def test_evaluate_is_killed_at_random(evaluating: Killing, tmp_path: Path) -> None:
    evaluating.check_random_kills(tmp_path, check_numbers)


def test_report_is_killed_at_random(reporting: Killing, tmp_path: Path) -> None:
    reporting.check_random_kills(tmp_path)
