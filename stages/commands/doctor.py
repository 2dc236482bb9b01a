"""Command `doctor`: report which packages, programs and files are missing, and how to get them.

It changes nothing. It has to be useful wherever it is run, so whatever can't even be checked (a
broken package, a damaged file) is a finding like any other.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from pipeline.errors import GmpipeError
from pipeline.files import access_error, exists, matching
from pipeline.formats.text import counted
from pipeline.machine import sign_of_gpu
from pipeline.settings import (
    CocoSettings,
    ImportedSettings,
    NuswideSettings,
    PrepareSettings,
    TableSettings,
    VocSettings,
    YoloSettings,
)
from stages.checkout.disk import existing_part, free_bytes, shown_bytes
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

_LITTLE_SPACE = 2e9  # bytes; the demo with its five runs takes less than a tenth of it
_INSTALL = "`pip install --editable .` in the checkout"
_FOR_DEVELOPERS = ("dev", "test")
_VENV_BIN = Path(".venv") / "bin"  # where `make install` puts the command, and dvc.yaml finds it


Mark = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """A row of the table.

    Attributes:
        mark: `ok`, `missing` for what a data set listed in `datasets` needs, or `note` for anything
            else that does not exist, or not yet.
        item: what was checked.
        state: what the check showed.
        fix: what to do about it.
    """

    mark: Mark
    item: str
    state: str
    fix: str = ""


def doctor() -> tuple[str, bool]:
    """Check everything that the stages need.

    Returns:
        The table of findings, and whether nothing is missing.
    """
    sections: dict[str, list[Finding]] = {
        "programs": [
            *_python(),
            *_checked("torch", _torch),
            *_checked("torchvision", _torchvision),
            *_programs(),
            *_extras(),
        ],
    }
    not_made = []
    try:
        request = read_request(None)
    except GmpipeError as error:
        sections["checkout"] = [*_no_settings(error)]
    else:
        sections["checkout"] = [*_checked("disks", _disks)]
        for name in request.params.datasets:
            check = partial(_dataset, request.for_dataset(name), wanted=True)
            findings = sections[f"data set {name}"] = [*_checked(name, check)]
            if items := [finding.item for finding in findings if finding.mark == "note"]:
                not_made.append(f"{', '.join(items)} of {name}")
        for name in request.params.prepare:
            if name not in request.params.datasets:
                check = partial(_dataset, request.for_dataset(name), wanted=False)
                sections[f"data set {name}, not listed in `datasets`"] = [
                    replace(finding, mark="note") if finding.mark == "missing" else finding
                    for finding in _checked(name, check)
                ]
    missing = sum(one.mark == "missing" for findings in sections.values() for one in findings)
    end = f"{missing} missing" if missing else "Nothing that `datasets` needs is missing."
    if not_made and not missing:
        end += f" Not made yet: {'; '.join(not_made)}. `dvc repro` makes them."
    return f"{_table(sections)}\n\n{end}", not missing


def _table(sections: Mapping[str, Sequence[Finding]]) -> str:
    rows: list[tuple[str, str, str]] = []
    for title, findings in sections.items():
        rows += [("", "", ""), ("", title, "")]
        for finding in findings:
            rows.append((finding.mark, f"  {finding.item}", finding.state))
            if finding.fix:
                rows.append(("", "", f"  to do: {finding.fix}"))
    table = tabulate(rows[1:], tablefmt="plain", disable_numparse=True, preserve_whitespace=True)
    return "\n".join(line.rstrip() for line in table.splitlines())


def _checked(item: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of ``check``, and one more if it fails."""
    try:
        yield from check()
    except Exception as error:  # of any kind: what is wrong here is what the user asked for
        if isinstance(error, OSError):
            error = access_error(error)
        described = str(error) if isinstance(error, GmpipeError) else f"{error!r}"
        yield Finding("missing", item, f"can't be checked: {described}", "fix this first")


def _no_settings(error: GmpipeError) -> Iterator[Finding]:
    """Report that params.yaml can't be read, and what can be checked without it."""
    yield Finding("missing", str(PARAMS_FILE), error.problem, error.remedy)
    if PARAMS_FILE.exists():
        yield from _checked("disks", _disks)


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
        yield Finding(
            "missing", "torch", problem, f"{_INSTALL}; if that does not help, in a new environment"
        )
        return
    import torch

    yield Finding("ok", "torch", torch.__version__)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and (sign := sign_of_gpu()):
        yield _unused_gpu(sign, " ".join(str(one.message) for one in said))
        return
    if not count:
        yield Finding(
            "note",
            "CUDA",
            "no device. Stage one is slow: about one image per second with the full detector on "
            "two cores (docs/scale.md)",
        )
        return
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(count))
    yield Finding("ok", "CUDA", f"{torch.version.cuda}: {names}")
    if count > 1 and _installed("dask-cuda") is None:
        yield Finding(
            "missing",
            "dask-cuda for several GPUs",
            f"is not installed, but needed to give each of {count} devices a worker",
            "`pip install --editable '.[cuda]'` in the checkout, or CUDA_VISIBLE_DEVICES=0",
        )


def _unused_gpu(sign: str, said: str) -> Finding:
    """The finding for a GPU that the machine shows by a ``sign``, and that torch does not use.

    Args:
        said: what torch warned of when it looked for a device; empty if it did not.
    """
    import torch

    hidden, release = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.version.cuda
    if release is None:
        reason = f"torch {torch.__version__} is a build for the CPU"
        fix = "install the build with CUDA that the selector on pytorch.org names"
    elif hidden is not None and hidden.strip() in ("", "-1"):
        reason = f"the environment sets CUDA_VISIBLE_DEVICES={hidden!r}"
        fix = "`unset CUDA_VISIBLE_DEVICES`"
    else:
        reason = said or f"the driver may be too old for CUDA {release}, or closed to this user"
        fix = (
            f"if `nvidia-smi` prints a CUDA version below {release}, update the driver, or install "
            "a build of torch for that version; in a container, pass the device on (`docker run "
            "--gpus all`)"
        )
    return Finding("note", "CUDA", f"a GPU is there and not used ({sign}): {reason}", fix)


def _torchvision() -> Iterator[Finding]:
    problem = _import_problem("torchvision")
    if problem:
        fix = f"{_INSTALL}; its release must match that of torch"
        yield Finding("missing", "torchvision", problem, fix)
    else:
        yield Finding("ok", "torchvision", version("torchvision"))


def _import_problem(name: str) -> str:
    """Say why a package can't be imported; an empty string if it can."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"is not installed ({error})"
    except Exception as error:  # a broken package raises anything, OSError for its libraries
        return f"is broken: {error!r}"
    return ""


def _programs() -> Iterator[Finding]:
    dvc = _installed("dvc")
    if dvc is None:
        yield Finding("missing", "DVC", "is not installed", _INSTALL)
    else:
        yield Finding("ok", "DVC", dvc)
    searched = os.pathsep.join([os.environ.get("PATH", os.defpath), str(_VENV_BIN)])
    if shutil.which("gmpipe", path=searched) is None:
        yield Finding(
            "note",
            "PATH",
            f"`gmpipe` is neither on PATH nor in {_VENV_BIN}, where `dvc repro` looks for it",
            f"activate the environment that {sys.executable} belongs to, or run `make install`",
        )
    git = shutil.which("git")
    if git is None:
        lacking = "is not installed, so results can't name the commit that made them"
        yield Finding("note", "git", lacking, "install git if you want that")
    else:
        yield Finding("ok", "git", git)


def _extras() -> Iterator[Finding]:
    """Check the optional packages that the installed gmpipe lists."""
    try:
        listed = metadata("gmpipe").get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return
    for line in listed:
        matched = re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line)
        if matched is None or matched[2] in _FOR_DEVELOPERS:
            continue
        package, extra = matched.groups()
        release = _installed(package)
        if release is None:
            fix = f"`pip install --editable '.[{extra}]'` in the checkout, if you want it"
            yield Finding("note", package, "optional, not installed", fix)
        else:
            yield Finding("ok", package, f"{release}, optional")


def _installed(package: str) -> str | None:
    """Return the release of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- checkout ------------------------------------------------------------------------------------


def _disks() -> Iterator[Finding]:
    for name in ("data", "cache", "runs"):
        folder = Path(name)
        item = f"{name}/" + (f" -> {folder.resolve()}" if folder.is_symlink() else "")
        if folder.is_symlink() and not folder.exists():
            fix = "create that folder, mount its disk, or remove the link"
            yield Finding("missing", item, "the link leads nowhere", fix)
        elif not os.access(existing_part(folder), os.W_OK):
            yield Finding("missing", item, "is not writable", "give yourself write permission")
        else:
            free = free_bytes(folder)
            fix = "free some space, or make it a link to another disk"
            state = f"{shown_bytes(free)} free"
            yield (
                Finding("note", item, state, fix)
                if free < _LITTLE_SPACE
                else Finding("ok", item, state)
            )


# --- data sets -----------------------------------------------------------------------------------


def _dataset(request: Request, *, wanted: bool) -> Iterator[Finding]:
    """Check a data set. If it is not ``wanted`` and has no files, nothing else is checked."""
    files = _files(request)
    if files is not None:
        yield files
    absent = files is not None and files.mark == "missing"
    if absent and not wanted and not exists(manifest_file(request.dataset)):
        return
    yield from _checked("prepared", lambda: _prepared(request))
    yield from _checked("detector", lambda: _detector(request))
    yield from _checked("label vectors", lambda: _label_vectors(request))
    yield from _checked("cache", lambda: _cache(request))
    yield from _checked("runs", lambda: _runs(request))


def _files(request: Request) -> Finding | None:
    """Check the files that the user provides; None for a data set that needs none."""
    root = data_root(request.dataset)
    needed, fix = _needed(request.dataset, request.prepare)
    absent = [root / path for path in needed if not exists(root / path)]
    if absent:
        own = isinstance(request.prepare, TableSettings)
        page = "docs/own-data.md" if own else "docs/datasets.md"
        return Finding("missing", "files", f"{absent[0]} does not exist", f"{fix} ({page})")
    return Finding("ok", "files", f"in {root}/") if needed else None


def _needed(dataset: str, source: PrepareSettings) -> tuple[list[str], str]:
    """Return some of a data set's files, at least one per archive, and how to get them."""
    root = f"{data_root(dataset)}/"
    if isinstance(source, VocSettings):
        lists = (f"{source.folder}/ImageSets/Main/{name}.txt" for name in source.splits.values())
        from pipeline.datasets.readers.voc import archives_of

        fix = (
            f"unpack {archives_of(source.folder)}"
            if source.vocabulary is None
            else "put the data set"
        )
        return [*lists, f"{source.folder}/JPEGImages"], f"{fix} in {root}"
    if isinstance(source, CocoSettings):
        from pipeline.datasets.readers.coco import annotations_of, is_published

        splits = source.splits.values()
        files = [annotations_of(data_root(dataset), split) for split in splits]
        if not is_published(source):
            return files, f"put the data set in {root}"
        return (
            [*files, *splits],
            f"unpack the publisher's annotations_*.zip, "
            f"{' and '.join(f'{split}.zip' for split in splits)} in {root}",
        )
    if isinstance(source, YoloSettings):
        return [source.file], f"put the data set in {root}"
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
            "params.yaml to the path of the table below that folder"
        )
    return [], ""


def _prepared(request: Request) -> Iterator[Finding]:
    from stages.checkout.manifests import dataset_manifest
    from stages.console.labels import shown_counts

    name = request.dataset
    if exists(manifest_file(name)):
        yield Finding("ok", "prepared", shown_counts(dataset_manifest(name)))
    elif isinstance(request.prepare, ImportedSettings):
        fix = f"`gmpipe import-regions FILE --dataset {name}`"
        yield Finding("missing", "prepared", "no regions are imported yet", fix)
    else:
        yield Finding("note", "prepared", "not yet", f"`gmpipe prepare --dataset {name}`")


def _detector(request: Request) -> Iterator[Finding]:
    from pipeline.regions.detector import (
        DESCRIPTION_FILE,
        TORCHVISION_WEIGHTS,
        torchvision_weights_path,
    )
    from stages.checkout.models import dataset_detector

    name, chosen = request.dataset, request.detector
    command = f"`gmpipe detector --dataset {name}`"
    if chosen.source == "imported":
        return
    if exists(detector_folder(name) / DESCRIPTION_FILE):
        made = dataset_detector(name)
        yield Finding("ok", "detector", f"{made.source}, sha256 {made.weights_sha256[:12]}...")
        return
    if chosen.source == "torchvision":
        path = torchvision_weights_path()
        if not exists(path):
            fix = (
                f"{command} downloads them ({TORCHVISION_WEIGHTS.meta['_file_size']:.0f} MB); "
                "without a network, put the file there"
            )
            yield Finding("missing", "detector", f"torchvision's weights are not at {path}", fix)
            return
    elif chosen.weights is not None and not exists(Path(chosen.weights)):
        fix = f"put the file there, or set `detector.{name}.weights` to another path"
        yield Finding("missing", "detector", f"{chosen.weights} does not exist", fix)
        return
    state = "not fitted yet" if chosen.source == "fit" else "its weights are not recorded yet"
    yield Finding("note", "detector", state, command)


def _label_vectors(request: Request) -> Iterator[Finding]:
    from pipeline.labels.vectors import source_file

    source = request.train.label_vectors
    path = source_file(source)
    if path is None:
        release = _installed("wordllama")
        if release is None:
            yield Finding("missing", "label vectors", "wordllama is not installed", _INSTALL)
        else:
            yield Finding("ok", "label vectors", f"wordllama {release}")
    elif exists(path):
        yield Finding("ok", "label vectors", str(path))
    else:
        fix = f"put {path.name} there, or set `train.{request.dataset}.label_vectors: wordllama`"
        if path.name.startswith("glove."):
            fix = (
                f"download {path.name} from https://nlp.stanford.edu/projects/glove/ to {path}; it "
                f"need not be unpacked. Or set `train.{request.dataset}.label_vectors: wordllama`, "
                "which needs no file"
            )
        yield Finding("missing", "label vectors", f"{path} does not exist", fix)


def _cache(request: Request) -> Iterator[Finding]:
    from pipeline.shards.failures import FAILURES_NAME, read_failures
    from pipeline.shards.index import INDEX_NAME
    from stages.checkout.caches import advising_on_cache, open_cache

    name = request.dataset
    folder = cache_folder(name)
    imported = request.detector.source == "imported"
    if exists(folder / INDEX_NAME):
        cache = open_cache(name)
        with advising_on_cache(name):
            failures = len(read_failures(folder))
        rows, regions = counted(len(cache), "row"), counted(cache.regions, "region")
        state = f"{rows} of {regions} in {counted(len(cache.shards), 'shard')}"
        if failures:
            state += f"; images without regions: {failures}, see {folder / FAILURES_NAME}"
        yield Finding("ok", "cache", state)
    elif not imported:  # `_prepared` reports that imported regions are missing
        yield Finding("note", "cache", "no rows yet", f"`gmpipe extract --dataset {name}`")


def _runs(request: Request) -> Iterator[Finding]:
    name = request.dataset
    top = runs_folder(name)
    folders = [folder for folder in matching(top, "*") if folder.is_dir()]
    trained = sum(exists(folder / CHECKPOINT_FILE) for folder in folders)
    evaluated = sum(exists(folder / METRICS_FILE) for folder in folders)
    if not trained:
        imported = isinstance(request.prepare, ImportedSettings)
        to_import = imported and not exists(manifest_file(name))
        fix = "" if to_import else f"`gmpipe train --dataset {name}`"
        yield Finding("note", "runs", "none yet", fix)
        return
    yield Finding("ok", "runs", f"{trained} trained, {evaluated} of them evaluated")
