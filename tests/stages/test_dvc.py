"""`dvc repro` runs the stages whose settings, code or data changed, and never drops regions.

The quick tests of the same are in `test_dependencies.py` (the code that dvc.yaml lists) and in
`tests/checkout/test_resolved.py` (the files of resolved settings).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flows import BIN, ROOT, Flow
from pages import read_page
from small import run_names, write_params

from pipeline.shards.reader import RegionCache

pytestmark = pytest.mark.slow


def make_checkout(flow: Flow) -> None:
    """Make the flow's folder one that DVC runs in."""
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, flow / name)
    (flow / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", flow / ".dvc/config")
    # The stages depend on the code here; the code that they run is in ROOT.
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, flow / name, ignore=ignored)
    run(flow, "git", "init", "--quiet")


def run(flow: Flow, *command: str | Path, fails: bool = False) -> str:
    """Run a program in the checkout; return what it printed."""
    top = flow.folder.parent
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DVC_SITE_CACHE_DIR": str(top / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(top / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(top / "system"),
    }
    done = subprocess.run(
        command, cwd=flow.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + (done.stderr if fails else "")


def repro(flow: Flow, *targets: str) -> list[str]:
    """Run `dvc repro`; return the names of the stages that ran, without the data set's."""
    said = run(flow, BIN / "dvc", "repro", *targets)
    stages = re.findall(r"^Running stage '(\w+)@\w+?(-.*)?'", said, re.MULTILINE)
    return [name + rest for name, rest in stages]


def stale(flow: Flow) -> set[str]:
    """The stages that `dvc repro` would run, of those whose own dependencies changed."""
    flow.ok("prepare")
    status: dict[str, Any] = json.loads(run(flow, BIN / "dvc", "status", "--json"))
    return {re.sub(r"@\w+", "", name, count=1) for name, changes in status.items()} - {
        "prepare"
    }  # which is always run


@contextmanager
def edited(path: Path) -> Iterator[None]:
    """Meanwhile, the file has another comment."""
    before = path.read_bytes()
    path.write_bytes(before + b"# a comment\n")
    yield
    path.write_bytes(before)


def stages_of(*variants: str, names: tuple[str, ...] = ("train", "evaluate")) -> set[str]:
    return {f"{name}-{variant}-0" for variant in variants for name in names}


def test_dvc_runs_what_changed_and_no_more(small: Flow) -> None:
    flow, variants = small, ("full", "max-pool")
    make_checkout(flow)
    assert repro(flow)[:3] == ["prepare", "detector", "extract"]
    assert run_names(flow) == {"full-s0", "max-pool-s0"}
    assert (flow / "runs/voc2007/full-s0/settings.yaml").is_file()
    assert repro(flow) == ["prepare"]
    shown = json.loads(run(flow, BIN / "dvc", "metrics", "show", "--json"))[""]["data"]
    for variant in variants:
        folder = f"runs/voc2007/{variant}-s0"
        metrics = json.loads((flow / folder / "metrics.json").read_text())
        assert shown[f"{folder}/summary.json"]["data"]["mAP"] == pytest.approx(metrics["mAP"])

    # The settings of one variant.
    own = {"variants": {"max-pool": {"epochs": 1}}}
    write_params(flow.folder, own)
    assert stale(flow) == {"train-max-pool-0"}
    assert set(repro(flow)) == {"prepare", "report", *stages_of("max-pool")}
    assert stale(flow) == set()

    # A comment; the settings of all variants; settings that one of them has of its own.
    with edited(flow / "params.yaml"):
        assert stale(flow) == set()
    write_params(flow.folder, {**own, "clip_norm": 4.0})
    assert stale(flow) == stages_of(*variants, names=("train",))
    write_params(flow.folder, {**own, "epochs": 3})
    assert stale(flow) == {"train-full-0"}
    write_params(flow.folder, own)
    assert stale(flow) == set()

    # Code: what no stage runs, what makes the page, what is only trained with, what heads share.
    # A head's own file is none of DVC's: the settings that `prepare` resolves hold a digest of it.
    for file, expected in (
        ("learning/torch_dataset.py", set()),
        ("report/rows.py", {"report"}),
        ("learning/loop.py", stages_of(*variants, names=("train",))),
        ("heads/contract.py", {*stages_of(*variants), "report"}),
        ("heads/pooling/max_pool.py", set()),
    ):
        with edited(flow / "pipeline" / file):
            assert stale(flow) == expected, file
    with edited(flow / "pipeline/report/rows.py"):
        assert repro(flow) == ["prepare", "report"]


def test_dvc_never_drops_regions_by_itself(tmp_path: Path) -> None:
    flow = Flow(tmp_path / "checkout")
    flow.folder.mkdir()
    make_checkout(flow)
    flow.params()
    assert repro(flow, "extract@tiny") == ["prepare", "detector", "extract"]
    before = flow.bytes("cache/tiny")
    flow.params(extract__tiny__regions=3)
    said = run(flow, BIN / "dvc", "repro", "extract@tiny", fails=True)
    assert re.search(r"regions is 4\b.*\b3\b.*--replace`", said, re.DOTALL)
    assert flow.bytes("cache/tiny") == before
    flow.ok("extract", "--replace")
    assert RegionCache.open(flow / "cache/tiny").regions == 3
    assert repro(flow, "extract@tiny") == ["prepare", "extract"]
    assert stale(flow) >= {"train-full-0"}


def test_the_commands_of_the_guide_to_searches(small: Flow) -> None:
    make_checkout(small)
    # DVC takes the author of an experiment from git.
    run(small, "git", "config", "user.name", "somebody")
    run(small, "git", "config", "user.email", "somebody@example.org")
    run(small, "git", "add", ".")
    run(small, "git", "commit", "--quiet", "--message", "start")
    [block] = [
        one
        for one in read_page("docs/guides/searches.md").blocks
        if one.reason and "test_dvc.py" in one.reason
    ]
    said = {}
    for line in block.lines:
        line = line.replace("demo", "voc2007").replace("epochs=5", "epochs=1")
        said[line] = run(small, *shlex.split(line))
    first, _, _, trial, shown, _, queue = said.values()
    for made in (first, trial):
        assert "Running stage 'train@voc2007-full-0'" in made
    assert "'extract@voc2007' didn't change" in trial
    assert "train.voc2007.epochs" in shown
    assert "Queued" in queue
    assert run_names(small) == set()  # nothing is evaluated
    history = (small / "runs/voc2007/full-s0/history.csv").read_text().splitlines()
    assert len(history) == 2
