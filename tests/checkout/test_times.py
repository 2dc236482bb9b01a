"""`.state/times/<dataset>.csv`: which stages append a line to it, and what is read from it."""

from __future__ import annotations

import binascii
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flows import ROOT, VARIANTS, Flow

from stages.checkout.times import StageTime, read_times, record_time

LINE = "train,full-s0,12.5,2025-03-04T05:06:07+00:00,\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def text(flow: Flow, dataset: str = "tiny") -> str:
    return (flow / f".state/times/{dataset}.csv").read_text()


def write(content: str | bytes, dataset: str = "tiny") -> None:
    path = Path(f".state/times/{dataset}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def sealed(line: str) -> str:
    """The line with its checksum, computed another way."""
    values = line.rstrip("\n")
    crc32 = binascii.crc32(values.replace(",", "\n").encode())
    return f"{values},{format(crc32, '08x')}\n"


def test_every_stage_that_made_something_has_a_line(
    made: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.folder)
    times = read_times("tiny")
    runs = [(stage, f"{name}-s0") for name in VARIANTS for stage in ("train", "evaluate")]
    assert [(one.stage, one.run) for one in times] == [
        ("prepare", ""),
        ("detector", ""),
        ("extract", ""),
        *runs,
    ]
    assert [one.rows for one in times] == [None, None, 60, None, None, None, None]
    for one in times:
        assert 0 < one.seconds < 600
        finished = datetime.fromisoformat(one.finished)
        assert finished.microsecond == 0
        assert timedelta(0) <= datetime.now(UTC) - finished < timedelta(hours=2)
    assert text(made).splitlines()[0] == "stage,run,seconds,finished,rows,crc32"
    assert len(text(made).splitlines()) == 8


def test_a_stage_that_is_up_to_date_or_fails_appends_no_line(flow: Flow) -> None:
    before = text(flow)
    flow.ok("prepare")
    flow.ok("extract")
    assert flow.gmpipe("extract", "--set", "extract.tiny.regions=3").code == 1
    assert flow.gmpipe("evaluate", "--seed", "7").code == 1
    (flow / "data/tiny/detector/weights.pt").unlink()
    (flow / "cache/tiny/regions-00000.h5").unlink()
    assert flow.gmpipe("extract").code == 1
    assert flow.gmpipe("train").code == 1
    assert text(flow) == before


def test_the_runs_of_compare_have_lines(small: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """For `--jobs 2` see test_processes_make_the_same_runs."""
    chosen = ("compare", "--seed", "0", "--variant", "full", "--variant", "max-pool")
    small.ok(*chosen, "--jobs", "1")
    small.ok(*chosen, "--jobs", "1")
    monkeypatch.chdir(small.folder)
    expected = {(stage, f"{v}-s0") for stage in ("train", "evaluate") for v in VARIANTS}
    assert {(one.stage, one.run) for one in read_times("voc2007")} == expected
    assert len(text(small, "voc2007").splitlines()) == 5


def test_without_a_file_there_are_no_times() -> None:
    assert read_times("tiny") == []
    write("")
    assert read_times("tiny") == []


def test_the_latest_line_counts() -> None:
    lines = (LINE, LINE.replace("full", "max-pool"), LINE.replace("12.5", "7"))
    write("".join(map(sealed, lines)))
    assert read_times("tiny") == [
        StageTime("train", "max-pool-s0", 12.5, "2025-03-04T05:06:07+00:00"),
        StageTime("train", "full-s0", 7, "2025-03-04T05:06:07+00:00"),
    ]


def test_damaged_lines_are_skipped() -> None:
    line = sealed(LINE)
    cut = [line[:end] + "\n" for end in range(len(line) - 1)]
    others = [
        line[:20] + line,  # appended to one that a full disk cut off
        line.replace("12.5", "12.6"),
        line.replace(":06:", ":05:"),
        sealed(LINE.replace("12.5", "nan")),
        sealed(LINE.replace("12.5", "12,5")),
        sealed(LINE.replace(",\n", ",x\n")),
        sealed(LINE.replace("2025", "today")),
        LINE,
        '"train,full-s0\n',
    ]
    write("".join([*cut, *others]).encode() + b"\xff\xfe\0,,,,\n")
    assert read_times("tiny") == []
    record_time("tiny", "extract", time.monotonic(), rows=3)
    assert [(one.stage, one.rows) for one in read_times("tiny")] == [("extract", 3)]


def test_lines_of_many_processes_stay_whole(tmp_path: Path) -> None:
    code = (
        "import sys, time; from stages.checkout.times import record_time\n"
        "sys.stdin.read()\n"
        "for n in range(200):\n"
        "    record_time('tiny', 'train', time.monotonic(), run=f'{sys.argv[1]}-s{n}')"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"p{number}"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
        )
        for number in range(4)
    ]
    for process in several:  # they start at the same time
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait() for process in several] == [0] * 4
    assert len(read_times("tiny")) == 800


def test_a_file_that_can_t_be_written_costs_the_line_only(small: Flow) -> None:
    (small / ".state").mkdir()
    (small / ".state/times").write_text("a file, not a folder")
    done = small.gmpipe("train")
    assert done.code == 0
    assert "runs/voc2007/full-s0" in done.out
    assert re.search(r"^Note: .*train.*\.state/times/voc2007\.csv", done.err, re.MULTILINE)
