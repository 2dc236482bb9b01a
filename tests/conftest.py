"""Fixtures that every test module can use.

They import what they need themselves: the process that hands the tests out to others needs none of
it, and the others wait for it.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Set before torch is imported, and inherited by subprocesses. The tests' tensors are too small to
# gain from a second thread, and threads that wait for each other lose a lot wherever another
# process runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
from filelock import FileLock

if TYPE_CHECKING:
    from flows import Flow
    from toys import Toy

# How long an example takes says nothing where other processes run beside the tests.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Keep all that was imported and collected from the garbage collector, which finds none in it.

    It would look through a million objects again and again.
    """
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _leave_torch_as_it_was() -> Iterator[None]:
    """Undo what commands set for the whole process.

    An extraction in this process sets the number of threads, which every thread that is new to
    torch then takes over.
    """
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _few_resamples() -> Iterator[None]:
    """Intervals from 100 resamples instead of 1,000. Tables and pages state the number used."""
    from pipeline.evaluation import bootstrap

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "RESAMPLES", 100)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Don't flush files to the disk, which takes milliseconds each.

    A file that was not flushed is lost only when the machine stops, which no test can show.
    `test_files.py` has that files are flushed before they get their names.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data that the project tests against but must not contain.

    `GMPIPE_SHARED` names it; the default is `../shared`, beside the checkout.
    """
    folders = [Path(__file__).resolve().parents[2] / "shared"]
    if "GMPIPE_SHARED" in os.environ:
        folders.insert(0, Path(os.environ["GMPIPE_SHARED"]))
    for folder in folders:
        if (folder / "data").is_dir():
            return folder
    pytest.skip(f"no real data: no folder `data` in {' or '.join(map(str, folders))}")


def made_once(
    name: str, make: Callable[[Path], object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder that one of pytest-xdist's processes makes, and all of them read."""
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent  # that of all processes
    folder, done = top / name, top / f"{name}.done"
    with FileLock(top / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by an attempt that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A finished flow; to be read only."""
    import torch
    from flows import Flow, run_all

    def make(folder: Path) -> None:
        # Here, since the tests on a GPU also run where Dask is not installed.
        from clusters import worker_in_this_process

        Flow(folder).params()
        threads = torch.get_num_threads()
        with worker_in_this_process():
            run_all(Flow(folder))
        torch.set_num_threads(threads)  # which the extraction set

    return Flow(made_once("made", make, tmp_path_factory))


@pytest.fixture
def flow(made: Flow, tmp_path: Path) -> Flow:
    """A finished flow, to be changed."""
    from flows import Flow

    return Flow(Path(shutil.copytree(made.folder, tmp_path / "flow")))


@pytest.fixture(scope="session")
def small_made(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A data set whose runs take a moment; to be read only."""
    from flows import Flow
    from small import make_small

    return Flow(made_once("small-made", make_small, tmp_path_factory))


@pytest.fixture
def small(small_made: Flow, tmp_path: Path) -> Flow:
    """A data set whose runs take a moment, to be changed."""
    from flows import Flow

    return Flow(Path(shutil.copytree(small_made.folder, tmp_path / "small")))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy problem; to be read only."""
    from toys import make_toy

    return make_toy(tmp_path_factory.mktemp("cache") / "toy")
