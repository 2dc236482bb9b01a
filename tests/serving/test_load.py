"""`gmpipe serve` in a process of its own, with the requests of benchmarks.serving."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flows import Flow, full_disk
from pages import read_page

from benchmarks.serving import Service, measure, serving

MOST_GROWTH = 30  # MB between a fifth of the requests and the end


@pytest.fixture
def bundle(made: Flow, tmp_path: Path) -> Path:
    made.ok("export", "--run", "runs/tiny/full-s0", "--bundle", str(tmp_path / "tiny.bundle"))
    return tmp_path / "tiny.bundle"


def photographs_of(made: Flow) -> list[Path]:
    return sorted((made / "data/tiny/prepared/images").glob("*.png"))


@contextlib.contextmanager
def connected(service: Service) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port)) as connection:
        yield connection


def health(service: Service) -> Any:
    with connected(service) as connection:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())


@pytest.mark.slow
def test_many_requests_leave_it_as_it_was(made: Flow, bundle: Path) -> None:
    """The service may write no byte to any file, and does its work all the same."""
    with contextlib.ExitStack() as stack:
        with full_disk(0):  # which the service inherits, and keeps
            service = stack.enter_context(serving(bundle))
        numbers = measure(service, photographs_of(made), requests=100)
        assert health(service)["status"] == "ok"
    assert numbers["memory_late_mb"] - numbers["memory_early_mb"] < MOST_GROWTH, numbers


@pytest.mark.slow
def test_what_was_accepted_is_answered_before_it_ends(made: Flow, bundle: Path) -> None:
    with contextlib.ExitStack() as stack:
        with serving(bundle) as service:
            waiting = []
            for photograph in photographs_of(made)[:8]:
                connection = stack.enter_context(connected(service))
                connection.request("POST", "/predict", photograph.read_bytes())
                waiting.append(connection)
            assert health(service)["status"] == "ok"  # so all connections before have been accepted
        for connection in waiting:
            response = connection.getresponse()
            assert response.status == 200
            assert len(json.loads(response.read())) == 1


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
