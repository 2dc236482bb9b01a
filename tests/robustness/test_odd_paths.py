"""Odd paths and failing disks, with real errors of the system: a message, never a traceback.

`/proc/self/mem` stands for a disk with a fault: it is a regular file whose first byte can't be read
(EIO), also by root.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flows import BIN, Flow, full_disk
from PIL import Image
from test_permissions import COSTS_WORK

RUN = "runs/tiny/full-s0"
SIMPLE = "runs/tiny/max-pool-s0"  # without graphs, whose translation to ONNX takes seconds
FAULTY = "/proc/self/mem"
LONG = "x" * 300


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _faulty(path: Path) -> None:
    path.symlink_to(FAULTY)


READ = {
    "params.yaml": "train",
    "data/tiny/prepared/manifest.parquet": "train",
    "data/tiny/prepared/boxes.parquet": "detector",
    "data/tiny/detector/detector.json": "predict photos --run " + RUN,
    "data/tiny/detector/weights.pt": "predict photos --run " + RUN,
    "data/tiny/prepared/images/train-00000.png": "extract",
    "cache/tiny/index.parquet": "cache info",
    "cache/tiny/regions-00000.h5": "cache verify --repair",
    "cache/tiny/failures.parquet": "cache info",
    f"{RUN}/checkpoint.pt": "evaluate",
    f"{RUN}/metrics.json": "report",
    f"{RUN}/predictions.parquet": "report",
    "photos/a.png": "predict photos/a.png --run " + RUN,
}


@pytest.fixture(scope="module")
def photographed(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A finished flow with a photograph beside it; to be read only."""
    flow = Flow(tmp_path_factory.mktemp("photographed"))
    shutil.copytree(made.folder, flow.folder, dirs_exist_ok=True)
    (flow / "photos").mkdir()
    shutil.copy(flow / "data/tiny/prepared/images/test-00000.png", flow / "photos/a.png")
    return flow


@pytest.fixture
def photographs(photographed: Flow, tmp_path: Path) -> Flow:
    """The same, to be changed."""
    return Flow(Path(shutil.copytree(photographed.folder, tmp_path / "flow")))


@pytest.mark.parametrize(("path", "command"), READ.items())
def test_a_disk_that_fails_costs_no_work(photographs: Flow, path: str, command: str) -> None:
    (photographs / path).unlink(missing_ok=True)
    _faulty(photographs / path)
    before = dict(files(photographs))
    outcome = photographs.gmpipe(*command.split())
    assert outcome.code == 1, outcome
    said = f"{outcome.out}{outcome.err}"
    assert "Traceback" not in said
    assert "Input/output error" in said
    assert path in said
    assert not COSTS_WORK.search(said), said
    after = dict(files(photographs))
    assert all(after[name] == content for name, content in before.items())


def files(flow: Flow) -> list[tuple[str, bytes]]:
    return [
        (str(path), path.read_bytes())
        for path in sorted(flow.folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.endswith(".lock")
    ]


@pytest.mark.parametrize("make", [_folder, _loop])
@pytest.mark.parametrize(("path", "command"), READ.items())
@pytest.mark.slow
def test_no_odd_thing_in_place_of_a_file_is_a_traceback(
    photographs: Flow, path: str, command: str, make: Callable[[Path], None]
) -> None:
    (photographs / path).unlink(missing_ok=True)
    make(photographs / path)
    outcome = photographs.gmpipe(*command.split())
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.err
    assert Path(path).name in f"{outcome.out}{outcome.err}"


@pytest.mark.parametrize(
    "command",
    [
        f"predict photos/{LONG}.png --run {RUN}",
        f"predict photos --run {RUN} -o {LONG}.csv",
        f"predict photos --run {RUN} -o photos/a.png/labels.csv",
        f"predict photos --run {RUN} -o /proc/labels.csv",
        f"predict photos --run runs/tiny/{LONG}",
        f"predict photos --run {RUN} --detector {LONG}",
        f"explain photos/{LONG}.png --run {RUN} -o a.png",
        f"explain photos/a.png --run {RUN} -o {LONG}.png",
        f"explain photos/a.png --run {RUN} -o /proc/a.png",
        f"export --run {SIMPLE} -o {LONG}.onnx",
        f"export --run {SIMPLE} -o /proc/network.onnx",
        f"import-regions {LONG}.npz",
        f"train --variant {LONG}",
        f"train --dataset {LONG}",
        f"train --set train.tiny.label_vectors={LONG}.npz",
        f"report --dataset {LONG}",
    ],
)
def test_names_that_are_too_long_or_can_not_be_written(photographed: Flow, command: str) -> None:
    outcome = photographed.gmpipe(*command.split())
    assert outcome.code in (1, 2), outcome
    assert "Traceback" not in outcome.err
    assert "Error: " in outcome.err or LONG in outcome.err
    assert not COSTS_WORK.search(outcome.err) or "variant" in command or "dataset" in command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "command"),
    [
        ("data/tiny/prepared/manifest.parquet", "prepare"),
        ("data/tiny/detector/weights.pt", "detector"),
        (f"{RUN}/checkpoint.pt", "train"),
        (f"{RUN}/metrics.json", "evaluate"),
        ("reports/tiny/index.html", "report"),
        ("photos/none", f"predict photos --run {RUN} -o labels.csv"),
        ("photos/none", f"explain photos/a.png --run {RUN} -o a.png"),
        ("photos/none", f"export --run {SIMPLE} -o a.onnx"),
    ],
)
def test_a_full_disk_is_named_by_each_command_that_writes(
    photographs: Flow, gone: str, command: str
) -> None:
    (photographs / gone).unlink(missing_ok=True)
    with full_disk(60):
        outcome = photographs.gmpipe(*command.split())
    assert outcome.refused(r"no space left on the device")


@pytest.mark.parametrize("command", ["labels", "settings", "doctor"])
@pytest.mark.slow
def test_nobody_reads_the_output(made: Flow, command: str) -> None:
    """As with `gmpipe labels | head -1`, in real processes."""
    process = subprocess.Popen(
        [BIN / "gmpipe", command],
        cwd=made.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.slow
def test_memory_that_runs_out_is_named(flow: Flow) -> None:
    """With a real limit (`ulimit -v`), set in a process that has loaded torch already."""
    Image.new("RGB", (12_000, 12_000)).save(flow / "large.png")  # 432 MB in memory
    code = (
        "import resource, sys, stages.commands.explain\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + (200 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"sys.argv = 'gmpipe explain large.png -o a.png --run {RUN}'.split()\n"
        "from stages.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=flow.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr, done.stderr
    assert "memory" in done.stderr


def test_a_former_file_stays_if_nothing_can_be_labelled(photographs: Flow) -> None:
    (photographs / "labels.csv").write_text("former")
    (photographs / "photos/a.png").unlink()
    _faulty(photographs / "photos/a.png")
    outcome = photographs.gmpipe("predict", "photos", "--run", RUN, "-o", "labels.csv")
    assert outcome.refused("none is labelled")
    assert (photographs / "labels.csv").read_text() == "former"
