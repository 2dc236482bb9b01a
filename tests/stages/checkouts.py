"""A checkout in which `gmpipe prepare` runs, on data sets laid out as their publishers do."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ruamel.yaml import YAML
from trees import make_coco, make_voc

from pipeline.datasets.manifest import Manifest, read_manifest
from stages.cli.main import main

IMAGES = "data/voc/VOCdevkit/VOC2007/JPEGImages"
"""Where a `Checkout` has the images of `voc`."""


@dataclass(frozen=True)
class Checkout:
    """A folder that gmpipe runs in, with the data sets `voc`, `coco`, `brought` and `demo`."""

    folder: Path

    def __truediv__(self, path: str) -> Path:
        return self.folder / path

    def params(self, **prepare: Any) -> None:
        """Write params.yaml; ``prepare`` changes the `prepare` blocks of data sets."""
        blocks: dict[str, dict[str, Any]] = {
            "voc": {"source": "voc"},
            "coco": {"source": "coco"},
            "brought": {"source": "imported"},
            "demo": {"source": "scenes", "train": 10, "test": 2, "size": 64},
        }
        for name, changes in prepare.items():
            blocks[name].update(changes)
        raw = {
            "datasets": ["voc"],
            "variants": ["full"],
            "seeds": [0],
            "prepare": blocks,
            "detector": {name: {"source": "torchvision"} for name in blocks},
            "extract": {name: {} for name in blocks},
            "train": {name: {} for name in blocks},
        }
        with (self / "params.yaml").open("w") as stream:
            YAML(typ="safe").dump(raw, stream)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run `gmpipe prepare ARGUMENTS` in this process: exit code, stdout, stderr."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["gmpipe", "prepare", *arguments]),
        ):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        assert "Traceback" not in err.getvalue()
        return code, out.getvalue(), err.getvalue()

    def prepare(self, dataset: str = "voc") -> str:
        """The first line that a successful run prints; the labels follow it."""
        code, out, err = self.run("--dataset", dataset)
        assert code == 0, err
        return out.splitlines()[0]

    def refused(self, *parts: str, dataset: str = "voc", options: tuple[str, ...] = ()) -> str:
        """The error of a run that must fail with a message that has all ``parts``."""
        code, out, err = self.run("--dataset", dataset, *options)
        assert (code, out) == (1, "")
        message = err[err.index("Error: ") :]
        lacking = [part for part in parts if part not in message]
        assert not lacking, f"{lacking} not in: {message}"
        return message

    def check(self, dataset: str = "voc") -> tuple[int, list[str]]:
        """Exit code and lines of a check, which must write nothing."""
        before = self.everything()
        code, out, err = self.run("--dataset", dataset, "--check")
        assert self.everything() == before
        assert "image/s" in err
        return code, out.splitlines()

    def everything(self) -> dict[str, tuple[int, bytes]]:
        """Modification time and content of every file and folder; of a folder no content."""
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(self.folder.rglob("*"))
        }

    def manifest(self, dataset: str = "voc") -> Manifest:
        return read_manifest(self / f"data/{dataset}/prepared/manifest.parquet")

    def prepared(self, dataset: str = "voc") -> list[str]:
        return sorted(path.name for path in (self / f"data/{dataset}/prepared").iterdir())


def make_checkout(folder: Path) -> Checkout:
    """A checkout with a devkit of five images, and COCO's tree of six."""
    checkout = Checkout(folder)
    make_voc(checkout / "data/voc")
    make_coco(checkout / "data/coco")
    checkout.params()
    return checkout
