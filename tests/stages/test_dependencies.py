"""The code that dvc.yaml lists for a stage is the code that the stage imports.

All files must be listed that are in the rooms of `pipeline` that decide the numbers of training,
evaluation and report. A module that is imported inside a function counts, one that is imported for
type checking does not. Files of `stages` may be listed, but only those that the stage imports.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from flows import ROOT
from ruamel.yaml import YAML

from pipeline.settings.heads import HEADS

DECIDING = {"decisions", "doubts", "evaluation", "labels", "learning", "heads", "report"}
EXEMPT = {
    "ahead": "decides when something is computed, which changes no number",
    "datasets": "what they make is in the manifest, which the stages depend on",
    "drawing": "chooses the fonts of figures, which changes no number",
    "errors": "holds messages only",
    "files": "writes bytes that others decide",
    "formats": "writes and reads values that others decide, and checks them",
    "image_metadata": "finds the orientation of photographs, as `images`",
    "images": "decodes photographs; what it decides of the regions is in the cache's fingerprint",
    "interrupts": "saves what is done when Ctrl-C is pressed, which changes no number",
    "machine": "decides how much is kept in memory, which changes no number",
    "names": "says what data sets and variants may be called",
    "regions": "the fingerprint of the cache holds what decides the regions",
    "settings": "the file of resolved settings holds every value, defaults included",
    "shards": "reads and checks what the fingerprint of the cache describes",
    "tensors": "reads and writes tensors, and chooses the device",
}
"""Rooms of `pipeline` that no stage lists, with the reason."""

STAGES = ("train", "evaluate", "report")


def room(path: str) -> str:
    """The room of a file, e.g. `learning`; `stages` for all files there."""
    top, name, *_ = path.split("/")
    return name.removesuffix(".py") if top == "pipeline" else top


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """For each stage, its own file and those that it imports, directly or through others.

    The package of an imported module is imported as well, which matters if its `__init__.py` is
    not empty. Heads are imported by their names in the registry, which no graph of imports shows.
    """
    graph = grimp.build_graph(
        "pipeline", "stages", exclude_type_checking_imports=True, cache_dir=None
    )
    imported = {}
    for stage in STAGES:
        modules = {f"stages.{stage}", *(entry.module for entry in HEADS.values())}
        modules |= {one for module in modules for one in graph.find_upstream_modules(module)}
        imported[stage] = {file for module in modules for file in files_of(module)}
    return imported


def files_of(module: str) -> Iterator[str]:
    """The file of a module, and those of the packages that it is in, unless they are empty."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        path = Path(*parts[:depth])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if (ROOT / file).is_file() and (ROOT / file).stat().st_size:
                yield str(file)


def listed(stage: str) -> list[str]:
    """The code that dvc.yaml lists."""
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    paths = stages[stage].get("deps", [])
    return [path for path in paths if path.startswith(("pipeline", "stages"))]


def files_below(path: str) -> set[str]:
    """A file, or the files in a folder that are not empty."""
    top = ROOT / path
    assert top.exists(), path
    files = [top] if top.is_file() else top.rglob("*")
    return {
        str(file.relative_to(ROOT))
        for file in files
        if file.is_file() and file.stat().st_size and "__pycache__" not in file.parts
    }


def is_of_one_head(file: str) -> bool:
    """Whether a file is in a room of heads, whose code the resolved settings hold a digest of."""
    return file.startswith("pipeline/heads/") and file.count("/") > 2


def needed(imported: set[str]) -> set[str]:
    """The imported files of rooms that decide numbers, and what else lies in those rooms.

    Files that are not modules, e.g. the page's scripts, are read by the modules beside them.
    """
    files = {file for file in imported if room(file) in DECIDING and not is_of_one_head(file)}
    data = {
        file
        for name in {room(file) for file in files}
        for file in files_below(f"pipeline/{name}")
        if not file.endswith(".py")
    }
    return files | data


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_what_a_stage_imports(stage: str, imports: dict[str, set[str]]) -> None:
    paths = listed(stage)
    assert len(set(paths)) == len(paths)
    expected = needed(imports[stage])
    actual = set().union(*map(files_below, paths))
    assert sorted(expected - actual) == [], f"dvc.yaml: add them to the deps of {stage}"
    allowed = expected | {file for file in imports[stage] if room(file) == "stages"}
    assert sorted(actual - allowed) == [], f"dvc.yaml: remove them from the deps of {stage}"


def test_every_imported_room_is_known(imports: dict[str, set[str]]) -> None:
    rooms = {room(file) for files in imports.values() for file in files} - {"stages"}
    assert rooms - DECIDING <= EXEMPT.keys()


def test_what_training_does_not_run_is_no_dependency_of_it(imports: dict[str, set[str]]) -> None:
    assert "pipeline/learning/loop.py" in imports["train"] - imports["evaluate"]
    assert "pipeline/heads/contract.py" in imports["train"] & imports["evaluate"]
    for stage in STAGES:
        assert "pipeline/learning/torch_dataset.py" not in imports[stage]
    assert not any(room(file) == "report" for file in imports["train"] | imports["evaluate"])


@pytest.mark.parametrize("stage", ["prepare", "detector", "extract"])
def test_stages_before_training_list_no_code(stage: str) -> None:
    assert listed(stage) == []
