"""Command `doctor`: what is here of all that the stages need, and how to get what is not.

It looks, and changes nothing. It must say something useful wherever it is run, so what can't even
be looked at (a broken package, a damaged file) is a finding like any other.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from pipeline.errors import GmpipeError
from pipeline.settings import (
    CocoSettings,
    ImportedSettings,
    NuswideSettings,
    PrepareSettings,
    TableSettings,
    VocSettings,
)
from stages.checkout.disk import free_bytes, place_of, shown_bytes
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    cache_folder,
    data_root,
    detector_folder,
    manifest_file,
    runs_folder,
)
from stages.checkout.params import PARAMS_FILE, Request, read_request

_LITTLE = 2e9  # bytes; the demo with its five runs takes less than a tenth of it
_INSTALL = "`pip install --editable .` in the checkout"
_FOR_DEVELOPERS = ("dev", "test")


@dataclass(frozen=True)
class Finding:
    """A row of the table.

    Attributes:
        mark: `ok`; `missing`, what the data sets in `datasets` need; `note`, all else that is not
            there, or not yet.
        thing: what was looked for.
        found: what was found.
        fix: what to do about it.
    """

    mark: Literal["ok", "missing", "note"]
    thing: str
    found: str
    fix: str = ""


def doctor() -> tuple[str, bool]:
    """Look at everything.

    Returns:
        the table, and whether nothing is missing.
    """
    sections: dict[str, list[Finding]] = {
        "programs": [
            *_python(),
            *_tried("torch", _torch),
            *_tried("torchvision", _torchvision),
            *_programs(),
            *_extras(),
        ],
        "places": [],
    }
    not_made = []
    try:
        request = read_request(None)
    except GmpipeError as error:
        fix = "mend it; the data sets can be looked at then"
        outside = not PARAMS_FILE.exists()
        if outside:
            fix = "change to the checkout, the folder with params.yaml, and ask again"
        sections["places"].append(Finding("missing", str(PARAMS_FILE), str(error), fix))
        if not outside:
            sections["places"] += _tried("disks", _disks)
    else:
        sections["places"] += _tried("disks", _disks)
        params = request.params
        others = [name for name in params.prepare if name not in params.datasets]
        for name in params.datasets:
            found = list(_tried(name, partial(_dataset, request.for_dataset(name), wanted=True)))
            sections[f"data set {name}"] = found
            if things := [one.thing for one in found if one.mark == "note"]:
                not_made.append(f"{', '.join(things)} of {name}")
        for name in others:
            sections[f"data set {name}, not listed in `datasets`"] = [
                replace(one, mark="note") if one.mark == "missing" else one
                for one in _tried(name, partial(_dataset, request.for_dataset(name), wanted=False))
            ]
    rows: list[tuple[str, str, str]] = []
    for title, findings in sections.items():
        rows += [("", "", ""), ("", title, "")]
        for one in findings:
            rows.append((one.mark, f"  {one.thing}", one.found))
            if one.fix:
                rows.append(("", "", f"  to do: {one.fix}"))
    missing = sum(one.mark == "missing" for findings in sections.values() for one in findings)
    end = f"{missing} missing" if missing else "nothing is missing that `datasets` needs"
    if not_made and not missing:
        end += f"; not made yet: {'; '.join(not_made)} (`dvc repro` makes them)"
    table = tabulate(rows[1:], tablefmt="plain", disable_numparse=True, preserve_whitespace=True)
    lines = [line.rstrip() for line in table.splitlines()]
    return "\n".join([*lines, "", end]), not missing


def _tried(thing: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What ``look`` finds, up to where it fails."""
    try:
        yield from look()
    except Exception as error:  # whatever is wrong here is what was asked for
        described = str(error) if isinstance(error, GmpipeError) else f"{error!r}"
        yield Finding("missing", thing, f"can't be looked at: {described}", "mend this first")


# --- programs ------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")
    try:
        yield Finding("ok", "gmpipe", version("gmpipe"))
    except PackageNotFoundError:
        yield Finding("missing", "gmpipe", "is not installed", _INSTALL)


def _torch() -> Iterator[Finding]:
    problem = _import_problem("torch")
    if problem:
        yield Finding("missing", "torch", problem, f"{_INSTALL}, in a new environment if it stays")
        return
    import torch

    yield Finding("ok", "torch", torch.__version__)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding(
            "note",
            "CUDA",
            "no device: stage one is slow, about an image a second with the full detector on two "
            "cores (docs/scale.md)",
        )
        return
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(count))
    yield Finding("ok", "CUDA", f"{torch.version.cuda}: {names}")
    if count > 1 and _installed("dask-cuda") is None:
        yield Finding(
            "missing",
            "dask-cuda, for several",
            f"is not installed, and gives each of {count} devices a worker",
            "`pip install --editable '.[cuda]'` in the checkout, or CUDA_VISIBLE_DEVICES=0",
        )


def _torchvision() -> Iterator[Finding]:
    problem = _import_problem("torchvision")
    if problem:
        fix = f"{_INSTALL}; its release must be the one that goes with torch's"
        yield Finding("missing", "torchvision", problem, fix)
    else:
        yield Finding("ok", "torchvision", version("torchvision"))


def _import_problem(name: str) -> str:
    """What keeps a package from being imported; empty if nothing does."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"is not installed ({error})"
    except Exception as error:  # a broken package raises anything, OSError for its libraries
        return f"is broken: {error!r}"
    return ""


def _programs() -> Iterator[Finding]:
    found = _installed("dvc")
    if found is None:
        yield Finding("missing", "DVC", "is not installed", _INSTALL)
    else:
        yield Finding("ok", "DVC", found)
    if shutil.which("gmpipe") is None:
        yield Finding(
            "note",
            "PATH",
            "`gmpipe` is not found by name, which is how `dvc repro` calls it",
            "`. .venv/bin/activate`, or `make repro`, which needs no activation",
        )
    git = shutil.which("git")
    if git is None:
        fix = "install git, or do without"
        yield Finding("note", "git", "is not there: results won't say which commit made them", fix)
    else:
        yield Finding("ok", "git", git)


def _extras() -> Iterator[Finding]:
    """Optional packages, as the installed gmpipe lists them."""
    try:
        listed = metadata("gmpipe").get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return
    for line in listed:
        matched = re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line)
        if matched is None or matched[2] in _FOR_DEVELOPERS:
            continue
        package, extra = matched.groups()
        found = _installed(package)
        if found is None:
            fix = f"`pip install --editable '.[{extra}]'` in the checkout, if you want it"
            yield Finding("note", package, "optional, not installed", fix)
        else:
            yield Finding("ok", package, f"{found}, optional")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- places --------------------------------------------------------------------------------------


def _disks() -> Iterator[Finding]:
    for name in ("data", "cache", "runs"):
        folder = Path(name)
        where = f"{name}/" + (f" -> {folder.resolve()}" if folder.is_symlink() else "")
        if folder.is_symlink() and not folder.exists():
            fix = "make that folder, mount its disk, or remove the link"
            yield Finding("missing", where, "the link leads nowhere", fix)
        elif not os.access(place_of(folder), os.W_OK):
            yield Finding("missing", where, "may not be written", "give yourself the right to")
        else:
            free = free_bytes(folder)
            fix = "make space, or make it a link to another disk" if free < _LITTLE else ""
            mark: Literal["ok", "note"] = "note" if free < _LITTLE else "ok"
            yield Finding(mark, where, f"{shown_bytes(free)} free", fix)


# --- data sets -----------------------------------------------------------------------------------


def _dataset(request: Request, *, wanted: bool) -> Iterator[Finding]:
    """What is here of a data set; of one that is not ``wanted`` and has no files, only that."""
    files = _files(request)
    if files is not None:
        yield files
    absent = files is not None and files.mark == "missing"
    if absent and not wanted and not manifest_file(request.dataset).exists():
        return
    yield from _tried("prepared", lambda: _prepared(request))
    yield from _tried("detector", lambda: _detector(request))
    yield from _label_vectors(request)
    yield from _tried("cache", lambda: _cache(request))
    yield _runs(request)


def _files(request: Request) -> Finding | None:
    """The files that a user brings; None for a data set that has none."""
    root = data_root(request.dataset)
    needed, fix = _needed(request.dataset, request.prepare)
    absent = [root / path for path in needed if not (root / path).exists()]
    if absent:
        own = isinstance(request.prepare, TableSettings)
        page = "docs/own-data.md" if own else "docs/datasets.md"
        return Finding("missing", "files", f"there is no {absent[0]}", f"{fix} ({page})")
    return Finding("ok", "files", f"in {root}/") if needed else None


def _needed(dataset: str, source: PrepareSettings) -> tuple[list[str], str]:
    """Some of a data set's files, one or more of each archive; and where to get them."""
    root = f"{data_root(dataset)}/"
    if isinstance(source, VocSettings):
        lists = f"{source.folder}/ImageSets/Main"
        return (
            [f"{lists}/trainval.txt", f"{lists}/test.txt", f"{source.folder}/JPEGImages"],
            f"unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar in {root}",
        )
    if isinstance(source, CocoSettings):
        splits = (source.train, source.test)
        return (
            [*(f"annotations/instances_{split}.json" for split in splits), *splits],
            f"unpack the publisher's annotations_trainval2014.zip, {source.train}.zip and "
            f"{source.test}.zip in {root}",
        )
    if isinstance(source, NuswideSettings):
        forms = {
            "official": [
                source.concepts,
                "ImageList/TrainImagelist.txt",
                "ImageList/TestImagelist.txt",
                "Groundtruth/TrainTestLabels",
            ],
            "csv": [source.file],
            "multi-hot": [source.concepts, source.train_list, source.test_list],
        }
        fix = f"put the lists of form `{source.form}` and the photographs in {root}"
        if source.form == "official":
            fix = (
                f"unpack the publisher's ConceptsList.zip, ImageList.zip and Groundtruth.zip in "
                f"{root}, and put the photographs in {root}{source.images}/"
            )
        return [*forms[source.form], source.images], fix
    if isinstance(source, TableSettings):
        return [source.file], (
            f"put your table and its images in {root}, or set `prepare.{dataset}.file` in "
            "params.yaml to the table's path below it"
        )
    return [], ""


def _prepared(request: Request) -> Iterator[Finding]:
    from pipeline.datasets.manifest import SPLITS
    from stages.checkout.manifests import dataset_manifest

    name = request.dataset
    if manifest_file(name).exists():
        manifest = dataset_manifest(name)
        counts = ", ".join(f"{manifest.counts[split]['images']} {split}" for split in SPLITS)
        yield Finding("ok", "prepared", f"{counts}, {len(manifest.vocabulary)} labels")
    elif isinstance(request.prepare, ImportedSettings):
        fix = f"`gmpipe import-regions FILE --dataset {name}`"
        yield Finding("missing", "prepared", "no regions were imported yet", fix)
    else:
        yield Finding("note", "prepared", "not yet", f"`gmpipe prepare --dataset {name}`")


def _detector(request: Request) -> Iterator[Finding]:
    from pipeline.regions.detector import (
        DESCRIPTION_FILE,
        TORCHVISION_WEIGHTS,
        torchvision_weights_path,
    )
    from stages.checkout.detectors import detector_description

    name, chosen = request.dataset, request.detector
    command = f"`gmpipe detector --dataset {name}`"
    if chosen.source == "imported":
        return
    if (detector_folder(name) / DESCRIPTION_FILE).is_file():
        found = detector_description(detector_folder(name), name)
        yield Finding("ok", "detector", f"{found.source}, sha256 {found.weights_sha256[:12]}...")
        return
    if chosen.source == "torchvision":
        path = torchvision_weights_path()
        if not path.is_file():
            fix = (
                f"{command} downloads it ({TORCHVISION_WEIGHTS.meta['_file_size']:.0f} MB); "
                "without a network put the file there"
            )
            yield Finding("missing", "detector", f"torchvision's weights are not at {path}", fix)
            return
    elif chosen.weights is not None and not Path(chosen.weights).is_file():
        fix = f"put the file there, or name another in `detector.{name}.weights`"
        yield Finding("missing", "detector", f"there are no weights at {chosen.weights}", fix)
        return
    done = "fitted" if chosen.source == "fit" else "resolved"
    yield Finding("note", "detector", f"not {done} yet", command)


def _label_vectors(request: Request) -> Iterator[Finding]:
    from pipeline.labels.vectors import source_file

    source = request.train.label_vectors
    path = source_file(source)
    if path is None:
        found = _installed("wordllama")
        if found is None:
            yield Finding("missing", "label vectors", "wordllama is not installed", _INSTALL)
        else:
            yield Finding("ok", "label vectors", f"wordllama {found}")
    elif path.is_file():
        yield Finding("ok", "label vectors", str(path))
    else:
        fix = f"put {path.name} there, or set `train.{request.dataset}.label_vectors: wordllama`"
        if path.name.startswith("glove."):
            fix = (
                f"fetch {path.name} from https://nlp.stanford.edu/projects/glove/ and put it at "
                f"{path}; it need not be unpacked. Or set "
                f"`train.{request.dataset}.label_vectors: wordllama`, which needs no file"
            )
        yield Finding("missing", "label vectors", f"there is no {path}", fix)


def _cache(request: Request) -> Iterator[Finding]:
    from pipeline.shards.failures import FAILURES_NAME, read_failures
    from pipeline.shards.reader import RegionCache
    from pipeline.shards.schema import INDEX_NAME

    name = request.dataset
    folder = cache_folder(name)
    imported = request.detector.source == "imported"
    if (folder / INDEX_NAME).exists():
        cache = RegionCache.open(folder)
        found = f"{len(cache)} rows of {cache.regions} regions in {len(cache.shards)} shards"
        if failures := len(read_failures(folder)):
            found += f"; images without regions: {failures}, see {folder / FAILURES_NAME}"
        yield Finding("ok", "cache", found)
    elif not imported:  # of imported ones the manifest tells already
        yield Finding("note", "cache", "no rows yet", f"`gmpipe extract --dataset {name}`")


def _runs(request: Request) -> Finding:
    name = request.dataset
    top = runs_folder(name)
    trained = len(list(top.glob(f"*/{CHECKPOINT_FILE}")))
    evaluated = len(list(top.glob(f"*/{METRICS_FILE}")))
    if not trained:
        imported = isinstance(request.prepare, ImportedSettings)
        to_import = imported and not manifest_file(name).exists()
        fix = "" if to_import else f"`gmpipe train --dataset {name}`"
        return Finding("note", "runs", "none yet", fix)
    return Finding("ok", "runs", f"{trained} trained, {evaluated} of them evaluated")
