"""One changed bit in each kind of file that a command reads.

What happens is one of

    refused   an error for the user, or a warning that names the file
    harmless  everything that is read is equal to what was written
    silent    anything else: another result without a word, or a traceback

Photographs and other files of the user can't know what they held; the hash of their content is
recorded in what was made from them, and differs. params.yaml is the user's to change.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from clusters import worker_in_this_process
from flows import ALL_CASES, Flow, unrendered
from tabulate import tabulate
from toys import Killed, killed_after

from pipeline.datasets.manifest import read_boxes
from pipeline.errors import GmpipeError
from pipeline.evaluation.metrics import read_evaluation
from pipeline.evaluation.predictions import read_logits
from pipeline.evaluation.tables import as_csv
from pipeline.files import read_bytes
from pipeline.labels.vectors import load_label_vectors
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.training import train_network
from pipeline.regions import fitting
from pipeline.regions.detector import load_state, read_description
from pipeline.regions.plan import image_digests
from pipeline.report.sweeps import SweepResults, SweepRun, read_sweep, write_sweep
from pipeline.shards.failures import Failure, read_failures, write_failures
from pipeline.shards.imports.npz import NpzFile
from pipeline.shards.reader import RegionCache
from pipeline.tensors import load_state as load_resumed
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import read_request
from stages.checkout.resolved import read_run_settings, write_variant_settings
from stages.checkout.times import read_times
from stages.commands.verify import verify

RUN = "runs/tiny/full-s0"
SWEEP = "runs/tiny/sweeps/beta"
QUICK, MANY = 5, 100 if ALL_CASES else 25


def killed_states(flow: Flow) -> None:
    """Leave what a killed training and a killed fit would resume from."""
    with (
        mock.patch.dict(train_network.__kwdefaults__, save_every=0),
        mock.patch("pipeline.learning.steps.compute_loss", killed_after(4)),
        pytest.raises(Killed),
    ):
        flow.gmpipe("train", "--seed", "1")
    with (
        mock.patch.object(fitting, "_SAVE_EVERY", 1),
        mock.patch.object(fitting._Learner, "learn", killed_in_third(fitting._Learner.learn)),
        pytest.raises(Killed),
    ):
        flow.gmpipe("detector")


def killed_in_third(learn: Callable[..., float]) -> Callable[..., float]:
    """A step of a fit that ends the process when it is made for the third time."""
    steps = iter([learn, learn])

    def step(*arguments: Any) -> float:
        if (real := next(steps, None)) is None:
            raise Killed
        return real(*arguments)

    return step


@pytest.fixture(scope="module")
def killed(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A finished flow with what else commands read: states, failures and the user's files."""
    flow = Flow(Path(shutil.copytree(made.folder, tmp_path_factory.mktemp("flips") / "flow")))
    killed_states(flow)
    write_failures(flow / "cache/tiny", [Failure("broken", "broken.png", "no image")])
    vocabulary = read_in(flow, lambda: dataset_manifest("tiny").vocabulary)
    vectors = np.random.default_rng(0).normal(size=(len(vocabulary), 6)).astype(np.float32)
    np.savez(flow / "vectors.npz", labels=np.array(vocabulary), vectors=vectors)
    runs = [SweepRun(value=str(value), seed=0, mAP=5.5, CF1=1.0, OF1=2.0) for value in (1, 2)]
    of = {"dataset": "tiny", "split": "drawn/test", "variant": "full"}
    hashes = ("fingerprint", "train_sha256", "test_sha256")
    of |= {name: flow.metrics()[name] for name in hashes}
    sweep = SweepResults(setting="beta", numeric=True, runs=runs, **of)
    write_sweep(flow / f"{SWEEP}/sweep.json", sweep)
    (flow / f"{SWEEP}/results.csv").write_text(as_csv(sweep.rows()))
    return flow


def read_in(flow: Flow, read: Callable[[], Any]) -> Any:
    with contextlib.chdir(flow.folder):
        return read()


# What reads each kind of file --------------------------------------------------------------------


def manifest() -> Any:
    found = dataset_manifest("tiny")
    fields = (found.dataset, found.split_name, found.vocabulary, found.sources, found.counts)
    return fields, found.table.to_pylist()


def boxes() -> Any:
    ids = dataset_manifest("tiny").image_ids("train")
    table = read_boxes(Path("data/tiny/prepared/boxes.parquet"), ids)
    return table.classes, [
        (key, one.classes.tolist(), one.boxes.tolist()) for key, one in table.images.items()
    ]


def regions() -> Any:
    cache = RegionCache.open(Path("cache/tiny"))
    rows = vars(cache.gather(np.arange(len(cache))))
    arrays = {name: values for name, values in rows.items() if isinstance(values, np.ndarray)}
    assert len(arrays) > 4
    listed = [values.tobytes() for values in arrays.values()]
    return cache.ids, cache.views.tolist(), dict(cache.recipe), cache.fingerprint, listed


def checkpoint() -> Any:
    """All but the hash of the file itself, which results name."""
    found = vars(load_checkpoint(Path(RUN, "checkpoint.pt")))
    state = {name: tensor.numpy().tobytes() for name, tensor in found.pop("state").items()}
    vectors = found.pop("label_vectors").numpy().tobytes()
    return state, vectors, {name: repr(found[name]) for name in found if name != "sha256"}


def predictions() -> Any:
    evaluation = read_evaluation(Path(RUN, "metrics.json"))
    ids, logits = read_logits(
        Path(RUN, "predictions.parquet"),
        checkpoint_sha256=evaluation.checkpoint_sha256,
        labels=len(evaluation.metrics.AP),
    )
    return ids, logits.tobytes()


def said_by_verify(path: str) -> Callable[[], Any]:
    """For files that no other command reads. Some are no more than compared with others."""

    def read() -> Any:
        text, _ = verify(read_request(None, ()), images=False)
        [line] = [line for line in text.splitlines() if line.startswith(f"{path}: ")]
        if not line.startswith(f"{path}: sound"):
            raise GmpipeError(line)
        return line

    return read


def variant_settings() -> Any:
    """`prepare` writes a file again that is not what it would write."""
    write_variant_settings(read_request(None, ()))
    return read_bytes(Path("data/tiny/settings/full.yaml"))


def times() -> Any:
    logger = logging.getLogger("stages.checkout.times")
    with mock.patch.object(logger, "warning") as warning:
        found = read_times("tiny")
    if warning.called:
        raise GmpipeError(str(warning.call_args))
    return found


def resumed(purpose: str) -> Callable[[], Any]:
    def read() -> Any:
        [path] = Path(".state").glob(f"{purpose}-*.pt")
        return plain(load_resumed(path))

    return read


def plain(value: Any) -> Any:
    """Tensors as bytes, at any depth."""
    if hasattr(value, "numpy"):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def vectors() -> Any:
    found = load_label_vectors(dataset_manifest("tiny").vocabulary, "vectors.npz")
    return found.names, found.vectors.tobytes(), found.sha256


def photographs() -> Any:
    found = dataset_manifest("tiny")
    return image_digests(found, Path("data/tiny"), contents=True, threads=1).tobytes()


def weights() -> Any:
    folder = Path("data/tiny/detector")
    return asdict(read_description(folder))


def users_weights() -> Any:
    return plain(load_state(Path("data/tiny/detector/weights.pt")))


@dataclass(frozen=True)
class Kind:
    """Files of a kind, and what reads them.

    Where a reading takes most of a second (``slow``), a fifth as many bits are flipped.
    """

    files: str
    read: Callable[[], Any]
    slow: bool = False


KINDS = {
    "manifest": Kind("data/tiny/prepared/manifest.parquet", manifest),
    "boxes": Kind("data/tiny/prepared/boxes.parquet", boxes),
    "variant's settings": Kind("data/tiny/settings/full.yaml", variant_settings),
    "detector's description": Kind("data/tiny/detector/detector.json", weights),
    "detector's weights": Kind("data/tiny/detector/weights.pt", weights),
    "weights of the user": Kind("data/tiny/detector/weights.pt", users_weights),
    "shard": Kind("cache/tiny/*.h5", regions),
    "index": Kind("cache/tiny/index.parquet", regions),
    "failures": Kind("cache/tiny/failures.parquet", lambda: read_failures(Path("cache/tiny"))),
    "checkpoint": Kind(f"{RUN}/checkpoint.pt", checkpoint),
    "settings of a run": Kind(f"{RUN}/settings.yaml", lambda: read_run_settings(Path(RUN))),
    "metrics": Kind(f"{RUN}/metrics.json", lambda: read_evaluation(Path(RUN, "metrics.json"))),
    "predictions": Kind(f"{RUN}/predictions.parquet", predictions),
    "history": Kind(f"{RUN}/history.csv", said_by_verify(f"{RUN}/history.csv"), slow=True),
    "summary": Kind(f"{RUN}/summary.json", said_by_verify(f"{RUN}/summary.json"), slow=True),
    "state of a training": Kind(".state/train-*.pt", resumed("train")),
    "state of a fit": Kind(".state/detector-*.pt", resumed("detector")),
    "sweep": Kind(f"{SWEEP}/sweep.json", lambda: read_sweep(Path(SWEEP, "sweep.json"))),
    "sweep's table": Kind(f"{SWEEP}/results.csv", said_by_verify(SWEEP), slow=True),
    "times": Kind(".state/times/tiny.csv", times),
    "label vectors": Kind("vectors.npz", vectors),
}


@contextlib.contextmanager
def flipped(folder: Path, files: str, seed: int) -> Iterator[Path]:
    """Change a bit of one of the files, which a seed chooses."""
    rng = np.random.default_rng(seed)
    paths = sorted(folder.glob(files))
    path = paths[rng.integers(len(paths))]
    before = path.read_bytes()
    changed = bytearray(before)
    changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    path.write_bytes(changed)
    try:
        yield path
    finally:
        path.write_bytes(before)


def outcome(read: Callable[[], Any], expected: bytes) -> str:
    try:
        return "harmless" if pickle.dumps(read()) == expected else "silent"
    except GmpipeError:
        return "refused"
    except Exception as error:
        return f"silent: {type(error).__name__}"


def count(flow: Flow, flips: int, *, slow: bool) -> dict[str, Counter[str]]:
    """Flip bits of each kind of file, and count what happens."""
    counts: dict[str, Counter[str]] = {}
    with contextlib.chdir(flow.folder):
        for name, kind in KINDS.items():
            if slow or not kind.slow:
                expected = pickle.dumps(kind.read())
                assert pickle.dumps(kind.read()) == expected, name
                counts[name] = Counter()
                for seed in range(flips // 5 if kind.slow else flips):
                    with flipped(flow.folder, kind.files, seed):
                        counts[name][outcome(kind.read, expected)] += 1
    return counts


def table_of(counts: dict[str, Counter[str]]) -> str:
    columns = ("refused", "harmless", "silent")
    rows = [
        [
            name,
            one["refused"],
            one["harmless"],
            sum(one.values()) - one["refused"] - one["harmless"],
        ]
        for name, one in counts.items()
    ]
    return str(tabulate(rows, ["file", *columns], tablefmt="github"))


def none_is_silent(counts: dict[str, Counter[str]]) -> bool:
    print(table_of(counts))
    silent = {
        name: dict(one) for name, one in counts.items() if one.keys() - {"refused", "harmless"}
    }
    assert not silent, silent
    return True


def test_no_flip_is_silent_quick(killed: Flow) -> None:
    assert none_is_silent(count(killed, QUICK, slow=False))


@pytest.mark.slow
def test_no_flip_is_silent(killed: Flow) -> None:
    assert none_is_silent(count(killed, MANY, slow=True))


def test_a_changed_photograph_has_another_hash(killed: Flow) -> None:
    with contextlib.chdir(killed.folder):
        expected = photographs()
        for seed in range(QUICK):
            with flipped(killed.folder, "data/tiny/prepared/**/*.png", seed):
                assert photographs() != expected


@pytest.mark.slow
def test_extract_refuses_changed_photographs(killed: Flow) -> None:
    for seed in range(QUICK):
        with flipped(killed.folder, "data/tiny/prepared/**/*.png", seed):
            assert killed.gmpipe("extract").refused("--replace")


@pytest.mark.slow
def test_no_flip_of_imported_regions_is_silent(small: Flow) -> None:
    def read() -> Any:
        file = NpzFile.open(Path("regions.npz"))
        rows = [plain_rows(one) for one in file.read(np.arange(len(file.image_ids)))]
        return rows, repr(file)

    def plain_rows(one: Any) -> Any:
        return [value.tobytes() for value in vars(one).values() if isinstance(value, np.ndarray)]

    with contextlib.chdir(small.folder):
        expected = pickle.dumps(read())
        counts: Counter[str] = Counter()
        for seed in range(MANY):
            with flipped(small.folder, "regions.npz", seed):
                counts[outcome(read, expected)] += 1
    assert none_is_silent({"imported regions": counts})


# Through the commands ----------------------------------------------------------------------------

COMMANDS: dict[str, tuple[str, ...]] = {
    "manifest": ("evaluate",),
    "boxes": ("detector",),
    "variant's settings": ("prepare",),
    "detector's description": ("extract",),
    "detector's weights": ("extract",),
    "shard": ("evaluate",),
    "index": ("evaluate",),
    "failures": ("cache", "info"),
    "checkpoint": ("evaluate",),
    "settings of a run": ("runs", "list"),
    "metrics": ("compare", "--seed", "0", "--variant", "full", "--variant", "max-pool"),
    "predictions": ("compare", "--seed", "0", "--variant", "full", "--variant", "max-pool"),
    "state of a training": ("train", "--seed", "1"),
    "state of a fit": ("detector",),
    "sweep": ("report", "--images", "1"),
    "times": ("report", "--images", "1"),
}


def results(flow: Flow, said: str) -> Any:
    """What a command leaves: what it prints, and its files, without the hash of the checkpoint.

    Where a fit or a training resumed does not count: a state that belongs to other bytes is not
    used, and the result is the same.
    """
    files = {**flow.bytes("data"), **flow.bytes("runs"), **flow.bytes("reports")}
    for name in [name for name in files if name.endswith("metrics.json") and "runs" in name]:
        content = json.loads(files[name])
        del content["checkpoint_sha256"], content["sha256"]
        files[name] = json.dumps(content).encode()
    wanted = {name: data for name, data in files.items() if not name.endswith(".parquet")}
    return re.sub(r", waiting for data [\d.]+ %|.*: resumed at .*\n", "", said), wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_flip_is_silent_through_a_command(killed: Flow, tmp_path: Path, name: str) -> None:
    sound = Flow(Path(shutil.copytree(killed.folder, tmp_path / "sound")))
    with worker_in_this_process(), unrendered():
        expected = results(sound, sound.ok(*COMMANDS[name]))
        counts: Counter[str] = Counter()
        for seed in range(QUICK):
            flow = Flow(Path(shutil.copytree(killed.folder, tmp_path / str(seed))))
            with flipped(flow.folder, KINDS[name].files, seed) as path:
                changed = path.read_bytes()
                done = flow.gmpipe(*COMMANDS[name])
                if path.exists() and path.read_bytes() == changed:  # no command has replaced it
                    shutil.copyfile(killed.folder / path.relative_to(flow.folder), path)
                said, files = results(flow, done.out)
            assert "Traceback" not in done.err
            if done.code or path.name in done.err or "damaged" in done.out:
                counts["refused"] += 1
            # `compare` says that it evaluates a run with damaged metrics again.
            elif files == expected[1] and said.endswith(expected[0]):
                counts["harmless"] += 1
            else:
                counts["silent"] += 1
    assert none_is_silent({name: counts})
