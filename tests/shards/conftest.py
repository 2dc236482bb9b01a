"""Fixtures for the tests of shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_rows
from caches import DATASET, RECIPE, RECIPE_OF_WHOLE

from pipeline.shards.shard import shard_name, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache's folder, named after its data set; it does not exist yet."""
    return tmp_path / DATASET


@pytest.fixture
def shard(folder: Path) -> Path:
    """A shard of four rows."""
    path = folder / shard_name(0)
    write_shard(path, make_rows(), dataset=DATASET, recipe=RECIPE)
    return path


@pytest.fixture
def shard_of_whole(folder: Path) -> Path:
    """The same of version 2: its rows have the vectors of whole views."""
    path = folder / shard_name(0)
    write_shard(path, make_rows(whole=True), dataset=DATASET, recipe=RECIPE_OF_WHOLE)
    return path
