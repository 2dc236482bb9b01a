"""Commands that may not read or write something say which, and cost nobody any work.

Each command meets each thing that it touches, once for each way in which a user may lack rights:
4,170 cases, which take most of an hour. So each command meets 8 of them, drawn from a seed. With
the environment variable GMPIPE_ALL_CASES it meets all.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flows import ALL_CASES, Flow, write_params
from other_user import OtherUser, given, unreachable
from small import PARAMS as SMALL_PARAMS

RUN = "runs/tiny/full-s0"
SIMPLE = "runs/tiny/max-pool-s0"  # without graphs, whose translation to ONNX takes seconds
SHARD = "cache/tiny/regions-00001.h5"


@dataclass(frozen=True)
class Command:
    """A command of the matrix.

    Attributes:
        arguments: of gmpipe.
        before: what is removed first, so that the command has something to make.
        writes: beginnings of the paths that it replaces when it succeeds.
        removes: beginnings of the paths that it may remove, also before it fails at another.
        run: whose files it meets.
    """

    arguments: str
    before: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    run: str = RUN


COMMANDS = {
    "prepare": Command("prepare", writes=("data/tiny/prepared", "data/tiny/settings")),
    "prepare, new": Command(
        "prepare",
        ("data/tiny/prepared/manifest.parquet", "data/tiny/settings/full.yaml"),
        ("data/tiny/prepared", "data/tiny/settings"),
    ),
    "prepare --check": Command("prepare --check"),
    "detector": Command("detector", writes=("data/tiny/detector",)),
    "extract": Command("extract", writes=("cache/tiny/failures.parquet",)),
    "extract, new": Command(
        "extract", (SHARD,), ("cache/tiny/index.parquet", "cache/tiny/failures.parquet")
    ),
    "import-regions": Command(
        "import-regions regions.npz --dataset voc2007", (), ("data/voc2007",)
    ),
    "train": Command("train", writes=(RUN,)),
    "train, new": Command("train", (f"{RUN}/checkpoint.pt",), (RUN,)),
    "train on imported": Command("train --dataset voc2007", (), ("runs/voc2007",)),
    "evaluate": Command("evaluate", writes=(RUN,)),
    "report": Command("report", writes=("reports/tiny",)),
    "compare": Command("compare --seed 0"),
    "sweep": Command("sweep epochs=1,3 --jobs 1", writes=("runs/tiny/sweeps",)),
    "predict": Command(f"predict photos --run {RUN}"),
    "predict -o": Command(f"predict photos --run {RUN} -o out/labels.csv", writes=("out",)),
    "explain": Command(f"explain photos/a.png --run {RUN} -o out/a.png", writes=("out",)),
    "export": Command(f"export --run {SIMPLE} -o out/network.onnx", writes=("out",), run=SIMPLE),
    "cache info": Command("cache info"),
    "cache verify": Command("cache verify"),
    "cache verify --repair": Command("cache verify --repair"),
    "cache verify --repair, damaged": Command(
        "cache verify --repair", (SHARD,), ("cache/tiny/index.parquet", "cache/tiny/failures")
    ),
    "cache estimate": Command("cache estimate --probe 1"),
    "runs list": Command("runs list"),
    "runs show": Command(f"runs show {RUN}"),
    "runs prune": Command("runs prune --yes", removes=("runs/tiny/full-s0-", "runs/tiny/sweeps")),
    "settings": Command("settings"),
    "doctor": Command("doctor"),
    "labels": Command("labels"),
    "completion": Command("completion bash"),
}
NEW = [name for name in COMMANDS if ", " in name]

FILES = (
    "params.yaml",
    "data/tiny/prepared/manifest.parquet",
    "data/tiny/prepared/boxes.parquet",
    "data/tiny/prepared/images/train-00000.png",
    "data/tiny/detector/weights.pt",
    "data/tiny/detector/detector.json",
    "data/tiny/settings/full.yaml",
    "data/tiny/.prepared.lock",
    "data/tiny/.detector.lock",
    "cache/tiny/regions-00000.h5",
    "cache/tiny/index.parquet",
    "cache/.tiny.lock",
    "cache/.tiny.workers.lock",
    f"{RUN}/checkpoint.pt",
    f"{RUN}/metrics.json",
    f"{RUN}/summary.json",
    f"{RUN}/predictions.parquet",
    f"{RUN}/history.csv",
    f"{RUN}/settings.yaml",
    "runs/tiny/.full-s0.lock",
    "runs/tiny/sweeps/epochs/results.csv",
    ".state/times/tiny.csv",
    "reports/tiny/index.html",
    "reports/.tiny.lock",
    "out/labels.csv",
    "photos/a.png",
    "regions.npz",
    "vectors.npz",
)
FOLDERS = (
    ".",
    "data",
    "data/tiny",
    "data/tiny/prepared",
    "data/tiny/prepared/images",
    "data/tiny/detector",
    "data/tiny/settings",
    "cache",
    "cache/tiny",
    "runs",
    "runs/tiny",
    RUN,
    "runs/tiny/sweeps",
    "runs/tiny/sweeps/epochs",
    ".state",
    ".state/times",
    "reports",
    "reports/tiny",
    "out",
    "photos",
    "../home",
    "../tmp",
)
FILE_MODES = {"read-only": 0o444, "unreadable": 0o000}
FOLDER_MODES = {"read-only": 0o555, "unreadable": 0o000, "unlisted": 0o311, "closed": 0o644}
"""`unlisted`: names in it can be opened but not listed; `closed`: the other way round."""

COSTS_WORK = re.compile(
    r"gmpipe (train|evaluate|extract|prepare|detector|sweep|compare|import|cache verify)|dvc repro"
    r"|--replace|--repair|[Dd]elete|[Tt]rain (this|the) run|again from|[Ww]rite its rows"
    r"|[Ee]xtract or|git checkout"
)


@pytest.fixture(scope="module")
def other_user() -> Iterator[OtherUser]:
    if reason := unreachable():
        pytest.skip(reason)
    with OtherUser() as server:
        yield server


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """A folder that other users can reach, as pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="gmpipe-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
        opened(Path(name))


@pytest.fixture(scope="module")
def whole(made: Flow, small_made: Flow, top: Path) -> Path:
    folder = top / "whole"
    make_whole(made, small_made, folder)
    return folder


def make_whole(made: Flow, small_made: Flow, folder: Path) -> None:
    """A finished flow with a sweep, photographs, and a second data set of imported regions."""
    for name in ("home", "tmp", "fonts"):
        (folder / name).mkdir(parents=True)
    flow = Flow(Path(shutil.copytree(made.folder, folder / "flow")))
    shutil.copytree(small_made.folder, flow.folder, dirs_exist_ok=True)
    changes = {f"{key}__voc2007": SMALL_PARAMS[key]["voc2007"] for key in ("prepare", "detector")}
    changes |= {f"{key}__voc2007": SMALL_PARAMS[key]["voc2007"] for key in ("extract", "train")}
    write_params(flow.folder, **changes)
    for epochs in (1, 3):
        changed = ("--set", f"train.tiny.epochs={epochs}")
        flow.ok("train", *changed)
        flow.ok("evaluate", *changed)
    flow.ok("sweep", "epochs=1,3")
    flow.ok("report")
    for name in ("photos", "out"):
        (flow / name).mkdir()
    shutil.copy(flow / "data/tiny/prepared/images/test-00000.png", flow / "photos/a.png")
    for lock in (path for path in FILES if path.endswith(".lock")):
        (flow / lock).touch()
    (flow / "out/labels.csv").touch()
    given(folder)


def opened(folder: Path) -> None:
    """Give the owner all rights in a folder back."""
    folder.chmod(0o755)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            opened(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            Path(entry.path).chmod(0o644)


Seen = dict[str, tuple[int, bytes]]


def seen(folder: Path) -> Seen:
    """The inode and the bytes of each file."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Box:
    """A copy of the finished flow, in which a command runs with a thing that it may not use."""

    def __init__(self, whole: Path, folder: Path, server: OtherUser) -> None:
        self.whole, self.top, self.server = whole, folder, server
        self.folder = folder / "flow"
        self.fresh = False

    def renew(self, before: tuple[str, ...]) -> None:
        if not self.fresh:
            shutil.rmtree(self.top, ignore_errors=True)
            shutil.copytree(self.whole, self.top)
            given(self.top)
        for path in before:
            (self.folder / path).unlink()

    def run(self, command: Command, hide: Callable[[Path], None]) -> tuple[int, str, str, str]:
        """Run a command after ``hide``; return its outcome, and what was lost, if anything."""
        self.renew(command.before)
        former = seen(self.folder)
        hide(self.folder)
        code, out, err = self.server.gmpipe(
            self.folder,
            *command.arguments.split(),
            environment={
                "HOME": str(self.top / "home"),
                "TMPDIR": str(self.top / "tmp"),
                "MPLCONFIGDIR": str(self.whole / "fonts"),
                "GMPIPE_TESTS": "1",
            },
        )
        opened(self.top)
        now = seen(self.folder)
        self.fresh = now == former and not command.before
        return code, out, err, lost(command, code, former, now)


BOOKKEEPING = re.compile(r"\.lock$|^\.state/")


def lost(command: Command, code: int, former: Seen, now: Seen) -> str:
    """Name a file that a command that failed has changed, or that one has made again in vain."""
    for path, (inode, content) in former.items():
        if command.removes and path.startswith(command.removes):
            continue
        if BOOKKEEPING.search(path) or (
            code == 0 and command.writes and path.startswith(command.writes)
        ):
            continue
        if path not in now:
            return f"{path} is gone"
        if now[path][1] != content:
            return f"{path} changed"
        if now[path][0] != inode:
            return f"{path} was written again"
    return ""


def is_named(thing: str, message: str, folder: Path) -> bool:
    """Whether a message names a thing, or something in it."""
    if thing == ".":
        return True
    return thing.removeprefix("../") in message


def faults(box: Box, command: Command, thing: str, mode: int, normal: tuple[int, str]) -> str:
    """What is wrong with the way in which a command meets a thing; empty if nothing is."""

    def hide(folder: Path) -> None:
        path = folder / thing
        if path.is_dir() and mode == 0o555:
            for parent, _, files in os.walk(path):
                for name in (*files, "."):
                    below = Path(parent, name)
                    below.chmod(stat.S_IMODE(below.stat().st_mode) & 0o555)
        else:
            path.chmod(mode)

    code, out, err, missing = box.run(command, hide)
    said = f"{out}\n{err}"
    if code not in (0, 1, 2) or "Traceback" in said:
        return f"exit code {code}\n{said}"
    if missing:
        return f"{missing}\n{said}"
    told = re.sub("^(Usage|Try).*", "", said, flags=re.MULTILINE)
    advice = [one[0] for one in COSTS_WORK.finditer(told) if one[0] not in normal[1]]
    if advice:
        return f"advises {advice}\n{said}"
    if code != normal[0] and "Error: " not in err and "doctor" not in command.arguments:
        return f"no error\n{said}"
    if code != normal[0] and not is_named(thing, said, box.folder):
        return f"does not name {thing}\n{said}"
    return ""


def matrix(names: list[str]) -> list[tuple[str, str, str, int]]:
    """Each command, thing and way."""
    return [
        (name, thing.replace(RUN, COMMANDS[name].run), way, mode)
        for name in names
        for things, modes in ((FILES, FILE_MODES), (FOLDERS, FOLDER_MODES))
        for thing in things
        for way, mode in modes.items()
        if thing not in COMMANDS[name].before
    ]


def check(whole: Path, box: Box, cases: list[tuple[str, str, str, int]]) -> None:
    """Run cases and collect their faults."""
    found: dict[str, str] = {}
    normal: dict[str, tuple[int, str]] = {}
    for name, thing, way, mode in cases:
        command = COMMANDS[name]
        if name not in normal:
            code, out, err, missing = box.run(command, lambda folder: None)
            assert (code, missing) == (0, ""), (name, out, err)
            normal[name] = code, f"{out}\n{err}"
        if fault := faults(box, command, thing, mode, normal[name]):
            found[f"{name} with {thing} {way}"] = fault
    print(f"{len(cases)} cases, {len(normal)} commands, {len(found)} faults")
    assert not found, "\n\n".join(f"*** {case}: {fault}" for case, fault in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_loses_work_or_ends_in_a_traceback(
    name: str, whole: Path, top: Path, other_user: OtherUser
) -> None:
    cases = matrix([name])
    if not ALL_CASES:
        cases = random.Random(name).sample(cases, 8)
    check(whole, Box(whole, top / "box", other_user), cases)


# A quick excerpt: where work was lost, or its loss advised ----------------------------------------

EXCERPT = [
    ("extract", "cache/tiny", "unlisted"),  # its shards were taken for missing, and written over
    ("extract", "data/tiny/prepared/images/train-00000.png", "unreadable"),  # `extract --replace`
    ("extract", "cache/tiny/index.parquet", "unreadable"),  # it was written again
    ("cache info", "cache/tiny/index.parquet", "unreadable"),  # `cache verify --repair`
    ("cache verify --repair", "cache/tiny/regions-00000.h5", "unreadable"),  # it was removed
    ("predict", "photos", "unreadable"),  # "holds no photograph"
    ("predict", "photos/a.png", "unreadable"),
    ("evaluate", f"{RUN}/checkpoint.pt", "unreadable"),
    ("evaluate", RUN, "read-only"),
    ("doctor", "runs/tiny", "unlisted"),  # "none yet"
    ("settings", ".", "read-only"),
]


@pytest.mark.slow  # for its start; it takes seconds after that
def test_an_excerpt(whole: Path, top: Path, other_user: OtherUser) -> None:
    chosen = [one for one in matrix(list(COMMANDS)) if one[:3] in EXCERPT]
    assert len(chosen) == len(EXCERPT)
    check(whole, Box(whole, top / "box", other_user), chosen)


@pytest.mark.slow
def test_runs_that_can_not_be_read_are_listed_beside_the_others(
    whole: Path, top: Path, other_user: OtherUser
) -> None:
    box = Box(whole, top / "box", other_user)
    for thing in (RUN, f"{RUN}/metrics.json", f"{RUN}/settings.yaml"):
        code, out, err, _ = box.run(
            COMMANDS["runs list"],
            lambda folder, thing=thing: (folder / thing).chmod(0),  # type: ignore[misc]
        )
        assert code == 0, err
        assert re.search(rf"^\| {RUN} .*unreadable", out, re.MULTILINE), out
        assert "runs/tiny/max-pool-s0" in out
