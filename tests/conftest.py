"""Fixtures that every test module may ask for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tests' tensors are too small to gain from a second thread, and threads that wait for each
# other lose a lot wherever another process runs. Before torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from flows import Flow, run_all
from small import make_small

from pipeline.evaluation import bootstrap


@pytest.fixture(autouse=True, scope="module")
def _leave_torch_as_it_was() -> Iterator[None]:
    """Training asks for deterministic kernels, for the whole process; an extraction in this process
    sets the number of threads, which every thread that is new to torch then takes over."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _few_resamples() -> Iterator[None]:
    """Intervals from 100 resamples instead of 1,000. Tables and pages state the number used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data that the project may test against but must not contain.

    `GMPIPE_SHARED` names it; without that it is looked for at `../shared`, beside the checkout.
    """
    places = [Path(__file__).resolve().parents[2] / "shared"]
    if "GMPIPE_SHARED" in os.environ:
        places.insert(0, Path(os.environ["GMPIPE_SHARED"]))
    for place in places:
        if (place / "data").is_dir():
            return place
    pytest.skip(f"no real data: no folder `data` in {' or '.join(map(str, places))}")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A finished flow; to be read only."""
    flow = Flow(tmp_path_factory.mktemp("flow"))
    flow.params()
    run_all(flow)
    return flow


@pytest.fixture
def flow(made: Flow, tmp_path: Path) -> Flow:
    """A finished flow, to be changed."""
    return Flow(Path(shutil.copytree(made.folder, tmp_path / "flow")))


@pytest.fixture
def small(tmp_path: Path) -> Flow:
    """A data set whose runs take a blink, to be changed."""
    return make_small(tmp_path / "small")
