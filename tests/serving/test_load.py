"""`gmpipe serve` in a process of its own, with the requests of benchmarks.serving."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from flows import Flow
from pages import read_page

from benchmarks.serving import ask, kinds, measure, serving

MOST_GROWTH = 30  # MB between a fifth of the requests and the end


@pytest.fixture
def bundle(made: Flow, tmp_path: Path) -> Path:
    made.ok("export", "--run", "runs/tiny/full-s0", "--bundle", str(tmp_path / "tiny.bundle"))
    return tmp_path / "tiny.bundle"


def photographs_of(made: Flow) -> list[Path]:
    return sorted((made / "data/tiny/prepared/images").glob("*.png"))


@pytest.mark.slow
def test_many_requests_leave_it_as_it_was(made: Flow, bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with serving(bundle) as service:
        numbers = measure(service, photographs_of(made), requests=100)
        process = psutil.Process(service.process.pid)
        written = [file.path for file in process.open_files() if "r" not in file.mode]
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["status"] == "ok"
        connection.close()
    assert numbers["memory_late_mb"] - numbers["memory_early_mb"] < MOST_GROWTH, numbers
    assert written == []
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_was_accepted_is_answered_before_it_ends(made: Flow, bundle: Path) -> None:
    fine = kinds(photographs_of(made))[:8]
    with ThreadPoolExecutor(8) as pool:
        with serving(bundle) as service:
            ask(service.port, fine[0])
            answers = [pool.submit(ask, service.port, kind) for kind in fine]
            time.sleep(0.05)  # so that they have come, and some wait
        for answer in answers:
            assert answer.result() > 0


@pytest.mark.slow
def test_the_calls_of_curl_in_the_documentation(made: Flow, bundle: Path) -> None:
    lines = [
        line
        for block in read_page("docs/guides/serving.md").blocks
        for line in block.lines
        if line.startswith("curl ")
    ]
    assert len(lines) == 3
    with serving(bundle) as service:
        for line in lines:
            here = line.replace(":8000", f":{service.port}").replace("data/demo", "data/tiny")
            done = subprocess.run(
                ["bash", "-c", here], cwd=made.folder, capture_output=True, check=False
            )
            assert done.returncode == 0, (here, done.stderr)
            json.loads(done.stdout)
