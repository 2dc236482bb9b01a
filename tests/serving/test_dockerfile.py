"""The Dockerfile fits the code. It is not built here, since no container engine is at hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from flows import ROOT
from starlette.routing import Route

from stages.cli.main import cli
from stages.cli.trained import serve
from stages.commands.serving.service import make_service


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments; continued lines are joined."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    kept = [line for line in lines if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in kept]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for kind, arguments in instructions if kind == name]


def test_it_starts_from_a_python_that_gmpipe_runs_on(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [version] = re.findall(r"^python:(\d+\.\d+)-slim$", of(instructions, "FROM")[0])
    assert f">={version}" == project["requires-python"]
    [install] = [line for line in of(instructions, "RUN") if "[serve]" in line]
    assert "serve" in project["optional-dependencies"]
    assert "--constraint constraints.txt" in install


def copied(instructions: list[tuple[str, str]]) -> Iterator[str]:
    for line in of(instructions, "COPY"):
        yield from (name.rstrip("/") for name in line.split()[:-1])


def test_it_copies_what_an_installation_needs_and_no_more(
    instructions: list[tuple[str, str]],
) -> None:
    names = set(copied(instructions))
    assert all((ROOT / name).exists() for name in names)
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.partition(".")[0] for name in tool["packages"]}
    assert names == {*packages, "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert allowed == names


def test_torchs_index_is_an_argument(instructions: list[tuple[str, str]]) -> None:
    assert of(instructions, "ARG") == ['CPU_INDEX=""']
    [torch] = [line for line in of(instructions, "RUN") if "torch torchvision" in line]
    assert '${CPU_INDEX:+--index-url "$CPU_INDEX"}' in torch
    assert "--constraint constraints.txt" in torch


def test_it_serves_as_an_unprivileged_user(instructions: list[tuple[str, str]]) -> None:
    kinds = [kind for kind, _ in instructions]
    [user] = of(instructions, "USER")
    assert int(user) > 0
    assert user in of(instructions, "RUN")[-1]
    assert kinds.index("USER") > max(n for n, kind in enumerate(kinds) if kind in ("RUN", "COPY"))


def test_its_command_is_one_of_gmpipe(instructions: list[tuple[str, str]], tmp_path: Path) -> None:
    [entry] = of(instructions, "ENTRYPOINT")
    words = json.loads(entry)
    assert words[0] == "gmpipe"
    with mock.patch.object(serve, "callback") as called:
        cli.main(words[1:], standalone_mode=False)
    options = called.call_args.kwargs
    assert (options["run"], options["host"]) == ("/bundle", "0.0.0.0")
    assert of(instructions, "EXPOSE") == [str(options["port"])]


def test_its_health_check_asks_the_service(instructions: list[tuple[str, str]]) -> None:
    [check] = of(instructions, "HEALTHCHECK")
    words = json.loads(check[check.index("[") :])
    compile(words[-1], "HEALTHCHECK", "exec")
    [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", words[-1])
    assert [port] == of(instructions, "EXPOSE")
    routes = make_service(mock.Mock(), mock.Mock(), mock.Mock()).routes
    assert path in {route.path for route in routes if isinstance(route, Route)}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        ["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
