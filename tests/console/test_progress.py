"""Bars in a terminal and plain lines elsewhere: what they show, how often, and between what."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from flows import ROOT, script

from stages.console.messages import QUIET, speaking
from stages.console.progress import State, progress_bar, progress_phase

BARS = """
from stages.console.messages import QUIET, speaking
from stages.console.progress import progress_bar
with speaking({level}):
    with progress_bar(total=5, desc="fit", unit="step") as bar:
        for step in range(5):
            bar.set_postfix(loss="0.1", refresh=False)
            bar.update()
    list(progress_bar(range(3), desc="draw", unit="scene"))
    with progress_bar(total=3, desc="hash", unit="image", delay=2) as bar:
        bar.update(3)
"""


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    done = script(tmp_path, BARS.format(level=""))
    assert done.stdout == ""
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    starts = [line.split("[")[0] for line in done.stderr.splitlines()]
    assert starts == ["fit:   0% 0/5 ", "fit: 100% 5/5 ", "draw:   0% 0/3 ", "draw: 100% 3/3 "]
    assert done.stderr.splitlines()[1].endswith("step/s, loss=0.1]")
    assert script(tmp_path, BARS.format(level="QUIET")).stderr == ""
    assert script(tmp_path, BARS.format(level=""), TQDM_DISABLE="1").stderr == ""


def in_terminal(folder: Path, code: str) -> str:
    """Return what a script writes to stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 4096):
            output += chunk
    os.close(ours)
    assert process.wait() == 0
    return output.decode()


def test_in_a_terminal_progress_is_bars(tmp_path: Path) -> None:
    output = in_terminal(tmp_path, BARS.format(level=""))
    assert "\rfit: 100%|" in output
    assert "█" in output
    assert "\rdraw: 100%|" in output
    assert "hash" not in output
    assert in_terminal(tmp_path, BARS.format(level="QUIET")) == ""


def test_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e6
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with contextlib.redirect_stderr(io.StringIO()) as output:
        for _ in progress_bar(range(100), desc="fit", unit="step"):
            now += 8
    lines = output.getvalue().splitlines()
    assert len(lines) == 100 * 8 // 32 + 1  # after 32 s, being asked every 8
    assert lines[1] == "fit:   4% 4/100 [00:32<12:48,  8.00s/step]"


def test_a_line_every_half_minute_even_if_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(1e6, 40)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr("stages.console.progress._BEAT_SECONDS", 0.01)
    with contextlib.redirect_stderr(io.StringIO()) as output:
        for delay in (0, 100):
            with progress_bar(total=2, desc="long", unit="step", delay=delay):
                before = len(output.getvalue().splitlines())
                while len(output.getvalue().splitlines()) < before + 3:
                    time.sleep(0.01)
    assert set(re.findall(r"^long: +\d+% \d/\d", output.getvalue(), re.MULTILINE)) == {
        "long:   0% 0/2"
    }


def test_a_resumed_bar_says_so_and_counts_from_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1e6
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with progress_bar(total=560, desc="fit", unit="step") as bar:
        now += 100
        bar.resume(200)
        now += 10
        bar.update(20)
    out, err = capsys.readouterr()
    assert out == "fit: resumed at step 200 of 560\n"
    assert err.splitlines()[-1] == "fit:  39% 220/560 [00:10<02:50,  2.00step/s]"
    with progress_bar(total=560, desc="fit", unit="step") as bar:
        bar.resume(0)
    assert capsys.readouterr().out == ""


def test_without_a_total_the_number_and_the_unit_are_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar(desc="verify", unit="item") as bar:
        bar.update(63)
    assert capsys.readouterr().err.splitlines()[-1].startswith("verify: 63 items [00:0")


def test_a_part_of_a_thing_is_rounded_and_its_rate_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e6
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with progress_bar(total=3, desc="runs", unit="run", smoothing=0) as bar:
        now += 10
        bar.n = 0.0125
        assert str(bar) == "runs:   0% 0.01/3 [00:10<39:52, 800.00s/run]"


def test_messages_take_the_place_of_bars_in_a_terminal(tmp_path: Path) -> None:
    code = """
from stages.console.messages import note, say, speaking
from stages.console.progress import progress_bar
with speaking(), progress_bar(total=5, desc="fit", unit="step") as bar:
    bar.resume(2)
    note("it is odd.")
"""
    lines = re.split("[\r\n]+", in_terminal(tmp_path, code))
    assert "Note: it is odd." in lines
    assert lines[lines.index("Note: it is odd.") - 1].isspace()  # what erases the bar
    assert lines[-2].startswith("fit:  40%|")


@pytest.mark.parametrize(("number", "shown"), [(0, "0 figures"), (1, "1 figure"), (4, "4 figures")])
def test_things_without_a_total_are_counted_in_words(
    number: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(desc="report, figures", unit="figure") as bar:
        bar.update(number)
    assert capsys.readouterr().err.splitlines()[-1] == f"report, figures: {shown} [00:00]"
    state = State("report, figures", "figure", number, None, 0, "")
    assert str(state).endswith(shown if number else "figures")


def test_only_a_long_part_of_the_work_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> str:
        with progress_phase("figures", 7, "figure") as on_figures, progress_phase("tracing"):
            time.sleep(0.2)
            on_figures(7)
        return capsys.readouterr().err

    assert work() == ""
    monkeypatch.setattr("stages.console.progress._PHASE_DELAY", 0.05)
    monkeypatch.setattr("stages.console.progress._BEAT_SECONDS", 0.02)
    lines = work().splitlines()
    assert sorted(line.split("[")[0] for line in lines) == [
        "figures:   0% 0/7 ",
        "figures: 100% 7/7 ",
        "tracing: 00:00",
    ]
    with speaking(QUIET):
        assert work() == ""
