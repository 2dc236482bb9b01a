"""Commands in processes: what they print, how they fail, and that none outlives its parent.

The commands here import no torch. One that waits for ever has a sitecustomize.py, which Python runs
when it starts, that sleeps.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from flows import ROOT, started_commands, write_params

from stages.console.messages import NORMAL, QUIET, VERBOSE, note, speaking
from stages.workers.jobs import run_jobs

LIST = ("runs", "list")
PRUNE = ("runs", "prune", "--yes")


@pytest.fixture(autouse=True)
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(tmp_path)
    monkeypatch.chdir(tmp_path)


def waiting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every command that is started from now on wait for ever."""
    folder = Path("slow").absolute()
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys, time\nif 'stages.cli' in sys.orig_argv:\n    time.sleep(1e6)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_runs_its_commands_until_one_fails() -> None:
    jobs = {
        "good": [LIST, PRUNE],
        "bad": [LIST, (*LIST, "--dataset", "tinny"), ("completion", "bash")],
        "wrong": [("lisst",)],
    }
    with speaking():
        outcomes = dict(run_jobs(jobs, 2))
    assert outcomes.keys() == jobs.keys()
    assert outcomes["good"].problem == ""
    first, second = outcomes["good"].output.splitlines()
    assert "runs/tiny" in first
    assert "0 bytes" in second
    assert "`tiny`" in outcomes["bad"].problem
    assert not outcomes["bad"].problem.startswith("Error")
    assert outcomes["bad"].output == first
    assert "lisst" in outcomes["wrong"].problem


def test_jobs_say_as_much_as_their_parent(capfd: pytest.CaptureFixture[str]) -> None:
    for level, is_printed, is_logged in (
        (QUIET, False, False),
        (NORMAL, True, False),
        (VERBOSE, True, True),
    ):
        with speaking(level):
            [(_, outcome)] = run_jobs({"prune": [PRUNE]}, 1)
        assert ("0 bytes" in outcome.output) == is_printed
        assert ("stages.checkout.params: read params.yaml" in capfd.readouterr().err) == is_logged


def test_a_note_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    with speaking():
        for _ in range(2):
            note("params.yaml is odd.")
    assert capfd.readouterr().err.count("Note: params.yaml is odd.") == 1


REPORTING = """
import sys, time
if "stages.cli" in sys.orig_argv:
    from stages.console.messages import note, speaking
    from stages.console.progress import progress_bar
    with speaking(), progress_bar(total=10, desc="fit", unit="step") as bar:
        note("params.yaml is odd.")
        bar.resume(2)
        bar.update(3)
        bar.set_postfix(loss="0.5")
        time.sleep(0.5)
"""


def test_progress_and_notes_of_running_jobs_are_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("sitecustomize.py").write_text(REPORTING)
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}{os.pathsep}{ROOT}")
    monkeypatch.setattr("stages.console.progress._LINE_SECONDS", 0.1)
    monkeypatch.setattr("stages.console.progress._BEAT_SECONDS", 0.05)
    with speaking():
        assert len(dict(run_jobs({name: [LIST, LIST] for name in "ab"}, 2))) == 2
    out, err = capfd.readouterr()
    assert out == "fit: resumed at step 2 of 10\n" * 4
    assert "gmpipe progress" not in err
    lines = err.splitlines()
    both = "fit 5/10 steps, loss=0.5; fit 5/10 steps, loss=0.5"
    [running, *later] = [line for line in lines if both in line]
    assert running.startswith("runs:  25% 0.5/2 [")
    assert later[-1].startswith("runs:  75% 1.5/2 [")
    assert lines.index("Note: params.yaml is odd.") < lines.index(running)
    assert lines.count("Note: params.yaml is odd.") == 1
    assert lines[-1].startswith("runs: 100% 2/2 [")


def test_a_terminal_has_a_bar_for_each_running_job(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rate of a job that was resumed counts from there: a step in about half a second."""
    Path("sitecustomize.py").write_text(
        """
import sys, time
if "stages.cli" in sys.orig_argv:
    from stages.console.progress import progress_bar
    with progress_bar(total=1000, desc="fit", unit="step") as bar:
        bar.resume(900)
        bar.refresh()
        time.sleep(0.5)
        bar.update()
        bar.refresh()
        time.sleep(0.5)
"""
    )
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}{os.pathsep}{ROOT}")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with speaking():
        assert len(dict(run_jobs({name: [LIST] for name in "ab"}, 2))) == 2
    out, err = capfd.readouterr()
    assert out == "fit: resumed at step 900 of 1,000\n" * 2
    rates = re.findall(r"\rfit:  90%\|[^\r]* 901/1000 \[\S+, +([\d.]+)(step/s|s/step)\]", err)
    assert all(float(rate) < 20 for rate, _ in rates)
    assert rates
    assert "\x1b[A" in err  # two bars below that of all runs
    assert "\rruns: 100%|" in err


@contextlib.contextmanager
def killing(number: int, *, when: int) -> Iterator[None]:
    """Meanwhile, send a signal to one of the commands as soon as so many of them run."""

    def kill() -> None:
        wait_for(lambda: len(started_commands()) == when)
        time.sleep(0.2)
        running = started_commands()
        assert len(running) == when
        running[0].send_signal(number)

    # In a thread, because the commands must be started by the main one.
    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


def test_no_job_begins_when_the_time_is_over() -> None:
    assert not list(run_jobs({"list": [LIST]}, 1, until=time.monotonic()))


def test_jobs_run_side_by_side_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_for_ever(monkeypatch)
    running = run_jobs({name: [LIST] for name in "abc"}, 2)
    for _ in range(2):  # the third job takes the place of the first that ends
        with killing(signal.SIGKILL, when=2):
            next(running)
    left = started_commands()
    assert len(left) == 1
    running.close()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 3])
def test_a_killed_process_is_named(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_for_ever(monkeypatch)
    with killing(number, when=1):
        [(name, outcome)] = run_jobs({"list": [LIST]}, 1)
    assert name == "list"
    # A real-time signal has no name.
    assert f"by {getattr(number, 'name', f'signal {number}')}." in outcome.problem
    assert ("--jobs" in outcome.problem) == (number == signal.SIGKILL)


@contextlib.contextmanager
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs two jobs, which wait for ever."""
    waiting_for_ever(monkeypatch)
    jobs = {"a": [LIST], "b": [LIST]}
    code = (
        "import signal; from stages.workers.jobs import run_jobs\n"
        # Whoever started the tests in the background may have made all of them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"list(run_jobs({jobs}, 2))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{ROOT}"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with parent(monkeypatch) as process:
        wait_for(lambda: len(started_commands(process.pid)) == 2)
        left = started_commands(process.pid)
        process.send_signal(number)
        process.wait(timeout=30)
        _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []


def test_a_process_whose_parent_has_ended_already_does_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.workers.child", "1", "--version"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
